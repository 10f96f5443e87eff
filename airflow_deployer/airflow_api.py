"""Airflow's own REST API at a base URL: is it well, what does it serve, what could it not import.

Paths and fields are those of Airflow 3's public API
(https://airflow.apache.org/docs/apache-airflow/stable/stable-rest-api-ref.html); the login is SimpleAuthManager's
(https://airflow.apache.org/docs/apache-airflow/stable/core-concepts/auth-manager/simple/index.html).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote as quote_path
from urllib.parse import urlencode

from airflow_deployer.errors import AirflowError

_CONNECT_TIMEOUT = 5.0
_READ_TIMEOUT = 15.0
# Resets are normal while a pod is replaced. With the growing pauses between them these retries take about 3 s.
_RETRIES = 5
# A request that was sent and got no answer may have cost the whole time-out.
_READ_RETRIES = 2
_PAUSE_FACTOR = 0.1
# The API server's own `[api] maximum_page_limit`; it silently returns no more.
_PAGE = 100
_DETAIL_LIMIT = 300


@dataclass(frozen=True)
class Component:
    """One entry of `GET /api/v2/monitor/health`.

    `status` is "healthy", "unhealthy", or None where the component has never reported; `latest_heartbeat` is
    RFC 3339, None for the metadatabase, which has none.
    """

    status: str | None
    latest_heartbeat: str | None


@dataclass(frozen=True)
class ImportFailure:
    """One entry of `GET /api/v2/importErrors`: the file, relative to its bundle, and Python's stack trace.

    `timestamp` is when it was last seen, RFC 3339 by the pod's clock.
    """

    filename: str
    stack_trace: str
    timestamp: str


@dataclass(frozen=True)
class Dag:
    """One entry of `GET /api/v2/dags`.

    `last_parsed_time` is RFC 3339 by the pod's clock; `relative_fileloc` is its file, relative to its bundle.
    """

    dag_id: str
    is_paused: bool
    last_parsed_time: str | None
    relative_fileloc: str | None


@dataclass(frozen=True)
class TaskTry:
    """One entry of `GET .../dagRuns/{id}/taskInstances`: a task of a run, and how far its latest try is.

    `map_index` is -1 for a task that is not mapped; `state` is None before it is scheduled; `try_number` counts from 1
    once it has started, `seconds` is what the try has taken, None before its end.
    """

    task_id: str
    map_index: int
    state: str | None
    try_number: int
    seconds: float | None


@dataclass(frozen=True)
class TaskLogEntry:
    """One message of a task's log: its text, its level where it has one, and the error it carries, as lines.

    `printed` is what the task wrote to its standard output or error, which Airflow reads apart from the messages: such
    a line may stand a little before or after the messages that it came between.
    """

    text: str
    level: str
    error: tuple[str, ...]
    printed: bool = False


class AirflowApi:
    """A client of the API server at `url`, which has no path: `http://localhost:8080`.

    Every method raises `AirflowError` when Airflow does not answer or refuses; idempotent requests are repeated a few
    times when their connection breaks.
    """

    def __init__(self, url: str) -> None:
        from urllib3 import PoolManager, Timeout

        self._url = url.rstrip("/")
        self._pool = PoolManager(timeout=Timeout(connect=_CONNECT_TIMEOUT, read=_READ_TIMEOUT))
        self._headers: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"AirflowApi({self._url!r})"

    def version(self) -> str:
        """Return Airflow's version; needs no login."""
        document = self.request("GET", "/api/v2/version", doing="read Airflow's version")
        return str(document["version"])

    def health(self) -> dict[str, Component]:
        """Return each component's health by the API's name for it; needs no login.

        The HTTP status says nothing: it is 200 with a dead scheduler or database too.
        """
        document = self.request("GET", "/api/v2/monitor/health", doing="read Airflow's health")
        return {
            name: Component(report.get("status"), report.get(f"latest_{name}_heartbeat"))
            for name, report in document.items()
            # Airflow leaves a component out, or null, that this deployment does not have.
            if isinstance(report, dict)
        }

    def login(self, user: str, password: str) -> None:
        """Log in; the token is kept for this object's later requests.

        Raises:
            AirflowError: no answer, or a wrong password.
        """
        document = self.request(
            "POST",
            "/auth/token",
            body={"username": user, "password": password},
            doing=f"log in to Airflow as {user}",
            idempotent=True,
            # What a validation error quotes is what was sent.
            quote=False,
        )
        self._headers = {"Authorization": f"Bearer {document['access_token']}"}

    def import_errors(self) -> list[ImportFailure]:
        """Return what the DAG processor could not import."""
        return [
            ImportFailure(entry["filename"], entry["stack_trace"], entry["timestamp"])
            for entry in self._pages("/api/v2/importErrors", "import_errors", doing="list the import errors")
        ]

    def dags(self) -> list[Dag]:
        """Return the DAGs that are served now, by id."""
        return [
            Dag(entry["dag_id"], entry["is_paused"], entry["last_parsed_time"], entry["relative_fileloc"])
            for entry in self._pages("/api/v2/dags", "dags", doing="list the DAGs", order_by="dag_id")
        ]

    def dag(self, dag_id: str) -> Dag | None:
        """Return one DAG, or None where there is none of that id."""
        path = f"/api/v2/dags/{_quoted(dag_id)}"
        found = self.request("GET", path, doing=f"read the DAG {dag_id}", missing_ok=True)
        if found is None:
            return None
        return Dag(found["dag_id"], found["is_paused"], found["last_parsed_time"], found["relative_fileloc"])

    def unpause(self, dag_id: str) -> None:
        """Let the scheduler work on the DAG's runs."""
        path = f"/api/v2/dags/{_quoted(dag_id)}?update_mask=is_paused"
        self.request("PATCH", path, body={"is_paused": False}, doing=f"unpause {dag_id}", idempotent=True)

    def trigger(self, dag_id: str, run_id: str) -> None:
        """Start a run under an id of the caller's own."""
        path = f"/api/v2/dags/{_quoted(dag_id)}/dagRuns"
        self.request("POST", path, body={"dag_run_id": run_id, "logical_date": None}, doing=f"run {dag_id}")

    def run_state(self, dag_id: str, run_id: str) -> str:
        """Return a run's state: `queued`, `running`, `success` or `failed`."""
        return str(self.request("GET", _run_path(dag_id, run_id), doing=f"read the run of {dag_id}")["state"])

    def fail_run(self, dag_id: str, run_id: str) -> None:
        """End a run that goes on, and its tasks, as failed."""
        path = _run_path(dag_id, run_id)
        self.request("PATCH", path, body={"state": "failed"}, doing=f"end the run of {dag_id}", idempotent=True)

    def task_tries(self, dag_id: str, run_id: str) -> list[TaskTry]:
        """Return every task of a run with its latest try."""
        entries = self._pages(
            _run_path(dag_id, run_id) + "/taskInstances", "task_instances", doing=f"list the tasks of {dag_id}"
        )
        return [
            TaskTry(entry["task_id"], entry["map_index"], entry["state"], entry["try_number"], entry["duration"])
            for entry in entries
        ]

    def clear_task(self, dag_id: str, run_id: str, task_id: str) -> None:
        """Have one task of an earlier run run again, on the DAG's latest version, and no other task."""
        body = {
            "dry_run": False,
            "dag_run_id": run_id,
            "task_ids": [task_id],
            "only_failed": False,
            "reset_dag_runs": True,
            "run_on_latest_version": True,
        }
        path = f"/api/v2/dags/{_quoted(dag_id)}/clearTaskInstances"
        self.request("POST", path, body=body, doing=f"run {dag_id}.{task_id} again")

    def task_log(
        self, dag_id: str, run_id: str, task: TaskTry, position: str | None
    ) -> tuple[list[TaskLogEntry], str | None]:
        """Return what a try has logged since `position`, and the position to go on from.

        Args:
            position: what the last call returned; None for all that there is.
        """
        query = {"map_index": task.map_index, "token": position or ""}
        found = self.request(
            "GET",
            f"{_run_path(dag_id, run_id)}/taskInstances/{_quoted(task.task_id)}/logs/{task.try_number}?"
            + urlencode({key: value for key, value in query.items() if value != ""}),
            doing=f"read the log of {dag_id}.{task.task_id}",
        )
        entries = [entry if isinstance(entry, dict) else {"event": entry} for entry in found["content"]]
        return [_log_entry(entry) for entry in entries], found.get("continuation_token")

    def request(
        self,
        method: str,
        path: str,
        *,
        doing: str,
        body: Any = None,
        idempotent: bool = False,
        quote: bool = True,
        missing_ok: bool = False,
    ) -> Any:
        """Send one request and return the decoded JSON answer.

        Args:
            method: the HTTP verb.
            path: from the slash on, query included.
            doing: what it is for, as it follows "Cannot" in an error: "list the DAGs".
            body: sent as JSON.
            idempotent: a POST or PATCH may be sent again when the connection breaks, as every other verb is.
            quote: an error may show what the server answered.
            missing_ok: return None where the server knows no such thing (404).

        Raises:
            AirflowError: no answer, an answer other than 2xx, or one that is not JSON.
        """
        from urllib3 import Retry
        from urllib3.exceptions import HTTPError

        retries = Retry(
            total=_RETRIES,
            read=_READ_RETRIES,
            redirect=False,
            backoff_factor=_PAUSE_FACTOR,
            # None: any verb. The default leaves out POST and PATCH.
            allowed_methods=None if idempotent else Retry.DEFAULT_ALLOWED_METHODS,
            respect_retry_after_header=False,
        )
        headers = {"Accept": "application/json", **self._headers}
        content = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = json.dumps(body).encode()
        try:
            response = self._pool.request(method, self._url + path, body=content, headers=headers, retries=retries)
        except HTTPError as error:
            raise AirflowError(
                f"Cannot {doing}: Airflow does not answer at {self._url}: {_cause(error)}.",
                hint="deployer status   shows the state of the pod and its components",
            ) from None
        if response.status == 401:
            raise AirflowError(
                f"Cannot {doing}: Airflow does not accept the login (401).",
                hint="deployer up   brings the password in the Secret and in the pod together",
            )
        if missing_ok and response.status == 404:
            return None
        if not 200 <= response.status < 300:
            detail = f": {_detail(response.data)}" if quote and response.data else ""
            raise AirflowError(f"Cannot {doing}: Airflow answers {response.status} to {method} {path}{detail}.")
        try:
            return response.json()
        except ValueError:
            raise AirflowError(
                f"Cannot {doing}: what answers at {self._url} is not Airflow's API: {path} is not JSON.",
                hint="deployer port-forward   with another --port, if another program answers there",
            ) from None

    def _pages(self, path: str, key: str, *, doing: str, **query: str) -> Iterator[dict[str, Any]]:
        offset = 0
        while True:
            parameters = urlencode({**query, "limit": _PAGE, "offset": offset})
            document = self.request("GET", f"{path}?{parameters}", doing=doing)
            entries: list[dict[str, Any]] = document[key]
            yield from entries
            offset += len(entries)
            # An entry that goes away between two pages makes the total smaller than what was promised.
            if not entries or offset >= document["total_entries"]:
                return


