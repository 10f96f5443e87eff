"""The pod's side of a sync: take DAG content in over standard input, have it checked, make it live, and say when it is.

    python -m airflow_deployer_pod.content_agent

**Protocol 1.** Run by exec, it speaks frames over standard input and output: 4 bytes length, big-endian, then the
payload: a JSON object, or raw bytes where the protocol says so. A raw frame holds at most 1 MiB, a JSON frame at most
64 MiB (a list of ten thousand files is longer than 1 MiB). Nothing else is written to standard output. The end of
standard input is the end. Paths are `dags/...` or `include/...`, ids are 64 hex digits. Requests and their answers:

    {"op": "state"}
        {"event": "state", "protocol": 1, "live": ID, "deployed": ID, "image": ID, "deployed_at": INT, "files": N}
        An id is "" where there is none.
    {"op": "stage", "content_id": ID, "base": ID|null, "put": [[PATH, EXECUTABLE, SIZE, SHA256], ...], "remove": [PATH]}
        {"event": "need", "paths": [...]}         the files of `put` whose bytes no kept version holds, in this order
        raw frames: the bytes of those files, one after the other, cut anywhere; none when none are needed
        {"event": "staged", "seconds": S, "affected": [DAG files that Airflow will have to parse]}
        It holds the lock until `switch`, `discard`, an error, the end, or 300 s without a frame (then it is discarded).
    {"op": "check"}
        {"event": "checked", "seconds": S, "report": {...}}    the document of `import_check` on the affected files
        A frame that comes meanwhile ends the check (`interrupted`) and is then answered.
    {"op": "check_live"}
        {"event": "checked", "seconds": S, "report": {...}}    the same of every DAG file that is live
    {"op": "switch", "deployed_at": INT|null, "timeout": S}    needs a `check` before it where anything is affected
        {"event": "switched", "at": RFC 3339 by the pod's clock}
        {"event": "live", "seconds": S, "parsed": N, "pending": [PATH],
         "import_errors": [{"file": PATH, "cause": TEXT}]}
        When nothing was parsed for the timeout (60 s), or the next frame comes, `live` says what is still pending. A
        removed DAG file is pending until its DAGs are gone. Switching to what is live already does nothing but answer.
    {"op": "discard"}
        {"event": "discarded"}

At any time `{"event": "error", "kind": KIND, "message": TEXT}` may come instead of an answer, and ends what was staged:
`no_space`, `invalid`, `busy` (somebody else stages), `unknown_base` (send `base` null), `check_failed` (the check could
not be made), `interrupted`, `database` (Airflow's database does not answer), `internal`. Up to `switched` the old
content stays live; after it the new one is, and Airflow finds it by itself. After an error amid the raw frames the
announced bytes are still read and dropped, up to the last; a peer may also just close.

When nothing is asked after a `live`, versions that nothing needs any more are removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from airflow_deployer_pod.affected import Affected, find_affected, may_hold_dags
from airflow_deployer_pod.airflow_database import DATABASES, AirflowDatabase, DatabaseError, Parsed
from airflow_deployer_pod.content_store import (
    ContentError,
    DagFile,
    FileEntry,
    Manifest,
    Stage,
    Store,
    check_entry,
    check_path,
)
from airflow_deployer_pod.parsing import Parsing
from airflow_deployer_pod.wake_socket import wake

PROTOCOL = 1
CHECK_SOCKET = Path("/run/airflow-deployer/check.sock")

MAX_RAW_FRAME = 1 << 20
MAX_JSON_FRAME = 64 << 20
STAGED_SECONDS = 300.0
BYTES_SECONDS = 60.0
LIVE_SECONDS = 60.0

_POLL_SECONDS = 0.02
_MANY_FILES = 100  # waiting for more than that, Airflow needs seconds, and asking the database is no longer free
_GIVE_UP_SECONDS = 0.1
_REST_SECONDS = 0.5  # what counts as nothing being asked


class EndOfInput(Exception):  # noqa: N818 - not an error
    """The peer has closed its side."""


class QuietPeer(Exception):  # noqa: N818 - not an error
    """No frame came in time."""


class FrameReader:
    """Reads frames from a descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._buffer = bytearray()

    def ready(self, seconds: float) -> bool:
        """Whether bytes of a frame, or the end, are there or come within `seconds`."""
        return bool(self._buffer) or bool(select.select([self._descriptor], [], [], seconds)[0])

    def read(self, limit: int, seconds: float | None = None) -> bytes:
        """The next frame's payload.

        Args:
            limit: the most bytes that it may have.
            seconds: how long to wait for each part of it; None for ever.

        Raises:
            EndOfInput: there is none.
            QuietPeer: it did not come in time.
            ContentError: `invalid`, it is longer than `limit`.
        """
        size = int.from_bytes(self._take(4, seconds), "big")
        if size > limit:
            raise ContentError("invalid", f"A frame of {size} bytes is too long.")
        return self._take(size, seconds)

    def _take(self, size: int, seconds: float | None) -> bytes:
        while len(self._buffer) < size:
            if seconds is not None and not select.select([self._descriptor], [], [], seconds)[0]:
                raise QuietPeer
            data = os.read(self._descriptor, 1 << 18)
            if not data:
                raise EndOfInput
            self._buffer += data
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken


