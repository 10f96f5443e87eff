"""Airflow's DAG processor, made to follow a switch of the content at once and to never mix two versions.

    python -P -m airflow_deployer_pod.dag_processor

What it changes in `DagFileProcessorManager` of Airflow 3.3 (`airflow/dag_processing/manager.py`):

- A datagram to its socket ends the sleep of its loop, which is up to a second, and has it refresh the bundle.
- Its loop goes round once a second, when it is woken, and when a parse has ended; not for each message of a parse, with
  five queries each time. A parse that has closed its sockets but not ended yet is looked at again at once, not a second
  later.
- A DAG that its file no longer defines is gone once the file was parsed, not up to two minutes later.
- With thousands of DAG files a switch costs what changed: only that is read to see whether it may hold DAGs, and DAGs
  are compared with files only where a file has gone. At rest, what is due is looked for every 5 s, not each second.
- A file that was queued before a switch is parsed from the version after it: the queue remembers where a file was.
- What was parsed from an older version is dropped, and the file parsed again: Airflow would store it under the new one.
  A parse that is overtaken while it runs is ended, so that the correction of a file that hangs need not wait for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import selectors
import signal
import socket
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import attrs
from airflow.dag_processing.bundles.base import BaseDagBundle
from airflow.dag_processing.manager import DagFileInfo, DagFileProcessorManager
from airflow.dag_processing.processor import DagFileProcessorProcess
from airflow.models.dag import DagModel
from airflow.utils.file import might_contain_dag
from airflow.utils.session import create_session

from airflow_deployer_pod.dag_bundle import ContentBundle
from airflow_deployer_pod.import_root import use_root
from airflow_deployer_pod.wake_socket import WAKE_SOCKET

_DATAGRAM = 64
_ENDING_SECONDS = 0.005
_DUE_SECONDS = 5.0
_PURGE_SECONDS = 60.0


@attrs.define(kw_only=True)
class ContentProcessorManager(DagFileProcessorManager):  # type: ignore[misc]
    """The DAG processor's loop, for a bundle of the class `ContentBundle`."""

    wake_socket: Path = WAKE_SOCKET
    _parsed_paths: dict[DagFileInfo, Path | None] = attrs.field(factory=dict, init=False)
    _awake: bool = attrs.field(default=False, init=False)
    _dag_files: dict[tuple[str, str], bool] = attrs.field(factory=dict, init=False)
    _present: dict[str, set[Path]] = attrs.field(factory=dict, init=False)
    _looked_at: float = attrs.field(default=float("-inf"), init=False)
    _looked_for: dict[str, str | None] = attrs.field(factory=dict, init=False)
    _purged_at: float = attrs.field(default=float("-inf"), init=False)

    def prepare_process_context(self) -> None:
        """Add the socket to what the loop waits for."""
        super().prepare_process_context()
        receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        receiver.setblocking(False)
        with contextlib.suppress(FileNotFoundError):
            self.wake_socket.unlink()
        # No moment at which others could write to it.
        before = os.umask(0o177)
        try:
            receiver.bind(str(self.wake_socket))
        finally:
            os.umask(before)
        self.selector.register(receiver, selectors.EVENT_READ, (self._woken, lambda _: None))

    def _woken(self, receiver: socket.socket) -> bool:
        """Take all messages; the loop goes on by itself. True: there will be more."""
        with contextlib.suppress(BlockingIOError):
            while True:
                receiver.recv(_DATAGRAM)
        self.request_bundle_refresh([bundle.name for bundle in self._dag_bundles])
        self._awake = True
        return True

    def _service_processor_sockets(self, timeout: float | None = 1.0) -> None:
        """Serve the parses until there is something to do in the loop, at most `timeout` seconds."""
        deadline = time.monotonic() + (timeout or 0.0)
        self._awake = False
        while True:
            left = max(0.0, deadline - time.monotonic())
            # The end of a process is no event.
            ending = any(not process._open_sockets for process in self._processors.values())
            super()._service_processor_sockets(min(left, _ENDING_SECONDS) if ending else left)
            if self._awake or not left or any(process.is_ready for process in self._processors.values()):
                return

    def claim_priority_files(self) -> list[DagFileInfo]:
        """The files to parse first, looked for where they will be after the refresh that follows.

        A new file is not in the version before, and would be forgotten.
        """
        files: list[DagFileInfo] = super().claim_priority_files()
        for bundle in self._dag_bundles:
            live = bundle.store.live_version() if isinstance(bundle, ContentBundle) else None
            if live:
                path = bundle.store.root(live) / "dags"
                files = [
                    dataclasses.replace(file, bundle_path=path) if file.bundle_name == bundle.name else file
                    for file in files
                ]
        return files

    def _find_files_in_bundle(self, bundle: BaseDagBundle) -> list[Path]:
        """The DAG files of the bundle, below its path: what `list_py_file_paths` in `airflow/utils/file.py` finds."""
        manifest = bundle.store.manifest(bundle.path.parent.name) if isinstance(bundle, ContentBundle) else None
        if manifest is None or any(path.endswith("/.airflowignore") for path in manifest.files):
            found: list[Path] = super()._find_files_in_bundle(bundle)
            return found
        known, self._dag_files = self._dag_files, {}
        for path, entry in manifest.files.items():
            if path.startswith("dags/"):
                key = (path, entry.sha256)
                self._dag_files[key] = known[key] if key in known else self._is_dag_file(bundle.path.parent / path)
        return [Path(path.removeprefix("dags/")) for (path, _), found in self._dag_files.items() if found]

    def _is_dag_file(self, file: Path) -> bool:
        is_module = file.suffix == ".py" or zipfile.is_zipfile(file)
        return is_module and bool(might_contain_dag(str(file), self.dag_discovery_safe_mode))

    def _get_observed_filelocs(self, present: set[DagFileInfo]) -> set[str]:
        """The places of DAGs in these files; only archives have others than their own path."""
        if all(info.rel_path.suffix == ".py" for info in present):
            return {str(info.rel_path) for info in present}
        observed: set[str] = super()._get_observed_filelocs(present)
        return observed

    def deactivate_deleted_dags(self, bundle_name: str, present: set[DagFileInfo]) -> None:
        """Take away the DAGs of files that have gone, where one has."""
        before = self._present.get(bundle_name)
        now = self._present[bundle_name] = {info.rel_path for info in present}
        # What is inside an archive may go while its file stays.
        if before is None or not before <= now or any(path.suffix != ".py" for path in now):
            super().deactivate_deleted_dags(bundle_name=bundle_name, present=present)

    def prepare_file_queue(self, known_files: dict[str, set[DagFileInfo]]) -> None:
        """Queue the files that are due: after a switch, and every few seconds for those that are parsed regularly."""
        now = time.monotonic()
        if self._looked_for != self._bundle_versions or now > self._looked_at + _DUE_SECONDS:
            self._looked_at, self._looked_for = now, dict(self._bundle_versions)
            super().prepare_file_queue(known_files)

    def purge_inactive_dag_warnings(self) -> None:
        """Purge warnings of DAGs that are no more: housekeeping that nobody waits for."""
        now = time.monotonic()
        if now > self._purged_at + _PURGE_SECONDS:
            self._purged_at = now
            super().purge_inactive_dag_warnings()

    def _create_process(self, dag_file: DagFileInfo) -> DagFileProcessorProcess:
        """Parse a file from the version that is current now; a callback runs on the version that it names."""
        bundle = self._bundle(dag_file.bundle_name)
        if dag_file.bundle_version is None and bundle is not None and bundle.is_initialized:
            current = dataclasses.replace(dag_file, bundle_path=bundle.path)
        else:
            current = dag_file
        if isinstance(bundle, ContentBundle) and current.bundle_path:
            # What the child inherits.
            use_root(current.bundle_path.parent, bundle.store.folder)
        process = super()._create_process(current)
        self._parsed_paths[dag_file] = current.bundle_path
        return process

    def _start_new_processes(self) -> None:
        """Parse what is queued; Airflow would forget a file that is being parsed already."""
        for file in [file for file in self._file_queue if file in self._processors]:
            process, bundle = self._processors[file], self._bundle(file.bundle_name)
            same = bundle is None or self._parsed_paths.get(file) == bundle.path
            if not (same or process.had_callbacks or file.bundle_version):
                self.log.info("Ending the parse of %s, whose content has changed since.", file.rel_path)
                process.kill(signal.SIGKILL)
                process.close()
                del self._processors[file]
        super()._start_new_processes()

    def handle_parsing_result(self, file: DagFileInfo, proc: DagFileProcessorProcess, **arguments: Any) -> None:
        """Store what was parsed, unless a switch has overtaken it."""
        path = self._parsed_paths.pop(file, None)
        bundle = self._bundle(file.bundle_name)
        overtaken = (
            isinstance(bundle, ContentBundle)
            and file.bundle_version is None
            and proc.parsing_result is not None
            and (path != bundle.path or self._bundle_versions.get(bundle.name) != bundle.path.parent.name)
        )
        if not overtaken:
            super().handle_parsing_result(file, proc, **arguments)
            if proc.parsing_result is not None and not proc.parsing_result.import_errors:
                self._deactivate_missing(file, {dag.dag_id for dag in proc.parsing_result.serialized_dags})
            return
        self.log.info("Parsing %s again, whose content changed while it was parsed.", file.rel_path)
        if bundle is not None:
            if path == bundle.path:
                # The new version could not be written to the database, which is tried again.
                self.request_bundle_refresh(bundle.name)
            self._add_files_to_queue([dataclasses.replace(file, bundle_path=bundle.path)], mode="frontprio")

    def _deactivate_missing(self, file: DagFileInfo, present: set[str]) -> None:
        """Take away the DAGs that a file had and has no more (those in a zip file have places of their own)."""
        dags = DagModel.__table__
        with create_session() as session:
            session.execute(
                dags.update()
                .where(
                    dags.c.bundle_name == file.bundle_name,
                    dags.c.relative_fileloc == str(file.rel_path),
                    dags.c.is_stale.is_(False),
                    dags.c.dag_id.not_in(present),
                )
                .values(is_stale=True)
            )

    def _bundle(self, name: str) -> BaseDagBundle | None:
        return next((bundle for bundle in self._dag_bundles if bundle.name == name), None)


def main() -> int:
    """Run the DAG processor until it is told to end; return the exit code.

    It does what `airflow dag-processor` does (`airflow/cli/commands/dag_processor_command.py`).
    """
    from airflow.jobs.dag_processor_job_runner import DagProcessorJobRunner
    from airflow.jobs.job import Job, run_job
    from airflow.utils.cli import sigint_handler
    from airflow.utils.process_utils import set_component_mp_start_method
    from airflow.utils.providers_configuration_loader import providers_configuration_loaded

    @providers_configuration_loaded  # type: ignore[untyped-decorator]
    def run() -> None:
        set_component_mp_start_method("dag_processor")
        # Until the loop has its own: what the parent process does on a signal is not for this one.
        signal.signal(signal.SIGINT, sigint_handler)
        signal.signal(signal.SIGTERM, sigint_handler)
        runner = DagProcessorJobRunner(job=Job(), processor=ContentProcessorManager(max_runs=-1))  # type: ignore[call-arg]
        run_job(job=runner.job, execute_callable=runner._execute)

    run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
