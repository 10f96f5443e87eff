"""Import DAG files as Airflow's DAG processor would, and report what came of it.

    python -m airflow_deployer_pod.import_check [.../dags]    all of them, without a database or a network
    python -m airflow_deployer_pod.import_check --request     what one line on standard input asks for
    answer(connection)                                        the same over a socket, in a forked child

**Request.** One line, a JSON object, answered with the deployment's own database: `root`, the folder that holds `dags/`
and `include/`; `files`, the DAG files to import, relative to it (null: all of them); `known`, the file of each DAG that
is defined elsewhere, `{dag_id: path}`.

**Answer.** One line, a JSON document, and nothing else: whatever Airflow or the DAG files print goes to standard error.
The exit code is 0 whenever the check was made, whatever it found; anything else means that it could not be made, and
standard error says why. Paths are relative to the parent of the DAG folder (`dags/orders.py`, `include/shop.py`); lines
count from 1 and are null where none is known. The document:

    airflow         version
    seconds         how long it all took
    files           [{path, dag_ids, imports, seconds}]  every file that was imported, broken ones with no dag_ids
                    imports: the project's own files that were loaded for it
    errors          [{path, line, dag_file, kind, exception, message, traceback, advice}]  what must be mended before a
                    deploy; path and line: where in the project it happened; dag_file: the file that was being imported;
                    kind: syntax, import, cycle, timeout, crash, or moved: a name that moved between Airflow's series,
                    also one that the import would have failed for next; traceback: its lines from the project's own on;
                    advice: what to write instead, or empty
    needs_database  [same as errors]  a Variable, a Connection or a table was asked for while importing, which only
                    the deployment's own database can answer (a request has it, but cannot set a Variable)
    duplicates      [{dag_id, places: [{path, line}]}]  one id, several DAGs: Airflow would show one of them, at random
    moved           [{path, line, name, gone, advice}]  lines that use what is deprecated in this Airflow, or what a
                    task will ask for in vain (gone): `import_moves`
    skipped         [path]  Python files that lack the words "airflow" and "dag" (Airflow's safe mode)

What `.airflowignore` names is left out, as Airflow does it. Each file is imported in a process of its own, as in the
DAG processor: none sees what another one left behind, and one that hangs or crashes is named. Airflow's own limit
applies first (`[core] dagbag_import_timeout`), and the DAG processor's `dag_file_processor_timeout` to what ignores it.
How all that is called in this image's Airflow is in its profile (`parsing.py`).
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import logging
import os
import re
import selectors
import signal
import socket
import sys
import time
import traceback
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from airflow_deployer_pod.content_store import CONTENT_FOLDER, IMAGE_FOLDER
from airflow_deployer_pod.import_advice import advise
from airflow_deployer_pod.import_root import use_version
from airflow_deployer_pod.parsing import Parsing, load

_MESSAGE_LENGTH = 500
_TRACEBACK_LINES = 20

# What Airflow raises when a DAG file asks for something while it is imported, and there is no database to ask.
_NEEDS_DATABASE = re.compile(
    r"VARIABLE_NOT_FOUND|CONNECTION_NOT_FOUND"
    r"|Airflow(?:NotFound)?Exception: The conn_id "
    r"|KeyError: .Variable .* does not exist"
    r"|OperationalError: \(sqlite3\.OperationalError\) no such table"
)
# What it raises, outside a task and outside the DAG processor, for what can only be done there (`Variable.set`).
_NEEDS_AIRFLOW = re.compile(r"SUPERVISOR_COMMS")
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
    advice: str


class FileResult(TypedDict):
    """What the process that imported one file hands back.

    The id of each of its DAGs (twice for two DAGs of one id), the files that it imported, and Airflow's error texts.
    """

    dag_ids: list[str]
    imports: list[str]
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


def needs_airflow(text: str) -> bool:
    """Whether an import failed because it asked for what Airflow grants only in its own processes."""
    return _NEEDS_AIRFLOW.search(text) is not None


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
        # The folder differs from check to check, and is of no interest.
        "message": raised.message.partition("\n")[0].replace(f"{root}/", "")[:_MESSAGE_LENGTH],
        "traceback": [line.replace(f"{root}/", "") for line in _project_traceback(text, root)],
        "advice": "",
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


def import_file(file: Path, dags: Path, parsing: Parsing) -> FileResult:
    """Import one DAG file into this process, serialize its DAGs, and say what came of it."""
    # Airflow is there only inside the image, and is imported once, before the processes are forked.
    dag_bag, dag_class = load(parsing.dag_bag), load(parsing.dag)
    begin = time.monotonic()
    registered = _Registered()
    if parsing.dag_context:
        load(parsing.dag_context).autoregistered_dags = registered
    arguments = {"include_examples": False, "bundle_path": dags, "bundle_name": "dags", "load_op_links": False}
    known = {name for one in dag_bag.__mro__ for name in inspect.signature(one.__init__).parameters}
    raised = _Raised()
    if parsing.error_log:
        logging.getLogger(parsing.error_log).addHandler(raised)
    try:
        bag = dag_bag(dag_folder=str(file), **{name: value for name, value in arguments.items() if name in known})
    except SystemExit:  # which only later versions of Airflow count as an import error
        seconds = round(time.monotonic() - begin, 3)
        return {"dag_ids": [], "imports": [], "errors": [traceback.format_exc()], "seconds": seconds}
    # A second DAG of the same file takes the first one's place without a word, and equal ones count as one for Airflow.
    module_level = _module_level_dags(str(file), dag_class)
    defined = {id(dag): dag.dag_id for dag in (*registered.dags, *bag.dags.values(), *module_level)}
    errors = list(bag.import_errors.values())
    if parsing.error_log:
        errors = raised.texts([dag.dag_id for dag in module_level if dag.dag_id not in bag.dags])
    seen = [dag_id for dag_id in defined.values() if dag_id in bag.dags]
    if parsing.serialize:
        serialize = load(parsing.serialize)
        for dag in bag.dags.values():
            try:
                serialize(dag)
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
    return {
        "dag_ids": sorted(seen),
        "imports": imported_files(dags.parent, file),
        "errors": errors,
        "seconds": round(time.monotonic() - begin, 3),
    }


class _Raised(logging.Handler):
    """Keeps the exceptions that are logged: an old `DagBag` tells no more than their messages otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self._exceptions: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take what is logged about an exception."""
        if record.exc_info and record.exc_info[1] is not None and record.exc_info[1] not in self._exceptions:
            self._exceptions.append(record.exc_info[1])

    def texts(self, refused: Sequence[str]) -> list[str]:
        """The tracebacks; that of a cycle begins with the DAG, where only one was `refused`."""
        found = []
        for error in self._exceptions:
            text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            if len(refused) == 1:
                text = text.replace("Cycle detected in DAG. ", f"Cycle detected in DAG: {refused[0]}. ")
            found.append(text)
        return found


class _Registered(set):  # type: ignore[type-arg]  # `set[Any]` is none in Python 3.8
    """Where Airflow collects the DAGs of a file: also keeps those that equal another one, or are cleared away."""

    def __init__(self) -> None:
        super().__init__()
        self.dags: list[Any] = []

    def add(self, item: Any) -> None:
        """Take a DAG and its module."""
        super().add(item)
        self.dags.append(item[0])


def _module_level_dags(file: str, dag_class: type) -> list[Any]:
    modules = [module for module in list(sys.modules.values()) if getattr(module, "__file__", None) == file]
    return [value for module in modules for value in vars(module).values() if isinstance(value, dag_class)]


def imported_files(root: Path, file: Path) -> list[str]:
    """The project's files below `root` that this process has loaded as modules, without `file` itself."""
    folder = f"{root}/"
    found = set()
    for module in list(sys.modules.values()):
        place = getattr(module, "__file__", None)
        if isinstance(place, str) and place.startswith(folder):
            archive, inside, _ = place.partition(".zip/")
            found.add((f"{archive}.zip" if inside else place)[len(folder) :])
    return sorted(found - {_relative(str(file), root)})


