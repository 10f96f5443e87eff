"""Airflow's own REST API at a base URL: is it well, what does it serve, what could it not import, what runs.

Paths and fields are those of Airflow 3's public API
(https://airflow.apache.org/docs/apache-airflow/stable/stable-rest-api-ref.html) and, where nothing else is said, of
Airflow 2's too; `airflow_profiles.RestApi` has the differences.
"""

from __future__ import annotations

import ast
import base64
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote as quote_path
from urllib.parse import urlencode

from airflow_deployer import task_logs
from airflow_deployer.airflow_profiles import Profile, RestApi
from airflow_deployer.airflow_web import AirflowWeb
from airflow_deployer.running_airflow import Dag, ImportFailure, RunningTask, dag_file
from airflow_deployer.task_logs import TaskLogEntry

# The server's own `maximum_page_limit`; it silently returns no more.
_PAGE = 100


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


class AirflowApi(AirflowWeb):
    """A client of the REST API of the Airflow at `url`; see `AirflowWeb`.

    Args:
        url: of the web server.
        profile: of the Airflow that answers there, which has to be of a series with a REST API.
    """

    def __init__(self, url: str, profile: Profile) -> None:
        super().__init__(url, profile)
        if profile.api is None:
            raise ValueError(f"Airflow {profile.series} has no REST API")
        self.rest: RestApi = profile.api
        """How this API is spoken to."""

    def version(self) -> str:
        """Return Airflow's version; needs no login."""
        document = self.request("GET", f"{self.rest.path}/version", doing="read Airflow's version")
        return str(document["version"])

    def login(self, user: str, password: str) -> None:
        """Have this object's later requests say who it is.

        Raises:
            AirflowError: no answer, or a wrong password; where each request has the password, the first one tells.
        """
        if self.rest.login == "basic":
            token = base64.b64encode(f"{user}:{password}".encode()).decode()
            self._headers = {"Authorization": f"Basic {token}"}
            return
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
            ImportFailure(dag_file(entry["filename"]), entry["stack_trace"], entry["timestamp"])
            for entry in self._pages("/importErrors", "import_errors", doing="list the import errors")
        ]

    def dags(self) -> list[Dag]:
        """Return the DAGs that are served now, by id."""
        return [self._dag(entry) for entry in self._pages("/dags", "dags", doing="list the DAGs", order_by="dag_id")]

    def running_tasks(self) -> tuple[RunningTask, ...]:
        """Return the task instances that run now."""
        return tuple(
            RunningTask(entry["dag_id"], entry["dag_run_id"], entry["task_id"], entry["map_index"])
            for entry in self._pages(
                "/dags/~/dagRuns/~/taskInstances", "task_instances", doing="list the running tasks", state="running"
            )
        )

    def dag(self, dag_id: str) -> Dag | None:
        """Return one DAG, or None where there is none of that id."""
        path = _dag_path(dag_id)
        found = self._call("GET", path, doing=f"read the DAG {dag_id}", missing_ok=True)
        return None if found is None else self._dag(found)

    def unpause(self, dag_id: str) -> None:
        """Let the scheduler work on the DAG's runs."""
        path = f"{_dag_path(dag_id)}?update_mask=is_paused"
        self._call("PATCH", path, body={"is_paused": False}, doing=f"unpause {dag_id}", idempotent=True)

    def trigger(self, dag_id: str, run_id: str) -> None:
        """Start a run under an id of the caller's own."""
        body = {"dag_run_id": run_id, **self.rest.trigger}
        self._call("POST", f"{_dag_path(dag_id)}/dagRuns", body=body, doing=f"run {dag_id}")

    def run_state(self, dag_id: str, run_id: str) -> str:
        """Return a run's state: `queued`, `running`, `success` or `failed`."""
        return str(self._call("GET", _run_path(dag_id, run_id), doing=f"read the run of {dag_id}")["state"])

    def fail_run(self, dag_id: str, run_id: str) -> None:
        """End a run that goes on, and its tasks, as failed."""
        path = _run_path(dag_id, run_id)
        self._call("PATCH", path, body={"state": "failed"}, doing=f"end the run of {dag_id}", idempotent=True)

    def task_tries(self, dag_id: str, run_id: str) -> list[TaskTry]:
        """Return every task of a run with its latest try."""
        entries = self._pages(
            f"{_run_path(dag_id, run_id)}/taskInstances", "task_instances", doing=f"list the tasks of {dag_id}"
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
            **self.rest.clear,
        }
        path = f"{_dag_path(dag_id)}/clearTaskInstances"
        self._call("POST", path, body=body, doing=f"run {dag_id}.{task_id} again")

    def task_log(
        self, dag_id: str, run_id: str, task: TaskTry, position: str | None
    ) -> tuple[list[TaskLogEntry], str | None]:
        """Return what a try has logged since `position`, and the position to go on from.

        Args:
            position: what the last call returned; None for all that there is.
        """
        query = {"map_index": task.map_index, "token": position or ""}
        found = self._call(
            "GET",
            f"{_run_path(dag_id, run_id)}/taskInstances/{_quoted(task.task_id)}/logs/{task.try_number}?"
            + urlencode({key: value for key, value in query.items() if value != ""}),
            doing=f"read the log of {dag_id}.{task.task_id}",
        )
        content, position = found["content"], found.get("continuation_token")
        if self.rest.task_log == "events":
            return task_logs.from_events(content), position
        # Pairs of host and text, as Python writes them.
        return [entry for _, text in ast.literal_eval(content) for entry in task_logs.from_text(text)], position

    def _dag(self, entry: dict[str, Any]) -> Dag:
        file = entry[self.rest.dag_file]
        return Dag(
            entry["dag_id"], entry["is_paused"], entry["last_parsed_time"], None if file is None else dag_file(file)
        )

    def _call(self, method: str, path: str, **options: Any) -> Any:
        """Send a request to a path below the API's own; see `request`."""
        return self.request(method, self.rest.path + path, **options)

    def _pages(self, path: str, key: str, *, doing: str, **query: str) -> Iterator[dict[str, Any]]:
        offset = 0
        while True:
            parameters = urlencode({**query, "limit": _PAGE, "offset": offset})
            document = self._call("GET", f"{path}?{parameters}", doing=doing)
            entries: list[dict[str, Any]] = document[key]
            yield from entries
            offset += len(entries)
            # An entry that goes away between two pages makes the total smaller than what was promised.
            if not entries or offset >= document["total_entries"]:
                return


def _dag_path(dag_id: str) -> str:
    return f"/dags/{_quoted(dag_id)}"


def _run_path(dag_id: str, run_id: str) -> str:
    return f"{_dag_path(dag_id)}/dagRuns/{_quoted(run_id)}"


def _quoted(name: str) -> str:
    return quote_path(name, safe="")
