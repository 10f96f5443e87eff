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
from airflow_deployer.airflow_api import AirflowApi, TaskTry
from airflow_deployer.airflow_profiles import AIRFLOW_1, AIRFLOW_2, AIRFLOW_3
from airflow_deployer.errors import AirflowError
from airflow_deployer.running_airflow import Component, Dag, ImportFailure, RunningTask

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
        self.bodies: list[Any] = []
        self.authorizations: list[str | None] = []

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

    def do_PATCH(self) -> None:
        self.answer()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(f"{self.command} {self.path}")
        self.server.bodies.append(json.loads(body) if body else None)
        self.server.authorizations.append(self.headers.get("Authorization"))
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


# -- Airflow 2: what 2.11.2 answered, cut down to what is read -------------------------------------------------------

HEALTH_2 = {
    "dag_processor": {"latest_dag_processor_heartbeat": "2026-11-23T16:00:12.806090+00:00", "status": "healthy"},
    "metadatabase": {"status": "healthy"},
    "scheduler": {"latest_scheduler_heartbeat": "2026-11-23T16:00:14.315674+00:00", "status": "healthy"},
    "triggerer": {"latest_triggerer_heartbeat": "2026-11-23T16:00:14.008466+00:00", "status": "healthy"},
}
DAG_2 = {
    "dag_id": "hello",
    "fileloc": "/home/airflow/dags/hello.py",
    "file_token": "Ii90bXAvYXBpL2hvbWUyL2RhZ3MvaGVsbG8ucHki.8W96mJ7Lo8vA6GISMn17C4vrnEc",
    "is_active": True,
    "is_paused": True,
    "last_parsed_time": "2026-11-23T15:59:58.402591+00:00",
}
IMPORT_ERROR_2: dict[str, Any] = {
    "filename": "/home/airflow/dags/broken.py",
    "import_error_id": 1,
    "stack_trace": "Traceback (most recent call last):\nModuleNotFoundError: No module named 'nothing_like_it'\n",
    "timestamp": "2026-11-23T16:03:30.436051+00:00",
}
RUN_2 = {"dag_id": "hello", "dag_run_id": "r1", "run_type": "manual", "state": "failed"}
TASK_2 = {
    "dag_id": "hello",
    "dag_run_id": "r1",
    "duration": 0.953771,
    "map_index": -1,
    "state": "failed",
    "task_id": "bad",
    "try_number": 2,
}
LOG_2 = {
    "content": "[('vm', \" INFO - ::group::Log message source details\\n*** Found local files:\\n***   * "
    "/home/airflow/logs/attempt=1.log\\n INFO - ::endgroup::\\n"
    "[2026-11-23T16:00:57.140+0000] {taskinstance.py:2885} INFO - "
    "Starting\\n[2026-11-23T16:00:57.194+0000] {logging_mixin.py:190} WARNING - it's one\\n\")]",
    "continuation_token": "eyJkb3dubG9hZF9sb2dzIjpmYWxzZX0.l0g",
}
FORBIDDEN_2 = {
    "detail": None,
    "status": 403,
    "title": "Forbidden",
}


@pytest.fixture
def two(server: Server) -> AirflowApi:
    api = AirflowApi(server.url, AIRFLOW_2)
    api.login("admin", PASSWORD)
    return api


def test_airflow_2_is_asked_with_the_password_in_each_request(two: AirflowApi, server: Server) -> None:
    assert server.requests == []
    server.answers["/health"] = (200, HEALTH_2)
    server.answers["/api/v1/version"] = (200, {"git_version": ".release:x", "version": "2.11.2"})
    server.answers["/api/v1/dags"] = (200, {"dags": [DAG_2], "total_entries": 1})
    server.answers["/api/v1/importErrors"] = (200, {"import_errors": [IMPORT_ERROR_2], "total_entries": 1})
    assert [*two.health()] == ["metadatabase", "scheduler", "dag_processor", "triggerer"]
    assert two.health()["triggerer"] == Component("healthy", "2026-11-23T16:00:14.008466+00:00")
    assert two.version() == "2.11.2"
    assert two.dags() == [Dag("hello", True, "2026-11-23T15:59:58.402591+00:00", "hello.py")]
    assert two.import_errors() == [
        ImportFailure("broken.py", IMPORT_ERROR_2["stack_trace"], "2026-11-23T16:03:30.436051+00:00")
    ]
    assert set(server.authorizations) == {"Basic YWRtaW46Y29ycmVjdCBob3JzZQ=="}


def test_runs_and_tasks_of_airflow_2(two: AirflowApi, server: Server) -> None:
    run = "/api/v1/dags/hello/dagRuns/r1"
    server.answers["/api/v1/dags/hello"] = (200, DAG_2)
    server.answers["/api/v1/dags/hello/dagRuns"] = (200, RUN_2)
    server.answers[run] = (200, RUN_2)
    server.answers[f"{run}/taskInstances"] = (200, {"task_instances": [TASK_2], "total_entries": 1})
    server.answers["/api/v1/dags/~/dagRuns/~/taskInstances"] = (200, {"task_instances": [TASK_2], "total_entries": 1})
    server.answers["/api/v1/dags/hello/clearTaskInstances"] = (200, {"task_instances": []})
    two.unpause("hello")
    two.trigger("hello", "r1")
    assert server.bodies == [{"is_paused": False}, {"dag_run_id": "r1"}]
    assert two.run_state("hello", "r1") == "failed"
    assert two.task_tries("hello", "r1") == [TaskTry("bad", -1, "failed", 2, 0.953771)]
    assert two.running_tasks() == (RunningTask("hello", "r1", "bad", -1),)
    two.clear_task("hello", "r1", "bad")
    assert server.bodies[-1] == {
        "dry_run": False,
        "dag_run_id": "r1",
        "task_ids": ["bad"],
        "only_failed": False,
        "reset_dag_runs": True,
    }


def test_the_log_of_a_task_of_airflow_2_is_text_and_can_be_gone_on_with(two: AirflowApi, server: Server) -> None:
    server.answers["/api/v1/dags/hello/dagRuns/r1/taskInstances/bad/logs/2"] = (200, LOG_2)
    entries, position = two.task_log("hello", "r1", TaskTry("bad", -1, "failed", 2, 1.0), "before")
    assert [(entry.level, entry.text) for entry in entries[-2:]] == [("info", "Starting"), ("warning", "it's one")]
    assert position == "eyJkb3dubG9hZF9sb2dzIjpmYWxzZX0.l0g"
    assert server.requests[-1].endswith("/logs/2?map_index=-1&token=before")


def test_airflow_2_takes_a_wrong_password_for_none(two: AirflowApi, server: Server) -> None:
    server.answers["/api/v1/dags"] = (403, FORBIDDEN_2)
    with pytest.raises(AirflowError, match=r"Cannot list the DAGs: Airflow does not accept the login \(403\)"):
        two.dags()
    server.answers["/api/v1/dags"] = (500, FORBIDDEN_2)
    with pytest.raises(AirflowError, match=r"Airflow answers 500 to GET .*: Forbidden\."):
        two.dags()
