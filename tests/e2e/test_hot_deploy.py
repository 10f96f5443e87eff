"""New DAG content in the running pod: nothing restarts, runs keep their version, a failure leaves the old content."""

from __future__ import annotations

import json
from typing import Any

import pytest

from airflow_deployer.cluster import POD, STATEFUL_SET
from tests.e2e import airflow_runs
from tests.e2e.conftest import Project, eventually

pytestmark = pytest.mark.e2e

SLOW = """
import time

from airflow.sdk import DAG, task

with DAG("slow", schedule=None):
    @task
    def first() -> str:
        time.sleep(SECONDS)
        from include import words

        return words.WORD + "-TEXT"

    @task
    def second(before: str) -> str:
        import include.words
        import late

        return before + "/" + include.words.WORD + "-TEXT-" + late.NAME

    second(first())
"""


def slow(text: str, seconds: int) -> str:
    return SLOW.replace("TEXT", text).replace("SECONDS", str(seconds))


def identity(project: Project) -> tuple[str, dict[str, int]]:
    """The pod's UID and how often each container has restarted."""
    pod = project.pod()
    return pod["metadata"]["uid"], {
        status["name"]: status["restartCount"] for status in pod["status"]["containerStatuses"]
    }


def restart_count(project: Project, container: str) -> int:
    return identity(project)[1][container]


def status(project: Project) -> Any:
    return project.deployer("status", "--output", "json").json


def running(project: Project, run: str, task: str) -> bool:
    found = airflow_runs.tasks(project.api(), "slow", run)
    return found.get((task, -1), (None, 0))[0] == "running"


def test_a_run_in_flight_keeps_its_version_and_nothing_restarts(project: Project) -> None:
    project.write("dags/slow.py", slow("one", 25))
    project.write("dags/late.py", "NAME = 'one'\n")
    project.write("include/words.py", "WORD = 'alpha'\n")
    first = project.up()
    before = identity(project)
    api = project.api()
    airflow_runs.trigger(api, "slow", "began-before")
    eventually(lambda: running(project, "began-before", "first"), seconds=60, what="the task runs")

    # Everything that the run has not imported yet is changed under it.
    project.write("dags/slow.py", slow("two", 0))
    project.write("dags/late.py", "NAME = 'two'\n")
    project.write("include/words.py", "WORD = 'beta'\n")
    second = project.up()
    assert second["content"] == "switched"
    assert second["pod"] == "kept"
    assert second["image"] != first["image"]
    assert identity(project) == before
    assert running(project, "began-before", "first")
    told = status(project)
    assert told["live_content_id"] == told["content_id"] == second["content_id"]

    # A run that begins now is of the new content, and done before the old one goes on.
    airflow_runs.trigger(api, "slow", "began-after")
    assert airflow_runs.wait(api, "slow", "began-after") == "success"
    assert airflow_runs.result(api, "slow", "began-after", "second") == "beta-two/beta-two-two"
    assert airflow_runs.wait(api, "slow", "began-before") == "success"
    assert airflow_runs.result(api, "slow", "began-before", "second") == "alpha-one/alpha-one-one"
    assert airflow_runs.tasks(api, "slow", "began-before")[("first", -1)] == ("success", 1)
    runs = {
        run: api.request("GET", f"/api/v2/dags/slow/dagRuns/{run}", doing="read the run")["bundle_version"]
        for run in ("began-before", "began-after")
    }
    assert runs == {"began-before": first["content_id"][:12], "began-after": second["content_id"][:12]}
    assert identity(project) == before

    # Nothing is left to do, and a restart of the pod comes up with exactly this content.
    third = project.up()
    assert (third["changes"], third["content"], third["pod"]) == ({}, "unchanged", "kept")
    project.cluster.delete(POD, project.names.namespace, project.names.pod, uid=before[0])
    project.wait_for_new_pod(before[0])
    assert status(project)["live_content_id"] == second["content_id"]
    airflow = next(c for c in project.pod()["spec"]["containers"] if c["name"] == "airflow")
    assert airflow["image"] == second["image"]