def write_frame(descriptor: int, document: Mapping[str, Any]) -> None:
    """Write one JSON frame.

    Raises:
        EndOfInput: nobody reads it.
    """
    payload = json.dumps(document).encode()
    data = memoryview(len(payload).to_bytes(4, "big") + payload)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except BrokenPipeError:
        raise EndOfInput from None


@dataclass
class _Work:
    """What is staged: its stage, the DAG files before it, what it affects, its DAG files, and what the check found."""

    stage: Stage
    known: dict[str, DagFile]
    affected: Affected
    dag_files: dict[str, DagFile]
    checked: bool = False
    expected: list[str] = field(default_factory=list)


@dataclass
class Agent:
    """One connection.

    Attributes:
        image: the content id of the image's own content.
        check: makes the import check: takes its request and what says whether to give it up, returns its document.
        wake: cuts the DAG processor's sleep short.
    """

    store: Store
    database: AirflowDatabase
    image: str
    input: FrameReader
    output: int
    check: Callable[[Mapping[str, Any], Callable[[], bool]], dict[str, Any]]
    wake: Callable[[], None]
    _work: _Work | None = None
    _tidy: bool = False

    def run(self) -> None:
        """Answer requests until the peer closes."""
        operations = {
            "state": self._state,
            "stage": self._stage,
            "check": self._check,
            "check_live": self._check_live,
            "switch": self._switch,
            "discard": self._discard,
        }
        try:
            while True:
                request = self._next_request()
                try:
                    operation = operations.get(str(request.get("op")))
                    if operation is None:
                        raise ContentError("invalid", f"There is no operation {request.get('op')!a}.")
                    operation(request)
                except ContentError as error:
                    self._fail(error.kind, str(error))
                except OSError as error:
                    self._fail("internal", f"The volume cannot be read or written: {error.strerror}.")
                except DatabaseError as error:
                    self._fail("database", f"Airflow's database does not answer: {error}.")
        except EndOfInput:
            pass
        finally:
            self._end_work()
            self._remove_versions()
            self.database.close()

    def _next_request(self) -> dict[str, Any]:
        if self._tidy and not self.input.ready(_REST_SECONDS):
            self._remove_versions()
        while True:
            try:
                payload = self.input.read(MAX_JSON_FRAME, STAGED_SECONDS if self._work else None)
            except QuietPeer:
                # Its host may be asleep or gone without a word, and others wait for the lock.
                self._end_work()
                continue
            try:
                request = json.loads(payload)
            except ValueError:
                request = None
            if isinstance(request, dict):
                return request
            self._fail("invalid", "A frame is not a JSON object.")

    def _send(self, event: str, **values: Any) -> None:
        write_frame(self.output, {"event": event, **values})

    def _fail(self, kind: str, message: str) -> None:
        self._end_work()
        self._send("error", kind=kind, message=message)

    def _end_work(self) -> None:
        if self._work:
            self._work.stage.discard()
            self._work = None

    def _state(self, request: Mapping[str, Any]) -> None:
        self._send("state", protocol=PROTOCOL, image=self.image, **self.store.state())

    def _discard(self, request: Mapping[str, Any]) -> None:
        self._end_work()
        self._send("discarded")

    def _stage(self, request: Mapping[str, Any]) -> None:
        begin = time.monotonic()
        self._end_work()
        content_id, base = str(request.get("content_id")), request.get("base")
        put: dict[str, FileEntry] = {}
        try:
            for path, executable, size, sha256 in request.get("put") or []:
                put[check_path(str(path))] = check_entry(executable, size, sha256)
            remove = [check_path(str(path)) for path in request.get("remove") or []]
        except (TypeError, ValueError):
            raise ContentError("invalid", "The list of files is none.") from None
        live = self.store.live_manifest()
        stage = self.store.stage(content_id, None if base is None else str(base), put, remove)
        try:
            self._send("need", paths=stage.need)
            if not self._receive(stage):
                return
            known = self._known(live)
            affected = find_affected(
                live.files, known, stage.manifest.files, lambda path: (stage.root / path).read_bytes()
            )
        except BaseException:
            stage.discard()
            raise
        unaffected = {
            path: one for path, one in known.items() if path not in affected.files and path not in affected.removed
        }
        self._work = _Work(stage, known, affected, {} if affected.everything else unaffected)
        self._send("staged", seconds=_since(begin), affected=affected.files)

    def _receive(self, stage: Stage) -> bool:
        """Take the announced bytes; False when something failed, which the peer has been told."""
        left = stage.needed_bytes
        failure: ContentError | None = None
        while left > 0:
            try:
                data = self.input.read(MAX_RAW_FRAME, BYTES_SECONDS)
            except QuietPeer:
                # What comes later can no longer be told from a request.
                raise EndOfInput from None
            left -= len(data)
            if failure is None:
                try:
                    stage.write(data)
                except ContentError as error:
                    failure = error
                    stage.discard()
                    self._send("error", kind=error.kind, message=str(error))
        if failure is None:
            stage.finish()
        return failure is None

    def _known(self, live: Manifest) -> dict[str, DagFile]:
        """What is known of the live DAG files; of those that no check has seen yet, what Airflow has parsed of them."""
        if live.dag_files is not None:
            return dict(live.dag_files)
        parsed = self.database.dag_files()
        root = self.store.root(live.version)
        # Airflow may not have come to all of them yet.
        files = [path for path in live.files if may_hold_dags(path, lambda path: (root / path).read_bytes())]
        return {
            path: {"dag_ids": parsed.get(path.removeprefix("dags/"), []), "imports": None, "broken": False}
            for path in files
        }

    def _staged(self) -> _Work:
        if self._work is None:
            raise ContentError("invalid", "Nothing is staged (any more): stage it first.")
        return self._work

    def _check(self, request: Mapping[str, Any]) -> None:
        begin = time.monotonic()
        work = self._staged()
        report = self._import(
            work.stage.root,
            None if work.affected.everything else work.affected.files,
            {dag_id: path for path, one in work.dag_files.items() for dag_id in one["dag_ids"]},
        )
        failed = {finding["dag_file"] for finding in (*report["errors"], *report["needs_database"])}
        work.expected.clear()
        for file in report["files"]:
            path = file["path"]
            work.dag_files[path] = {"dag_ids": file["dag_ids"], "imports": file["imports"], "broken": path in failed}
            # A file without a DAG leaves no trace in Airflow's database that could be waited for.
            if file["dag_ids"] or path in failed:
                work.expected.append(path)
        work.checked = True
        self._send("checked", seconds=_since(begin), report=report)

    def _check_live(self, request: Mapping[str, Any]) -> None:
        begin = time.monotonic()
        report = self._import(self.store.root(self.store.live_manifest().version), None, {})
        self._send("checked", seconds=_since(begin), report=report)

    def _import(self, root: Path, files: Sequence[str] | None, known: Mapping[str, str]) -> dict[str, Any]:
        """Make the import check (see `import_check`), and give it up for the next frame."""
        return self.check({"root": str(root), "files": files, "known": known}, lambda: self.input.ready(0.0))

    def _switch(self, request: Mapping[str, Any]) -> None:
        work = self._staged()
        if not work.checked and work.affected.files:
            raise ContentError("invalid", "Nothing was checked yet: check it first.")
        deployed_at, timeout = request.get("deployed_at"), request.get("timeout") or LIVE_SECONDS
        if not isinstance(deployed_at, int | None) or not isinstance(timeout, int | float):
            raise ContentError("invalid", "The time of the deploy or the timeout is none.")
        removed = {path for path in work.known if path not in work.dag_files}
        # Before anything changes: what cannot be told to Airflow is better not switched.
        self.database.needed_versions()
        begin = time.monotonic()
        already = self.store.live_version() == work.stage.manifest.version
        at = work.stage.switch(deployed_at, work.dag_files)
        self._work = None
        self._tidy = True
        self._send("switched", at=datetime.fromtimestamp(at, timezone.utc).isoformat())
        if not already:
            self.database.request_parsing(path.removeprefix("dags/") for path in work.expected)
            self.wake()
        self._wait_until_live(
            work.stage.manifest.version,
            at,
            begin,
            [path.removeprefix("dags/") for path in work.expected],
            [path.removeprefix("dags/") for path in sorted(removed)],
            timeout,
        )

    def _wait_until_live(
        self, version: str, at: float, begin: float, expected: Sequence[str], removed: Sequence[str], timeout: float
    ) -> None:
        done: set[str] = set()
        errors: dict[str, str] = {}
        pending = set(expected)
        remaining = set(removed)
        refreshed = False
        # A large project is parsed for minutes: the time is up when nothing comes any more.
        fewest, progress = len(pending) + len(remaining), begin
        while True:
            found: Parsed | None = self.database.parsed(version, at, pending, remaining)
            if found is not None:
                refreshed = True
                errors.update(found.errors)
                done |= found.files | set(found.errors)
                pending -= done
                remaining = set(found.remaining)
            if refreshed and not pending and not remaining:
                break
            left = len(pending) + len(remaining)
            if left < fewest:
                fewest, progress = left, time.monotonic()
            if time.monotonic() - progress > timeout:
                break
            if self.input.ready(_POLL_SECONDS if len(pending) < _MANY_FILES else 0.2):
                break
        self._send(
            "live",
            seconds=_since(begin),
            parsed=len(done),
            import_errors=[{"file": f"dags/{file}", "cause": _cause(text)} for file, text in sorted(errors.items())],
            pending=sorted(f"dags/{path}" for path in pending | remaining),
        )

    def _remove_versions(self) -> None:
        """Remove what no run needs; what fails now is done after the next switch."""
        if self._tidy:
            self._tidy = False
            with contextlib.suppress(ContentError, DatabaseError):
                self.store.remove_unneeded(self.database.needed_versions())


