"""Upgrades with data on the real cluster: asked for, interrupted, failed and gone back on, and done."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from airflow_deployer.cluster import CLAIM, POD
from airflow_deployer.database_image import POSTGRES_MAJOR
from airflow_deployer.manifests import AIRFLOW_VERSION
from airflow_deployer.running_airflow import VERSION_LABEL
from tests.e2e import airflow_runs
from tests.e2e.bad_network import Proxy
from tests.e2e.conftest import Project, eventually
from tests.e2e.database import locked

pytestmark = pytest.mark.e2e

DAG = """
from datetime import datetime

from airflow import DAG

try:
    from airflow.providers.standard.operators.python import PythonOperator
except ImportError:
    from airflow.operators.python import PythonOperator

with DAG("orders", start_date=datetime(2024, 1, 1), schedule=None):
    PythonOperator(task_id="load", python_callable=print)
"""


def set_version(project: Project, version: str, more: str = "") -> None:
    project.write("deployer.toml", f'[airflow]\nversion = "{version}"\n{more}')


def facts(project: Project) -> dict[str, str]:
    """What the claim remembers."""
    claim = project.cluster.get(CLAIM, project.names.namespace, project.names.claim)
    assert claim is not None
    found: dict[str, str] = claim["metadata"]["annotations"]
    return found


def runs(project: Project) -> list[str]:
    api = project.api()
    listed = api.request("GET", f"{api.rest.path}/dags/orders/dagRuns?limit=100", doing="list the runs")
    return sorted(each["dag_run_id"] for each in listed["dag_runs"])


def version(project: Project) -> str:
    return project.api().version()


def interrupted(project: Project, number: signal.Signals, reached: Callable[[], bool]) -> None:
    """Begin the upgrade, and send the signal once the moment has come."""
    running = project.start("up", "--upgrade")
    try:
        eventually(reached, seconds=120, what="the moment to interrupt the upgrade")
        running.send_signal(number)
        running.communicate(timeout=60)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == (130 if number is signal.SIGINT else -number)


def is_held(project: Project) -> bool:
    return "held" in project.shell("ls /run/airflow-deployer").split()


def pod_version(project: Project) -> str:
    """Of the pod, which is away for a moment while it is replaced."""
    found = project.cluster.get(POD, project.names.namespace, project.names.pod)
    return str(found["metadata"]["labels"][VERSION_LABEL]) if found else ""


def backups(project: Project) -> list[Path]:
    return sorted(project.folder.glob("*.backup"))


def test_from_2_to_3_in_place_and_back(project: Project, proxy: Proxy) -> None:
    project.write("dags/orders.py", DAG)
    (project.folder / "dags/dummy.py").unlink()
    set_version(project, "2.11.2")
    project.up()
    for run in ("one", "two"):
        airflow_runs.trigger(project.api(), "orders", run)
        assert airflow_runs.wait(project.api(), "orders", run) == "success"
    project.api().request("POST", "/api/v1/variables", body={"key": "region", "value": "eu"}, doing="make the variable")
    assert (facts(project)[AIRFLOW_VERSION], facts(project)[POSTGRES_MAJOR]) == ("2.11.2", "15")

    set_version(project, "3.3.2")
    told = project.deployer("up")
    assert told.code == 1, told
    assert "This is an upgrade, Airflow 2.11.2 to 3.3.2" in told.stderr
    assert "next: deployer up --upgrade" in told.stderr
    assert version(project) == "2.11.2"

    # Killed while Airflow is stopped and the backup is written: it starts again by itself, as it was.
    with locked(project, "LOCK TABLE alembic_version"):
        interrupted(project, signal.SIGKILL, lambda: is_held(project))
    eventually(lambda: project.deployer("status").code == 0, seconds=120, what="Airflow 2 runs again")
    assert (version(project), runs(project)) == ("2.11.2", ["one", "two"])

    # So it does when the API server is gone, and the command says what became of it.
    running = project.start("up", "--upgrade")
    try:
        with locked(project, "LOCK TABLE alembic_version"):
            eventually(lambda: is_held(project), seconds=120, what="Airflow is stopped")
            proxy.refusing = True
            proxy.cut()
        _, errors = running.communicate(timeout=120)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 1, errors
    assert "Traceback" not in errors
    proxy.refusing = False
    eventually(lambda: project.deployer("status").code == 0, seconds=120, what="Airflow 2 runs again")
    assert (version(project), runs(project)) == ("2.11.2", ["one", "two"])

    # Another version that cannot start: the way back is offered, and works.
    made = len(backups(project))
    set_version(project, "3.3.2", '[resources.airflow]\nrequests.memory = "250Mi"\nlimits.memory = "250Mi"\n')
    failed = project.deployer("up", "--upgrade")
    assert failed.code == 1, failed
    assert "The upgrade, Airflow 2.11.2 to 3.3.2, failed" in failed.stderr
    file = backups(project)[-1]
    assert len(backups(project)) == made + 1
    assert f"DEPLOYER_AIRFLOW_VERSION=2.11.2 deployer up --restore {file.name}" in failed.stderr
    set_version(project, "3.3.2")
    back = project.deployer("up", "--restore", file.name, "--yes", env={"DEPLOYER_AIRFLOW_VERSION": "2.11.2"})
    assert back.code == 0, back
    assert (version(project), runs(project)) == ("2.11.2", ["one", "two"])

    # Interrupted once the new pod comes: the next one finishes.
    interrupted(project, signal.SIGINT, lambda: pod_version(project) == "3.3.2")
    assert facts(project)[AIRFLOW_VERSION] == "2.11.2"
    report = project.up("--upgrade")
    assert report["airflow_version"] == "3.3.2"
    assert facts(project)[AIRFLOW_VERSION] == "3.3.2"
    assert facts(project)[POSTGRES_MAJOR] == "15", "the data stays on its PostgreSQL"
    assert (version(project), runs(project)) == ("3.3.2", ["one", "two"])
    region = project.api().request("GET", "/api/v2/variables/region", doing="read the variable")
    assert region["value"] == "eu"
    airflow_runs.trigger(project.api(), "orders", "three")
    assert airflow_runs.wait(project.api(), "orders", "three") == "success"

    set_version(project, "2.11.2")
    refused = project.deployer("up")
    assert refused.code == 1, refused
    assert "the database belongs to Airflow 3.3.2, which the older one cannot read" in refused.stderr
    assert "deployer up --restore FILE" in refused.stderr
    assert version(project) == "3.3.2"

    set_version(project, "3.3.2", '[images]\npostgres = "postgres:17"\n')
    refused = project.deployer("up")
    assert refused.code == 2, refused
    assert "holds data of PostgreSQL 15" in refused.stderr
    assert "deployer backup airflow.backup" in refused.stderr


def test_from_3_2_to_3_3_in_place(project: Project) -> None:
    project.write("dags/orders.py", DAG)
    (project.folder / "dags/dummy.py").unlink()
    set_version(project, "3.2.2")
    locked = project.deployer("lock")
    assert locked.code == 0, locked
    project.up()
    airflow_runs.trigger(project.api(), "orders", "one")
    assert airflow_runs.wait(project.api(), "orders", "one") == "success"
    set_version(project, "3.3.2")
    began = time.monotonic()
    report = project.up("--upgrade")
    print(f"upgraded in {time.monotonic() - began:.1f} s: {report['steps']}")
    assert (version(project), runs(project)) == ("3.3.2", ["one"])


def test_a_data_directory_of_another_major_is_never_started_on(project: Project) -> None:
    """Also where nobody looked before: the container itself refuses."""
    set_version(project, "3.3.2", '[images]\npostgres = "postgres:15"\n')
    project.up("--no-port-forward")
    subprocess.run(
        [
            *("kubectl", "--context", project.cluster.context.name, "-n", project.names.namespace),
            *("set", "image", "statefulset/airflow", "postgres=localhost:5000/library/postgres:17"),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    assert project.cluster.delete(POD, project.names.namespace, project.names.pod, grace_seconds=1)

    def refusal() -> bool:
        pod = project.cluster.get(POD, project.names.namespace, project.names.pod) or {}
        statuses = pod.get("status", {}).get("containerStatuses", [])
        return any("holds data of PostgreSQL 15, which PostgreSQL 17 cannot read" in str(each) for each in statuses)

    eventually(refusal, seconds=90, what="Postgres 17 refuses the data of 15")
    set_version(project, "3.3.2")
    assert project.up("--no-port-forward", "--force-conflicts")["airflow_version"] == "3.3.2"
