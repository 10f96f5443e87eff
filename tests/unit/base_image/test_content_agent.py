"""The content agent over real pipes with a real store; only Airflow's database and the import check are made up."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from airflow_deployer_pod import content_agent
from airflow_deployer_pod.airflow_database import DatabaseError, Parsed
from airflow_deployer_pod.content_agent import Agent, FrameReader
from airflow_deployer_pod.content_store import ContentError, FileEntry, Store, files_id

DAG = b"from airflow.sdk import DAG\n"
FIRST = {"dags/a.py": DAG, "dags/b.py": DAG + b"import a\n", "include/helper.py": b"x = 1\n"}
IMAGE = "f" * 64


class FakeDatabase:
    """Airflow's database as if every file were parsed at once; `hidden` ones are not, `broken` ones fail."""

    def __init__(self) -> None:
        self.requested: list[str] = []
        self.hidden: set[str] = set()
        self.broken: dict[str, str] = {}
        self.version: str | None = None
        self.away = False
        self.needed: set[str] = set()

    def dag_files(self) -> dict[str, list[str]]:
        # It has not come to `b` yet, and knows a file that is no more.
        return {"a.py": ["a"], "gone.py": ["gone"]}

    def request_parsing(self, files: Iterable[str]) -> None:
        self.requested = sorted(files)

    def parsed(self, version: str, since: float, files: Iterable[str], removed: Iterable[str]) -> Parsed | None:
        assert abs(since - time.time()) < 10.0
        if self.version not in (None, version):
            return None
        wanted = set(files) - self.hidden
        return Parsed(
            frozenset(wanted - set(self.broken)),
            {path: text for path, text in self.broken.items() if path in wanted},
            frozenset(set(removed) & self.hidden),
        )

    def needed_versions(self) -> set[str]:
        if self.away:
            raise DatabaseError("connection refused")
        return self.needed

    def close(self) -> None:
        pass