def _since(begin: float) -> float:
    return round(time.monotonic() - begin, 3)


def _cause(stacktrace: str) -> str:
    """The last line of a traceback, which names the exception."""
    return next((line.strip() for line in reversed(stacktrace.splitlines()) if line.strip()), "")


def check_content(
    request: Mapping[str, Any], interrupted: Callable[[], bool], check_socket: Path = CHECK_SOCKET
) -> dict[str, Any]:
    """Have the staged files imported: by a child of the process that has imported Airflow, else in a fresh process.

    Args:
        request: what `import_check` takes.
        interrupted: whether to give it up; asked ten times a second.
        check_socket: where that process listens.

    Raises:
        ContentError: `check_failed`, with the cause, or `interrupted`.
    """
    line = json.dumps(request).encode() + b"\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(str(check_socket))
        except OSError:
            answer, cause = _check_in_fresh_process(line, interrupted)
        else:
            answer, cause = _ask(connection, line, interrupted), "the process that was to make it has ended"
    try:
        document = json.loads(answer)
    except ValueError:
        raise ContentError("check_failed", f"The import check could not be made: {cause}.") from None
    if not isinstance(document, dict) or "error" in document:
        raise ContentError("check_failed", f"The import check could not be made: {document['error']}")
    return document


def _ask(connection: socket.socket, line: bytes, interrupted: Callable[[], bool]) -> bytes:
    answer = bytearray()
    with contextlib.suppress(OSError):
        connection.sendall(line)
        while True:
            # Closing the connection is what ends the check on the other side.
            while not select.select([connection], [], [], _GIVE_UP_SECONDS)[0]:
                _go_on(interrupted)
            data = connection.recv(1 << 18)
            if not data:
                break
            answer += data
    return bytes(answer)


