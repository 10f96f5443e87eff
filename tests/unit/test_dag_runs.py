"""Running a DAG or a task again and again: what is asked of Airflow, and what is shown. A stand-in plays Airflow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from airflow_deployer import dag_runs
from airflow_deployer.airflow_api import AirflowApi, TaskTry
from airflow_deployer.airflow_profiles import AIRFLOW_3
from airflow_deployer.dag_runs import Rerun, Target, find_target
from airflow_deployer.errors import AirflowError
from airflow_deployer.running_airflow import Dag
from airflow_deployer.task_logs import TaskLogEntry


class Airflow(AirflowApi):
    """An Airflow whose runs are in the states that the test sets."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1", AIRFLOW_3)
        self.paused = {"orders": True, "team.orders": False}
        self.state = "running"
        self.tries: list[TaskTry] = []
        self.logs: dict[str, list[TaskLogEntry]] = {}
        self.asked: list[str] = []

    def dags(self) -> list[Dag]:
        return [Dag(dag_id, paused, None, None) for dag_id, paused in self.paused.items()]

    def dag(self, dag_id: str) -> Dag | None:
        return next((dag for dag in self.dags() if dag.dag_id == dag_id), None)

    def unpause(self, dag_id: str) -> None:
        self.paused[dag_id] = False
        self.asked.append(f"unpause {dag_id}")

    def trigger(self, dag_id: str, run_id: str) -> None:
        assert run_id.startswith("dev__")
        self.asked.append(f"trigger {dag_id}")

    def run_state(self, dag_id: str, run_id: str) -> str:
        return self.state

    def fail_run(self, dag_id: str, run_id: str) -> None:
        self.asked.append(f"fail {dag_id}")

    def task_tries(self, dag_id: str, run_id: str) -> list[TaskTry]:
        return self.tries

    def clear_task(self, dag_id: str, run_id: str, task_id: str) -> None:
        self.asked.append(f"clear {dag_id}.{task_id}")

    def task_log(
        self, dag_id: str, run_id: str, task: TaskTry, position: str | None
    ) -> tuple[list[TaskLogEntry], str | None]:
        entries = self.logs.get(task.task_id, [])
        return entries[int(position or 0) :], str(len(entries))