@dataclass
class _Import:
    file: Path
    pid: int
    reader: int
    begin: float
    output: bytes = b""


class GivenUpError(Exception):
    """Whoever asked for the check has gone."""


def import_files(
    files: Iterable[Path],
    dags: Path,
    parsing: Parsing,
    limit: float,
    result_descriptor: int,
    peer: int | None = None,
) -> dict[Path, FileResult]:
    """Import each file in a process of its own, as many at once as there are processors, none longer than `limit` s.

    Raises:
        GivenUpError: the other end of the socket `peer` was closed meanwhile.
    """
    waiting = list(reversed(list(files)))
    results: dict[Path, FileResult] = {}
    running: dict[int, _Import] = {}
    with selectors.DefaultSelector() as selector:
        if peer is not None:
            selector.register(peer, selectors.EVENT_READ)
        while waiting or running:
            while waiting and len(running) < len(os.sched_getaffinity(0)):
                started = _fork(waiting.pop(), dags, parsing, result_descriptor)
                running[started.reader] = started
                selector.register(started.reader, selectors.EVENT_READ)
            for key, _ in selector.select(0.5):
                if key.fd == peer:
                    for one in running.values():
                        _kill(one)
                    raise GivenUpError
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


def _fork(file: Path, dags: Path, parsing: Parsing, result_descriptor: int) -> _Import:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            os.close(reader)
            os.close(result_descriptor)
            content = memoryview(json.dumps(import_file(file, dags, parsing)).encode())
            while content:
                content = content[os.write(writer, content) :]
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    return _Import(file, pid, reader, time.monotonic())