def _check_in_fresh_process(line: bytes, interrupted: Callable[[], bool]) -> tuple[bytes, str]:
    import subprocess

    command = [sys.executable, "-m", "airflow_deployer_pod.import_check", "--request"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        given: bytes | None = line
        while True:
            try:
                answer, errors = process.communicate(given, timeout=_GIVE_UP_SECONDS)
                break
            except subprocess.TimeoutExpired:
                given = None
                try:
                    _go_on(interrupted)
                except ContentError:
                    process.terminate()
                    raise
    last = errors.decode(errors="replace").strip().rpartition("\n")[2]
    return answer, last or f"it ended with exit code {process.returncode}"


def _go_on(interrupted: Callable[[], bool]) -> None:
    if interrupted():
        raise ContentError("interrupted", "The import check was given up.")


def main() -> int:
    """Serve the peer at standard input and output; return the exit code."""
    output = os.dup(1)
    # Whatever else may print must not get between the frames.
    os.dup2(2, 1)
    agent = Agent(
        store=Store(),
        database=DATABASES[Parsing.read().source](),
        image=os.environ.get("AIRFLOW_DEPLOYER_CONTENT_ID", ""),
        input=FrameReader(0),
        output=output,
        check=check_content,
        wake=wake,
    )
    agent.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
