"""The port-forward against a real API server, kubelet and container runtime: what it carries and what it outlives."""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from airflow_deployer import background_forward
from airflow_deployer.cluster import NAMESPACE, POD, STATEFUL_SET, Cluster, Kind, Object
from airflow_deployer.errors import ForwardError
from airflow_deployer.port_forward import Target, forwarded
from airflow_deployer.registry import MIRROR_ANNOTATION
from tests.e2e.conftest import eventually, free_port

pytestmark = pytest.mark.e2e

MEGABYTE = 1024 * 1024
LISTENING, SILENT = 9000, 9999

# One line says what the program is to do with the connection.
PROGRAM = f"""
import itertools, socketserver, time
numbers = itertools.count(1)
class Talk(socketserver.StreamRequestHandler):
    def handle(self):
        number = next(numbers)
        verb, _, argument = self.rfile.readline().decode().strip().partition(" ")
        if verb == "send":
            for _ in range(int(argument)):
                self.wfile.write(b"x" * {MEGABYTE})
        elif verb == "count":
            total = 0
            while data := self.rfile.read1(65536):
                total += len(data)
                if total >= int(argument):
                    break
            self.wfile.write(str(total).encode())
        elif verb == "echo":
            while data := self.rfile.read1(65536):
                self.wfile.write(data)
        elif verb == "stall":
            time.sleep(int(argument))
        elif verb == "GET":
            # A web server that keeps connections; its answer tells on which one it was given.
            line = verb
            while line:
                while line.strip():
                    line = self.rfile.readline().decode()
                self.wfile.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 6\\r\\n\\r\\n%6d" % number)
                line = self.rfile.readline().decode()
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 512
Server(("0.0.0.0", {LISTENING}), Talk).serve_forever()
"""


def stateful_set(image: str) -> Object:
    """A StatefulSet `web` whose pod runs `PROGRAM`."""
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": "web"},
        "spec": {
            "serviceName": "web",
            "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {
                    "terminationGracePeriodSeconds": 1,
                    "automountServiceAccountToken": False,
                    "containers": [{"name": "web", "image": image, "command": ["python3", "-c", PROGRAM]}],
                },
            },
        },
    }


@pytest.fixture(scope="module")
def image(cluster: Cluster) -> str:
    """A Python image that the cluster can pull: from the announced mirror, else the public one."""
    hosting = cluster.get(Kind("", "v1", "ConfigMap", "configmaps"), "kube-public", "local-registry-hosting")
    mirror = ((hosting or {}).get("metadata", {}).get("annotations") or {}).get(MIRROR_ANNOTATION)
    return f"{mirror}/library/python:3.13-slim-trixie" if mirror else "python:3.13-slim-trixie"


