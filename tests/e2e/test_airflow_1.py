"""Airflow 1.10 as the blog has it, in one deployment that all tests share: up, import gate, a killed pod, UI, down."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from airflow_deployer.cluster import POD
from tests.e2e import airflow_1_runs
from tests.e2e.browser import chromium, log_in, open_dag
from tests.e2e.conftest import Project, eventually
from tests.e2e.test_hot_deploy import identity, status

pytestmark = pytest.mark.e2e

VERSION = "1.10.15"

# The blog's, as it was written for this Airflow.
DUMMY = """
from datetime import datetime

from airflow import DAG
from airflow.operators.dummy_operator import DummyOperator

with DAG("dummy", start_date=datetime(2021, 1, 1), schedule_interval=None) as dag:
    DummyOperator(task_id="first") >> DummyOperator(task_id="second")
"""

SLOW = """
import time
from datetime import datetime

from airflow import DAG
from airflow.operators.python_operator import PythonOperator

with DAG("slow", start_date=datetime(2021, 1, 1), schedule_interval=None) as dag:
    quick = PythonOperator(task_id="quick", python_callable=lambda: "done")
    sleep = PythonOperator(task_id="sleep", python_callable=lambda: time.sleep(25))
    last = PythonOperator(task_id="last", python_callable=lambda: "end")
    quick >> sleep >> last
"""


@pytest.fixture(scope="module")
def one(shared_project: Project) -> Iterator[Project]:
    """A deployment of Airflow 1.10."""
    shared_project.write("deployer.toml", f'[airflow]\nversion = "{VERSION}"\n')
    shared_project.write("dags/dummy.py", DUMMY)
    shared_project.up()
    yield shared_project


def test_it_is_up_and_a_second_up_does_nothing(one: Project) -> None:
    again = one.up()
    assert (again["changes"], again["pod"]) == ({}, "kept")
    assert (again["airflow_version"], again["dags"], again["import_errors"]) == (VERSION, 1, [])
    told = status(one)
    assert told["healthy"] is True
    assert told["components"] == {"web": "healthy", "metadatabase": "healthy", "scheduler": "healthy"}
    assert (told["dags"], told["content_scope"]) == (1, "pod")
    assert "a change takes a new pod" in one.deployer("status").stdout
    # The blog's user and place.
    assert one.shell("id -un; echo $AIRFLOW_HOME; airflow version").split() == ["airflow", "/home/airflow", VERSION]


def test_a_file_that_does_not_import_is_refused_and_the_pod_stays(one: Project) -> None:
    before = identity(one)
    one.write("dags/broken.py", "from airflow import DAG\nimport nothing_like_it\n")
    refused = one.deployer("up")
    assert refused.code == 1, refused
    assert "dags/broken.py, line 2: ModuleNotFoundError: No module named 'nothing_like_it'" in refused.stderr
    (one.folder / "dags/broken.py").unlink()
    for command in ("sync", "dev"):
        refused = one.deployer(command)
        assert refused.code == 2, refused
        assert "deployer up   brings every change, with a new pod" in refused.stderr
    assert identity(one) == before


def test_the_blog_s_dag_runs_to_its_end(one: Project) -> None:
    airflow_1_runs.trigger(one, "dummy", "first-run")
    assert airflow_1_runs.wait(one, "dummy", "first-run") == "success"


def test_a_person_logs_in_and_sees_the_dag(one: Project, tmp_path: Path) -> None:
    with chromium(tmp_path / "profile") as browser:
        log_in(browser, f"http://localhost:{one.port}/home", one.secret("admin-password"))
        open_dag(browser, "dummy", "airflow-1.10")


def test_a_change_replaces_the_pod_and_what_ran_is_still_listed(one: Project) -> None:
    before = identity(one)
    one.write("dags/slow.py", SLOW)
    report = one.up()
    assert (report["pod"], report["dags"]) == ("replaced", 2)
    assert identity(one)[0] != before[0]
    assert airflow_1_runs.state(one, "dummy", "first-run") == "success"


def begin(one: Project, run_id: str) -> None:
    """Start a run and wait until its long task is under way."""
    airflow_1_runs.trigger(one, "slow", run_id)
    eventually(
        lambda: airflow_1_runs.tasks(one, "slow", run_id).get("sleep", ("", 0))[0] == "running",
        seconds=120,
        what="the long task runs",
    )


def test_what_runs_is_waited_for_where_the_pod_is_replaced(one: Project) -> None:
    begin(one, "waited-for")
    one.write("dags/slow.py", SLOW + "\n# changed\n")
    result = one.deployer("up", "--output", "json")
    assert result.code == 0, result
    assert "waiting for 1 running task: slow.sleep of waited-for" in result.stderr, result
    assert (result.json["pod"], result.json["interrupted"]) == ("replaced", [])
    assert airflow_1_runs.wait(one, "slow", "waited-for") == "success"
    assert airflow_1_runs.tasks(one, "slow", "waited-for")["sleep"] == ("success", 1)


def test_a_killed_pod_loses_nothing(one: Project) -> None:
    begin(one, "killed")
    uid = one.pod()["metadata"]["uid"]

    one.cluster.delete(POD, one.names.namespace, one.names.pod, uid=uid, grace_seconds=0)

    one.wait_for_new_pod(uid)
    assert airflow_1_runs.wait(one, "slow", "killed") == "success"
    assert airflow_1_runs.tasks(one, "slow", "killed") == {
        "quick": ("success", 1),
        "sleep": ("success", 2),
        "last": ("success", 1),
    }
    assert airflow_1_runs.state(one, "dummy", "first-run") == "success"


def test_down_keeps_the_data(one: Project) -> None:
    down = one.deployer("down", "--output", "json")
    assert down.code == 0, down
    assert [one.has(what) for what in ("StatefulSet", "pod", "claim", "Secret")] == [False, False, True, True]
