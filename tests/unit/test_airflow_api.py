"""The client of Airflow's REST API, against answers in the shape of Airflow 3.3.2's and against broken connections."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from airflow_deployer import airflow_web
from airflow_deployer.airflow_api import AirflowApi
from airflow_deployer.airflow_profiles import AIRFLOW_1, AIRFLOW_3
from airflow_deployer.errors import AirflowError
from airflow_deployer.running_airflow import Component, Dag, ImportFailure

PASSWORD = "correct horse"
TOKEN = "eyJ.token"

HEALTH = {
    "metadatabase": {"status": "healthy"},
    "scheduler": {"status": "healthy", "latest_scheduler_heartbeat": "2026-11-23T09:00:00.123456+00:00"},
    "triggerer": {"status": None, "latest_triggerer_heartbeat": None},
    "dag_processor": {"status": "unhealthy", "latest_dag_processor_heartbeat": "2026-11-23T08:00:00+00:00"},
}


class Server(ThreadingHTTPServer):
    """Answers as Airflow does; `resets` connections are broken first."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.resets = 0
        self.answers: dict[str, tuple[int, Any]] = {}
        self.dags = [
            {
                "dag_id": f"dag_{number:03}",
                "is_paused": False,
                "last_parsed_time": "2026-11-23T09:00:00Z",
                "relative_fileloc": "a.py",
            }
            for number in range(3)
        ]
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(f"{self.command} {self.path}")
        if self.server.resets:
            self.server.resets -= 1
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        status, document = self.document(body)
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def document(self, body: bytes) -> tuple[int, Any]:
        parts = urlsplit(self.path)
        if parts.path in self.server.answers:
            return self.server.answers[parts.path]
        if parts.path == "/api/v2/version":
            return 200, {"version": "3.3.2", "git_version": None}
        if parts.path == "/api/v2/monitor/health":
            return 200, HEALTH
        if parts.path == "/auth/token":
            if json.loads(body) == {"username": "admin", "password": PASSWORD}:
                return 201, {"access_token": TOKEN}
            return 401, {"detail": f"Invalid credentials {body.decode()}"}
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"detail": "Not authenticated"}
        query = parse_qs(parts.query)
        offset = int(query["offset"][0])
        limit = min(int(query["limit"][0]), 100)
        if parts.path == "/api/v2/dags":
            return 200, {"dags": self.server.dags[offset : offset + limit], "total_entries": len(self.server.dags)}
        if parts.path == "/api/v2/importErrors":
            entry = {
                "import_error_id": 1,
                "timestamp": "2026-11-23T09:00:00Z",
                "filename": "broken.py",
                "bundle_name": "dags-folder",
                "stack_trace": "Traceback (most recent call last):\nNameError: name 'x' is not defined\n",
            }
            return 200, {"import_errors": [entry], "total_entries": 1}
        return 404, {"detail": "Not Found"}


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def api(server: Server) -> AirflowApi:
    return AirflowApi(server.url, AIRFLOW_3)


@pytest.fixture
def logged_in(api: AirflowApi) -> AirflowApi:
    api.login("admin", PASSWORD)
    return api


def test_health_and_version_need_no_login(api: AirflowApi) -> None:
    assert api.version() == "3.3.2"
    assert api.health() == {
        "metadatabase": Component("healthy", None),
        "scheduler": Component("healthy", "2026-11-23T09:00:00.123456+00:00"),
        "triggerer": Component(None, None),
        "dag_processor": Component("unhealthy", "2026-11-23T08:00:00+00:00"),
    }


def test_a_component_of_which_nothing_is_said_has_no_health(api: AirflowApi, server: Server) -> None:
    server.answers["/api/v2/monitor/health"] = (200, HEALTH | {"dag_processor": None})
    assert api.health()["dag_processor"] == Component(None, None)


def test_a_series_without_a_rest_api_has_no_client() -> None:
    with pytest.raises(ValueError, match=r"Airflow 1\.10 has no REST API"):
        AirflowApi("http://127.0.0.1:1", AIRFLOW_1)


