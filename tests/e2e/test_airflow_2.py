"""Airflow 2 through the whole flow, in one deployment that all tests share: up, gate, hot deploy, dev, a killed pod."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from airflow_deployer.cluster import POD
from tests.e2e import airflow_runs, test_dev, test_durability, test_hot_deploy
from tests.e2e.browser import chromium, log_in, open_dag
from tests.e2e.conftest import ROOT, Project, eventually
from tests.e2e.test_hot_deploy import identity, running, status

pytestmark = pytest.mark.e2e

VERSION = "2.11.2"


def in_airflow_2(source: str) -> str:
    """A DAG file of another module's test, with Airflow 2's imports."""
    return source.replace(
        "from airflow.sdk import DAG, task\n", "from airflow import DAG\nfrom airflow.decorators import task\n"
    )


@pytest.fixture(scope="module")
def two(shared_project: Project) -> Iterator[Project]:
    """A deployment of Airflow 2."""
    shared_project.write("deployer.toml", f'[airflow]\nversion = "{VERSION}"\n')
    shared_project.write("dags/orders_report.py", (ROOT / "dags" / "orders_report.py").read_text(encoding="utf-8"))
    shared_project.up()
    yield shared_project


def write_slow(project: Project, text: str, word: str, seconds: int) -> None:
    """A DAG of two tasks whose every import is of one word."""
    project.write("dags/slow.py", in_airflow_2(test_hot_deploy.slow(text, seconds)))
    project.write("dags/late.py", f"NAME = '{text}'\n")
    project.write("include/words.py", f"WORD = '{word}'\n")


def test_it_is_up_and_a_second_up_does_nothing(two: Project) -> None:
    again = two.up()
    assert (again["changes"], again["pod"], again["content"]) == ({}, "kept", "unchanged")
    assert (again["airflow_version"], again["dags"], again["import_errors"]) == (VERSION, 2, [])
    told = status(two)
    assert told["healthy"] is True
    assert told["airflow_version"] == VERSION
    assert told["components"] == dict.fromkeys(
        ("web", "metadatabase", "scheduler", "dag_processor", "triggerer"), "healthy"
    )
    assert told["content_scope"] == "task"
    shown = two.deployer("status").stdout
    assert "live for every task that starts now (Airflow 2 has no DAG versions)" in " ".join(shown.split())
    assert two.secret("admin-password") not in shown
    assert two.api().version() == VERSION


def test_a_file_that_does_not_import_is_refused_and_the_old_content_stays(two: Project) -> None:
    before = status(two)["live_content_id"]
    two.write("dags/broken.py", "from airflow import DAG\nimport nothing_like_it\n")
    refused = two.deployer("up")
    assert refused.code == 1, refused
    assert "dags/broken.py, line 2: ModuleNotFoundError: No module named 'nothing_like_it'" in refused.stderr
    (two.folder / "dags/broken.py").unlink()
    assert status(two)["live_content_id"] == before


def test_new_content_is_live_for_the_next_task_and_nothing_restarts(two: Project) -> None:
    write_slow(two, "one", "alpha", 20)
    assert two.up()["content"] == "switched"
    before = identity(two)
    api = two.api()
    airflow_runs.trigger(api, "slow", "began-before")
    eventually(lambda: running(two, "began-before", "first"), seconds=60, what="the task runs")

    write_slow(two, "two", "beta", 0)
    second = two.up()
    assert (second["content"], second["pod"]) == ("switched", "kept")
    assert running(two, "began-before", "first")
    assert identity(two) == before

    # The task that runs finishes on what it began with; the next one, in the same run, is of the new content.
    assert airflow_runs.wait(api, "slow", "began-before") == "success"
    assert airflow_runs.result(api, "slow", "began-before", "first") == "alpha-one"
    assert airflow_runs.result(api, "slow", "began-before", "second") == "alpha-one/beta-two-two"
    assert airflow_runs.tasks(api, "slow", "began-before")[("first", -1)] == ("success", 1)
    assert identity(two) == before


def test_saves_are_live_and_a_task_is_run_again_after_each(two: Project) -> None:
    def save(text: str) -> None:
        two.write("dags/orders.py", in_airflow_2(test_dev.DAG.format(dag_id="orders", text=text)))

    save("one")
    synced = two.deployer("sync", "--output", "json")
    assert synced.code == 0, synced
    assert synced.json["changed"] is True
    with test_dev.dev(two, "--run", "orders.speak") as running:
        running.next("log", 120, lambda event: event["component"] == "speak" and event["text"] == "says one")
        assert running.next("run_ended", 60)["state"] == "success"
        save("two")
        running.next("live", 10)
        running.next("log", 120, lambda event: event["component"] == "speak" and event["text"] == "says two")
        assert running.next("run_ended", 60)["state"] == "success"
        assert running.end() == 0, running
    assert test_dev.description(two, "orders") == "two"


def test_a_person_logs_in_and_sees_the_dag(two: Project, tmp_path: Path) -> None:
    with chromium(tmp_path / "profile") as browser:
        log_in(browser, f"http://localhost:{two.port}/home", two.secret("admin-password"))
        open_dag(browser, "dummy", "airflow-2")


def test_two_hundred_connections_are_served(two: Project) -> None:
    def page(_: int) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{two.port}/login/", timeout=60) as answer:
            return int(answer.status)

    with ThreadPoolExecutor(200) as pool:
        assert set(pool.map(page, range(200))) == {200}
    # Neither their ends nor what the forward keeps open for the next request hold up anybody.
    assert page(0) == 200


def test_a_killed_pod_loses_nothing(two: Project) -> None:
    airflow_runs.trigger(two.api(), "dummy", "earlier")
    assert airflow_runs.wait(two.api(), "dummy", "earlier") == "success"
    before = test_durability.begin(two, "killed")
    uid = two.pod()["metadata"]["uid"]

    two.cluster.delete(POD, two.names.namespace, two.names.pod, uid=uid, grace_seconds=0)

    two.wait_for_new_pod(uid)
    test_durability.finish(two, "killed", before, reconcile_tries=2)
    assert airflow_runs.state(two.api(), "dummy", "earlier") == "success"


def test_down_keeps_the_data(two: Project) -> None:
    down = two.deployer("down", "--output", "json")
    assert down.code == 0, down
    assert [two.has(what) for what in ("StatefulSet", "pod", "claim", "Secret")] == [False, False, True, True]
