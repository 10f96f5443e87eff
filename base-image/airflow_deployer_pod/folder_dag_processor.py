"""The DAG processor of Airflow 2, made to follow a switch of the content at once and to never mix two versions.

    python -m airflow_deployer_pod.folder_dag_processor

To this Airflow the DAG files are those below `[core] dags_folder`, a link to the live version, and by these names its
database knows them. What is changed in `DagFileProcessorManager` (`airflow/dag_processing/manager.py`) and
`DagFileProcessor` (`processor.py`) of Airflow 2.11:

- A datagram to its socket ends the sleep of its loop, which is up to a second.
- After a switch it ends the parses of the version before, parses their files again, looks for new files where the list
  of files has changed, and says which version it follows (`followed.py`).
- A parse imports the project's modules from one version, and what it found is stored only while that one is live: the
  process that parses is the one that stores.
- A DAG that its file no longer defines is gone once the file was parsed, not up to two minutes later.
- At rest, what is due is looked for every 5 s, not each second.
"""

from __future__ import annotations

import socket
import sys
import time
from typing import Any

from airflow.configuration import conf
from airflow.dag_processing import processor as processor_module
from airflow.dag_processing.manager import DagFileProcessorManager
from airflow.dag_processing.processor import DagFileProcessor
from airflow.models.dag import DagModel
from airflow.models.serialized_dag import SerializedDagModel
from airflow.utils import timezone
from airflow.utils.file import might_contain_dag
from airflow.utils.session import create_session

from airflow_deployer_pod import followed, wake_socket
from airflow_deployer_pod.content_store import Store
from airflow_deployer_pod.dag_files import DagFiles
from airflow_deployer_pod.import_root import use_version

_DUE_SECONDS = 5.0
_LONG_AGO = timezone.utc_epoch()


class ContentProcessor(DagFileProcessor):  # type: ignore[misc]
    """What the forked process does with one file."""

    store = Store()
    version: str | None = None
    """The version that is parsed; what the process inherits from the loop."""
    callbacks = False
    """Whether there is more to do than to parse, which must not be lost."""

    @classmethod
    def _get_dagbag(cls, file_path: str) -> Any:
        """Import the file; nothing more is done when a switch has overtaken that: it may have seen two versions."""
        bag = super()._get_dagbag(file_path)
        if not cls.callbacks:
            cls.end_if_overtaken()
        return bag

    @staticmethod
    def save_dag_to_db(*arguments: Any, **named: Any) -> Any:
        """Store what was parsed, unless a switch has overtaken it."""
        ContentProcessor.end_if_overtaken()
        return DagFileProcessor.save_dag_to_db(*arguments, **named)

    @classmethod
    def end_if_overtaken(cls) -> None:
        """End this process if another version is live; the loop parses the file again."""
        if cls.store.live_version() != cls.version:
            raise SystemExit(0)


class ContentProcessorManager(DagFileProcessorManager):  # type: ignore[misc]
    """The DAG processor's loop, for a DAG folder that is a link to the live version."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.store = ContentProcessor.store
        self._receiver: socket.socket | None = None
        self._version: str | None = None
        self._parsed_versions: dict[str, str | None] = {}
        self._files = DagFiles(lambda path: might_contain_dag(path, conf.getboolean("core", "dag_discovery_safe_mode")))
        self._found: set[str] | None = None
        self._look_for_due = True
        self._looked_at = float("-inf")

    def _run_parsing_loop(self) -> Any:
        """Add the socket to what the loop waits for; nothing that it says is a process."""
        self._receiver = wake_socket.listen()
        self.waitables[self._receiver] = None
        return super()._run_parsing_loop()

    def collect_results(self) -> None:
        """Collect the results of the processes; the socket is none."""
        self.waitables.pop(self._receiver, None)
        super().collect_results()
        self.waitables[self._receiver] = None

    def _refresh_dag_dir(self) -> bool:
        """Follow a switch, then list the DAG files where that is due or the switch has changed their list."""
        if self._receiver is not None:
            wake_socket.drain(self._receiver)
        version = self.store.live_version()
        if version is not None and version != self._version:
            self._follow(version)
        refreshed: bool = super()._refresh_dag_dir()
        return refreshed

    def _follow(self, version: str) -> None:
        root = self.store.root(version)
        self._version = ContentProcessor.version = version
        # What the processes inherit.
        use_version(root, self.store.folder)
        for file, processor in list(self._processors.items()):
            if not processor._callback_requests:
                self.log.info("Ending the parse of %s, whose content has changed since.", file)
                processor.kill()
                self.waitables.pop(processor.waitable_handle, None)
                del self._processors[file]
                self._queue_first(file)
        followed.write(followed.Followed(version, time.time()))
        manifest = self.store.manifest(version)
        paths = self._files.find(manifest, root) if manifest else None
        found = None if paths is None else set(paths)
        if found is None or found != self._found:
            self.last_dag_dir_refresh_time = _LONG_AGO
        self._found = found
        self._look_for_due = True

    def prepare_file_path_queue(self) -> None:
        """Queue the files that are due: after a switch, and every few seconds for those that are parsed regularly."""
        now = time.monotonic()
        if self._look_for_due or now > self._looked_at + _DUE_SECONDS:
            self._look_for_due, self._looked_at = False, now
            super().prepare_file_path_queue()

    def _create_process(self, file_path: str, *arguments: Any, **named: Any) -> Any:  # Airflow's is a static method
        """Remember from which version a file is parsed."""
        process = DagFileProcessorManager._create_process(file_path, *arguments, **named)
        self._parsed_versions[file_path] = self._version
        ContentProcessor.callbacks = bool(process._callback_requests)
        return process

    def _collect_results_from_processor(self, processor: Any) -> None:
        """Note what a parse has found, or that its file has to be parsed again."""
        file = processor.file_path
        if self._parsed_versions.pop(file, None) != self.store.live_version():
            self.log.info("Parsing %s again, whose content changed while it was parsed.", file)
            self._queue_first(file)
            return
        super()._collect_results_from_processor(processor)
        if processor.result is not None and not processor.result[1]:
            self._deactivate_missing(file, processor.start_time)

    def _queue_first(self, file: str) -> None:
        queue = self._file_path_queue
        if file in queue:
            queue.remove(file)
        queue.appendleft(file)

    def _deactivate_missing(self, file: str, start: Any) -> None:
        """Take away the DAGs that a file had and that its parse, which began at `start`, did not find again."""
        with create_session() as session:
            gone = [
                dag_id
                for (dag_id,) in session.query(DagModel.dag_id).filter(
                    # Those in a zip file have places of their own.
                    DagModel.fileloc.in_([file])
                    if file.endswith(".py")
                    else DagModel.fileloc.startswith(f"{file}/", autoescape=True),
                    DagModel.is_active,
                    DagModel.last_parsed_time < start,
                )
            ]
            for dag_id in gone:
                session.query(DagModel).filter(DagModel.dag_id == dag_id).update({"is_active": False})
                SerializedDagModel.remove_dag(dag_id, session=session)


def main() -> int:
    """Run the DAG processor until it is told to end, as `airflow dag-processor` does; return the exit code."""
    from airflow.cli.cli_parser import get_parser
    from airflow.cli.commands import dag_processor_command

    processor_module.DagFileProcessor = ContentProcessor
    dag_processor_command.DagFileProcessorManager = ContentProcessorManager
    arguments = get_parser().parse_args(["dag-processor"])
    arguments.func(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
