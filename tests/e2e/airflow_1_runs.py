"""Running DAGs of Airflow 1.10, which has no stable REST API, for tests: its commands and its database, in the pod."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.e2e.conftest import Project

Tries = dict[str, tuple[str | None, int]]
"""Task id to state and the number of tries that have begun."""

_QUERY = """
import json, re, sys
import psycopg2
url = open("/run/secrets/airflow-deployer/sql-alchemy-conn").read().strip()
with psycopg2.connect(re.sub(r"[+]psycopg2", "", url)) as connection, connection.cursor() as cursor:
    cursor.execute(sys.argv[1], sys.argv[2:])
    print(json.dumps(cursor.fetchall()))
"""


def query(project: Project, statement: str, *parameters: str) -> Any:
    """Ask the database; the rows."""
    return json.loads(project.command("/opt/airflow/bin/python", "-I", "-c", _QUERY, statement, *parameters))


def trigger(project: Project, dag_id: str, run_id: str) -> None:
    """Unpause the DAG and start a run."""
    project.command("airflow", "unpause", dag_id)
    project.command("airflow", "trigger_dag", "-r", run_id, dag_id)


def state(project: Project, dag_id: str, run_id: str) -> str:
    """The run's state."""
    rows = query(project, "SELECT state FROM dag_run WHERE dag_id = %s AND run_id = %s", dag_id, run_id)
    return str(rows[0][0]) if rows else ""


def wait(project: Project, dag_id: str, run_id: str, seconds: float = 180) -> str:
    """Wait for the run's end; return its state."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        reached = state(project, dag_id, run_id)
        if reached in ("success", "failed"):
            return reached
        time.sleep(1)
    pytest.fail(f"run {run_id} of {dag_id} did not end within {seconds:.0f} s: {tasks(project, dag_id, run_id)}")


def tasks(project: Project, dag_id: str, run_id: str) -> Tries:
    """Every task instance of the run."""
    rows = query(
        project,
        "SELECT ti.task_id, ti.state, ti.try_number FROM task_instance AS ti JOIN dag_run AS run"
        " ON run.dag_id = ti.dag_id AND run.execution_date = ti.execution_date"
        " WHERE run.dag_id = %s AND run.run_id = %s",
        dag_id,
        run_id,
    )
    return {task_id: (reached, tries) for task_id, reached, tries in rows}