def _quoted(name: str) -> str:
    return quote_path(name, safe="")


def _run_path(dag_id: str, run_id: str) -> str:
    return f"/api/v2/dags/{_quoted(dag_id)}/dagRuns/{_quoted(run_id)}"


def _log_entry(entry: dict[str, Any]) -> TaskLogEntry:
    """Take what is for a reader out of a `StructuredLogMessage`, whose fields are those of structlog's events."""
    error: list[str] = []
    for cause in entry.get("error_detail") or []:
        for frame in cause.get("frames") or []:
            error.append(f"{frame.get('filename')}:{frame.get('lineno')} in {frame.get('name')}")
        error.append(f"{cause.get('exc_type')}: {cause.get('exc_value')}")
    printed = entry.get("logger") in ("task.stdout", "task.stderr")
    return TaskLogEntry(str(entry.get("event", "")), str(entry.get("level") or ""), tuple(error), printed)


def _cause(error: Exception) -> str:
    """Say what broke: urllib3 wraps it once for the retries and once for the pool."""
    cause: object = getattr(error, "reason", None) or error
    text = " ".join(str(cause).split())
    # urllib3 puts the connection's repr in front.
    return text.rpartition(">: ")[2] or type(cause).__name__


def _detail(data: bytes) -> str:
    """Take the reason out of FastAPI's error body, `{"detail": ...}`."""
    try:
        detail = json.loads(data)["detail"]
    except (ValueError, KeyError, TypeError):
        detail = data.decode(errors="replace")
    text = " ".join((detail if isinstance(detail, str) else json.dumps(detail)).split())
    return text if len(text) <= _DETAIL_LIMIT else text[:_DETAIL_LIMIT] + "..."
