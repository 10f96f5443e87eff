"""Airflow 2's scheduler, each of whose tasks runs on the one version of the content that was live when it started.

    python -m airflow_deployer_pod.folder_scheduler

A task is a process that LocalExecutor forks and that then does what `airflow tasks run` does: it imports its DAG file.
Before that it looks up the live version, and from then on takes everything from there; a switch in between, or later,
changes nothing for it. It also holds that version (`Store.hold_live`), so that it stays on the volume.
"""

from __future__ import annotations

import sys
from typing import Any

from airflow_deployer_pod.content_store import Store
from airflow_deployer_pod.import_root import use_version

_held: list[int] = []
"""The descriptor that holds the version of this process; the process that it forks for the task inherits it."""


def use_live_version(sub_command: str, **_: Any) -> None:
    """Called by Airflow before a command (`airflow/utils/cli_action_loggers.py`): settle which content a task sees."""
    if sub_command != "task_run" or _held:
        return
    from airflow import settings

    store = Store()
    version, descriptor = store.hold_live()
    _held.append(descriptor)
    root = store.root(version)
    settings.DAGS_FOLDER = str(root / "dags")
    use_version(root, store.folder)


def main() -> None:
    """Run the scheduler until it is told to end."""
    from airflow.__main__ import main as airflow
    from airflow.utils import cli_action_loggers

    cli_action_loggers.register_pre_exec_callback(use_live_version)
    sys.argv = ["airflow", "scheduler", "--skip-serve-logs"]
    airflow()


if __name__ == "__main__":
    main()