def _kill(one: _Import) -> None:
    # Its group: what the file itself started must not hold the pipe open or outlive the check.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(one.pid, signal.SIGKILL)


def _collect(one: _Import, limit: float | None) -> FileResult:
    """The result of a process that closed its pipe, or (with a limit) that has to be killed for taking too long."""
    if limit is not None:
        _kill(one)
    status = os.waitpid(one.pid, 0)[1]
    seconds = round(time.monotonic() - one.begin, 3)
    if limit is not None:
        error = f"AirflowTaskTimeout: the import did not end within {limit:.0f} s and could not be interrupted"
    elif status:
        killed = os.WIFSIGNALED(status)
        cause = (
            f"signal {signal.Signals(os.WTERMSIG(status)).name}" if killed else f"exit code {os.WEXITSTATUS(status)}"
        )
        error = f"Crash: the process that imported this file ended with {cause}"
    else:
        try:
            result: FileResult = json.loads(one.output)
            return result
        except ValueError:
            error = "Crash: the file ended the process that imported it"
    return {"dag_ids": [], "imports": [], "errors": [error], "seconds": seconds}


def list_files(dags: Path, parsing: Parsing, wanted: Sequence[Path] | None = None) -> tuple[list[Path], list[Path]]:
    """The DAG files of a folder as Airflow finds them, and those that its safe mode leaves out.

    Args:
        dags: the folder.
        parsing: how this Airflow lists them.
        wanted: look only at these.
    """
    from airflow.configuration import conf

    safe_mode = conf.getboolean("core", "dag_discovery_safe_mode")
    above = {parent for file in wanted or [] for parent in file.parents if _relative(str(parent), dags) is not None}
    if (
        wanted is not None
        and parsing.might_contain_dag
        and not any((folder / ".airflowignore").exists() for folder in above)
    ):
        # Nothing can be ignored, so the folder, which may be large, need not be walked.
        might_contain_dag = load(parsing.might_contain_dag)
        everything = {file for file in wanted if file.is_file() and (file.suffix == ".py" or zipfile.is_zipfile(file))}
        chosen = {file for file in everything if might_contain_dag(str(file), safe_mode)}
    else:
        list_dag_files = load(parsing.list_files)
        everything, chosen = (
            # What is outside are Airflow's examples.
            {Path(file) for file in list_dag_files(str(dags), safe_mode=mode) if _relative(str(file), dags) is not None}
            for mode in (False, safe_mode)
        )
        if wanted is not None:
            everything.intersection_update(wanted)
            chosen.intersection_update(wanted)
    return sorted(chosen), sorted(everything - chosen)


@dataclass(frozen=True)
class Request:
    """What to check.

    Attributes:
        root: the folder that holds `dags/` and `include/`.
        files: the DAG files to import, relative to it; None for all.
        known: the file of each DAG that is defined elsewhere, relative to it.
        database: whether the deployment's own database can be asked.
    """

    root: Path
    files: Sequence[str] | None = None
    known: Mapping[str, str] = field(default_factory=dict)
    database: bool = False

    @classmethod
    def parse(cls, line: bytes) -> Request:
        """Read what came over a socket.

        Raises:
            ValueError: it is no request.
        """
        document = json.loads(line)
        try:
            return cls(Path(document["root"]), document["files"], document["known"], database=True)
        except (LookupError, TypeError):
            raise ValueError("root, files and known are what a request consists of") from None