class Peer:
    """The other side: writes requests, reads events."""

    def __init__(self, input: int, output: int) -> None:
        self._input, self._output = input, output

    def send(self, document: Mapping[str, Any]) -> None:
        self.send_raw(json.dumps(document).encode())

    def send_raw(self, payload: bytes) -> None:
        os.write(self._input, len(payload).to_bytes(4, "big") + payload)

    def close(self) -> None:
        if self._input >= 0:
            os.close(self._input)
            self._input = -1

    def receive(self) -> dict[str, Any]:
        size = int.from_bytes(self._take(4), "big")
        document: dict[str, Any] = json.loads(self._take(size))
        return document

    def _take(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = os.read(self._output, size - len(data))
            assert part, "the agent has ended"
            data += part
        return data

    def ask(self, **request: Any) -> dict[str, Any]:
        self.send(request)
        return self.receive()

    def stage(self, files: Mapping[str, bytes], base: Mapping[str, bytes] | None) -> dict[str, Any]:
        """Stage a set as a change of another; return the last event."""
        new, old = entries(files), entries(base or {})
        event = self.ask(
            op="stage",
            content_id=files_id(new),
            base=None if base is None else files_id(old),
            put=[[path, *entry] for path, entry in new.items() if old.get(path) != entry],
            remove=[path for path in old if path not in new],
        )
        if event["event"] == "need":
            # Cut anywhere: the frames need not follow the files.
            data = b"".join(files[path] for path in event["paths"])
            for start in range(0, len(data), 7):
                self.send_raw(data[start : start + 7])
            return self.receive()
        return event

    def sync(self, files: Mapping[str, bytes], base: Mapping[str, bytes] | None, **switch: Any) -> dict[str, Any]:
        """A whole round; return the last event."""
        assert self.stage(files, base)["event"] == "staged"
        assert self.ask(op="check")["event"] == "checked"
        assert self.ask(op="switch", **switch)["event"] == "switched"
        return self.receive()


class Check:
    """The import check as if each DAG file defined the DAG of its own name."""

    def __init__(self) -> None:
        self.requests: list[Mapping[str, Any]] = []
        self.hangs = False

    def __call__(self, request: Mapping[str, Any], interrupted: Callable[[], bool]) -> dict[str, Any]:
        self.requests.append(request)
        while self.hangs:
            time.sleep(0.01)
            if interrupted():
                raise ContentError("interrupted", "The import check was given up.")
        root = Path(request["root"])
        files = request["files"]
        if files is None:
            files = sorted(str(file.relative_to(root)) for file in (root / "dags").rglob("*.py"))
        return {
            "files": [
                {"path": path, "dag_ids": [Path(path).stem], "imports": self._imports(root / path)} for path in files
            ],
            "errors": [],
            "needs_database": [],
        }

    def _imports(self, file: Path) -> list[str]:
        return ["dags/a.py"] if b"import a\n" in file.read_bytes() else []


def entries(files: Mapping[str, bytes]) -> dict[str, FileEntry]:
    return {path: FileEntry(False, len(data), hashlib.sha256(data).hexdigest()) for path, data in files.items()}


class Pod:
    """A store in which FIRST is live, and agents on it."""

    def __init__(self, folder: Path) -> None:
        for path, data in FIRST.items():
            (folder / "image" / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / "image" / path).write_bytes(data)
        self.store = Store(folder / "content")
        self.store.adopt(folder / "image", files_id(entries(FIRST)), 1)
        self.database = FakeDatabase()
        self.check = Check()
        self.woken = 0
        self._ends: list[Callable[[], None]] = []

    def connect(self) -> Peer:
        input_reader, input_writer = os.pipe()
        output_reader, output_writer = os.pipe()

        def wake() -> None:
            self.woken += 1

        agent = Agent(
            self.store, self.database, IMAGE, FrameReader(input_reader), output_writer, check=self.check, wake=wake
        )
        thread = threading.Thread(target=agent.run)
        thread.start()
        peer = Peer(input_writer, output_reader)

        def end() -> None:
            peer.close()
            thread.join(10.0)
            assert not thread.is_alive()
            for descriptor in (input_reader, output_reader, output_writer):
                os.close(descriptor)

        self._ends.append(end)
        return peer

    def end(self) -> None:
        for end in self._ends:
            end()

    def live(self) -> dict[str, bytes]:
        root = self.store.current
        return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    """A pod that has just started with FIRST in its image."""
    found = Pod(tmp_path)
    yield found
    found.end()


def test_the_state_is_told(pod: Pod) -> None:
    first = files_id(entries(FIRST))
    assert pod.connect().ask(op="state") == {
        "event": "state",
        "protocol": 1,
        "image": IMAGE,
        "live": first,
        "deployed": first,
        "deployed_at": 1,
        "files": 3,
    }


def test_a_changed_dag_file_goes_live(pod: Pod) -> None:
    peer = pod.connect()
    second = {**FIRST, "dags/a.py": DAG + b"#"}
    # No check has seen the image's content: what imports `a` is found in the text.
    staged = peer.stage(second, FIRST)
    assert (staged["event"], staged["affected"]) == ("staged", ["dags/a.py", "dags/b.py"])
    assert pod.live() == FIRST
    assert peer.ask(op="check")["report"]["files"][0]["path"] == "dags/a.py"
    assert pod.check.requests[-1]["known"] == {}
    assert peer.ask(op="switch", deployed_at=None)["event"] == "switched"
    live = peer.receive()
    assert (live["event"], live["parsed"], live["import_errors"], live["pending"]) == ("live", 2, [], [])
    assert pod.live() == second
    assert (pod.database.requested, pod.woken) == (["a.py", "b.py"], 1)
    assert peer.ask(op="state")["deployed_at"] == 1


def test_what_a_check_found_is_kept_for_the_next(pod: Pod) -> None:
    peer = pod.connect()
    second = {**FIRST, "include/helper.py": b"x = 2\n"}
    peer.sync(second, FIRST)
    assert pod.check.requests[-1]["files"] is None
    third = {**second, "dags/c.py": DAG, "dags/b.py": DAG}
    peer.sync(third, second)
    assert pod.check.requests[-1]["files"] == ["dags/b.py", "dags/c.py"]
    assert pod.check.requests[-1]["known"] == {"a": "dags/a.py"}
    # `b` imports `a` no more.
    assert peer.stage({**third, "dags/a.py": DAG + b"#"}, third)["affected"] == ["dags/a.py"]


def test_what_is_live_can_be_checked_beside_what_is_staged(pod: Pod) -> None:
    peer = pod.connect()
    assert peer.stage({**FIRST, "dags/c.py": DAG}, FIRST)["event"] == "staged"
    answer = peer.ask(op="check_live")
    assert answer["event"] == "checked"
    assert [file["path"] for file in answer["report"]["files"]] == ["dags/a.py", "dags/b.py"]
    assert peer.ask(op="check")["report"]["files"][0]["path"] == "dags/c.py"


def test_what_is_known_outlives_a_round_without_a_check(pod: Pod) -> None:
    peer = pod.connect()
    second = {**FIRST, "dags/c.py": DAG}
    peer.sync(second, FIRST)
    assert pod.check.requests[-1]["known"] == {"a": "dags/a.py"}
    peer.sync(FIRST, second)
    third = {path: data for path, data in FIRST.items() if path != "dags/b.py"}
    assert peer.stage(third, FIRST)["affected"] == []
    assert peer.ask(op="switch")["event"] == "switched"
    assert peer.receive()["pending"] == []
    dag_files = pod.store.live_manifest().dag_files
    assert dag_files is not None
    assert list(dag_files) == ["dags/a.py"]


def test_a_switch_with_a_time_that_is_none_is_refused(pod: Pod) -> None:
    peer = pod.connect()
    for request in ({"deployed_at": "now"}, {"timeout": "long"}):
        peer.stage(FIRST, FIRST)
        assert peer.ask(op="switch", **request)["kind"] == "invalid"


def test_a_deploy_is_written_down(pod: Pod) -> None:
    peer = pod.connect()
    second = {**FIRST, "dags/a.py": DAG + b"#"}
    peer.sync(second, FIRST, deployed_at=7)
    state = peer.ask(op="state")
    assert (state["deployed"], state["deployed_at"]) == (files_id(entries(second)), 7)


def test_staging_what_is_live_does_nothing(pod: Pod) -> None:
    peer = pod.connect()
    assert peer.stage(FIRST, FIRST)["affected"] == []
    assert peer.ask(op="switch", deployed_at=3)["event"] == "switched"
    assert peer.receive()["pending"] == []
    assert (pod.woken, pod.store.state()["deployed_at"]) == (0, 3)


def test_what_is_not_live_in_time_is_named(pod: Pod) -> None:
    peer = pod.connect()
    pod.database.hidden = {"a.py", "b.py"}
    second = {"dags/a.py": DAG + b"#", "include/helper.py": b"x = 1\n"}
    live = peer.sync(second, FIRST, timeout=0.05)
    assert (live["parsed"], live["pending"]) == (0, ["dags/a.py", "dags/b.py"])


def test_the_next_frame_ends_the_wait(pod: Pod) -> None:
    peer = pod.connect()
    pod.database.version = "another"
    second = {**FIRST, "dags/b.py": DAG}
    peer.stage(second, FIRST)
    peer.ask(op="check")
    peer.ask(op="switch")
    peer.send({"op": "state"})
    assert peer.receive()["pending"] == ["dags/b.py"]
    assert peer.receive()["live"] == files_id(entries(second))


def test_an_import_error_counts_as_parsed(pod: Pod) -> None:
    peer = pod.connect()
    pod.database.broken = {"b.py": 'Traceback:\n  File "b.py"\nValueError: no\n\n'}
    live = peer.sync({**FIRST, "dags/b.py": DAG}, FIRST)
    assert live["import_errors"] == [{"file": "dags/b.py", "cause": "ValueError: no"}]
    assert live["pending"] == []


def test_an_unknown_base_is_answered_by_sending_everything(pod: Pod) -> None:
    peer = pod.connect()
    second = {**FIRST, "dags/a.py": DAG + b"#"}
    event = peer.stage(second, {"dags/x.py": b"x"})
    assert (event["event"], event["kind"]) == ("error", "unknown_base")
    put = [[path, *entry] for path, entry in entries(second).items()]
    need = peer.ask(op="stage", content_id=files_id(entries(second)), base=None, put=put, remove=[])
    # What is live is not sent again.
    assert need["paths"] == ["dags/a.py"]
    peer.send_raw(second["dags/a.py"])
    assert peer.receive()["event"] == "staged"
    assert peer.sync(second, None)["pending"] == []
    assert pod.live() == second


def test_two_at_once(pod: Pod) -> None:
    first, other = pod.connect(), pod.connect()
    second = {**FIRST, "dags/a.py": DAG + b"#"}
    assert first.stage(second, FIRST)["event"] == "staged"
    assert other.stage(second, FIRST)["kind"] == "busy"
    assert first.ask(op="discard") == {"event": "discarded"}
    assert other.stage(second, FIRST)["event"] == "staged"
    # A peer that goes without a word leaves nothing.
    other.close()
    deadline = time.monotonic() + 5.0
    while first.stage(second, FIRST)["event"] != "staged" and time.monotonic() < deadline:
        pass
    assert first.ask(op="discard") == {"event": "discarded"}
    assert list(pod.store.staging.iterdir()) == []


def test_a_quiet_peer_loses_what_it_staged(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_agent, "STAGED_SECONDS", 0.05)
    peer = pod.connect()
    peer.stage({**FIRST, "dags/a.py": DAG + b"#"}, FIRST)
    time.sleep(0.2)
    pod.store.lock().release()
    event = peer.ask(op="switch")
    assert (event["kind"], event["message"]) == ("invalid", "Nothing is staged (any more): stage it first.")


@pytest.mark.parametrize("cut", [0, 1, 10, 200, 330, 338, 350, 400])
def test_a_sync_that_is_cut_off_at_any_byte_changes_nothing(pod: Pod, cut: int) -> None:
    second = {**FIRST, "dags/a.py": DAG * 5}
    new = entries(second)
    request = {"op": "stage", "content_id": files_id(new), "base": None, "put": [[p, *e] for p, e in new.items()]}
    payload = json.dumps(request).encode()
    data = b"".join(second.values())
    everything = len(payload).to_bytes(4, "big") + payload + len(data).to_bytes(4, "big") + data
    peer = pod.connect()
    os.write(peer._input, everything[: -1 - cut])
    peer.close()
    pod.end()
    pod._ends.clear()
    assert pod.live() == FIRST
    assert list(pod.store.staging.iterdir()) == []
    pod.store.lock().release()


def test_an_error_amid_the_bytes_is_told_and_the_rest_dropped(pod: Pod) -> None:
    peer = pod.connect()
    files = {"dags/a.py": DAG * 10, "dags/z.py": DAG + b"z"}
    new = entries(files)
    put = [[path, *entry] for path, entry in new.items()]
    need = peer.ask(op="stage", content_id=files_id(new), base=None, put=put, remove=[])
    peer.send_raw(b"x" * len(files["dags/a.py"]))
    event = peer.receive()
    assert (event["kind"], event["message"]) == ("invalid", "'dags/a.py' changed while it was sent.")
    assert need["paths"] == ["dags/a.py", "dags/z.py"]
    peer.send_raw(files["dags/z.py"])
    assert peer.ask(op="state")["live"] == files_id(entries(FIRST))
    pod.store.lock().release()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"op": "fly"}, "There is no operation"),
        ({}, "There is no operation"),
        ({"op": "check"}, "Nothing is staged"),
        ({"op": "stage", "content_id": "x", "base": None, "put": [["a"]]}, "list of files"),
        ({"op": "stage", "content_id": "x", "base": None, "put": [["/etc/x", False, 1, "0" * 64]]}, "The path"),
        ({"op": "stage", "content_id": "x", "base": None, "put": [], "remove": ["../x"]}, "The path"),
        ({"op": "stage", "content_id": "0" * 64, "base": None, "put": []}, "These files are the content"),
    ],
)
def test_what_is_no_request_is_refused(pod: Pod, request_: Mapping[str, Any], message: str) -> None:
    peer = pod.connect()
    event = peer.ask(**request_)
    assert event["kind"] == "invalid"
    assert message in event["message"]
    peer.send_raw(b"{")
    assert peer.receive()["message"] == "A frame is not a JSON object."
    assert peer.ask(op="state")["event"] == "state"


