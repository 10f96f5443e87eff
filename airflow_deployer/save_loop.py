"""The loop behind `deployer dev`: every change of the project becomes live in the pod, through whatever happens to it.

One change is one round: read the project, stage it beside what is live, import it there, switch, wait until Airflow has
parsed it. Whatever goes wrong on the way leaves the last good content live and the loop running.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

from airflow_deployer.api_streams import RefusedError, UnavailableError
from airflow_deployer.config import CONFIG_FILE, Settings
from airflow_deployer.content import CONTENT_TAG_LENGTH, File, ProjectContent, ProjectReader
from airflow_deployer.errors import ClusterError, ConfigurationError, DeployerError, ProjectError, SyncError

if TYPE_CHECKING:
    from airflow_deployer.content_sync import Live, State
    from airflow_deployer.gate import Duplicate, GateReport, ImportProblem

T = TypeVar("T")

_HEARTBEAT = 5.0
# A pod that does not tell its state for so long is taken to be away: after a laptop's sleep the connection is dead, and
# nothing else would say so for minutes.
_ANSWER = 5.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 5.0
_BUSY_PAUSE = 0.2
# For a file that is being written; after that the event of its last write brings the next round.
_TORN_PAUSE, _TORN_TRIES = 0.1, 5
_WRITING_NS = 20_000_000
# What takes longer than this is told, and given up when the next save comes.
_PATIENCE = 2.0
_PATHS_SHOWN = 3
# Where the pod keeps content, staged and live; what follows is the path in the project.
_VERSION_FOLDER = re.compile(r"/home/airflow/content/[^/]+/[^/]+/")


class View(Protocol):
    """Where the loop tells what happens; `console.Console` is one."""

    def event(self, kind: str, message: str, *, mark: str = "", details: Sequence[str] = (), **fields: object) -> None:
        """Tell it; `fields` are for programs, the rest is for a person."""


class Channel(Protocol):
    """The connection to the pod's content agent; `content_sync.ContentChannel` is one and says what each does."""

    async def connect(self) -> None: ...

    async def close(self) -> None: ...

    async def state(self) -> State: ...

    async def stage(self, content: ProjectContent) -> None: ...

    def check(self) -> Coroutine[Any, Any, GateReport]: ...

    def switch(self, content: ProjectContent) -> Coroutine[Any, Any, Live]: ...

    async def discard(self) -> None: ...


class Changes(Protocol):
    """What says that the project may have changed; `watching.Watch` is one."""

    async def wait(self) -> None:
        """Return once something may have changed since this returned last."""


class _OvertakenError(Exception):
    """The project has changed again before a round was over."""


@dataclass(frozen=True)
class Runtime:
    """What a pod is made of besides its DAG content; a change of it takes a new pod."""

    plugins: tuple[tuple[str, bool, bytes], ...]
    requirements: bytes | None
    settings: Settings

    @classmethod
    def of(cls, content: ProjectContent, settings: Settings) -> Runtime:
        """Take it from what was read."""
        return cls(
            tuple((file.path, file.executable, file.digest) for file in content.plugin_files),
            content.requirements.digest if content.requirements else None,
            settings,
        )

    def differences(self, other: Runtime) -> list[str]:
        """Name what is not the same in both."""
        before, after = ({path: rest for path, *rest in runtime.plugins} for runtime in (self, other))
        different = [path for path in sorted(before.keys() | after.keys()) if before.get(path) != after.get(path)]
        if self.requirements != other.requirements:
            different.append("requirements.txt")
        keys = [
            field
            for field in self.settings.__struct_fields__
            if getattr(self.settings, field) != getattr(other.settings, field)
        ]
        return [*different, *([f"{CONFIG_FILE} ({', '.join(keys)})"] if keys else [])]