def test_dags_and_import_errors_after_a_login(logged_in: AirflowApi) -> None:
    assert logged_in.dags()[0] == Dag("dag_000", False, "2026-11-23T09:00:00Z", "a.py")
    assert logged_in.import_errors() == [
        ImportFailure(
            "broken.py",
            "Traceback (most recent call last):\nNameError: name 'x' is not defined\n",
            "2026-11-23T09:00:00Z",
        )
    ]


def test_every_page_is_read(logged_in: AirflowApi, server: Server) -> None:
    server.dags = [{**server.dags[0], "dag_id": f"dag_{number:03}"} for number in range(205)]
    assert [dag.dag_id for dag in logged_in.dags()] == [f"dag_{number:03}" for number in range(205)]


def test_without_a_login_the_answer_says_so(api: AirflowApi) -> None:
    with pytest.raises(AirflowError, match=r"Cannot list the DAGs: Airflow does not accept the login \(401\)"):
        api.dags()


def test_a_wrong_password_is_an_error_that_shows_no_secret(api: AirflowApi) -> None:
    with pytest.raises(AirflowError, match="Cannot log in to Airflow as admin") as caught:
        api.login("admin", "wrong secret")
    assert "wrong secret" not in f"{caught.value}{caught.value.hint}{caught.value.details}"
    assert caught.value.__cause__ is None


def test_a_login_that_is_refused_otherwise_quotes_nothing_of_what_was_sent(api: AirflowApi, server: Server) -> None:
    server.answers["/auth/token"] = (422, {"detail": [{"input": {"password": PASSWORD}}]})
    with pytest.raises(AirflowError, match="422") as caught:
        api.login("admin", PASSWORD)
    assert PASSWORD not in str(caught.value)


def test_no_secret_is_in_the_object_s_text(logged_in: AirflowApi, server: Server) -> None:
    assert repr(logged_in) == f"AirflowApi('{server.url}')"


def test_a_few_broken_connections_are_tried_again(api: AirflowApi, server: Server) -> None:
    server.resets = 2
    assert api.version() == "3.3.2"
    server.resets = 1
    api.login("admin", PASSWORD)


def test_what_must_not_be_done_twice_is_not_sent_twice(logged_in: AirflowApi, server: Server) -> None:
    server.requests.clear()
    server.resets = 1
    with pytest.raises(AirflowError, match="Cannot trigger it: Airflow does not answer"):
        logged_in.request("POST", "/api/v2/dags/d/dagRuns", body={}, doing="trigger it")
    assert server.requests == ["POST /api/v2/dags/d/dagRuns"]


def test_nobody_there_is_an_error_with_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(airflow_web, "_PAUSE_FACTOR", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(AirflowError, match=f"does not answer at http://127.0.0.1:{port}: .*refused") as caught:
        AirflowApi(f"http://127.0.0.1:{port}", AIRFLOW_3).version()
    assert "object at 0x" not in str(caught.value)
    assert "deployer status" in caught.value.hint


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, {"detail": "boom"}), "Airflow answers 500 to GET /api/v2/version: boom."),
        ((404, {"detail": {"reason": "x", "message": "y"}}), '404 to GET /api/v2/version: {"reason": "x", "message"'),
        ((502, b"<html>bad\ngateway</html>"), "502 to GET /api/v2/version: <html>bad gateway</html>."),
        ((500, b"x" * 1000), "x" * 300 + "..."),
        ((200, b"<html>another program</html>"), "is not Airflow's API: /api/v2/version is not JSON."),
    ],
)
def test_an_unexpected_answer_is_an_error_with_its_reason(
    api: AirflowApi, server: Server, answer: tuple[int, Any], message: str
) -> None:
    server.answers["/api/v2/version"] = answer
    with pytest.raises(AirflowError) as caught:
        api.version()
    assert message in str(caught.value)
    assert str(caught.value).startswith("Cannot read Airflow's version: ")
