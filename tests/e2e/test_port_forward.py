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
import socketserver
class Talk(socketserver.StreamRequestHandler):
    def handle(self):
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
