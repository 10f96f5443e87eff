"""Rows: the port-forward against `kubectl port-forward`, and a page of Airflow's UI against a direct connection."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import os
import queue
import re
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from airflow_deployer import background_forward
from airflow_deployer.airflow_api import AirflowApi
from airflow_deployer.airflow_profiles import AIRFLOW_3
from airflow_deployer.credentials import decode
from airflow_deployer.manifests import Names
from airflow_deployer.port_forward import Target
from airflow_deployer.registry import MIRROR_ANNOTATION
from bench.measure import QUICK_ROUNDS, Group, Row, Side, document, percentile, run, text_table
from bench.programs import Kubectl, ProgramError, local_context
from bench.project import EDITED, project

PORT = 8080
IMAGE = "library/python:3.13-slim-trixie"
# Airflow's UI asks for these when the grid of a DAG is opened.
_PAGE = "/dags/{dag_id}"
_CALLS = (
    "/ui/config",
    "/ui/auth/menus",
    "/api/v2/version",
    "/api/v2/dags/{dag_id}",
    "/api/v2/dags/{dag_id}/details",
    "/api/v2/dags/{dag_id}/dagVersions?limit=10",
    "/api/v2/dags/{dag_id}/tasks",
    "/ui/dags/{dag_id}/latest_run",
    "/ui/grid/structure/{dag_id}?limit=10",
    "/ui/grid/runs/{dag_id}?limit=10",
    "/ui/structure/structure_data?dag_id={dag_id}",
    "/ui/grid/ti_summaries/{dag_id}?run_ids={run_id}",
)
_BROWSER_CONNECTIONS = 6
# Time for whatever a request has left behind, as between two clicks.
_PAUSE_SECONDS = 0.05

# A web server as there are many: threads, HTTP/1.1, connections that stay. `/N` is N bytes.
SERVER = """
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 65536
    disable_nagle_algorithm = True
    def do_GET(self):
        left = int(self.path[1:])
        self.send_response(200)
        self.send_header("Content-Length", str(left))
        self.end_headers()
        block = b"x" * min(left, 1 << 20)
        while left:
            left -= self.wfile.write(block[:left])
    def log_message(self, *arguments):
        pass
class Server(ThreadingHTTPServer):
    request_queue_size = 512
    daemon_threads = True
Server(("0.0.0.0", %d), Handler).serve_forever()
"""


class KubectlForward:
    """`kubectl port-forward` to a pod's port; started anew where it has ended, as users do."""

    def __init__(self, kubectl: Kubectl, namespace: str, pod: str) -> None:
        self._command = kubectl.command("port-forward", f"pod/{pod}", f":{PORT}", namespace=namespace)
        self._process: subprocess.Popen[str] | None = None
        self._port = 0

    @property
    def port(self) -> int:
        """The local port, on 127.0.0.1."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True
            )
            # It writes a line for every connection, and would stop if nobody read them.
            lines: queue.SimpleQueue[str] = queue.SimpleQueue()
            threading.Thread(target=_copy_lines, args=(self._process, lines), daemon=True).start()
            first = re.match(r"Forwarding from 127\.0\.0\.1:(\d+)", lines.get(timeout=20))
            if first is None:
                raise ProgramError(f"{' '.join(self._command)} does not forward")
            self._port = int(first[1])
        return self._port

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


def _copy_lines(process: subprocess.Popen[str], lines: queue.SimpleQueue[str]) -> None:
    for line in process.stdout or ():
        lines.put(line)
    lines.put("")


@dataclass(frozen=True)
class Forwards:
    """Both forwards to one pod: ours as `deployer up` leaves it in the background, and `kubectl`'s."""

    ours: int
    kubectl: KubectlForward

    def sides(self, measure: Callable[[int], float]) -> Sequence[Side]:
        """The two sides of a row; `measure` gets the local port."""
        return (
            Side("deployer", lambda: measure(self.ours), QUICK_ROUNDS),
            Side("kubectl port-forward", lambda: measure(self.kubectl.port), QUICK_ROUNDS),
        )


@contextlib.contextmanager
def forwards(kubectl: Kubectl, namespace: str, name: str) -> Iterator[Forwards]:
    """Forward to port `PORT` of the pod `<name>-0`, which must run, both ways."""
    theirs = KubectlForward(kubectl, namespace, f"{name}-0")
    target = Target(kubectl.context, namespace, name, PORT)
    before = os.environ.get("XDG_STATE_HOME")
    with tempfile.TemporaryDirectory() as state:
        os.environ["XDG_STATE_HOME"] = state
        try:
            ours = background_forward.ensure(target, _free_port())
            yield Forwards(ours.port, theirs)
        finally:
            theirs.close()
            background_forward.stop(target)
            os.environ.pop("XDG_STATE_HOME")
            if before is not None:
                os.environ["XDG_STATE_HOME"] = before


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# -- a plain web server ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def web_server() -> Iterator[Forwards]:
    """Both forwards to a web server in a pod of its own."""
    kubectl = Kubectl(local_context())
    with kubectl.namespace() as namespace:
        kubectl("create", "namespace", namespace)
        kubectl("apply", "--filename", "-", namespace=namespace, text=json.dumps(_stateful_set(_image(kubectl))))
        kubectl("wait", "statefulset/web", "--for=jsonpath={.status.readyReplicas}=1", namespace=namespace)
        with forwards(kubectl, namespace, "web") as both:
            for port in (both.ours, both.kubectl.port):
                request(port, 3)
            yield both


