"""The frames of a sync: what is sent for a change, and what the pod's answers become."""

from __future__ import annotations

import asyncio
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from airflow_deployer.api_streams import ApiServer, UnavailableError
from airflow_deployer.config import Project
from airflow_deployer.content import ProjectContent, read_project
from airflow_deployer.content_sync import ContentChannel
from airflow_deployer.errors import GateError, SyncError
from airflow_deployer.manifests import Names

REPORT: dict[str, Any] = {
    "airflow": "3.3.2",
    "seconds": 0.1,
    "files": [{"path": "dags/a.py", "dag_ids": ["a"], "seconds": 0.1}],
    "errors": [],
    "needs_database": [],
    "duplicates": [],
    "skipped": [],
}
BROKEN = {
    "path": "dags/a.py",
    "line": 3,
    "dag_file": "dags/a.py",
    "kind": "import",
    "exception": "NameError",
    "message": "name 'x' is not defined",
    "traceback": [],
}
LIVE = {"event": "live", "seconds": 0.2, "parsed": 1, "import_errors": [], "pending": []}


class Pod:
    """A stand-in for the exec: answers as told, and keeps what was sent."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.sent = b""
        self._answers = b"".join(
            struct.pack(">I", len(text)) + text for text in (json.dumps(a).encode() for a in answers)
        )

    async def write(self, data: bytes) -> None:
        self.sent += data

    async def read_exactly(self, size: int) -> bytes:
        if len(self._answers) < size:
            raise UnavailableError("gone")
        data, self._answers = self._answers[:size], self._answers[size:]
        return data

    async def close(self) -> None:
        pass

    def frames(self) -> list[bytes]:
        found, rest = [], self.sent
        while rest:
            (size,) = struct.unpack_from(">I", rest)
            found.append(rest[4 : 4 + size])
            rest = rest[4 + size :]
        return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "dags").mkdir()
    (tmp_path / "dags/a.py").write_text("# airflow dag a\n")
    (tmp_path / "dags/b.py").write_text("# airflow dag b\n")
    return tmp_path


def content(folder: Path) -> ProjectContent:
    return read_project(folder, Project())


def state(live: str) -> dict[str, Any]:
    return {"event": "state", "live": live, "deployed": live, "image": live, "deployed_at": 1}


def round_of(live: str, *needed: str) -> list[dict[str, Any]]:
    return [
        state(live),
        {"event": "need", "paths": list(needed)},
        {"event": "staged", "seconds": 0.1, "affected": []},
        {"event": "checked", "seconds": 0.1, "report": REPORT},
        {"event": "switched", "at": "2026-01-01T00:00:00Z"},
        LIVE,
    ]


def channel(pod: Pod) -> ContentChannel:
    made = ContentChannel(ApiServer.__new__(ApiServer), Names("airflow", "default"))
    made._exec = pod  # type: ignore[assignment]
    return made


def test_the_first_round_names_everything_and_the_next_only_the_difference(folder: Path) -> None:
    first = content(folder)
    pod = Pod(*round_of("", "dags/b.py"), *round_of(first.content_id, "dags/c.py"))
    sync = channel(pod)

    async def run() -> None:
        result = await sync.sync(first)
        assert (result.changed, result.live_id, result.parsed) == (True, first.content_id, 1)
        (folder / "dags/a.py").unlink()
        (folder / "dags/c.py").write_text("# airflow dag c\n")
        await sync.sync(content(folder))

    asyncio.run(run())
    frames = pod.frames()
    requests = [json.loads(frame) for frame in frames if frame.startswith(b"{")]
    stages = [request for request in requests if request["op"] == "stage"]
    assert stages[0]["base"] is None
    assert [entry[0] for entry in stages[0]["put"]] == ["dags/a.py", "dags/b.py"]
    assert stages[1]["base"] == first.content_id
    assert [entry[0] for entry in stages[1]["put"]] == ["dags/c.py"]
    assert stages[1]["remove"] == ["dags/a.py"]
    assert [frame for frame in frames if not frame.startswith(b"{")] == [b"# airflow dag b\n", b"# airflow dag c\n"]
    assert [request["op"] for request in requests[:4]] == ["state", "stage", "check", "switch"]


def test_what_is_live_is_checked_as_a_whole() -> None:
    pod = Pod({"event": "checked", "seconds": 0.1, "report": REPORT | {"errors": [BROKEN]}})
    assert asyncio.run(channel(pod).check_live()).shown == {"a.py"}
    assert [json.loads(frame) for frame in pod.frames()] == [{"op": "check_live"}]


def test_what_is_live_is_left_alone(folder: Path) -> None:
    wanted = content(folder)
    pod = Pod(state(wanted.content_id))
    assert asyncio.run(channel(pod).sync(wanted)).changed is False
    assert len(pod.frames()) == 1


def test_a_base_that_the_pod_has_lost_is_sent_whole(folder: Path) -> None:
    first = content(folder)
    lost = {"event": "error", "kind": "unknown_base", "message": "no such base"}
    again = round_of("other")
    pod = Pod(*round_of(""), again[0], lost, *again[1:])
    sync = channel(pod)

    async def run() -> None:
        await sync.sync(first)
        (folder / "dags/a.py").write_text("# airflow dag a2\n")
        await sync.sync(content(folder))

    asyncio.run(run())
    stages = [request for request in map(json.loads, pod.frames()) if request["op"] == "stage"]
    assert [(stage["base"], len(stage["put"])) for stage in stages] == [(None, 2), (first.content_id, 1), (None, 2)]


def test_a_broken_dag_is_not_switched_to(folder: Path) -> None:
    answers = [
        *round_of("")[:3],
        {"event": "checked", "seconds": 0.1, "report": REPORT | {"errors": [BROKEN]}},
        {"event": "discarded"},
    ]
    pod = Pod(*answers)
    with pytest.raises(GateError, match=r"dags/a\.py, line 3: NameError"):
        asyncio.run(channel(pod).sync(content(folder)))
    assert json.loads(pod.frames()[-1]) == {"op": "discard"}


def test_a_file_that_shrank_is_filled_up(folder: Path) -> None:
    read = content(folder)
    (folder / "dags/b.py").write_text("#\n")
    refused = {"event": "error", "kind": "invalid", "message": "dags/b.py has another digest"}
    pod = Pod(state(""), {"event": "need", "paths": ["dags/b.py"]}, refused)
    with pytest.raises(SyncError) as caught:
        asyncio.run(channel(pod).sync(read))
    assert caught.value.kind == "invalid"
    assert "changed while it was being read" in caught.value.hint
    assert sum(map(len, pod.frames()[2:])) == len("# airflow dag b\n")


def test_what_the_pod_cannot_do_offers_a_new_pod(folder: Path) -> None:
    refused = {"event": "error", "kind": "check_failed", "message": "The import check could not be made: killed"}
    with pytest.raises(SyncError, match="could not be made: killed") as caught:
        asyncio.run(channel(Pod(*round_of("")[:3], refused)).sync(content(folder)))
    assert "deployer up --replace" in caught.value.hint


def test_what_airflow_has_not_parsed_in_time_is_named(folder: Path) -> None:
    answers = [*round_of("")[:5], LIVE | {"parsed": 0, "pending": ["dags/a.py"]}]
    with pytest.raises(SyncError, match=r"has not parsed 1 file\(s\) yet: dags/a.py") as caught:
        asyncio.run(channel(Pod(*answers)).sync(content(folder)))
    assert caught.value.kind == "not_live"


def test_a_pod_that_goes_away_is_told_as_such(folder: Path) -> None:
    with pytest.raises(UnavailableError):
        asyncio.run(channel(Pod(state(""))).sync(content(folder)))


def test_something_else_that_answers_is_no_agent(folder: Path) -> None:
    pod = Pod()
    pod._answers = b"OCI runtime exec failed"
    with pytest.raises(SyncError, match="not the content agent"):
        asyncio.run(channel(pod).state())
