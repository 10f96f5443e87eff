"""Bringing DAG content into the running pod: stage, import check, one atomic switch, and the wait until it is live.

The other end is `base-image/airflow_deployer_pod/content_agent.py`, which documents the frames that go over one
long-lived exec.
"""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from airflow_deployer.api_streams import ApiServer, RefusedError, UnavailableError
from airflow_deployer.content import File, ProjectContent
from airflow_deployer.errors import GateError, SyncError
from airflow_deployer.gate import GateReport, parse_report
from airflow_deployer.kube_context import KubeContext
from airflow_deployer.manifests import Names
from airflow_deployer.pod_exec import PodExec
from airflow_deployer.reports import ImportErrorReport

AGENT = ("/opt/airflow/bin/python", "-m", "airflow_deployer_pod.content_agent")

REPLACE_HINT = (
    "deployer status   shows the state of the pod; deployer up --replace   brings the content with a new pod instead, "
    "after running tasks have ended"
)

_LENGTH = struct.Struct(">I")
_CHUNK = 1 << 18
_LARGEST_ANSWER = 64 << 20

OnEvent = Callable[[str], None]


@dataclass(frozen=True)
class State:
    """What the pod serves: content ids of 64 hex digits, empty where there is none.

    Attributes:
        live: what Airflow parses and new runs use.
        deployed: what `up` deployed last.
        image: what the running container's image holds.
    """

    live: str
    deployed: str
    image: str


@dataclass(frozen=True)
class Live:
    """What Airflow said of the content that it was switched to.

    Attributes:
        seconds: from the switch until the last affected file was parsed.
        parsed: the number of DAG files that were.
        pending: those that were not, when the time was up.
    """

    seconds: float
    parsed: int
    import_errors: tuple[ImportErrorReport, ...]
    pending: tuple[str, ...]


@dataclass(frozen=True)
class SyncResult:
    """One round: stage, check, switch, live.

    Attributes:
        changed: False when the pod served this content already.
        live_id: the content id that is live now.
        stage_seconds, check_seconds, live_seconds: what each part took.
        parsed: the number of DAG files that Airflow parsed for it.
        report: what the import check said; None when nothing changed.
    """

    changed: bool
    live_id: str
    stage_seconds: float
    check_seconds: float
    live_seconds: float
    parsed: int
    report: GateReport | None
    import_errors: tuple[ImportErrorReport, ...]