def test_nothing_is_switched_unchecked_or_without_a_database(pod: Pod) -> None:
    peer = pod.connect()
    second = {**FIRST, "dags/a.py": DAG + b"#"}
    peer.stage(second, FIRST)
    assert peer.ask(op="switch")["message"] == "Nothing was checked yet: check it first."
    peer.stage(second, FIRST)
    peer.ask(op="check")
    pod.database.away = True
    event = peer.ask(op="switch")
    assert (event["kind"], event["message"]) == (
        "database",
        "Airflow's database does not answer: connection refused.",
    )
    assert pod.live() == FIRST


def test_versions_that_nothing_needs_go_when_nothing_is_asked(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_agent, "_REST_SECONDS", 0.02)
    peer = pod.connect()
    before: Mapping[str, bytes] = FIRST
    pod.database.needed = {str(pod.store.live_version())}
    for number in range(14):
        after = {**FIRST, "dags/a.py": DAG + b"#%d" % number}
        peer.sync(after, before)
        before = after
    peer.close()
    pod.end()
    pod._ends.clear()
    kept = {folder.name for folder in pod.store.versions.iterdir()}
    assert len(kept) == 11
    assert pod.database.needed <= kept
    assert pod.store.live_version() in kept


def test_a_check_that_hangs_is_given_up_for_the_next_frame(pod: Pod) -> None:
    peer = pod.connect()
    pod.check.hangs = True
    peer.stage({**FIRST, "dags/a.py": DAG + b"#"}, FIRST)
    peer.send({"op": "check"})
    peer.send({"op": "state"})
    assert peer.receive()["kind"] == "interrupted"
    assert peer.receive()["event"] == "state"
    # A peer that is gone frees the lock at once.
    peer.stage({**FIRST, "dags/a.py": DAG + b"#"}, FIRST)
    peer.send({"op": "check"})
    peer.close()
    pod.store.lock(5.0).release()


def never() -> bool:
    return False


def test_a_check_over_a_socket_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "check.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(ContentError, match="given up") as caught:
            content_agent.check_content({}, lambda: True, path)
        assert caught.value.kind == "interrupted"
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(64) == b"{}\n"
            assert connection.recv(64) == b""


def test_the_check_is_asked_over_its_socket(tmp_path: Path) -> None:
    path = tmp_path / "check.sock"
    answers = iter([b'{"files": []}\n', b'{"error": "no"}\n', b""])
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with connection, connection.makefile("rb") as lines:
                    assert json.loads(lines.readline()) == {"root": "/x"}
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        assert content_agent.check_content({"root": "/x"}, never, path) == {"files": []}
        with pytest.raises(ContentError, match="could not be made: no"):
            content_agent.check_content({"root": "/x"}, never, path)
        with pytest.raises(ContentError, match="has ended"):
            content_agent.check_content({"root": "/x"}, never, path)
        thread.join()
