"""That a save is noticed at once, in whatever way it is made, and that noise is not."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from airflow_deployer.config import Project
from airflow_deployer.watching import Watch

SOON = 1.0
QUIET = 0.3


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("dags/team/daily.py", "include/query.sql", "dags/__pycache__/daily.cpython-313.pyc", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / ".deployerignore").write_text("*.log\n")
    return tmp_path


@asynccontextmanager
async def watching(project: Path, config_file: Path | None = None) -> AsyncIterator[Watch]:
    def fail(text: str) -> None:
        pytest.fail(text)

    async with Watch(project, Project(), config_file, fail) as watch:
        yield watch


async def settled(watch: Watch) -> None:
    while await noticed(watch, QUIET):
        pass


async def noticed(watch: Watch, seconds: float = SOON) -> bool:
    try:
        await asyncio.wait_for(watch.wait(), seconds)
    except asyncio.TimeoutError:
        return False
    return True


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario(), 20)

    asyncio.run(bounded())


def save_by_rename(project: Path) -> None:
    file = project / "dags/team/daily.py"
    file.with_name(".daily.py.tmp~").write_text("y")
    file.with_name(".daily.py.tmp~").rename(file)


def make_a_folder_with_a_file(project: Path) -> None:
    (project / "dags/new").mkdir()
    (project / "dags/new/a.py").write_text("x")


CHANGES: dict[str, Callable[[Path], object]] = {
    "a save": lambda project: (project / "dags/team/daily.py").write_text("y"),
    "a save by rename": save_by_rename,
    "a new file": lambda project: (project / "include/new.sql").write_text("y"),
    "a file in a new folder": make_a_folder_with_a_file,
    "a removed file": lambda project: (project / "include/query.sql").unlink(),
    "a changed mode": lambda project: (project / "dags/team/daily.py").chmod(0o755),
    "a plugin, the folder included": lambda project: shutil.copytree(project / "include", project / "plugins"),
    "requirements": lambda project: (project / "requirements.txt").write_text("pandas"),
    "the configuration": lambda project: (project / "deployer.toml").write_text(""),
    "what is ignored": lambda project: (project / ".deployerignore").write_text(""),
    "dags/ removed": lambda project: shutil.rmtree(project / "dags"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_is_noticed(project: Path, change: Callable[[Path], object]) -> None:
    async def scenario() -> None:
        async with watching(project) as watch:
            change(project)
            assert await noticed(watch)

    run(scenario)


NOISE: dict[str, Callable[[Path], object]] = {
    "bytecode": lambda project: (project / "dags/__pycache__/new.pyc").write_text("x"),
    "an editor's swap file": lambda project: (project / "dags/.daily.py.swp").write_text("x"),
    "what .deployerignore lists": lambda project: (project / "dags/run.log").write_text("x"),
    "a file beside the content": lambda project: (project / "README.md").write_text("y"),
    "a folder beside the content": lambda project: (project / "tests").mkdir(),
}


@pytest.mark.parametrize("change", NOISE.values(), ids=NOISE.keys())
def test_noise_is_not_noticed(project: Path, change: Callable[[Path], object]) -> None:
    async def scenario() -> None:
        async with watching(project) as watch:
            change(project)
            assert not await noticed(watch, QUIET)

    run(scenario)


def test_a_burst_of_many_files_is_one_change(project: Path) -> None:
    async def scenario() -> None:
        async with watching(project) as watch:
            for number in range(300):
                (project / f"dags/team/dag{number}.py").write_text("x")
            assert await noticed(watch)
            assert not await noticed(watch, QUIET)

    run(scenario)


def test_one_save_after_another_is_noticed(project: Path) -> None:
    async def scenario() -> None:
        async with watching(project) as watch:
            for number in range(5):
                await asyncio.sleep(0.05)
                (project / "dags/team/daily.py").write_text(str(number))
                assert await noticed(watch)

    run(scenario)


def test_folders_that_are_made_anew_are_watched_again(project: Path) -> None:
    async def scenario() -> None:
        async with watching(project) as watch:
            for _ in range(2):
                shutil.rmtree(project / "dags")
                assert await noticed(watch)
                (project / "dags").mkdir()
                await settled(watch)
                (project / "dags/a.py").write_text("x")
                assert await noticed(watch)
                await settled(watch)

    run(scenario)


def test_what_is_ignored_follows_the_ignore_file(project: Path) -> None:
    async def scenario() -> None:
        async with watching(project) as watch:
            (project / ".deployerignore").write_text("*.sql\n")
            await settled(watch)
            (project / "dags/run.log").write_text("x")
            assert await noticed(watch)
            (project / "include/query.sql").write_text("y")
            assert not await noticed(watch, QUIET)

    run(scenario)


def test_a_link_into_the_project_is_followed(project: Path) -> None:
    (project / "shared").mkdir()
    (project / "shared/a.py").write_text("x")
    (project / "dags/lib").symlink_to("../shared")

    async def scenario() -> None:
        async with watching(project) as watch:
            (project / "shared/a.py").write_text("y")
            assert await noticed(watch)

    run(scenario)


@pytest.mark.parametrize("target", [".", "missing", "loop"])
def test_a_bad_link_hinders_nothing(project: Path, target: str) -> None:
    (project / "dags/loop").symlink_to(target)

    async def scenario() -> None:
        async with watching(project) as watch:
            (project / "dags/team/daily.py").write_text("y")
            assert await noticed(watch)
            (project / "dags/loop").unlink()
            assert await noticed(watch)

    run(scenario)


def test_a_configuration_elsewhere_is_watched(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    config = tmp_path_factory.mktemp("elsewhere") / "prod.toml"
    config.write_text("")

    async def scenario() -> None:
        async with watching(project, config) as watch:
            config.write_text('name = "x"')
            assert await noticed(watch)

    run(scenario)


def test_where_events_cannot_be_had_the_files_are_looked_at_again_and_again(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from watchfiles import main

    told: list[str] = []

    def limited(*_: object) -> None:
        # What comes of the limit in /proc/sys/fs/inotify/max_user_watches.
        raise OSError(28, "OS file watch limit reached.")

    monkeypatch.setattr(main, "RustNotify", limited)

    async def scenario() -> None:
        async with Watch(project, Project(), None, told.append) as watch:
            assert await noticed(watch, 5)
            assert await noticed(watch, 5)

    run(scenario)
    assert told
    assert "OS file watch limit reached" in told[0]