class SaveLoop:
    """Keeps the pod's live content the same as the project's.

    Args:
        project: the project folder.
        deployed: what of it was deployed.
        settings: what it was deployed with.
        view: told what happens.
        load: reads the configuration, which may have changed.
        connect: makes a channel to the pod that is there now.
        still_there: called after a lost connection; ends the loop by raising when the deployment is gone.
        on_live: called after each change that became live, and once at the start.
        how_to_replace: what the user does for a new pod, as in "press r".
    """

    def __init__(
        self,
        project: Path,
        deployed: ProjectContent,
        settings: Settings,
        view: View,
        *,
        load: Callable[[], Settings],
        connect: Callable[[], Channel],
        still_there: Callable[[], Awaitable[None]],
        on_live: Callable[[], None],
        how_to_replace: str,
    ) -> None:
        self._runtime = Runtime.of(deployed, settings)
        self._view = view
        self._load = load
        self._connect = connect
        self._still_there = still_there
        self._on_live = on_live
        self._how_to_replace = how_to_replace
        self._reader = ProjectReader(project, settings.project)
        self._live: ProjectContent | None = deployed
        self._live_id = self._deployed_id = deployed.content_id
        self._findings: list[str] = []
        self._told_moves: set[tuple[str, str]] = set()
        self._complaints: dict[str, str] = {}
        self._to_replace: list[str] = []
        self._away_since: float | None = None
        self._started = False

    # -- the loop ---------------------------------------------------------------------------------------------------

    async def follow(self, changes: Changes) -> NoReturn:
        """Bring every change to the pod, until cancelled.

        Raises:
            ClusterError: the credentials do not allow it, or what `still_there` raises.
        """
        pause = _FIRST_PAUSE
        while True:
            channel = self._connect()
            try:
                await channel.connect()
                while True:
                    await self._round(channel, changes)
                    pause = _FIRST_PAUSE
                    await self._next_change(channel, changes)
            except _OvertakenError:
                # Closing the connection ends what it was waiting for.
                continue
            except SyncError as error:
                # What the agent could not do once it may well do after the next change, asked by a new connection.
                self._tell_error("sync_error", error)
                await changes.wait()
                continue
            except RefusedError as error:
                raise ClusterError(
                    f"Cannot reach into the pod: {error}.",
                    hint="ask an administrator of the cluster for a Role with this verb and resource",
                ) from None
            except UnavailableError as error:
                self._tell_away(str(error))
            finally:
                await channel.close()
            with contextlib.suppress(UnavailableError):
                await self._still_there()
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def _next_change(self, channel: Channel, changes: Changes) -> None:
        while True:
            try:
                return await asyncio.wait_for(changes.wait(), _HEARTBEAT)
            except asyncio.TimeoutError:
                live = await self._ask_state(channel)
                if self._live is not None and live not in ("", self._live.content_id):
                    self._live = None
                    self._view.event(
                        "changed_elsewhere",
                        f"another deploy or sync made {_short(live)} live; the next save brings this project's back",
                        mark="!",
                        live=live,
                    )

    async def _ask_state(self, channel: Channel) -> str:
        """Have the pod's state; return what is live."""
        try:
            state = await asyncio.wait_for(channel.state(), _ANSWER)
        except asyncio.TimeoutError:
            raise UnavailableError(f"no answer within {_ANSWER:.0f} s") from None
        if self._away_since is not None:
            self._view.event("back", f"the pod is back after {time.monotonic() - self._away_since:.0f} s", mark="✓")
            self._away_since = None
        self._live_id, self._deployed_id = state.live, state.deployed
        return state.live

    # -- one round ----------------------------------------------------------------------------------------------------

    async def _round(self, channel: Channel, changes: Changes) -> None:
        """Look at the project and make it live, if it is not."""
        began = time.monotonic()
        tries = _TORN_TRIES
        while (content := await self._read()) is not None:
            try:
                await self._sync(channel, content, changes, began)
            except SyncError as error:
                # Bytes that changed since they were read do not match their digest.
                tries -= 1
                if error.kind != "invalid" or not tries:
                    raise
                await asyncio.sleep(_TORN_PAUSE)
            else:
                await self._compare_runtime(content)
                return

    async def _sync(self, channel: Channel, content: ProjectContent, changes: Changes, began: float) -> None:
        live = await self._ask_state(channel)
        if live == content.content_id:
            self._tell_same(content)
            return
        if self._live is not None and self._live.content_id != live:
            self._live = None
        await self._stage(channel, content)
        report = await self._patiently(channel.check(), changes, "importing what the change affects")
        if report.errors or report.duplicates:
            await channel.discard()
            self._tell_findings(report)
            return
        parsed = await self._patiently(channel.switch(content), changes, "waiting for Airflow to parse it")
        self._tell_live(content, report, parsed, time.monotonic() - began)

    async def _patiently(self, work: Coroutine[Any, Any, T], changes: Changes, doing: str) -> T:
        """Wait for the pod; when it takes long, say so, and for no longer than until the next change.

        Raises:
            _OvertakenError: the project has changed; what the pod was doing is ended with the connection.
        """
        task = asyncio.ensure_future(work)
        change = None
        try:
            if (await asyncio.wait({task}, timeout=_PATIENCE))[0]:
                return task.result()
            self._view.event("slow", doing, mark=">")
            change = asyncio.ensure_future(changes.wait())
            await asyncio.wait({task, change}, return_when=asyncio.FIRST_COMPLETED)
            if not change.done():
                return task.result()
            self._view.event("overtaken", "given up for what was saved since", mark="!")
            raise _OvertakenError
        finally:
            for each in filter(None, (task, change)):
                each.cancel()
            await asyncio.gather(*filter(None, (task, change)), return_exceptions=True)

    async def _stage(self, channel: Channel, content: ProjectContent) -> None:
        began, told = time.monotonic(), False
        while True:
            try:
                return await channel.stage(content)
            except SyncError as error:
                if error.kind != "busy":
                    raise
                # An agent whose connection was lost takes a moment to notice.
                if not told and time.monotonic() - began > _PATIENCE:
                    self._view.event("busy", "another deploy is at work on this pod; waiting for it", mark="!")
                    told = True
                await asyncio.sleep(_BUSY_PAUSE)

    async def _read(self) -> ProjectContent | None:
        """Read the project; None where it cannot be deployed as it is, which is told once."""
        for tries_left in reversed(range(_TORN_TRIES)):
            try:
                content = await asyncio.to_thread(self._reader.read)
            except ProjectError as error:
                # A file may have gone away between being seen and being read.
                if not tries_left:
                    self._tell_complaint("project_error", error)
                    return None
            else:
                # Whoever is writing a file at this moment may have emptied it first.
                if not (0 <= time.time_ns() - self._reader.newest_ns < _WRITING_NS) or not tries_left:
                    self._complaints.pop("project_error", None)
                    return content
            await asyncio.sleep(_WRITING_NS / 1e9)
        return None

    async def _compare_runtime(self, content: ProjectContent) -> None:
        """Tell, once, what differs between the project and the pod besides the DAG content."""
        try:
            settings = await asyncio.to_thread(self._load)
        except ConfigurationError as error:
            self._tell_complaint("configuration_error", error)
            return
        self._complaints.pop("configuration_error", None)
        different = self._runtime.differences(Runtime.of(content, settings))
        if different == self._to_replace:
            return
        self._to_replace = different
        if different:
            self._view.event(
                "needs_replacement",
                f"{_listed(different)} changed, which takes a new pod: {self._how_to_replace}",
                mark="!",
                changed=different,
            )
        else:
            self._view.event("needs_nothing", "the pod is what the project asks for again", mark="✓")

    # -- what is told -------------------------------------------------------------------------------------------------

    def _tell_same(self, content: ProjectContent) -> None:
        self._live = content
        if self._findings:
            self._view.event("cleared", "the errors are gone; the project is what is live", mark="✓")
            self._findings = []
        self._start()

    def _tell_live(self, content: ProjectContent, report: GateReport, live: Live, seconds: float) -> None:
        changed = changed_paths(self._live, content)
        cleared = "; the errors are gone" if self._findings else ""
        files = f" ({live.parsed} DAG file{'s' * (live.parsed != 1)} parsed)" if live.parsed else ""
        self._view.event(
            "live",
            f"live in {seconds:.2f} s  {_listed(changed) or 'this project'}{files}{cleared}",
            mark="✓",
            # Where nothing had to be imported, "no DAG was found" says nothing of the project.
            details=self._new_warnings(report) if report.files else (),
            live=content.content_id,
            seconds=round(seconds, 3),
            changed=changed,
            parsed=live.parsed,
            cleared=bool(self._findings),
        )
        self._live, self._findings = content, []
        self._live_id = content.content_id
        for failure in live.import_errors:
            self._findings.append(f"{failure.file}: {failure.cause}")
            self._view.event("import_error", self._findings[-1], mark="x", file=failure.file, cause=failure.cause)
        self._started = True
        self._on_live()

    def _new_warnings(self, report: GateReport) -> list[str]:
        """What is worth knowing; what moved in Airflow once for each file, not after every save."""
        new = tuple(moved for moved in report.moved if (moved.path, moved.name) not in self._told_moves)
        self._told_moves |= {(moved.path, moved.name) for moved in new}
        return dataclasses.replace(report, moved=new).warnings

    def _tell_findings(self, report: GateReport) -> None:
        self._findings = [*map(_located, report.errors), *map(_located_twice, report.duplicates)]
        only = report.errors[0].traceback if len(self._findings) == 1 and report.errors else ()
        self._view.event(
            "import_errors",
            "\n".join(self._findings),
            mark="x",
            details=[
                *map(in_project, only),
                *([f"next: {report.hint}"] if report.hint else []),
                "the last good content stays live",
            ],
            errors=[
                {"file": error.path, "line": error.line, "cause": error.cause, "dag_file": error.dag_file}
                for error in report.errors
            ],
            duplicates=[duplicate.dag_id for duplicate in report.duplicates],
        )
        self._start()

    def _start(self) -> None:
        if not self._started:
            self._started = True
            self._on_live()

    def _tell_away(self, reason: str) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic()
            self._view.event("away", f"the pod is out of reach: {reason}; trying again until it is back", mark="!")

    def _tell_complaint(self, kind: str, error: DeployerError) -> None:
        if error.message != self._complaints.get(kind):
            self._complaints[kind] = error.message
            self._tell_error(kind, error)

    def _tell_error(self, kind: str, error: DeployerError) -> None:
        hint = [f"next: {error.hint}"] if error.hint else []
        self._view.event(kind, error.message, mark="x", details=[*error.details, *hint])

    def tell_end(self) -> None:
        """Say what stays behind."""
        permanent = self._live_id == self._deployed_id
        self._view.event(
            "end",
            f"Airflow keeps running with the content {_short(self._live_id)}, which "
            + ("is in its image" if permanent else "is in no image yet: deployer up   makes it permanent"),
            mark="✓" if permanent else "!",
            details=["what was saved last does not import and is not live"] if self._findings else [],
            live=self._live_id,
            permanent=permanent,
        )