class Seen:
    """What the user sees."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.lines: list[tuple[str, str, str]] = []

    def event(self, kind: str, message: str, *, mark: str = "", details: Sequence[str] = (), **fields: object) -> None:
        self.events.append((kind, message))

    def log(self, component: str, level: str, text: str) -> None:
        self.lines.append((component, level, text))

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dag_runs, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(dag_runs, "_LOG_SECONDS", 0.0)
    monkeypatch.setattr(dag_runs, "_LAST_LINES_SECONDS", 0.01)


@contextmanager
def running(airflow: Airflow, text: str) -> Iterator[tuple[Rerun, Seen]]:
    seen = Seen()
    rerun = Rerun(lambda: airflow, text, seen)
    rerun.start()
    yield rerun, seen
    rerun.stop()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


FRAMES = (
    "/opt/airflow/lib/python3.13/site-packages/airflow/sdk/execution_time/task_runner.py:1579 in run",
    "/home/airflow/content/versions/f892a77d2e54/dags/orders.py:3 in load",
    "KeyError: 'x'",
)


def line(text: str, level: str = "info", error: tuple[str, ...] = ()) -> TaskLogEntry:
    return TaskLogEntry(text, level, error)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("orders", Target("orders", None)),
        ("orders.load", Target("orders", "load")),
        ("orders.group.load", Target("orders", "group.load")),
        ("team.orders", Target("team.orders", None)),
        ("team.orders.load", Target("team.orders", "load")),
    ],
)
def test_what_the_text_means(text: str, target: Target) -> None:
    assert find_target(Airflow(), text) == target


def test_a_dag_that_is_not_there() -> None:
    with pytest.raises(AirflowError, match=r"Cannot run sales\.load: there is no such DAG") as caught:
        find_target(Airflow(), "sales.load")
    assert "orders, team.orders" in caught.value.hint


def test_a_paused_dag_is_unpaused_and_run_with_its_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    airflow = Airflow()
    airflow.tries = [TaskTry("load", 3, "running", 1, None), TaskTry("later", -1, None, 0, None)]
    airflow.logs["load"] = [
        line("::group::Pre Execute"),
        line("Worker startup parse complete"),
        line("careful", "warning"),
        TaskLogEntry("printed meanwhile", "info", (), printed=True),
        line("::endgroup::"),
        line("12 of 40"),
    ]
    with running(airflow, "orders") as (_, seen):
        until(lambda: len(seen.lines) == 3)
        airflow.logs["load"].append(line("Boom", "error", FRAMES))
        airflow.tries = [TaskTry("load", 3, "failed", 1, 1.25)]
        airflow.state = "failed"
        until(lambda: "run_ended" in seen.kinds)
    assert airflow.asked == ["unpause orders", "trigger orders"]
    assert seen.kinds == ["unpaused", "run_started", "run_ended"]
    assert seen.events[-1][1].startswith("orders failed after 0.")
    assert seen.lines == [
        ("load[3]", "warning", "careful"),
        ("load[3]", "info", "printed meanwhile"),
        ("load[3]", "info", "12 of 40"),
        ("load[3]", "error", "Boom"),
        ("load[3]", "error", "  dags/orders.py:3 in load"),
        ("load[3]", "error", "  KeyError: 'x'"),
        ("load[3]", "warning", "failed after 1.2 s"),
    ]


def test_the_next_save_ends_the_run_before() -> None:
    airflow = Airflow()
    with running(airflow, "team.orders") as (rerun, seen):
        until(lambda: "run_started" in seen.kinds)
        time.sleep(0.05)
        rerun.start()
        until(lambda: seen.kinds.count("run_started") == 2)
    assert airflow.asked == ["trigger team.orders", "fail team.orders", "trigger team.orders"]


def test_a_task_is_run_again_in_the_run_of_before() -> None:
    airflow = Airflow()
    airflow.tries = [TaskTry("load", -1, "success", 1, 0.5), TaskTry("after", -1, "running", 1, None)]
    with running(airflow, "team.orders.load") as (rerun, seen):
        for count in (1, 2):
            until(lambda count=count: seen.kinds.count("run_ended") == count)  # type: ignore[misc]
            rerun.start()
        until(lambda: seen.kinds.count("run_ended") == 3)
    assert airflow.asked == ["trigger team.orders", "clear team.orders.load", "clear team.orders.load"]
    assert seen.events[-1][1].startswith("team.orders.load success after ")


def test_a_task_that_never_ran_gets_a_new_run() -> None:
    airflow = Airflow()
    airflow.tries = [TaskTry("load", -1, "upstream_failed", 0, None)]
    with running(airflow, "team.orders.load") as (rerun, seen):
        until(lambda: "run_ended" in seen.kinds)
        rerun.start()
        until(lambda: seen.kinds.count("run_ended") == 2)
    assert airflow.asked == ["trigger team.orders"] * 2


def test_a_task_that_is_not_there_is_told() -> None:
    airflow = Airflow()
    airflow.tries = [TaskTry("load", -1, "success", 1, 0.5)]
    with running(airflow, "team.orders.lod") as (_, seen):
        until(lambda: "run_error" in seen.kinds)
    assert seen.events[-1] == ("run_error", "Cannot run team.orders.lod: the DAG team.orders has no such task.")


def test_an_end_leaves_the_run_alone() -> None:
    airflow = Airflow()
    with running(airflow, "team.orders") as (_, seen):
        until(lambda: "run_started" in seen.kinds)
    time.sleep(0.05)
    assert airflow.asked == ["trigger team.orders"]
