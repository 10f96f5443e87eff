"""The blog's promise: killing the pod in the middle of a DAG run loses nothing."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import pytest

from airflow_deployer.cluster import POD
from tests.e2e import airflow_runs
from tests.e2e.conftest import ROOT, Project, eventually

DAG = "orders_report"
SLOW_SECONDS = 25
MAPPED = 12


@pytest.fixture
def orders(project: Project) -> Project:
    """The realistic DAG, deployed."""
    project.write("dags/orders_report.py", (ROOT / "dags" / "orders_report.py").read_text(encoding="utf-8"))
    project.up()
    return project


def expected_report() -> dict[str, Any]:
    """The run's result, computed from the DAG's own source without Airflow."""
    stub = types.ModuleType("airflow.sdk")

    def passes_through(*arguments: Any, **_: Any) -> Any:
        return arguments[0] if arguments and callable(arguments[0]) else lambda function: function

    vars(stub).update(Param=passes_through, task=passes_through, get_current_context=None)
    vars(stub).update(dag=lambda **_: lambda function: lambda: None)
    before = {name: sys.modules.get(name) for name in ("airflow", "airflow.sdk")}
    sys.modules.update({"airflow": types.ModuleType("airflow"), "airflow.sdk": stub})
    try:
        spec = importlib.util.spec_from_file_location("orders_report", ROOT / "dags" / "orders_report.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for name, found in before.items():
            sys.modules.pop(name)
            if found is not None:
                sys.modules[name] = found
    report: dict[str, Any] = module.expected_report(1, SLOW_SECONDS)
    return report


def begin(project: Project, run_id: str) -> airflow_runs.Tries:
    """Start a run and wait until its long task is under way; return the task states of that moment."""
    api = project.api()
    airflow_runs.trigger(api, DAG, run_id, {"slow_seconds": SLOW_SECONDS})

    def under_way() -> airflow_runs.Tries | None:
        now = airflow_runs.tasks(api, DAG, run_id)
        return now if now.get(("reconcile", -1), ("", 0))[0] == "running" else None

    found: airflow_runs.Tries = eventually(under_way, seconds=120, what="the long task runs")
    return found


def finish(project: Project, run_id: str, before: airflow_runs.Tries, *, reconcile_tries: int) -> None:
    """Wait for the run's success and compare it with the moment of the interruption."""
    api = project.api()
    assert airflow_runs.wait(api, DAG, run_id, seconds=240) == "success", airflow_runs.tasks(api, DAG, run_id)
    after = airflow_runs.tasks(api, DAG, run_id)
    finished = {key: tried for key, tried in before.items() if tried[0] == "success"}
    assert len([key for key in finished if key[0] == "summarize"]) == MAPPED
    assert {key: after[key] for key in finished} == finished, "a finished task ran again"
    assert after[("summarize", 6)][1] == 2, "the flaky task needs its second try"
    assert after[("reconcile", -1)] == ("success", reconcile_tries)
    assert airflow_runs.result(api, DAG, run_id, "publish") == expected_report()
    assert "12 shops" not in airflow_runs.log(api, DAG, run_id, "summarize", map_index=0)
    assert "shop-01: 200 orders" in airflow_runs.log(api, DAG, run_id, "summarize", map_index=0)
    assert f"step {SLOW_SECONDS} of {SLOW_SECONDS}" in airflow_runs.log(
        api, DAG, run_id, "reconcile", attempt=reconcile_tries
    )


@pytest.mark.e2e
def test_a_killed_pod_loses_nothing(orders: Project) -> None:
    api = orders.api()
    airflow_runs.trigger(api, "dummy", "earlier")
    assert airflow_runs.wait(api, "dummy", "earlier") == "success"
    before = begin(orders, "killed")
    uid = orders.pod()["metadata"]["uid"]

    orders.cluster.delete(POD, orders.names.namespace, orders.names.pod, uid=uid, grace_seconds=0)

    orders.wait_for_new_pod(uid)
    finish(orders, "killed", before, reconcile_tries=2)
    assert airflow_runs.state(orders.api(), "dummy", "earlier") == "success"


@pytest.mark.e2e
def test_a_graceful_delete_and_down_and_up_lose_nothing(orders: Project) -> None:
    before = begin(orders, "deleted")
    uid = orders.pod()["metadata"]["uid"]

    orders.cluster.delete(POD, orders.names.namespace, orders.names.pod, uid=uid)

    orders.wait_for_new_pod(uid)
    # The grace period lets the running task end: it is not interrupted at all.
    finish(orders, "deleted", before, reconcile_tries=1)

    before = begin(orders, "down")
    done = orders.deployer("down", "--output", "json")
    assert done.code == 0, done
    assert not orders.has("StatefulSet")
    assert not orders.has("pod")
    assert orders.has("claim")
    assert orders.has("Secret")

    report = orders.up()
    assert report["pod"] == "created"
    finish(orders, "down", before, reconcile_tries=1)
    assert airflow_runs.state(orders.api(), DAG, "deleted") == "success"
    assert "shop-01" in airflow_runs.log(orders.api(), DAG, "deleted", "summarize", map_index=0)