def test_a_broken_file_stops_the_deploy_and_the_old_content_stays(project: Project) -> None:
    project.write("dags/slow.py", slow("one", 0))
    project.write("dags/late.py", "NAME = 'one'\n")
    project.write("include/words.py", "WORD = 'alpha'\n")
    first = project.up()
    before = identity(project)

    project.write("include/words.py", "WORD = 'alpha'\nraise RuntimeError('no words')\n")
    project.write(
        "dags/eager.py", "from airflow.sdk import DAG\nfrom include import words\n\ndag = DAG('eager', schedule=None)\n"
    )
    for command in ("up", "sync"):
        result = project.deployer(command)
        assert result.code == 1, result
        assert "include/words.py, line 2: RuntimeError: no words" in result.stderr
        assert "Traceback (most recent call last):\n  File" not in result.stderr.partition("error:")[0]
    assert identity(project) == before
    assert status(project)["live_content_id"] == first["content_id"]
    stateful_set = project.cluster.get(STATEFUL_SET, project.names.namespace, project.names.name)
    assert stateful_set is not None
    assert stateful_set["metadata"]["annotations"]["airflow-deployer/content-id"] == first["content_id"]

    project.write("include/words.py", "WORD = 'gamma'\n")
    fixed = project.up()
    assert (fixed["content"], fixed["dags"]) == ("switched", 3)
    assert identity(project) == before
    api = project.api()
    airflow_runs.trigger(api, "slow", "mended")
    assert airflow_runs.wait(api, "slow", "mended") == "success"
    assert airflow_runs.result(api, "slow", "mended", "first") == "gamma-one"


def test_a_sync_is_live_and_survives_restarts(project: Project) -> None:
    deployed = project.up()
    project.write("dags/hello.py", "from airflow.sdk import DAG\n\ndag = DAG('hello', schedule=None)\n")
    result = project.deployer("sync", "--output", "json")
    assert result.code == 0, result
    synced = result.json
    assert synced["changed"] is True
    assert synced["in_image"] is False
    assert "hello" in {dag.dag_id for dag in project.api().dags()}
    assert project.deployer("sync", "--output", "json").json["changed"] is False
    told = status(project)
    assert told["content_id"] == deployed["content_id"]
    assert told["live_content_id"] == synced["content_id"]
    assert "in no image yet" in project.deployer("status").stdout

    # The container restarts, then the pod is made again: what was synced stays.
    before = identity(project)
    project.shell("kill -9 -1")
    restarts = before[1]["airflow"]
    eventually(lambda: restart_count(project, "airflow") > restarts and project.is_ready(), seconds=180, what="restart")
    assert status(project)["live_content_id"] == synced["content_id"]
    project.cluster.delete(POD, project.names.namespace, project.names.pod, uid=before[0])
    project.wait_for_new_pod(before[0])
    assert status(project)["live_content_id"] == synced["content_id"]

    # A file that is removed is gone from Airflow, and `up` puts the content into an image.
    (project.folder / "dags/hello.py").unlink()
    project.write("dags/other.py", "from airflow.sdk import DAG\n\ndag = DAG('other', schedule=None)\n")
    up = project.up()
    assert up["content"] == "switched"
    assert {dag.dag_id for dag in project.api().dags()} == {"dummy", "other"}
    told = status(project)
    assert told["content_id"] == told["live_content_id"] == up["content_id"]


def test_running_tasks_are_waited_for_where_the_pod_is_replaced(project: Project) -> None:
    project.write("dags/slow.py", slow("one", 15))
    project.write("dags/late.py", "NAME = 'one'\n")
    project.write("include/words.py", "WORD = 'alpha'\n")
    project.up()
    api = project.api()
    airflow_runs.trigger(api, "slow", "waited-for")
    eventually(lambda: running(project, "waited-for", "first"), seconds=60, what="the task runs")
    uid = identity(project)[0]
    project.write("deployer.toml", "[airflow.env]\nTEAM = 'one'\n")
    result = project.deployer("up", "--output", "json")
    assert result.code == 0, result
    assert "waiting for 1 running task" in result.stderr, result
    assert (result.json["pod"], result.json["interrupted"]) == ("replaced", [])
    assert identity(project)[0] != uid
    assert airflow_runs.wait(project.api(), "slow", "waited-for") == "success"
    assert airflow_runs.tasks(project.api(), "slow", "waited-for")[("first", -1)] == ("success", 1)

    # Without the wait they are cut off, listed, and start over.
    project.write("dags/slow.py", slow("two", 40))
    project.up()
    airflow_runs.trigger(project.api(), "slow", "cut-off")
    eventually(lambda: running(project, "cut-off", "first"), seconds=60, what="the task runs")
    project.write("deployer.toml", "[airflow.env]\nTEAM = 'two'\n")
    result = project.deployer("up", "--now", "--output", "json")
    assert result.code == 0, result
    assert result.json["interrupted"] == ["slow.first of cut-off"]
    assert "cut off and start over: slow.first of cut-off" in result.stderr
    assert airflow_runs.wait(project.api(), "slow", "cut-off") == "success"
    assert airflow_runs.tasks(project.api(), "slow", "cut-off")[("first", -1)] == ("success", 2)
    assert json.dumps(result.json)
