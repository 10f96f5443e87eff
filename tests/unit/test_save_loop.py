"""What `deployer dev` does with each change, and through what it goes on: a stand-in plays the pod."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from airflow_deployer import save_loop
from airflow_deployer.api_streams import RefusedError, UnavailableError
from airflow_deployer.config import Settings
from airflow_deployer.content import ProjectContent, read_project
from airflow_deployer.content_sync import Live, State
from airflow_deployer.errors import ClusterError, ConfigurationError, SyncError
from airflow_deployer.gate import Duplicate, GateReport, ImportedFile, ImportProblem, Moved, Place
from airflow_deployer.reports import ImportErrorReport
from airflow_deployer.save_loop import SaveLoop, changed_paths

BROKEN = ImportProblem("dags/a.py", 2, "dags/a.py", "import", "NameError", "name 'x' is not defined", ("Traceback",))


class Pod:
    """The pod as the loop sees it: what is live, and what goes wrong."""

    def __init__(self, live: str) -> None:
        self.live = live
        self.deployed = live
        self.errors: tuple[ImportProblem, ...] = ()
        self.duplicates: tuple[Duplicate, ...] = ()
        self.moved: tuple[Moved, ...] = ()
        self.import_errors: tuple[ImportErrorReport, ...] = ()
        self.failures: list[Exception] = []
        self.away = ""
        self.silent = False
        self.hangs = ""
        self.connections = 0
        self.done: list[str] = []

    def connect(self) -> PodChannel:
        return PodChannel(self)


class PodChannel:
    """A connection to `Pod`."""

    def __init__(self, pod: Pod) -> None:
        self._pod = pod

    async def connect(self) -> None:
        self._check("connect")
        self._pod.connections += 1

    async def close(self) -> None:
        pass

    async def state(self) -> State:
        self._check("state")
        if self._pod.silent:
            await asyncio.sleep(60)
        return State(self._pod.live, self._pod.deployed, self._pod.deployed)

    async def stage(self, content: ProjectContent) -> None:
        self._check("stage")
        if self._pod.failures:
            raise self._pod.failures.pop(0)

    async def check(self) -> GateReport:
        self._check("check")
        await self._hang("check")
        files = (ImportedFile("dags/a.py", ("a",), 0.1),)
        return GateReport("3.3.2", 0.1, files, self._pod.errors, (), self._pod.duplicates, (), self._pod.moved)

    async def switch(self, content: ProjectContent) -> Live:
        self._check("switch")
        self._pod.live = content.content_id
        await self._hang("switch")
        return Live(0.1, 1, self._pod.import_errors, ())

    async def discard(self) -> None:
        self._check("discard")

    def _check(self, what: str) -> None:
        if self._pod.away:
            raise UnavailableError(self._pod.away)
        self._pod.done.append(what)

    async def _hang(self, what: str) -> None:
        if self._pod.hangs == what:
            await asyncio.sleep(60)


class Seen:
    """What the user sees."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, tuple[str, ...], dict[str, object]]] = []

    def event(self, kind: str, message: str, *, mark: str = "", details: Sequence[str] = (), **fields: object) -> None:
        self.events.append((kind, message, tuple(details), fields))

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, *_ in self.events]

    def last(self, kind: str) -> tuple[str, tuple[str, ...]]:
        """Message and details of the latest event of that kind."""
        return next((message, details) for seen, message, details, _ in reversed(self.events) if seen == kind)

    async def until(self, kind: str, count: int = 1) -> None:
        for _ in range(500):
            if self.kinds.count(kind) >= count:
                return
            await asyncio.sleep(0.01)
        pytest.fail(f"no {kind}: {self.events}")


