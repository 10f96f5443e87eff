"""Running DAGs through Airflow's REST API, for tests: trigger, wait, task states, logs, results."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import quote

import pytest

from airflow_deployer.airflow_api import AirflowApi, TaskTry

Tries = dict[tuple[str, int], tuple[str | None, int]]
"""Task id and map index (-1: not mapped) to state and try number."""


def trigger(api: AirflowApi, dag_id: str, run_id: str, conf: dict[str, Any] | None = None) -> None:
    """Unpause the DAG and start a run."""
    api.unpause(dag_id)
    body = {"dag_run_id": run_id, "conf": conf or {}, **api.rest.trigger}
    api.request("POST", f"{api.rest.path}/dags/{dag_id}/dagRuns", body=body, doing=f"trigger {dag_id}")


def state(api: AirflowApi, dag_id: str, run_id: str) -> str:
    """The run's state."""
    return api.run_state(dag_id, run_id)


def wait(api: AirflowApi, dag_id: str, run_id: str, seconds: float = 180) -> str:
    """Wait for the run's end; return its state."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        reached = state(api, dag_id, run_id)
        if reached in ("success", "failed"):
            return reached
        time.sleep(0.5)
    pytest.fail(f"run {run_id} of {dag_id} did not end within {seconds:.0f} s: {tasks(api, dag_id, run_id)}")


def tasks(api: AirflowApi, dag_id: str, run_id: str) -> Tries:
    """Every task instance of the run."""
    return {(each.task_id, each.map_index): (each.state, each.try_number) for each in api.task_tries(dag_id, run_id)}


def log(api: AirflowApi, dag_id: str, run_id: str, task_id: str, *, map_index: int = -1, attempt: int = 1) -> str:
    """The text of one attempt's log."""
    entries, _ = api.task_log(dag_id, run_id, TaskTry(task_id, map_index, None, attempt, None), None)
    return "\n".join(entry.text for entry in entries)


def result(api: AirflowApi, dag_id: str, run_id: str, task_id: str) -> Any:
    """What the task returned."""
    path = f"{api.rest.path}/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/xcomEntries/{quote('return_value')}"
    return api.request("GET", f"{path}?deserialize=false&stringify=false", doing="read the result")["value"]