@pytest.fixture(scope="module")
def target(cluster: Cluster, image: str) -> Iterator[Target]:
    """The pod `web-0`, running, in a namespace of this module's own."""
    namespace = f"e2e-{secrets.token_hex(4)}"
    cluster.create(NAMESPACE, None, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    cluster.apply(STATEFUL_SET, namespace, stateful_set(image))
    target = Target(cluster.context.name, namespace, "web", LISTENING, cluster.context.kubeconfig)
    wait_running(cluster, target)
    yield target
    cluster.delete(NAMESPACE, None, namespace)


@pytest.fixture
def port(target: Target) -> Iterator[int]:
    with forwarded(target) as local:
        yield local


def wait_running(cluster: Cluster, target: Target, *, not_uid: str = "") -> str:
    """Wait for the pod's program; return the pod's UID."""

    def uid() -> str | None:
        pod = cluster.get(POD, target.namespace, target.pod)
        if pod is None or pod["metadata"]["uid"] == not_uid or pod["status"].get("phase") != "Running":
            return None
        return str(pod["metadata"]["uid"])

    return str(eventually(uid, seconds=120, what="the pod runs"))


def talk(port: int, line: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(line.encode() + b"\n")
    return connection


def echoes(port: int) -> bool:
    with talk(port, "echo") as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"hello")
        return connection.recv(5) == b"hello"
    return False


def ask(port: int, host: str = "127.0.0.1") -> int:
    """Send an HTTP request on a connection of its own; return the number of the pod's connection that served it."""
    with socket.create_connection((host, port), timeout=60) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n")
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            part = connection.recv(1)
            if not part:
                raise ConnectionError("no answer")
            answer += part
        return int(connection.recv(6, socket.MSG_WAITALL))


def resident_megabytes(pid: int) -> float:
    """The memory that a process has in RAM (proc_pid_status(5))."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1]) / 1024


def count_to_end(connection: socket.socket) -> int:
    total = 0
    while data := connection.recv(1 << 18):
        total += len(data)
    return total


def test_a_large_stream_arrives_whole_both_ways(port: int) -> None:
    with talk(port, "send 100") as connection:
        assert count_to_end(connection) == 100 * MEGABYTE
    with talk(port, f"count {20 * MEGABYTE}") as connection:
        connection.sendall(b"x" * (20 * MEGABYTE))
        assert connection.recv(100) == str(20 * MEGABYTE).encode()


def test_two_hundred_connections_at_once_lose_nothing(port: int) -> None:
    with ThreadPoolExecutor(200) as pool:
        assert all(pool.map(lambda _: echoes(port), range(200)))


def test_a_reset_connection_ends_only_itself(port: int) -> None:
    with talk(port, "echo") as survivor:
        for _ in range(5):
            victim = talk(port, "send 50")
            assert victim.recv(1) == b"x"
            victim.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            victim.close()
        survivor.sendall(b"still here")
        assert survivor.recv(10) == b"still here"
    assert echoes(port)


def test_a_client_that_reads_late_gets_everything(port: int) -> None:
    with talk(port, "send 50") as connection:
        time.sleep(2)
        assert count_to_end(connection) == 50 * MEGABYTE


def test_a_client_that_has_sent_its_last_byte_still_receives(port: int) -> None:
    with talk(port, "send 20") as connection:
        connection.shutdown(socket.SHUT_WR)
        assert count_to_end(connection) == 20 * MEGABYTE


def test_bytes_come_through_as_they_are_sent(port: int) -> None:
    with talk(port, "echo") as connection:
        for number in range(5):
            sent = f"tick{number}".encode()  # nothing follows before it has come back
            connection.sendall(sent)
            assert connection.recv(len(sent), socket.MSG_WAITALL) == sent


def test_requests_in_a_row_share_connections_of_the_pod(port: int) -> None:
    ask(port)
    served = [ask(port) for _ in range(40)]
    assert len(set(served)) <= 4


def test_two_hundred_requests_at_once_lose_nothing(port: int) -> None:
    with ThreadPoolExecutor(200) as pool:
        assert len(list(pool.map(lambda _: ask(port), range(400)))) == 400


def test_memory_is_bounded_with_slow_readers_and_slow_pods(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    state = background_forward.ensure(target, free_port())
    try:
        assert echoes(state.port)
        assert not socket.has_ipv6 or ask(state.port, "::1")
        before = resident_megabytes(state.pid)
        with contextlib.ExitStack() as stack:
            readers = [stack.enter_context(talk(state.port, "send 200")) for _ in range(8)]
            for _ in range(8):
                sender = stack.enter_context(talk(state.port, "stall 20"))
                sender.settimeout(0.5)
                with contextlib.suppress(TimeoutError):
                    for _ in range(200):
                        sender.sendall(b"x" * MEGABYTE)
                    pytest.fail("a pod that does not read stops its client")
            time.sleep(2)
            # 16 connections with 200 MB each to carry.
            assert resident_megabytes(state.pid) - before < 40
            # Others are not slowed down by them.
            assert ask(state.port)
            assert count_to_end(readers[0]) == 200 * MEGABYTE
    finally:
        background_forward.stop(target)


def test_a_port_that_nobody_listens_on_is_waited_for_and_then_an_error(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("airflow_deployer.port_forward._PATIENCE", 1.0)
    log: list[str] = []
    silent = Target(target.context, target.namespace, target.name, SILENT, target.kubeconfig)
    with (
        forwarded(silent, log=log.append) as port,
        talk(port, "echo") as connection,
        pytest.raises(ConnectionResetError),
    ):
        connection.recv(1)
    assert any("nothing listens on that port" in line for line in log), log


@pytest.mark.parametrize("grace", [0, 1])
def test_it_outlives_its_pod(cluster: Cluster, target: Target, port: int, grace: int) -> None:
    uid = wait_running(cluster, target)
    with talk(port, "echo") as connection:
        connection.sendall(b"before")
        assert connection.recv(6) == b"before"
        delete_pod(cluster, target, grace)
        # Whoever was connected hears of it, at the latest when the pod is gone.
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    # Asked while there is no pod, or one that does not listen yet: the connection waits and is served.
    eventually(lambda: echoes(port), seconds=90, what="the next pod answers")
    assert wait_running(cluster, target, not_uid=uid) != uid


def test_requests_go_on_across_the_replacement_of_the_pod(cluster: Cluster, target: Target) -> None:
    log: list[str] = []
    with forwarded(target, log=log.append) as port:
        replace_under_requests(cluster, target, port, log)


def replace_under_requests(cluster: Cluster, target: Target, port: int, log: list[str]) -> None:
    uid = wait_running(cluster, target)
    for _ in range(5):
        ask(port)
    delete_pod(cluster, target, 1)
    failures: list[ConnectionError] = []
    deadline = time.monotonic() + 90
    while (pod := cluster.get(POD, target.namespace, target.pod)) is None or pod["metadata"]["uid"] == uid:
        assert time.monotonic() < deadline
        try:
            ask(port)
        except ConnectionError as error:
            failures.append(error)
    # What its program had accepted when it was killed may fail; no other request, however many there were.
    assert len(failures) <= 3, (failures, log)
    assert ask(port)


def delete_pod(cluster: Cluster, target: Target, grace: int) -> None:
    cluster._json(
        "DELETE",
        POD.path(target.namespace, target.pod),
        body={"kind": "DeleteOptions", "apiVersion": "v1", "gracePeriodSeconds": grace},
        what="delete the pod",
    )


def test_the_background_one_survives_the_pod_and_ends_with_the_stateful_set(
    cluster: Cluster, target: Target, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    port = free_port()
    state = background_forward.ensure(target, port)
    try:
        assert echoes(port)
        uid = wait_running(cluster, target)
        delete_pod(cluster, target, 0)
        wait_running(cluster, target, not_uid=uid)
        assert echoes(port)
        assert background_forward.ensure(target, port) == state

        cluster.delete(STATEFUL_SET, target.namespace, target.name)
        eventually(lambda: background_forward.find(target) is None, seconds=40, what="the forward ends by itself")
        with pytest.raises(ForwardError, match="there is no StatefulSet web"):
            background_forward.ensure(target, port)
    finally:
        background_forward.stop(target)
        cluster.apply(STATEFUL_SET, target.namespace, stateful_set(image))
        wait_running(cluster, target)
