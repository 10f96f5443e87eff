"""The steps of an upgrade around the rollout: tasks end, Airflow stops, the database is backed up; later the counts.

Airflow stays stopped from the backup on until the old pod is gone: nothing happens that the backup does not hold.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from airflow_deployer import backup, backup_file, credentials, draining
from airflow_deployer.api_streams import in_background
from airflow_deployer.connection import Session
from airflow_deployer.errors import BackupError, UpgradeError
from airflow_deployer.pod_postgres import Postgres
from airflow_deployer.progress import Progress, Step

_HISTORY = ("dag_run", "task_instance")
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class History:
    """What must survive: the number of DAG runs and of task instances."""

    dag_runs: int
    task_instances: int

    def __str__(self) -> str:
        return f"{self.dag_runs:,} DAG runs, {self.task_instances:,} task instances"


@contextlib.contextmanager
def stopped_and_backed_up(
    session: Session, file: Path, ask: draining.Ask, progress: Progress, *, now: bool
) -> Iterator[History]:
    """Have Airflow stopped and its database in `file`, for the time of the block, and Postgres running.

    Args:
        ask: has the Airflow in the pod answer, for the time of a block.
        now: do not wait for running tasks.

    Raises:
        RolloutError: Airflow does not stop.
        BackupError: the backup failed; Airflow starts again.
    """
    drain = float(session.settings.timeouts.drain)
    stack = contextlib.AsyncExitStack()
    with in_background(session.context.name, session.context.kubeconfig) as (api, submit):
        with progress.step("Stop") as step, draining.watched(ask, step, now=now) as observed:
            if observed.tasks:
                progress.info(draining.told(observed.tasks, now=now))
            submit(stack.enter_async_context(Postgres(api, session.names).held(drain=drain, now=now))).result()
            step.done("Airflow has stopped, Postgres runs on")
        try:
            backup.write(session, file, progress)
            with backup_file.opened(file) as made:
                tables = made.manifest.tables
            yield History(*(tables[f"public.{name}"].rows for name in _HISTORY))
        finally:
            # The pod may be gone by now, and the hold with it.
            with contextlib.suppress(Exception):
                submit(stack.aclose()).result(timeout=10.0)


def count(session: Session) -> History:
    """Count what is in the database now."""

    async def run(postgres: Postgres) -> History:
        async with postgres.psql(credentials.POSTGRES_DATABASE) as psql:
            return History(*[int(await psql.value(f"SELECT count(*) FROM {name}")) for name in _HISTORY])  # noqa: S608

    return backup.with_postgres(session, run)


def compare(before: History, after: History) -> None:
    """Make sure that nothing was lost.

    Raises:
        UpgradeError: there are fewer of something than before.
    """
    if after.dag_runs < before.dag_runs or after.task_instances < before.task_instances:
        raise UpgradeError(f"The history is not whole: {before} before, {after} after the migration.")


def wait_for_postgres(session: Session, step: Step) -> None:
    """Wait until the Postgres of a new pod answers, whatever its Airflow does.

    Raises:
        BackupError: it does not within `timeouts.ready`.
    """

    async def ask(postgres: Postgres) -> None:
        async with postgres.psql(credentials.POSTGRES_DATABASE) as psql:
            await psql.value("SELECT 1")

    step.update("waiting for Postgres")
    deadline = time.monotonic() + float(session.settings.timeouts.ready)
    while True:
        try:
            return backup.with_postgres(session, ask)
        except BackupError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_SECONDS)