class Saves:
    """Says that something may have changed, when the test says so."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def happen(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()
        self._event.clear()


class Dev:
    """A project, a pod that serves it, and the loop between them."""

    def __init__(self, project: Path, settings: Settings) -> None:
        self.project = project
        self.settings: Settings | ConfigurationError = settings
        self.content = read_project(project, settings.project)
        self.pod = Pod(self.content.content_id)
        self.seen = Seen()
        self.saves = Saves()
        self.gone: ClusterError | None = None
        self.runs = 0
        self.loop = SaveLoop(
            project,
            self.content,
            settings,
            self.seen,
            load=self._load,
            connect=self.pod.connect,
            still_there=self._still_there,
            on_live=self._on_live,
            how_to_replace="press r",
        )

    def save(self, path: str, text: str | None) -> None:
        """Write a file, or remove it, and say so."""
        file = self.project / path
        if text is None:
            file.unlink()
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        self.saves.happen()

    def _load(self) -> Settings:
        if isinstance(self.settings, ConfigurationError):
            raise self.settings
        return self.settings

    async def _still_there(self) -> None:
        if self.gone is not None:
            raise self.gone

    def _on_live(self) -> None:
        self.runs += 1


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("_FIRST_PAUSE", 0.01), ("_LONGEST_PAUSE", 0.05), ("_BUSY_PAUSE", 0.01)):
        monkeypatch.setattr(save_loop, name, seconds)


@asynccontextmanager
async def following(tmp_path: Path) -> AsyncIterator[Dev]:
    (tmp_path / "dags").mkdir()
    for name in "ab":
        (tmp_path / f"dags/{name}.py").write_text("import airflow  # dag")
    dev = Dev(tmp_path, Settings())
    task = asyncio.create_task(dev.loop.follow(dev.saves))
    try:
        for _ in range(500):
            if "state" in dev.pod.done:
                break
            await asyncio.sleep(0.01)
        yield dev
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 20))


def test_a_save_becomes_live(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with following(tmp_path) as dev:
            dev.save("dags/a.py", "import airflow  # dag 2")
            dev.save("dags/c.py", "new")
            dev.save("dags/b.py", None)
            await dev.seen.until("live")
            message, _ = dev.seen.last("live")
            assert message.startswith("live in 0.")
            assert "s  dags/a.py, dags/b.py removed, dags/c.py added (1 DAG file parsed)" in message
            assert dev.pod.live == read_project(tmp_path, Settings().project).content_id
            assert dev.runs == 2  # at the start, and after the save

    run(scenario())


def test_what_does_not_import_is_told_with_its_place_and_the_last_good_content_stays_live(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with following(tmp_path) as dev:
            before, dev.pod.errors = dev.pod.live, (BROKEN,)
            dev.save("dags/a.py", "x")
            await dev.seen.until("import_errors")
            assert dev.seen.last("import_errors") == (
                "dags/a.py:2 NameError: name 'x' is not defined",
                ("Traceback", "the last good content stays live"),
            )
            assert dev.pod.live == before
            assert dev.pod.done[-1] == "discard"

            dev.pod.errors = ()
            dev.save("dags/a.py", "import airflow  # mended")
            await dev.seen.until("live")
            assert dev.seen.last("live")[0].endswith("dags/a.py (1 DAG file parsed); the errors are gone")

    run(scenario())


def test_what_moved_in_airflow_is_told_once_for_each_file(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with following(tmp_path) as dev:
            old = Moved("dags/a.py", 1, "airflow.operators.bash.BashOperator", False, "another import")
            dev.pod.moved = (old,)
            dev.save("dags/a.py", "one")
            await dev.seen.until("live", 1)
            assert dev.seen.last("live")[1] == (
                "airflow.operators.bash.BashOperator is deprecated; instead: another import (dags/a.py, line 1)",
            )
            dev.pod.moved = (dataclasses.replace(old, line=2),)
            dev.save("dags/a.py", "two")
            await dev.seen.until("live", 2)
            assert dev.seen.last("live")[1] == ()

    run(scenario())


def test_an_error_that_is_undone_is_cleared(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with following(tmp_path) as dev:
            good = (tmp_path / "dags/a.py").read_text()
            dev.pod.errors = (BROKEN,)
            dev.save("dags/a.py", "x")
            await dev.seen.until("import_errors")
            dev.save("dags/a.py", good)
            await dev.seen.until("cleared")

    run(scenario())


def test_an_id_that_two_dags_have_is_told_with_both_places(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with following(tmp_path) as dev:
            dev.pod.duplicates = (Duplicate("daily", (Place("dags/a.py", 3), Place("dags/b.py", 4))),)
            dev.save("dags/b.py", "same")
            await dev.seen.until("import_errors")
            assert dev.seen.last("import_errors")[0] == "dags/a.py:3 the DAG id 'daily' is taken: dags/b.py:4"

    run(scenario())


def test_what_only_airflow_itself_cannot_import_is_told_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with following(tmp_path) as dev:
            dev.pod.import_errors = (ImportErrorReport("dags/a.py", "KeyError: 'x'"),)
            dev.save("dags/a.py", "y")
            await dev.seen.until("import_error")
            assert dev.seen.kinds[-2:] == ["live", "import_error"]

    run(scenario())


def test_a_project_that_cannot_be_deployed_is_told_once_and_mended(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with following(tmp_path) as dev:
            (tmp_path / "dags").rename(tmp_path / "elsewhere")
            for _ in range(3):
                dev.saves.happen()
                await asyncio.sleep(0.15)
            await dev.seen.until("project_error")
            assert dev.seen.kinds.count("project_error") == 1
            (tmp_path / "elsewhere").rename(tmp_path / "dags")
            dev.save("dags/a.py", "import airflow  # dag 2")
            await dev.seen.until("live")

    run(scenario())


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with following(tmp_path) as dev:
            dev.pod.failures = [SyncError("digest", kind="invalid")] * 2
            dev.save("dags/a.py", "y")
            await dev.seen.until("live")
            assert "sync_error" not in dev.seen.kinds

    run(scenario())


@pytest.mark.parametrize("what", ["check", "switch"])
def test_what_takes_long_is_told_and_given_up_for_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(save_loop, "_PATIENCE", 0.05)

    async def scenario() -> None:
        async with following(tmp_path) as dev:
            dev.pod.hangs = what
            dev.save("dags/a.py", "while True: pass")
            await dev.seen.until("slow")
            await asyncio.sleep(0.1)
            assert dev.seen.kinds == ["slow"]
            dev.pod.hangs = ""
            dev.save("dags/a.py", "mended")
            await dev.seen.until("live")
            assert dev.seen.kinds == ["slow", "overtaken", "live"]
            assert dev.pod.live == read_project(tmp_path, Settings().project).content_id

    run(scenario())


def test_another_deploy_at_work_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_loop, "_PATIENCE", 0.03)

    async def scenario() -> None:
        async with following(tmp_path) as dev:
            dev.pod.failures = [SyncError("busy", kind="busy")] * 5
            dev.save("dags/a.py", "y")
            await dev.seen.until("live")
            assert dev.seen.kinds == ["busy", "live"]

    run(scenario())


def test_what_the_pod_cannot_do_is_told_and_tried_again_with_the_next_save(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with following(tmp_path) as dev:
            dev.pod.failures = [SyncError("The volume is full.", kind="no_space", hint="enlarge storage.size")]
            dev.save("dags/a.py", "y")
            await dev.seen.until("sync_error")
            assert dev.seen.last("sync_error") == ("The volume is full.", ("next: enlarge storage.size",))
            dev.save("dags/a.py", "z")
            await dev.seen.until("live")

    run(scenario())


def test_a_pod_that_goes_away_gets_what_it_lacks_when_it_is_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with following(tmp_path) as dev:
            dev.save("dags/a.py", "y")
            await dev.seen.until("live")
            dev.pod.away = "there is no such pod"
            dev.save("dags/a.py", "z")
            await dev.seen.until("away")
            await asyncio.sleep(0.2)
            assert dev.seen.kinds.count("away") == 1
            dev.pod.live = dev.content.content_id  # a new pod, as its image has it
            dev.pod.away = ""
            await dev.seen.until("back")
            await dev.seen.until("live", 2)
            assert dev.pod.live == read_project(tmp_path, Settings().project).content_id

    run(scenario())


def test_a_connection_that_died_silently_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_loop, "_HEARTBEAT", 0.05)
    monkeypatch.setattr(save_loop, "_ANSWER", 0.05)

    async def scenario() -> None:
        async with following(tmp_path) as dev:
            dev.pod.silent = True
            await dev.seen.until("away")
            dev.pod.silent = False
            await dev.seen.until("back")
            assert dev.pod.connections >= 2

    run(scenario())


def test_what_others_made_live_is_told_and_left_until_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save_loop, "_HEARTBEAT", 0.02)

    async def scenario() -> None:
        async with following(tmp_path) as dev:
            dev.pod.live = "f" * 64
            await dev.seen.until("changed_elsewhere")
            await asyncio.sleep(0.1)
            assert dev.seen.kinds == ["changed_elsewhere"]
            dev.saves.happen()
            await dev.seen.until("live")

    run(scenario())


def test_a_deployment_that_was_removed_ends_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        (tmp_path / "dags").mkdir()
        (tmp_path / "dags/a.py").write_text("x")
        dev = Dev(tmp_path, Settings())
        dev.pod.away, dev.gone = "there is no such pod", ClusterError("removed")
        with pytest.raises(ClusterError, match="removed"):
            await dev.loop.follow(dev.saves)

    run(scenario())


def test_missing_permissions_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(channel: PodChannel) -> None:
        raise RefusedError("forbidden (403)")

    monkeypatch.setattr(PodChannel, "connect", refused)

    async def scenario() -> None:
        (tmp_path / "dags").mkdir()
        (tmp_path / "dags/a.py").write_text("x")
        dev = Dev(tmp_path, Settings())
        with pytest.raises(ClusterError, match="forbidden"):
            await dev.loop.follow(dev.saves)

    run(scenario())


CHANGES: dict[str, tuple[Callable[[Dev], None], str]] = {
    "a plugin": (lambda dev: dev.save("plugins/p.py", "x"), "plugins/p.py"),
    "requirements": (lambda dev: dev.save("requirements.txt", "pandas"), "requirements.txt"),
    "configuration": (
        lambda dev: setattr(dev, "settings", msgspec.structs.replace(Settings(), airflow=new_airflow())),
        "deployer.toml (airflow)",
    ),
}


def new_airflow() -> Any:
    return msgspec.structs.replace(Settings().airflow, env={"A": "b"})


@pytest.mark.parametrize(("change", "what"), CHANGES.values(), ids=CHANGES.keys())
def test_what_takes_a_new_pod_is_told_once_and_withdrawn(
    tmp_path: Path, change: Callable[[Dev], None], what: str
) -> None:
    async def scenario() -> None:
        async with following(tmp_path) as dev:
            change(dev)
            for _ in range(3):
                dev.saves.happen()
                await asyncio.sleep(0.05)
            await dev.seen.until("needs_replacement")
            assert dev.seen.kinds == ["needs_replacement"]
            assert dev.seen.last("needs_replacement")[0] == f"{what} changed, which takes a new pod: press r"

            dev.settings = Settings()
            for path in ("plugins/p.py", "requirements.txt"):
                (tmp_path / path).unlink(missing_ok=True)
            dev.saves.happen()
            await dev.seen.until("needs_nothing")

    run(scenario())


def test_a_broken_configuration_is_told_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with following(tmp_path) as dev:
            dev.settings = ConfigurationError("Unknown key `storag` in deployer.toml.")
            for _ in range(3):
                dev.saves.happen()
                await asyncio.sleep(0.05)
            await dev.seen.until("configuration_error")
            assert dev.seen.kinds == ["configuration_error"]

    run(scenario())


def test_the_end_says_whether_an_image_has_what_is_live(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with following(tmp_path) as dev:
            dev.loop.tell_end()
            assert dev.seen.last("end")[0].endswith("which is in its image")
            dev.save("dags/a.py", "y")
            await dev.seen.until("live")
            dev.loop.tell_end()
            assert dev.seen.last("end")[0] == (
                f"Airflow keeps running with the content {dev.pod.live[:12]}, "
                "which is in no image yet: deployer up   makes it permanent"
            )
            dev.pod.errors = (BROKEN,)
            dev.save("dags/a.py", "x")
            await dev.seen.until("import_errors")
            dev.loop.tell_end()
            assert dev.seen.last("end")[1] == ("what was saved last does not import and is not live",)

    run(scenario())


def test_changed_paths(tmp_path: Path) -> None:
    (tmp_path / "dags").mkdir()
    (tmp_path / "dags/a.py").write_text("x")
    before = read_project(tmp_path, Settings().project)
    (tmp_path / "dags/a.py").chmod(0o755)
    assert changed_paths(before, read_project(tmp_path, Settings().project)) == ["dags/a.py"]
    assert changed_paths(None, before) == []
