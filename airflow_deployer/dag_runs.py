"""Running a DAG, or one task of it, again after each change, and showing what its tasks log.

Through Airflow's own scheduler, so that what runs is what production would run. One task is run again by clearing it in
a run of before: the results of the tasks above it are still there.
"""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from airflow_deployer.airflow_api import AirflowApi, TaskTry
from airflow_deployer.errors import AirflowError, DeployerError
from airflow_deployer.save_loop import View, in_project
from airflow_deployer.task_logs import TaskLogEntry

_POLL_SECONDS = 0.3
_LAST_LINES_SECONDS = 0.7
# Where the base image has Airflow.
_OWN_FRAMES = ("/opt/airflow/", "/usr/lib/python3")
_WRONG_LEVELS = ("warning", "error", "critical")
_FINAL_STATES = frozenset({"success", "failed", "upstream_failed", "skipped", "removed"})
# States of a try that has a log of its own.
_LOGGING_STATES = frozenset({"running", "success", "failed", "up_for_retry", "up_for_reschedule", "deferred"})
# Airflow writes its own doings into each log between these.
_FOLDS = tuple(
    f"::group::{title}"
    for title in (
        "Log message source details",
        "Pre Execute",
        "Post Execute",
        # Airflow 2's.
        "Pre task execution logs",
        "Post task execution logs",
    )
)
_END_OF_FOLD = "::endgroup::"
# Each look at the log of a running task has its price in the pod.
_LOG_SECONDS = 1.0


class RunView(View, Protocol):
    """Where runs tell what happens; `console.Console` is one."""

    def log(self, component: str, level: str, text: str) -> None:
        """Tell a line of a task's log."""


@dataclass(frozen=True)
class Target:
    """What is to be run: a DAG, and one task of it or None for all of it."""

    dag_id: str
    task_id: str | None

    def __str__(self) -> str:
        return self.dag_id if self.task_id is None else f"{self.dag_id}.{self.task_id}"


def find_target(api: AirflowApi, text: str) -> Target:
    """Find out what `DAG` or `DAG.TASK` means: both ids may have dots themselves, and the longest DAG id wins.

    Raises:
        AirflowError: there is no such DAG.
    """
    dag_id, task_id = text, None
    while True:
        if api.dag(dag_id) is not None:
            return Target(dag_id, task_id)
        dag_id, dot, _ = dag_id.rpartition(".")
        if not dot:
            raise AirflowError(
                f"Cannot run {text}: there is no such DAG.", hint=f"one of {_some(api)}, with a task as DAG.TASK"
            )
        task_id = text[len(dag_id) + 1 :]


def _some(api: AirflowApi) -> str:
    return ", ".join(dag.dag_id for dag in api.dags()[:5]) or "none that there are: Airflow lists no DAGs"


