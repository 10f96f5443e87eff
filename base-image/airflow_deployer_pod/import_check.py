"""Import every DAG file as Airflow's DAG processor would, without a database or a network, and report what came of it.

    python -m airflow_deployer_pod.import_check [DAGS_FOLDER]        (default: $AIRFLOW_HOME/dags)

**Protocol.** Standard output carries one line, a JSON document, and nothing else: whatever Airflow or the DAG files
print goes to standard error. The exit code is 0 whenever the check was made, whatever it found; anything else means
that it could not be made, and standard error says why. Paths are relative to the parent of the DAG folder
(`dags/orders.py`, `include/shop.py`); lines count from 1 and are null where none is known. The document:

    airflow         version
    seconds         how long it all took
    files           [{path, dag_ids, seconds}]  every file that was imported, broken ones with no dag_ids
    errors          [{path, line, dag_file, kind, exception, message, traceback}]  what must be mended before a deploy
                    path and line: where in the project it happened; dag_file: the file that was being imported;
                    kind: syntax, import, cycle, timeout, crash; traceback: its lines from the project's own on
    needs_database  [same as errors]  a Variable, a Connection or a table was asked for while importing, which only
                    the deployment's own database can answer
    duplicates      [{dag_id, places: [{path, line}]}]  one id, several DAGs: Airflow would show one of them, at random
    skipped         [path]  Python files that lack the words "airflow" and "dag" (Airflow's safe mode)

What `.airflowignore` names is left out, as Airflow does it. Each file is imported in a process of its own, as in the
DAG processor: none sees what another one left behind, and one that hangs or crashes is named. Airflow's own limit
applies first (`[core] dagbag_import_timeout`), and `[dag_processor] dag_file_processor_timeout` to what ignores it.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import selectors
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

_MESSAGE_LENGTH = 500
_TRACEBACK_LINES = 20

# What Airflow raises when a DAG file asks for something while it is imported, and there is no database to ask.
_NEEDS_DATABASE = re.compile(
    r"VARIABLE_NOT_FOUND|CONNECTION_NOT_FOUND"
    r"|AirflowNotFoundException: The conn_id "
    r"|KeyError: .Variable .* does not exist"
    r"|OperationalError: \(sqlite3\.OperationalError\) no such table"
)
_FRAME = re.compile(r'^\s*File "(?P<file>.+)", line (?P<line>\d+)')
_EXCEPTION = re.compile(r"^(?P<type>[A-Za-z_][\w.]*)(?:: (?P<message>.*))?$", re.DOTALL)
_KINDS = {
    "SyntaxError": "syntax",
    "IndentationError": "syntax",
    "TabError": "syntax",
    "AirflowDagCycleException": "cycle",
    "AirflowTaskTimeout": "timeout",
}


class Finding(TypedDict):
    """One entry of `errors` and `needs_database`, as the module's documentation describes it."""

    path: str
    line: int | None
    dag_file: str
    kind: str
    exception: str
    message: str
    traceback: list[str]


class FileResult(TypedDict):
    """What the process that imported one file hands back: the id of each of its DAGs, and Airflow's own error texts."""

    dag_ids: list[str]
    errors: list[str]
    seconds: float


class Place(TypedDict):
    """Where a DAG is defined."""

    path: str
    line: int | None


class Duplicate(TypedDict):
    """One entry of `duplicates`."""

    dag_id: str
    places: list[Place]


@dataclass(frozen=True)
class RaisedException:
    """What a formatted traceback says: the last exception's short type name, message and frames, outermost first."""

    type: str
    message: str
    frames: tuple[tuple[str, int], ...]


def parse_traceback(text: str) -> RaisedException:
    """Take a formatted traceback apart; a text that is none counts as the exception's line alone.

    Of a chain of exceptions the last one counts, which is the one that ended the import.
    """
    lines = text.rstrip().splitlines()
    start = max((index for index, line in enumerate(lines) if line.startswith("Traceback (")), default=-1) + 1
    frames = []
    after_frames = start
    for index, line in enumerate(lines[start:], start):
        if found := _FRAME.match(line):
            frames.append((found["file"], int(found["line"])))
            after_frames = index + 1
    # Below the last frame come its source lines, indented, then the exception, whose message may have lines of its own.
    ending = lines[after_frames:]
    while ending and (not ending[0] or ending[0][0].isspace()):
        ending.pop(0)
    found = _EXCEPTION.match("\n".join(ending))
    if found is None:
        return RaisedException("", "\n".join(ending).strip(), tuple(frames))
    return RaisedException(found["type"].rpartition(".")[2], (found["message"] or "").strip(), tuple(frames))


def needs_database(text: str) -> bool:
    """Whether an import failed, directly or in consequence, because there is no database to ask."""
    return _NEEDS_DATABASE.search(text) is not None