def check(request: Request, parsing: Parsing, result_descriptor: int, *, over_socket: bool = False) -> dict[str, Any]:
    """Import what the request names and return the document that the module's documentation describes.

    Args:
        request: what to import.
        parsing: how this Airflow does it.
        result_descriptor: where the answer will go; nothing that is imported may hold it.
        over_socket: whether that is a socket, whose other end tells by closing that nobody waits any more.

    Raises:
        GivenUpError: nobody does.
    """
    begin = time.monotonic()
    import airflow
    from airflow.configuration import conf

    for name in (parsing.dag_bag, parsing.dag, parsing.dag_context, parsing.serialize):
        if name:
            load(name)

    root, dags = request.root, request.root / "dags"
    use_version(root, CONTENT_FOLDER)
    limit = max(
        conf.getfloat(parsing.timeout_section, "dag_file_processor_timeout"),
        conf.getfloat("core", "dagbag_import_timeout") + 5,
    )
    wanted = None if request.files is None else [root / file for file in request.files]
    files, skipped = list_files(dags, parsing, wanted)
    peer = result_descriptor if over_socket else None
    results = import_files(files, dags, parsing, limit, result_descriptor, peer)
    errors: list[Finding] = []
    unanswered: list[Finding] = []
    for file in files:
        for text in results[file]["errors"]:
            finding = describe(text, file, root)
            if finding["exception"] == "Crash":
                finding["kind"] = "crash"
            unknown = needs_airflow(text) if request.database else needs_database(text) or needs_airflow(text)
            (unanswered if unknown else errors).append(finding)
    dag_ids = {file: list(results[file]["dag_ids"]) for file in files}
    for dag_id, path in request.known.items():
        dag_ids.setdefault(root / path, []).append(dag_id)
    imports = {str(_relative(str(file), root)): results[file]["imports"] for file in files}
    advice = advise(root, imports, errors, parsing.series)
    return {
        "airflow": airflow.__version__,
        "seconds": round(time.monotonic() - begin, 3),
        "files": [
            {
                "path": _relative(str(file), root),
                "dag_ids": sorted(set(results[file]["dag_ids"])),
                "imports": results[file]["imports"],
                "seconds": results[file]["seconds"],
            }
            for file in files
        ],
        "errors": advice.errors,
        "needs_database": unanswered,
        "duplicates": find_duplicates(dag_ids, root),
        "moved": advice.moved,
        "skipped": [_relative(str(file), root) for file in skipped],
    }


def _use_own_database() -> None:
    """Have DAG files find Variables and Connections in the deployment's database."""
    from airflow import settings

    # Outside a task and outside the DAG processor, Airflow asks its database only in a process that says this.
    os.environ["_AIRFLOW_PROCESS_CONTEXT"] = "server"
    if settings.engine is not None:
        # No connection of the process that this one was forked from may be used in two.
        settings.engine.dispose(close=False)


def _set_up(environment: Mapping[str, str]) -> None:
    # The default of two frames would cut off the project's own when the cause is inside a library.
    os.environ.update(environment, AIRFLOW__CORE__DAGBAG_IMPORT_ERROR_TRACEBACK_DEPTH="100")


def answer(connection: socket.socket) -> None:
    """Read one request from the connection, and write the answer to it: in a forked child, which then ends."""
    os.dup2(2, 1)
    # What failed is in the answer; the pod's log is for what Airflow does with the content once it is live.
    logging.disable(logging.CRITICAL)
    _set_up({})
    with connection, connection.makefile("rb") as lines:
        try:
            request = Request.parse(lines.readline())
        except ValueError as error:
            document: dict[str, Any] = {"error": f"this is no request: {error}."}
        else:
            _use_own_database()
            try:
                document = check(request, Parsing.read(), connection.fileno(), over_socket=True)
            except GivenUpError:
                return
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(json.dumps(document).encode() + b"\n")


def main(arguments: Sequence[str]) -> int:
    """Check what the arguments or standard input name, print the document, and return the exit code."""
    if arguments and arguments[0] == "--request":
        try:
            request = Request.parse(sys.stdin.buffer.readline())
        except ValueError as error:
            print(f"This is no request: {error}.", file=sys.stderr)
            return 1
    else:
        dags = Path(arguments[0] if arguments else IMAGE_FOLDER / "dags").resolve()
        if not dags.is_dir():
            print(f"{dags} is not a folder.", file=sys.stderr)
            return 1
        request = Request(dags.parent)
    parsing = Parsing.read()
    # From here on standard output is standard error for everyone, and the result has a descriptor of its own.
    result_descriptor = os.dup(1)
    os.dup2(2, 1)
    if request.database:
        _set_up({})
        _use_own_database()
    else:
        _set_up(
            {
                **parsing.without_database,
                "AIRFLOW__CORE__DAGS_FOLDER": str(request.root / "dags"),
                "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            }
        )
    document = check(request, parsing, result_descriptor)
    with os.fdopen(result_descriptor, "w", encoding="utf-8") as output:
        output.write(json.dumps(document) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