class Rerun:
    """Runs one target again and again, one run at a time, in a thread of its own.

    Args:
        connect: makes a client of Airflow's API that is logged in.
        text: `DAG` or `DAG.TASK`.
        view: told what happens.
    """

    def __init__(self, connect: Callable[[], AirflowApi], text: str, view: RunView) -> None:
        self._connect = connect
        self._text = text
        self._view = view
        self._wanted = threading.Event()
        self._ended = False
        self._task_run: str | None = None
        self._thread = threading.Thread(target=self._work, name="rerun", daemon=True)
        self._thread.start()

    def start(self) -> None:
        """Run it once more; a run of ours that is under way is ended."""
        self._wanted.set()

    def stop(self) -> None:
        """Stop following; a run that is under way goes on in Airflow."""
        self._ended = True
        self._wanted.set()
        self._thread.join(timeout=2 * _POLL_SECONDS)

    def _work(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._ended:
                return
            try:
                self._run()
            except DeployerError as error:
                hint = [f"next: {error.hint}"] if error.hint else []
                self._view.event("run_error", error.message, mark="x", details=hint)

    def _run(self) -> None:
        api = self._connect()
        target = find_target(api, self._text)
        dag = api.dag(target.dag_id)
        if dag is not None and dag.is_paused:
            api.unpause(target.dag_id)
            self._view.event(
                "unpaused", f"{target.dag_id} was paused and is no more: a paused DAG runs nothing", mark="!"
            )
        run_id = self._begin(api, target)
        began = time.monotonic()
        outcome = self._follow(api, target, run_id)
        if outcome is not None:
            self._view.event(
                "run_ended",
                f"{target} {outcome} after {time.monotonic() - began:.1f} s",
                mark="✓" if outcome == "success" else "x",
                run=run_id,
                state=outcome,
            )
        elif not self._ended and target.task_id is None:
            api.fail_run(target.dag_id, run_id)
            self._view.event("run_replaced", f"ended {run_id}, the next save has come", mark="!", run=run_id)

    def _begin(self, api: AirflowApi, target: Target) -> str:
        """Start a run, or clear the task in the run of before; return the run's id."""
        if target.task_id is not None and self._task_run is not None:
            tries = api.task_tries(target.dag_id, self._task_run)
            if any(each.task_id == target.task_id and each.state in _LOGGING_STATES for each in tries):
                api.clear_task(target.dag_id, self._task_run, target.task_id)
                self._view.event("run_started", f"running {target} again in {self._task_run}", mark=">")
                return self._task_run
        now = datetime.datetime.now(datetime.timezone.utc)
        run_id = f"dev__{now.isoformat(timespec='milliseconds')}"
        api.trigger(target.dag_id, run_id)
        above = ", with the tasks above it" if target.task_id is not None else ""
        self._view.event("run_started", f"running {target}{above}: {run_id}", mark=">", run=run_id)
        self._task_run = run_id
        return run_id

    def _follow(self, api: AirflowApi, target: Target, run_id: str) -> str | None:
        """Show logs and states until the end; return the outcome, or None when another run is wanted first."""
        logs = _Logs(api, target, run_id, self._view)
        while not self._wanted.wait(_POLL_SECONDS):
            # In this order: what ends between the two is seen in the next round.
            state = api.run_state(target.dag_id, run_id)
            tries = api.task_tries(target.dag_id, run_id)
            if target.task_id is not None:
                tries = [each for each in tries if each.task_id == target.task_id]
                if not tries:
                    raise AirflowError(f"Cannot run {target}: the DAG {target.dag_id} has no such task.")
                states = {each.state for each in tries}
                state = "" if states - _FINAL_STATES else next((s for s in states if s != "success"), "success") or ""
            if state in _FINAL_STATES:
                # What a task wrote last may reach its log after its end is known.
                time.sleep(_LAST_LINES_SECONDS)
                logs.show(tries, last=True)
                return state
            logs.show(tries)
        return None


class _Logs:
    """The logs of one run's tasks, as far as they were shown."""

    def __init__(self, api: AirflowApi, target: Target, run_id: str, view: RunView) -> None:
        self._api = api
        self._target = target
        self._run_id = run_id
        self._view = view
        self._positions: dict[tuple[str, int, int], str | None] = {}
        self._told: set[tuple[str, int, int]] = set()
        self._ended: set[tuple[str, int, int]] = set()
        self._folded: set[tuple[str, int, int]] = set()
        self._looked = 0.0

    def show(self, tries: list[TaskTry], *, last: bool = False) -> None:
        """Show what is new of every task that runs or has run; the end of one not at the first sight of it."""
        due = time.monotonic() - self._looked >= _LOG_SECONDS
        if due:
            self._looked = time.monotonic()
        for each in tries:
            key = (each.task_id, each.map_index, each.try_number)
            if each.state not in _LOGGING_STATES or key in self._told or not (due or each.state in _FINAL_STATES):
                continue
            if each.state in _FINAL_STATES and key not in self._ended and not last:
                self._ended.add(key)
                continue
            for line in self._new_lines(key, each):
                self._view.log(_name(each), line.level or "info", line.text)
                for detail in _of_the_project(line.error):
                    self._view.log(_name(each), "error", f"  {detail}")
            if each.state in _FINAL_STATES or each.state == "up_for_retry":
                self._told.add(key)
                took = f" after {each.seconds:.1f} s" if each.seconds is not None else ""
                self._view.log(_name(each), "info" if each.state == "success" else "warning", f"{each.state}{took}")

    def _new_lines(self, key: tuple[str, int, int], task: TaskTry) -> Iterator[TaskLogEntry]:
        entries, position = self._api.task_log(self._target.dag_id, self._run_id, task, self._positions.get(key))
        self._positions[key] = position
        for entry in entries:
            if entry.printed:
                yield entry
            elif entry.text.startswith(_FOLDS):
                self._folded.add(key)
            elif entry.text.startswith(_END_OF_FOLD):
                self._folded.discard(key)
            elif key not in self._folded or entry.level in _WRONG_LEVELS:
                yield entry


def _of_the_project(error: Sequence[str]) -> Iterator[str]:
    """The lines of an error without Airflow's own frames, with paths as they are in the project."""
    return (in_project(line) for line in error if not line.startswith(_OWN_FRAMES))


def _name(task: TaskTry) -> str:
    return task.task_id if task.map_index < 0 else f"{task.task_id}[{task.map_index}]"
