"""The side of `deployer`: a project folder and its deployment in a namespace of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airflow_deployer.airflow_profiles import PROFILES, Profile
from airflow_deployer.credentials import POSTGRES_DATABASE, POSTGRES_USER
from bench.airflow_account import Database, save_at_any_moment
from bench.programs import Kubectl, deployer_command, environment, failed, run

ROOT = Path(__file__).resolve().parents[1]
EDITED = "edited"
"""The DAG that is edited; its description tells the versions apart."""

# As every new DAG it is paused, so that no series minds that it has no schedule of its own; Airflow 1.10 wants it in a
# variable.
_DAG = """from datetime import datetime

from airflow import DAG

try:
    from airflow.providers.standard.operators.empty import EmptyOperator
except ImportError:
    from airflow.operators.dummy_operator import DummyOperator as EmptyOperator

with DAG(dag_id="{dag_id}", start_date=datetime(2026, 1, 1), description="{description}") as dag:
    EmptyOperator(task_id="first") >> EmptyOperator(task_id="second")
"""


def dag_file(dag_id: str, description: str) -> str:
    """The text of a DAG file of two tasks, for every series of Airflow."""
    return _DAG.format(dag_id=dag_id, description=description)


def write_dags(folder: Path, *, files: int | None = None) -> None:
    """Fill `folder/dags`: the repository's own DAGs and the one that is edited, or so many files in all."""
    dags = folder / "dags"
    if files is None:
        shutil.copytree(ROOT / "dags", dags, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        dags.mkdir()
        for index in range(files - 1):
            (dags / f"dag_{index:04}.py").write_text(dag_file(f"dag_{index:04}", "never edited"), encoding="utf-8")
    (dags / f"{EDITED}.py").write_text(dag_file(EDITED, "first"), encoding="utf-8")


def write_include(folder: Path, *, megabytes: int) -> None:
    """Fill `folder/include` with files of one megabyte that do not compress."""
    include = folder / "include"
    include.mkdir()
    for index in range(megabytes):
        (include / f"table_{index:03}.bin").write_bytes(os.urandom(1_000_000))


@dataclass
class Project:
    """A project folder and where it is deployed."""

    folder: Path
    namespace: str
    kubectl: Kubectl
    profile: Profile
    env: dict[str, str]
    database: Database
    edits: int = 0

    def deployer(self, *arguments: str) -> str:
        """Run `deployer` in the folder and return its standard output."""
        return run([deployer_command(), *arguments], folder=self.folder, env=self.env)

    def up(self, *arguments: str) -> Any:
        """Run `deployer up` and return its report."""
        return json.loads(self.deployer("up", "--output", "json", *arguments))

    def edit(self) -> str:
        """Save a new version of the edited DAG and return its description."""
        self.edits += 1
        # With the namespace: content of an earlier run would be in the registry already.
        description = f"edit {self.edits} of {self.namespace}"
        (self.folder / "dags" / f"{EDITED}.py").write_text(dag_file(EDITED, description), encoding="utf-8")
        return description

    def add(self) -> tuple[str, str]:
        """Save a new DAG file and return its DAG's id and description."""
        self.edits += 1
        dag_id, description = f"new_{self.edits}", f"new {self.edits} of {self.namespace}"
        (self.folder / "dags" / f"{dag_id}.py").write_text(dag_file(dag_id, description), encoding="utf-8")
        return dag_id, description

    def configure(self, settings: str = "") -> None:
        """Write `deployer.toml`: the version of Airflow, and the text of other tables."""
        text = f'[airflow]\nversion = "{self.profile.locked}"\n{settings}'
        (self.folder / "deployer.toml").write_text(text, encoding="utf-8")

    def up_with_edit(self) -> float:
        """Seconds from a saved edit until `deployer up` has ended and Airflow has parsed it."""
        began = time.monotonic()
        description = self.edit()
        self.deployer("up")
        self.database.wait_parsed(EDITED, description, seconds=60)
        return time.monotonic() - began

    def save_to_parsed(self) -> float:
        """Seconds from a saved edit until Airflow has parsed it; `deployer dev` must run."""
        save_at_any_moment()
        began = time.monotonic()
        self.database.wait_parsed(EDITED, self.edit(), seconds=60)
        return time.monotonic() - began

    def new_to_parsed(self) -> float:
        """Seconds from a saved new file until Airflow has parsed it; `deployer dev` must run."""
        save_at_any_moment()
        began = time.monotonic()
        self.database.wait_parsed(*self.add(), seconds=60)
        return time.monotonic() - began

    @contextlib.contextmanager
    def dev(self) -> Iterator[None]:
        """Run `deployer dev` for the time of the block; it begins once a first saved file has arrived.

        Raises:
            ProgramError: it ended, or nothing arrives.
        """
        log = self.folder.parent / "dev.log"
        with log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen(
                [deployer_command(), "dev", "--output", "json"],
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
            try:
                deadline = time.monotonic() + 300
                while '{"event": "watching"' not in log.read_text(encoding="utf-8"):
                    if process.poll() is not None or time.monotonic() > deadline:
                        what = f"deployer dev does not watch (exit code {process.poll()})"
                        raise failed(what, log.read_text(encoding="utf-8"))
                    time.sleep(0.1)
                self.database.wait_parsed(EDITED, self.edit(), seconds=60)
                yield
            finally:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


@contextlib.contextmanager
def project(
    kubectl: Kubectl, profile: Profile = PROFILES[0], *, files: int | None = None, megabytes: int = 0
) -> Iterator[Project]:
    """A project that is not deployed yet; at the end its deployment is removed.

    Args:
        profile: of the series whose newest release is deployed.
        files: how many DAG files; None for the repository's own and the edited one.
        megabytes: of other content in `include/`.
    """
    with tempfile.TemporaryDirectory() as top, kubectl.namespace() as namespace:
        folder = Path(top) / "project"
        folder.mkdir()
        write_dags(folder, files=files)
        if megabytes:
            write_include(folder, megabytes=megabytes)
        env = environment(
            DEPLOYER_CONTEXT=kubectl.context,
            DEPLOYER_NAMESPACE=namespace,
            DEPLOYER_PORT_FORWARD_PORT=str(_free_port()),
            XDG_STATE_HOME=str(Path(top) / "state"),
        )
        known = Database(kubectl, namespace, user=POSTGRES_USER, name=POSTGRES_DATABASE)
        made = Project(folder, namespace, kubectl, profile, env, known)
        made.configure()
        try:
            yield made
        finally:
            known.close()
            made.deployer("port-forward", "--stop")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