class ContentChannel:
    """A connection to the content agent in one pod; not to be used by two tasks at once.

    Every method but `close` raises `UnavailableError` when the pod or the API server goes away, after which the channel
    is of no more use, `RefusedError` when the credentials do not allow an exec, and `SyncError` when the pod refuses.
    """

    def __init__(self, api: ApiServer, names: Names) -> None:
        self._api = api
        self._names = names
        self._exec: PodExec | None = None
        # What the pod was last known to hold, so that only the difference has to be named.
        self._base: ProjectContent | None = None

    async def connect(self) -> None:
        """Start the agent."""
        self._exec = await PodExec.start(self._api, self._names.namespace, self._names.pod, "airflow", AGENT)

    async def close(self) -> None:
        """End the agent; what was staged and not switched to is forgotten."""
        if self._exec is not None:
            await self._exec.close()

    async def state(self) -> State:
        """Ask what is live."""
        answer = await self._ask({"op": "state"}, "state")
        return State(answer["live"] or "", answer["deployed"] or "", answer["image"] or "")

    async def sync(self, content: ProjectContent, *, on_event: OnEvent = lambda text: None) -> SyncResult:
        """Make the content live, unless it is.

        Args:
            on_event: told what is being waited for.

        Raises:
            GateError: the DAGs do not import; what was live stays live.
            SyncError: the pod could not take the content, or Airflow did not parse it in time.
        """
        if (await self.state()).live == content.content_id:
            self._base = content
            return SyncResult(False, content.content_id, 0.0, 0.0, 0.0, 0, None, ())
        staging = time.monotonic()
        await self.stage(content, on_event=on_event)
        checking = time.monotonic()
        report = await self.check(on_event=on_event)
        await self._require_clean(report)
        checked = time.monotonic()
        live = await self.switch(content, on_event=on_event)
        return SyncResult(
            True,
            content.content_id,
            checking - staging,
            checked - checking,
            live.seconds,
            live.parsed,
            report,
            live.import_errors,
        )

    async def stage(self, content: ProjectContent, *, on_event: OnEvent = lambda text: None) -> None:
        """Bring the whole set to the volume, beside what is live; only bytes that the pod lacks are sent."""
        on_event("staging")
        put, removed = _difference(self._base, content)
        base = self._base.content_id if self._base is not None else None
        try:
            answer = await self._ask(_stage(content, base, put, removed), "need")
        except SyncError as error:
            if error.kind != "unknown_base":
                raise
            put = list(content.dag_files)
            answer = await self._ask(_stage(content, None, put, []), "need")
        by_path = {file.path: file for file in put}
        needed = [by_path[path] for path in answer["paths"]]
        if needed:
            on_event(f"sending {sum(file.size for file in needed) / 1e6:.1f} MB")
        for file in needed:
            await self._send_file(file)
        await self._answer("staged")

    async def check(self, *, on_event: OnEvent = lambda text: None) -> GateReport:
        """Import what the change affects in the pod, with its own connections and variables."""
        on_event("importing")
        answer = await self._ask({"op": "check"}, "checked")
        return parse_report(json.dumps(answer["report"]), 0, [])

    async def check_live(self) -> GateReport:
        """Import all that is live, in the pod, with its own connections and variables."""
        answer = await self._ask({"op": "check_live"}, "checked")
        return parse_report(json.dumps(answer["report"]), 0, [])

    async def switch(
        self,
        content: ProjectContent,
        *,
        deployed_at: int | None = None,
        timeout: float = 60.0,
        on_event: OnEvent = lambda text: None,
    ) -> Live:
        """Make what was staged the live content, and wait until Airflow has parsed what it affects.

        Args:
            deployed_at: `manifests.Image.deployed_at` of the image that holds it; None when no image does yet.
            timeout: seconds without any file being parsed after which it gives up.
        """
        await self._ask({"op": "switch", "deployed_at": deployed_at, "timeout": timeout}, "switched")
        self._base = content
        on_event("waiting for Airflow to parse it")
        answer = await self._answer("live")
        live = Live(
            answer["seconds"],
            answer["parsed"],
            tuple(ImportErrorReport(error["file"], error["cause"]) for error in answer["import_errors"]),
            tuple(answer["pending"]),
        )
        if live.pending:
            raise SyncError(
                f"The new content is in place, but after {timeout:.0f} s Airflow has not parsed "
                f"{len(live.pending)} file(s) yet: {', '.join(live.pending[:3])}.",
                kind="not_live",
                hint="the log of the dag-processor says more; deployer up --replace   starts it afresh, with a new pod",
            )
        return live

    async def discard(self) -> None:
        """Forget what was staged."""
        await self._ask({"op": "discard"}, "discarded")

    async def _require_clean(self, report: GateReport) -> None:
        try:
            report.raise_for_errors()
        except GateError:
            await self.discard()
            raise

    # -- frames ----------------------------------------------------------------------------------------------------

    async def _ask(self, request: dict[str, Any], event: str) -> dict[str, Any]:
        await self._send(json.dumps(request).encode())
        return await self._answer(event)

    async def _answer(self, event: str) -> dict[str, Any]:
        size = _LENGTH.unpack(await self._running.read_exactly(_LENGTH.size))[0]
        if size > _LARGEST_ANSWER:
            raise SyncError("What answers in the pod is not the content agent.", kind="protocol")
        answer: dict[str, Any] = json.loads(await self._running.read_exactly(size))
        if answer.get("event") == "error":
            raise SyncError(
                f"The pod cannot take the content: {str(answer.get('message', '')).rstrip('.')}.",
                kind=str(answer.get("kind", "")),
                hint=_HINTS.get(str(answer.get("kind", "")), REPLACE_HINT),
            )
        if answer.get("event") != event:
            raise SyncError(f"The pod answered {answer.get('event')!r} instead of {event!r}.", kind="protocol")
        return answer

    async def _send(self, payload: bytes) -> None:
        await self._running.write(_LENGTH.pack(len(payload)) + payload)

    async def _send_file(self, file: File) -> None:
        """Send a file's bytes; one that has changed since it was read is found by its digest in the pod."""
        left = file.size
        try:
            with open(file.source, "rb") as stream:  # noqa: ASYNC230, PTH123 - a local file, read in small pieces
                while left and (data := stream.read(min(left, _CHUNK))):
                    left -= len(data)
                    await self._send(data)
        except OSError:
            pass
        while left:
            # It shrank or went away: what was promised is filled up, and the digest will not match.
            size = min(left, _CHUNK)
            left -= size
            await self._send(bytes(size))

    @property
    def _running(self) -> PodExec:
        if self._exec is None:
            raise UnavailableError("not connected to the pod")
        return self._exec


def sync_once(context: KubeContext, names: Names, content: ProjectContent, *, on_event: OnEvent) -> SyncResult:
    """One round in a loop of its own; raises as `ContentChannel.sync`, a pod out of reach is a `SyncError` too."""

    async def run() -> SyncResult:
        api = ApiServer(context.name, context.kubeconfig)
        channel = ContentChannel(api, names)
        try:
            await api.load()
            await channel.connect()
            return await channel.sync(content, on_event=on_event)
        except (UnavailableError, RefusedError) as error:
            raise SyncError(
                f"The running pod cannot take the content: {error}.",
                kind="unavailable",
                hint="deployer status   shows the state of the pod",
            ) from None
        finally:
            await channel.close()
            await api.close()

    return asyncio.run(run())


_HINTS = {
    "no_space": "enlarge storage.size in deployer.toml and run deployer up, or remove old logs",
    "busy": "another sync or up is at work on this deployment; wait for it",
    "invalid": "run the command again: a file changed while it was being read",
}


def _stage(content: ProjectContent, base: str | None, put: Iterable[File], removed: list[str]) -> dict[str, Any]:
    return {
        "op": "stage",
        "content_id": content.content_id,
        "base": base,
        "put": [[file.path, file.executable, file.size, file.digest.hex()] for file in put],
        "remove": removed,
    }


def _difference(base: ProjectContent | None, content: ProjectContent) -> tuple[list[File], list[str]]:
    """The files that are new or other than in `base`, and the paths that it has and `content` lacks."""
    if base is None:
        return list(content.dag_files), []
    before = {file.path: (file.digest, file.executable) for file in base.dag_files}
    put = [file for file in content.dag_files if before.get(file.path) != (file.digest, file.executable)]
    return put, sorted(before.keys() - {file.path for file in content.dag_files})
