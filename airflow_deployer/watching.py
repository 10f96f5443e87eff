"""Noticing that the project's files change on disk, by the file system's own events (`watchfiles`).

Only says *that* something may have changed; what has changed is for `content.ProjectReader` to find out.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_deployer.config import CONFIG_FILE
from airflow_deployer.content import IGNORE_FILE, Ignored, ignore_rule
from airflow_deployer.errors import ProjectError

if TYPE_CHECKING:
    from watchfiles import Change

    from airflow_deployer.config import Project

# A burst of writes (git checkout, an editor that saves all) is one change: it ends when nothing has come for a step,
# and after the longer time in any case.
_STEP_MS = 20
_DEBOUNCE_MS = 200
# Where the file system has no events to offer; reading the project again costs only looking at its files.
_POLL_SECONDS = 1.0
_RETRY_SECONDS = 0.5

OnTrouble = Callable[[str], None]


class Watch:
    """Watches what a project ships and what configures it, for the time of an `async with` block.

    Args:
        project: the project folder.
        paths: the `[project]` settings, relative to it.
        config_file: where the configuration is read from, if not from the project's own files.
        on_trouble: told what hinders the watching.
    """

    def __init__(self, project: Path, paths: Project, config_file: Path | None, on_trouble: OnTrouble) -> None:
        self._project = project.resolve()
        self._folders = [self._project / name for name in (paths.dags, paths.include, paths.plugins)]
        names = (paths.requirements, CONFIG_FILE, "pyproject.toml", IGNORE_FILE)
        self._files = {self._project / name for name in names}
        if config_file is not None:
            self._files.add(config_file.resolve())
        self._on_trouble = on_trouble
        self._ignored: Ignored = lambda path: False
        self._changed = asyncio.Event()
        self._file_task: asyncio.Task[None] | None = None
        self._tree_task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Watch:
        self._load_rule()
        self._watch_trees()
        self._file_task = asyncio.create_task(self._watch_single_files())
        # By the time that they first wait, both tasks have registered with the file system.
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in filter(None, (self._file_task, self._tree_task)):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def wait(self) -> None:
        """Return once something may have changed since this returned last."""
        await self._changed.wait()
        self._changed.clear()

    async def _watch_single_files(self) -> None:
        """Watch the folders that hold a single file or the top of a tree, without what lies below them."""
        interesting = self._files | set(self._folders)
        parents = {path.parent for path in interesting}
        async for changes in self._changes(lambda: filter(Path.is_dir, parents), recursive=False):
            paths = {Path(path) for path in changes} & interesting
            if self._project / IGNORE_FILE in paths:
                self._load_rule()
            if paths & set(self._folders):
                # A folder that was made anew is another one to the file system.
                self._watch_trees()
            if paths:
                self._changed.set()

    def _watch_trees(self) -> None:
        if self._tree_task is not None:
            self._tree_task.cancel()
        self._tree_task = asyncio.create_task(self._watch_folders())

    async def _watch_folders(self) -> None:
        folders = self._folders
        async for _ in self._changes(lambda: filter(Path.is_dir, folders), recursive=True, wanted=self._is_wanted):
            self._changed.set()

    async def _changes(
        self,
        folders: Callable[[], Iterable[Path]],
        *,
        recursive: bool,
        wanted: Callable[[Change, str], bool] | None = None,
    ) -> AsyncIterator[set[str]]:
        """Yield the paths of each burst of changes, for ever."""
        from watchfiles import awatch

        while True:
            try:
                async for changes in awatch(
                    *folders(),
                    watch_filter=wanted,
                    debounce=_DEBOUNCE_MS,
                    step=_STEP_MS,
                    recursive=recursive,
                    ignore_permission_denied=True,
                ):
                    yield {path for _, path in changes}
            except FileNotFoundError:
                # Removed since it was looked for.
                await asyncio.sleep(_RETRY_SECONDS)
            except (OSError, RuntimeError) as error:
                # OSError is mostly the limit on inotify watches; RuntimeError is the base of watchfiles' own.
                self._on_trouble(f"cannot watch the files ({error}); looking every {_POLL_SECONDS:.0f} s instead")
                while True:
                    await asyncio.sleep(_POLL_SECONDS)
                    self._changed.set()

    def _is_wanted(self, change: Change, path: str) -> bool:
        with contextlib.suppress(ValueError):
            return not self._ignored(Path(path).relative_to(self._project).as_posix())
        return True

    def _load_rule(self) -> None:
        # A file that cannot be read is told by whoever reads the project.
        with contextlib.suppress(ProjectError):
            self._ignored = ignore_rule(self._project)
