"""Airflow's DAG processor, made to follow a switch of the content at once and to never mix two versions.

    python -m airflow_deployer_pod.dag_processor

What it changes in `DagFileProcessorManager` of Airflow 3.2 and 3.3 (`airflow/dag_processing/manager.py`):

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

import dataclasses
import selectors
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import attrs
from airflow.configuration import conf
from airflow.dag_processing.bundles.base import BaseDagBundle
from airflow.dag_processing.manager import DagFileInfo, DagFileProcessorManager
from airflow.dag_processing.processor import DagFileProcessorProcess
from airflow.models.dag import DagModel
from airflow.utils.file import might_contain_dag
from airflow.utils.session import create_session

from airflow_deployer_pod import wake_socket
from airflow_deployer_pod.dag_bundle import ContentBundle
from airflow_deployer_pod.dag_files import DagFiles
from airflow_deployer_pod.import_root import use_root

_ENDING_SECONDS = 0.005
_DUE_SECONDS = 5.0
_PURGE_SECONDS = 60.0


@attrs.define(kw_only=True)
class ContentProcessorManager(DagFileProcessorManager):  # type: ignore[misc]
    """The DAG processor's loop, for a bundle of the class `ContentBundle`."""

    _parsed_paths: dict[DagFileInfo, Path | None] = attrs.field(factory=dict, init=False)
    _awake: bool = attrs.field(default=False, init=False)
    _dag_files: DagFiles = attrs.field(
        factory=lambda: DagFiles(
            lambda path: might_contain_dag(path, conf.getboolean("core", "dag_discovery_safe_mode"))
        ),
        init=False,
    )
    _present: dict[str, set[Path]] = attrs.field(factory=dict, init=False)
    _looked_at: float = attrs.field(default=float("-inf"), init=False)
    _looked_for: dict[str, str | None] = attrs.field(factory=dict, init=False)
    _purged_at: float = attrs.field(default=float("-inf"), init=False)

    def _run_parsing_loop(self) -> Any:
        """Add the socket to what the loop waits for."""
        self.selector.register(wake_socket.listen(), selectors.EVENT_READ, (self._woken, lambda _: None))
        return super()._run_parsing_loop()

    def _woken(self, receiver: socket.socket) -> bool:
        """Take all messages; the loop goes on by itself. True: there will be more."""
        wake_socket.drain(receiver)
        self._refresh([bundle.name for bundle in self._dag_bundles])
        self._awake = True
        return True

    def _refresh(self, bundle_names: list[str]) -> None:
        # The method that asks for it is newer than what it sets.
        self._force_refresh_bundles.update(bundle_names)

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
        """The files to parse first, where they will be after the refresh that follows."""
        return self._where_they_will_be(super().claim_priority_files())

    def _get_priority_files(self, *arguments: Any, **named: Any) -> list[DagFileInfo]:
        """What the same was called in Airflow 3.2."""
        return self._where_they_will_be(super()._get_priority_files(*arguments, **named))

    def _where_they_will_be(self, files: list[DagFileInfo]) -> list[DagFileInfo]:
        """Look for files in the live version: a new one is not in the version before, and would be forgotten."""
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
        root = bundle.path.parent
        manifest = bundle.store.manifest(root.name) if isinstance(bundle, ContentBundle) else None
        paths = self._dag_files.find(manifest, root) if manifest else None
        if paths is not None:
            return [Path(path) for path in paths]
        found: list[Path] = super()._find_files_in_bundle(bundle)
        return found

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
                _close(process)
                del self._processors[file]
        super()._start_new_processes()

    def _collect_results(self, *arguments: Any, **named: Any) -> None:
        """Store what was parsed, unless a switch has overtaken it."""
        # What gets ready meanwhile has its turn next time.
        others = {file: process for file, process in self._processors.items() if not process.is_ready}
        for file in others:
            del self._processors[file]
        parsed: list[tuple[DagFileInfo, set[str]]] = []
        for file, process in list(self._processors.items()):
            path, result = self._parsed_paths.pop(file, None), process.parsing_result
            bundle = self._bundle(file.bundle_name)
            if result is None:
                continue
            if isinstance(bundle, ContentBundle) and self._is_overtaken(file, path, bundle):
                del self._processors[file]
                _close(process)
            elif not result.import_errors:
                parsed.append((file, {dag.dag_id for dag in result.serialized_dags}))
        try:
            super()._collect_results(*arguments, **named)
        finally:
            self._processors.update(others)
        for file, dag_ids in parsed:
            self._deactivate_missing(file, dag_ids)

    def _is_overtaken(self, file: DagFileInfo, path: Path | None, bundle: ContentBundle) -> bool:
        """Whether a file was parsed from a version that is not the bundle's any more; if so, have it parsed again."""
        current = path == bundle.path and self._bundle_versions.get(bundle.name) == bundle.path.parent.name
        if current or file.bundle_version is not None:
            return False
        self.log.info("Parsing %s again, whose content changed while it was parsed.", file.rel_path)
        if path == bundle.path:
            # The new version could not be written to the database, which is tried again.
            self._refresh([bundle.name])
        self._add_files_to_queue([dataclasses.replace(file, bundle_path=bundle.path)], mode="frontprio")
        return True

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


def _close(process: DagFileProcessorProcess) -> None:
    """Close what a parse has open; Airflow 3.2 does it with its log."""
    if hasattr(process, "close"):
        process.close()
    else:
        process.logger_filehandle.close()


def main() -> int:
    """Run the DAG processor until it is told to end; return the exit code.

    It does what `airflow dag-processor` does (`airflow/cli/commands/dag_processor_command.py`).
    """
    from airflow.jobs.dag_processor_job_runner import DagProcessorJobRunner
    from airflow.jobs.job import Job, run_job
    from airflow.utils import process_utils
    from airflow.utils.cli import sigint_handler
    from airflow.utils.providers_configuration_loader import providers_configuration_loaded

    @providers_configuration_loaded  # type: ignore[untyped-decorator]
    def run() -> None:
        if hasattr(process_utils, "set_component_mp_start_method"):  # Airflow 3.2 has no such choice
            process_utils.set_component_mp_start_method("dag_processor")
        # Until the loop has its own: what the parent process does on a signal is not for this one.
        signal.signal(signal.SIGINT, sigint_handler)
        signal.signal(signal.SIGTERM, sigint_handler)
        runner = DagProcessorJobRunner(job=Job(), processor=ContentProcessorManager(max_runs=-1))  # type: ignore[call-arg]
        run_job(job=runner.job, execute_callable=runner._execute)

    run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