def _image(kubectl: Kubectl) -> str:
    annotations = kubectl.get("configmap/local-registry-hosting", "kube-public")["metadata"].get("annotations", {})
    mirror = annotations.get(MIRROR_ANNOTATION)
    return f"{mirror}/{IMAGE}" if mirror else IMAGE.removeprefix("library/")


def _stateful_set(image: str) -> dict[str, object]:
    probe = {"tcpSocket": {"port": PORT}, "periodSeconds": 1}
    container = {"name": "web", "image": image, "command": ["python3", "-c", SERVER % PORT], "readinessProbe": probe}
    labels = {"app": "web"}
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": "web"},
        "spec": {
            "serviceName": "web",
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
        },
    }


def request(port: int, size: int) -> float:
    """Seconds from connecting until `size` bytes and the head before them have come."""
    began = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        _ask(connection, size)
        _receive(connection, size)
    return time.perf_counter() - began


def _ask(connection: socket.socket, size: int) -> None:
    connection.sendall(f"GET /{size} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())


def _receive(connection: socket.socket, size: int) -> None:
    buffer = bytearray(1 << 20)
    head = b""
    while b"\r\n\r\n" not in head:
        part = connection.recv(65536)
        if not part:
            raise ConnectionError("the connection ended before the answer")
        head += part
    left = size - (len(head) - head.index(b"\r\n\r\n") - 4)
    while left > 0:
        received = connection.recv_into(buffer)
        if not received:
            raise ConnectionError("the connection ended within the answer")
        left -= received


def stream_rate(port: int, *, megabytes: int = 200) -> float:
    """MB/s of one answer."""
    return megabytes / request(port, megabytes * 1_000_000)


def single_request(port: int) -> float:
    """Milliseconds of a request for 3 bytes on a connection of its own, after a pause."""
    time.sleep(_PAUSE_SECONDS)
    return request(port, 3) * 1000


def requests_at_once(port: int, *, clients: int = 20, each: int = 5) -> tuple[float, list[float]]:
    """Requests a second of `clients` that ask at once, each `each` times on new connections; milliseconds of each."""
    start = threading.Barrier(clients + 1)

    def client() -> list[float]:
        start.wait()
        return [request(port, 3) * 1000 for _ in range(each)]

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client) for _ in range(clients)]
        start.wait()
        began = time.perf_counter()
        taken = [one for future in running for one in future.result()]
    return len(taken) / (time.perf_counter() - began), taken


def connections_served(port: int, *, count: int = 200) -> float:
    """How many of `count` connections, all open at once, get their answer."""
    served = 0
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(count):
            with contextlib.suppress(OSError):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
                _ask(connection, 3)
                connections.append(connection)
        for connection in connections:
            with contextlib.suppress(OSError):
                _receive(connection, 3)
                served += 1
    return served


_Sides = contextlib.AbstractContextManager[Sequence[Side]]


def _both(measure: Callable[[int], float]) -> Callable[[Forwards], _Sides]:
    def sides(both: Forwards) -> _Sides:
        return contextlib.nullcontext(both.sides(measure))

    return sides


# -- a page of Airflow's UI -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Page:
    """What a browser does to open the grid of a DAG."""

    first: str
    calls: tuple[str, ...]
    headers: dict[str, str]

    def load(self, host: str, port: int) -> float:
        """Seconds from the first connection until everything has come, on as many connections as browsers open.

        Raises:
            ProgramError: an answer is not 200.
        """
        idle: queue.LifoQueue[http.client.HTTPConnection] = queue.LifoQueue()
        for _ in range(_BROWSER_CONNECTIONS):
            idle.put(http.client.HTTPConnection(host, port, timeout=30))

        def get(path: str) -> bytes:
            connection = idle.get()
            try:
                connection.request("GET", path, headers=self.headers)
                answer = connection.getresponse()
                body = answer.read()
            finally:
                idle.put(connection)
            if answer.status != 200:
                raise ProgramError(f"GET {path} was answered with {answer.status}")
            return body

        began = time.perf_counter()
        with ThreadPoolExecutor(_BROWSER_CONNECTIONS) as pool:
            html = gzip.decompress(get(self.first)).decode()
            assets = [f"/{path}" for path in re.findall(r'(?:src|href)="\./(static/[^"]+)"', html)]
            _all(pool.map(get, assets))
            _all(pool.map(get, self.calls))
        taken = time.perf_counter() - began
        while not idle.empty():
            idle.get().close()
        return taken


