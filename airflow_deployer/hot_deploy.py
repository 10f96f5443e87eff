"""New DAG content in the running pod while its image is built: staged and imported early, switched to at the end.

In a thread of its own, because the exec stream lives on asyncio and the rest of `up` does not. Nothing that is live
changes before `switch`; whatever fails before it leaves the old content live.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, TimeoutError
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from airflow_deployer.content import ProjectContent
from airflow_deployer.errors import SyncError
from airflow_deployer.kube_context import KubeContext
from airflow_deployer.manifests import Names

if TYPE_CHECKING:
    from airflow_deployer.content_sync import ContentChannel, Live
    from airflow_deployer.gate import GateReport

# The agent keeps what nobody asks about for a minute, and the build of a large image may take longer.
_STAGED_SECONDS = 45.0


class HotDeploy:
    """One content on its way into the pod; made by `begun`."""

    def __init__(self, channel: ContentChannel, content: ProjectContent, submit: Callable[..., Future[Any]]) -> None:
        self._channel = channel
        self._content = content
        self._submit = submit
        self._staged_at = 0.0
        self._prepared: Future[GateReport | None] = submit(self._prepare())

    async def _prepare(self) -> GateReport | None:
        await self._channel.connect()
        if (await self._channel.state()).live == self._content.content_id:
            return None
        await self._channel.stage(self._content)
        report = await self._channel.check()
        self._staged_at = time.monotonic()
        return report

    def report(self, timeout: float) -> GateReport | None:
        """Wait for what the warm import check says; None when the pod serves this content already.

        Args:
            timeout: seconds.

        Raises:
            SyncError: the pod cannot take the content, or is too slow.
        """
        from airflow_deployer.content_sync import REPLACE_HINT

        try:
            with _translated():
                return self._prepared.result(timeout)
        except TimeoutError:
            self._prepared.cancel()
            raise SyncError(
                f"The pod has not checked the new content after {timeout:.0f} s; what was live is live.",
                kind="timeout",
                hint=REPLACE_HINT,
            ) from None

    @property
    def was_live(self) -> bool:
        """Whether the pod served this content before; known once there was a `report`."""
        return self._prepared.done() and self._prepared.result() is None

    def switch(self, deployed_at: int, timeout: float) -> Live:
        """Make the content live and wait until Airflow has parsed it.

        Args:
            deployed_at: `manifests.Image.deployed_at` of the image that holds it.
            timeout: seconds without any file being parsed after which it gives up.

        Raises:
            SyncError: it could not be switched, or Airflow did not parse it in time.
        """
        switching: Future[Live] = self._submit(self._switch(deployed_at, timeout))
        with _translated():
            return switching.result()

    async def _switch(self, deployed_at: int, timeout: float) -> Live:
        if self.was_live or time.monotonic() - self._staged_at > _STAGED_SECONDS:
            await self._channel.stage(self._content)
            await self._channel.check()
        return await self._channel.switch(self._content, deployed_at=deployed_at, timeout=timeout)


@contextmanager
def begun(context: KubeContext, names: Names, content: ProjectContent) -> Iterator[HotDeploy]:
    """Begin to stage and check the content in the pod, for the time of the block.

    Args:
        context: where the pod is.
        names: its deployment.
        content: what is to become live.
    """
    from airflow_deployer.api_streams import in_background
    from airflow_deployer.content_sync import ContentChannel

    with in_background(context.name, context.kubeconfig) as (api, submit):
        channel = ContentChannel(api, names)
        try:
            yield HotDeploy(channel, content, submit)
        finally:
            with suppress(Exception):
                submit(channel.close()).result(timeout=5.0)


@contextmanager
def _translated() -> Iterator[None]:
    """Tell a pod that is out of reach as a sync that failed."""
    from airflow_deployer.api_streams import RefusedError, UnavailableError
    from airflow_deployer.content_sync import REPLACE_HINT

    try:
        yield
    except (UnavailableError, RefusedError) as error:
        raise SyncError(
            f"The running pod cannot take the new content: {error}.", kind="unavailable", hint=REPLACE_HINT
        ) from None