def in_project(text: str) -> str:
    """The text with paths in the pod's content as they are in the project."""
    return _VERSION_FOLDER.sub("", text)


def changed_paths(before: ProjectContent | None, after: ProjectContent) -> list[str]:
    """The DAG content's paths that differ, those that came or went marked as such; empty with nothing to compare to."""
    if before is None:
        return []

    def by_path(files: Sequence[File]) -> dict[str, tuple[bytes, bool]]:
        return {file.path: (file.digest, file.executable) for file in files}

    old, new = by_path(before.dag_files), by_path(after.dag_files)
    changed = []
    for path in sorted(old.keys() | new.keys()):
        if path not in old:
            changed.append(f"{path} added")
        elif path not in new:
            changed.append(f"{path} removed")
        elif old[path] != new[path]:
            changed.append(path)
    return changed


def _listed(items: Sequence[str]) -> str:
    shown = ", ".join(items[:_PATHS_SHOWN])
    return shown + (f" and {len(items) - _PATHS_SHOWN} more" if len(items) > _PATHS_SHOWN else "")


def _located(problem: ImportProblem) -> str:
    importing = f" (while importing {problem.dag_file})" if problem.dag_file != problem.path else ""
    return f"{_place(problem.path, problem.line)} {problem.cause}{importing}"


def _located_twice(duplicate: Duplicate) -> str:
    places = [_place(place.path, place.line) for place in duplicate.places]
    return f"{places[0]} the DAG id {duplicate.dag_id!r} is taken: {', '.join(places[1:])}"


def _place(path: str, line: int | None) -> str:
    """A place as terminals and editors recognise it."""
    return path if line is None else f"{path}:{line}"


def _short(content_id: str) -> str:
    return content_id[:CONTENT_TAG_LENGTH]