def _all(results: Iterable[bytes]) -> None:
    for _ in results:
        pass


@dataclass(frozen=True)
class Airflow:
    """A healthy Airflow with a finished run, the forwards to it, and where it is without one."""

    page: Page
    forwards: Forwards
    address: str


@contextlib.contextmanager
def airflow() -> Iterator[Airflow]:
    """Deploy, and run the DAG whose grid is opened."""
    kubectl = Kubectl(local_context())
    with project(kubectl) as made:
        made.up("--no-port-forward")
        names = Names("airflow", made.namespace)
        secret = decode(kubectl.get(f"secret/{names.secret}", made.namespace)["data"])
        address = str(kubectl.get(f"pod/{names.pod}", made.namespace)["status"]["podIP"])
        with forwards(kubectl, made.namespace, names.name) as both:
            api = AirflowApi(f"http://127.0.0.1:{both.ours}", AIRFLOW_3)
            api.login("admin", secret["admin-password"])
            fill = {"dag_id": EDITED, "run_id": quote(_run(api, EDITED))}
            headers = {"Accept-Encoding": "gzip", "Authorization": f"Bearer {_token(api, secret['admin-password'])}"}
            page = Page(_PAGE.format(**fill), tuple(call.format(**fill) for call in _CALLS), headers)
            # The first load fills the server's caches, for every side alike.
            page.load("127.0.0.1", both.ours)
            yield Airflow(page, both, address)


def _token(api: AirflowApi, password: str) -> str:
    body = {"username": "admin", "password": password}
    return str(api.request("POST", "/auth/token", doing="log in", body=body, quote=False)["access_token"])


def _run(api: AirflowApi, dag_id: str) -> str:
    """Run a DAG to its end and return the run's id."""
    api.request("PATCH", f"/api/v2/dags/{dag_id}", doing="unpause the DAG", body={"is_paused": False})
    path = f"/api/v2/dags/{dag_id}/dagRuns"
    run_id = str(api.request("POST", path, doing="run the DAG", body={"logical_date": None})["dag_run_id"])
    deadline = time.monotonic() + 120
    while api.request("GET", f"{path}/{quote(run_id)}", doing="look at the run")["state"] != "success":
        if time.monotonic() > deadline:
            raise ProgramError(f"the run of {dag_id} does not succeed")
        time.sleep(0.5)
    return run_id


def _page(airflow: Airflow) -> _Sides:
    ours, theirs = airflow.forwards.sides(lambda port: airflow.page.load("127.0.0.1", port))
    direct = Side("direct connection", lambda: airflow.page.load(airflow.address, PORT), QUICK_ROUNDS)
    return contextlib.nullcontext((ours, theirs, direct))


NO_SLOWER = {"kubectl port-forward": 1.0}
GROUPS: tuple[Group[Any], ...] = (
    Group(
        web_server,
        (
            Row(
                "forward-stream",
                "forward: one answer of 200 MB",
                "MB/s",
                _both(stream_rate),
                at_least=NO_SLOWER,
                more_is_better=True,
            ),
            Row(
                "forward-request",
                "forward: a request on a new connection, after a pause of 50 ms",
                "ms",
                _both(single_request),
                at_least=NO_SLOWER,
            ),
            Row(
                "forward-twenty",
                "forward: 20 clients at once, 5 requests each on new connections",
                "requests/s",
                _both(lambda port: requests_at_once(port)[0]),
                at_least={"kubectl port-forward": 2.0},
                more_is_better=True,
            ),
            Row(
                "forward-twenty-p95",
                "forward: the same, 95 % of the requests answered within",
                "ms",
                _both(lambda port: percentile(requests_at_once(port)[1], 95)),
                at_least=NO_SLOWER,
            ),
            Row(
                "forward-two-hundred",
                "forward: 200 connections open at once, answered",
                "connections",
                _both(connections_served),
                budget=200,
                more_is_better=True,
            ),
        ),
    ),
    Group(
        airflow,
        (
            Row(
                "forward-page",
                "forward: the grid of a DAG in Airflow's UI, all requests of the page on 6 connections",
                "s",
                _page,
                # At most 1.2 times the time of a direct connection.
                at_least={"direct connection": 1 / 1.2, **NO_SLOWER},
            ),
        ),
    ),
)


def main() -> None:
    """Measure these rows alone, and print them."""
    measured = run(GROUPS, only=None, rounds=None, report=lambda line: None)
    print(text_table(document(measured, {})))


if __name__ == "__main__":
    main()