def describe(text: str, dag_file: Path, root: Path) -> Finding:
    """Turn a raw error of `dag_file` into a finding; the place is the innermost frame below `root`."""
    raised = parse_traceback(text)
    path, line = _relative(str(dag_file), root) or str(dag_file), None
    for frame_file, frame_line in reversed(raised.frames):
        inside = _relative(frame_file, root)
        if inside is not None:
            path, line = inside, frame_line
            break
    kind = _KINDS.get(raised.type, "import")
    if kind == "cycle" and (found := re.search(r"in (?:DAG|Dag): (.+?)\. Faulty", raised.message)):
        line = next(iter(definition_lines(dag_file, found[1])), None)
    return {
        "path": path,
        "line": line,
        "dag_file": _relative(str(dag_file), root) or str(dag_file),
        "kind": kind,
        "exception": raised.type,
        "message": raised.message.partition("\n")[0][:_MESSAGE_LENGTH],
        "traceback": _project_traceback(text, root),
    }


def _project_traceback(text: str, root: Path) -> list[str]:
    """The last traceback from its first frame in the project on, without the import machinery above it."""
    lines = text.rstrip().splitlines()
    start = max((index for index, line in enumerate(lines) if line.startswith("Traceback (")), default=0)
    lines = lines[start:]
    for index, line in enumerate(lines):
        found = _FRAME.match(line)
        if found and _relative(found["file"], root) is not None:
            lines = [lines[0], *lines[index:]]
            break
    if len(lines) > _TRACEBACK_LINES:
        head, tail = lines[: _TRACEBACK_LINES // 2], lines[-_TRACEBACK_LINES // 2 :]
        lines = [*head, f"  ... {len(lines) - len(head) - len(tail)} lines ...", *tail]
    return lines


def _relative(file: str, root: Path) -> str | None:
    with contextlib.suppress(ValueError):
        return Path(file).relative_to(root).as_posix()
    return None


def definition_lines(file: Path, dag_id: str) -> list[int]:
    """The lines of a DAG file that seem to define the DAG `dag_id`: the id as a string, or a function of that name."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    return sorted(
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Constant) and node.value == dag_id)
        or (isinstance(node, ast.FunctionDef) and node.name == dag_id)
    )


def find_duplicates(dag_ids: dict[Path, list[str]], root: Path) -> list[Duplicate]:
    """List the ids that more than one DAG has, in one file or in several."""
    files: dict[str, list[Path]] = {}
    for file, ids in dag_ids.items():
        for dag_id in ids:
            files.setdefault(dag_id, []).append(file)
    duplicates: list[Duplicate] = []
    for dag_id, holders in sorted(files.items()):
        if len(holders) < 2:
            continue
        places: list[Place] = []
        for file in sorted(set(holders)):
            path = _relative(str(file), root) or str(file)
            found = definition_lines(file, dag_id)[: holders.count(file)]
            lines: list[int | None] = [*found, *[None] * (holders.count(file) - len(found))]
            places += [{"path": path, "line": line} for line in lines]
        duplicates.append({"dag_id": dag_id, "places": places})
    return duplicates


def import_file(file: Path, dags: Path) -> FileResult:
    """Import one DAG file into this process, serialize its DAGs, and say what came of it."""
    # Airflow is there only inside the image, and is imported once, before the processes are forked.
    from airflow.dag_processing.dagbag import BundleDagBag
    from airflow.serialization.serialized_objects import LazyDeserializedDAG

    begin = time.monotonic()
    seen: list[str] = []

    class Bag(BundleDagBag):  # type: ignore[misc]
        def bag_dag(self, dag: Any) -> None:
            # A second DAG of the same file would take the first one's place without a word.
            super().bag_dag(dag)
            seen.append(dag.dag_id)

    bag = Bag(dag_folder=str(file), bundle_path=dags, bundle_name="dags-folder", load_op_links=False)
    errors = list(bag.import_errors.values())
    for dag in bag.dags.values():
        try:
            LazyDeserializedDAG.from_dag(dag)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    return {"dag_ids": seen, "errors": errors, "seconds": round(time.monotonic() - begin, 3)}


@dataclass
class _Import:
    file: Path
    pid: int
    reader: int
    begin: float
    output: bytes = b""


def import_files(files: Iterable[Path], dags: Path, limit: float, result_descriptor: int) -> dict[Path, FileResult]:
    """Import each file in a process of its own, as many at once as there are processors, none longer than `limit` s."""
    waiting = list(reversed(list(files)))
    results: dict[Path, FileResult] = {}
    running: dict[int, _Import] = {}
    with selectors.DefaultSelector() as selector:
        while waiting or running:
            while waiting and len(running) < len(os.sched_getaffinity(0)):
                started = _fork(waiting.pop(), dags, result_descriptor)
                running[started.reader] = started
                selector.register(started.reader, selectors.EVENT_READ)
            for key, _ in selector.select(0.5):
                one = running[key.fd]
                data = os.read(one.reader, 65536)
                one.output += data
                if not data:
                    results[one.file] = _collect(one, None)
            for one in running.values():
                if one.file not in results and time.monotonic() - one.begin > limit:
                    results[one.file] = _collect(one, limit)
            for one in [one for one in running.values() if one.file in results]:
                selector.unregister(one.reader)
                os.close(one.reader)
                del running[one.reader]
    return results


def _fork(file: Path, dags: Path, result_descriptor: int) -> _Import:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            os.close(reader)
            os.close(result_descriptor)
            content = memoryview(json.dumps(import_file(file, dags)).encode())
            while content:
                content = content[os.write(writer, content) :]
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    return _Import(file, pid, reader, time.monotonic())


def _collect(one: _Import, limit: float | None) -> FileResult:
    """The result of a process that closed its pipe, or (with a limit) that has to be killed for taking too long."""
    if limit is not None:
        # Its group: what the file itself started must not hold the pipe open or outlive the check.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.pid, signal.SIGKILL)
    exit_code = os.waitstatus_to_exitcode(os.waitpid(one.pid, 0)[1])
    seconds = round(time.monotonic() - one.begin, 3)
    if limit is not None:
        error = f"AirflowTaskTimeout: the import did not end within {limit:.0f} s and could not be interrupted"
    elif exit_code:
        cause = f"exit code {exit_code}" if exit_code > 0 else f"signal {signal.Signals(-exit_code).name}"
        error = f"Crash: the process that imported this file ended with {cause}"
    else:
        try:
            result: FileResult = json.loads(one.output)
            return result
        except ValueError:
            error = "Crash: the file ended the process that imported it"
    return {"dag_ids": [], "errors": [error], "seconds": seconds}


def list_files(dags: Path) -> tuple[list[Path], list[Path]]:
    """The DAG files of a folder as Airflow finds them, and those that its safe mode leaves out."""
    from airflow.configuration import conf
    from airflow.dag_processing.importers import get_importer_registry

    registry = get_importer_registry()
    safe_mode = conf.getboolean("core", "dag_discovery_safe_mode")
    everything = {Path(file) for file in registry.list_dag_files(str(dags), safe_mode=False)}
    chosen = {Path(file) for file in registry.list_dag_files(str(dags), safe_mode=safe_mode)}
    return sorted(chosen), sorted(everything - chosen)


def check(dags: Path, result_descriptor: int) -> dict[str, Any]:
    """Import everything below `dags` and return the document that the module's documentation describes."""
    begin = time.monotonic()
    import airflow
    import airflow.dag_processing.dagbag
    import airflow.serialization.serialized_objects
    from airflow.configuration import conf

    airflow.settings.initialize()
    limit = max(
        conf.getfloat("dag_processor", "dag_file_processor_timeout"), conf.getfloat("core", "dagbag_import_timeout") + 5
    )
    files, skipped = list_files(dags)
    results = import_files(files, dags, limit, result_descriptor)
    root = dags.parent
    errors: list[Finding] = []
    unanswered: list[Finding] = []
    for file in files:
        for text in results[file]["errors"]:
            finding = describe(text, file, root)
            if finding["exception"] == "Crash":
                finding["kind"] = "crash"
            (unanswered if needs_database(text) else errors).append(finding)
    return {
        "airflow": airflow.__version__,
        "seconds": round(time.monotonic() - begin, 3),
        "files": [
            {
                "path": _relative(str(file), root),
                "dag_ids": sorted(set(results[file]["dag_ids"])),
                "seconds": results[file]["seconds"],
            }
            for file in files
        ],
        "errors": errors,
        "needs_database": unanswered,
        "duplicates": find_duplicates({file: results[file]["dag_ids"] for file in files}, root),
        "skipped": [_relative(str(file), root) for file in skipped],
    }


def main(arguments: Sequence[str]) -> int:
    """Check the folder that the arguments name, print the document, and return the exit code."""
    dags = Path(arguments[0] if arguments else os.environ.get("AIRFLOW_HOME", "/home/airflow") + "/dags").resolve()
    if not dags.is_dir():
        print(f"{dags} is not a folder.", file=sys.stderr)
        return 1
    # From here on standard output is standard error for everyone, and the result has a descriptor of its own.
    result_descriptor = os.dup(1)
    os.dup2(2, 1)
    os.environ.update(
        # There is no database: an empty one in memory answers every question with an error that can be told apart.
        AIRFLOW__DATABASE__SQL_ALCHEMY_CONN="sqlite://",
        AIRFLOW__CORE__DAGS_FOLDER=str(dags),
        AIRFLOW__CORE__LOAD_EXAMPLES="False",
        # The default of two frames would cut off the project's own when the cause is inside a library.
        AIRFLOW__CORE__DAGBAG_IMPORT_ERROR_TRACEBACK_DEPTH="100",
    )
    document = check(dags, result_descriptor)
    with os.fdopen(result_descriptor, "w", encoding="utf-8") as output:
        output.write(json.dumps(document) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
