"""Keeping Airflow stopped in its pod, while Postgres goes on, for as long as a block of code lasts.

A lock on the file `hold` of the emptyDir that both containers share tells the supervisor to stop everything, running
tasks first waited for; it starts Airflow again when the lock is free. The lock is taken by a script in the container
`postgres`, because that one also answers where Airflow itself crashes at every start. It lives on a line from here
every few seconds: when this process or the API server goes away, Airflow starts again by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from airflow_deployer.api_streams import ApiServer, RefusedError, UnavailableError
from airflow_deployer.errors import RolloutError
from airflow_deployer.manifests import RUN, Names
from airflow_deployer.pod_exec import PodExec

# For the API server's own stop, and a migration or a copy of DAG content that is not interrupted.
_STOP_SECONDS = 120.0
_BEAT_SECONDS = 10.0

SCRIPT = r"""
cd "$1" || exit
exec 9<>hold
flock --timeout 5 9 || { echo 'another deployer holds Airflow' >&2; exit 1; }
echo "$2" >hold
# Also where no supervisor runs at all, because the container crashed: its next life looks at the lock first of all.
until [ -e held ] || [ ! -e supervisor.lock ] || flock --nonblock --shared supervisor.lock true 9>&-; do
  read -r -t 0.3 _
  [ $? -eq 1 ] && exit
done
echo held
while read -r -t 60 _; do :; done
"""
"""Arguments: the shared folder, and `now` or `drain`. Says `held` once Airflow has stopped; a line of input, at the
latest every minute, keeps it that way, and the end of the input ends it."""


class Hold:
    """Airflow, stopped by us; made by `held`."""

    def __init__(self, command: PodExec) -> None:
        self._command = command
        self._tasks = [asyncio.create_task(self._beat()), asyncio.create_task(self._listen())]

    def ensure(self) -> None:
        """Make sure that Airflow is still stopped.

        Raises:
            RolloutError: the connection to the pod broke, and Airflow may run again.
        """
        for task in self._tasks:
            if task.done():
                raise RolloutError(
                    f"Airflow could not be kept stopped: {task.exception() or 'the connection to the pod ended'}.",
                    hint="run the command again",
                )

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_SECONDS)
            await self._command.write(b"\n")

    async def _listen(self) -> None:
        while await self._command.read():
            pass

    async def release(self) -> None:
        """Let Airflow start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._command.close()


@contextlib.asynccontextmanager
async def held(api: ApiServer, names: Names, *, drain: float, now: bool) -> AsyncIterator[Hold]:
    """Have Airflow stopped in the block.

    Args:
        drain: `timeouts.drain` of the deployment, in seconds: how long its supervisor waits for running tasks.
        now: do not wait for them; they start over when Airflow does.

    Raises:
        RolloutError: Airflow does not stop, somebody else holds it, or the pod cannot be reached.
    """
    arguments = (RUN, "now" if now else "drain")
    script = ("bash", "-c", SCRIPT, "hold", *arguments)
    command = None
    try:
        command = await PodExec.start(api, names.namespace, names.pod, "postgres", script)
        await asyncio.wait_for(command.read_line(), drain + _STOP_SECONDS)
    except BaseException as error:
        if command is not None:
            await command.close()
        if isinstance(error, asyncio.TimeoutError):
            raise RolloutError(
                f"Airflow did not stop within {drain + _STOP_SECONDS:.0f} s.",
                hint="deployer status; the log of container airflow says more",
            ) from None
        if isinstance(error, (UnavailableError, RefusedError)):
            raise RolloutError(f"Airflow cannot be stopped: {error}.", hint="deployer status") from None
        raise
    hold = Hold(command)
    try:
        yield hold
    finally:
        await hold.release()
