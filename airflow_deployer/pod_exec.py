"""A command in a container of the pod, with its standard streams, on asyncio.

The channels of `v4.channel.k8s.io`: 0 stdin, 1 stdout, 2 stderr, 3 the outcome as a `Status`
(https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/#get-connect-exec-requests-of-pod). The
protocol cannot close stdin alone: a command that reads until its end must be told the end in another way.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from airflow_deployer.api_streams import ApiServer, UnavailableError, close_stream

if TYPE_CHECKING:
    import aiohttp

_STDIN, _STDOUT, _STDERR, _OUTCOME = range(4)
_STDERR_KEPT = 8192
_FRAME = 1 << 20


class CommandError(UnavailableError):
    """The command ran and ended with an exit code other than 0; the message holds the last line it complained with."""


class PodExec:
    """A command that runs; made by `start`, ended by `close` or by itself.

    Nothing is read ahead: what the command writes waits in the stream until it is asked for.
    """

    def __init__(self, stream: aiohttp.ClientWebSocketResponse[bool]) -> None:
        self._stream = stream
        self._stdout = bytearray()
        self._stderr = bytearray()
        self._outcome: str | None = None

    @classmethod
    async def start(cls, api: ApiServer, namespace: str, pod: str, container: str, command: Sequence[str]) -> PodExec:
        """Start a command.

        Raises:
            UnavailableError: no such pod, container not running, API server away.
            RefusedError: these credentials may not.
        """
        query = [("container", container), ("stdin", "true"), ("stdout", "true"), ("stderr", "true")]
        query += [("command", part) for part in command]
        return cls(await api.open_stream(namespace, pod, "exec", query))

    @property
    def trouble(self) -> str:
        """Why the command ended, as far as it is known: its outcome, and the end of its standard error."""
        return ": ".join(filter(None, (self._outcome, *self.complaints[-1:])))

    @property
    def complaints(self) -> list[str]:
        """The last lines of the command's standard error, as far as they have been received."""
        return self._stderr.decode(errors="replace").strip().splitlines()

    async def write(self, data: bytes) -> None:
        """Write to the command's standard input, no faster than it takes it.

        Raises:
            UnavailableError: the stream broke.
        """
        view = memoryview(data)
        try:
            for start in range(0, len(view), _FRAME):
                await self._stream.send_bytes(bytes([_STDIN]) + view[start : start + _FRAME])
        except (ConnectionError, RuntimeError) as error:
            raise UnavailableError(f"the stream to the pod broke: {self.trouble or error}") from error

    async def read_exactly(self, size: int) -> bytes:
        """Read from the command's standard output.

        Raises:
            UnavailableError: it ended, or the stream broke, before so many bytes came.
        """
        while len(self._stdout) < size:
            if not await self._receive():
                raise UnavailableError(f"the command in the pod ended: {self.trouble or 'nothing more came'}")
        data = bytes(self._stdout[:size])
        del self._stdout[:size]
        return data

    async def read(self) -> bytes:
        """Read what comes next on the command's standard output; empty once the command has ended well.

        Raises:
            CommandError: the command has failed.
            UnavailableError: the stream broke.
        """
        while not self._stdout:
            if not await self._receive():
                return b""
        data = bytes(self._stdout)
        self._stdout.clear()
        return data

    async def read_line(self) -> bytes:
        """Read a line of the command's standard output, without its end; errors as of `read_exactly`."""
        searched = 0
        while (end := self._stdout.find(b"\n", searched)) < 0:
            searched = len(self._stdout)
            if not await self._receive():
                raise UnavailableError(f"the command in the pod ended: {self.trouble or 'nothing more came'}")
        line = bytes(self._stdout[:end])
        del self._stdout[: end + 1]
        return line

    async def close(self) -> None:
        """End the stream, and with it the command's standard input."""
        await close_stream(self._stream)

    async def _receive(self) -> bool:
        """Take in what comes next; False once the command has ended well and nothing is left."""
        from aiohttp import WSMsgType

        message = await self._stream.receive()
        if message.type is not WSMsgType.BINARY:
            if self._outcome is None:
                raise UnavailableError(f"the stream to the pod broke: {self.trouble or 'the other end has closed it'}")
            if self._outcome:
                raise CommandError(f"the command in the pod ended: {self.trouble}")
            return False
        channel, payload = message.data[0], memoryview(message.data)[1:]
        if channel == _STDOUT:
            self._stdout += payload
        elif channel == _STDERR:
            self._stderr += payload
            del self._stderr[:-_STDERR_KEPT]
        elif channel == _OUTCOME:
            self._outcome = _outcome(bytes(payload))
        return True


def _outcome(payload: bytes) -> str:
    """What a `Status` says of a command that ended; empty for success."""
    try:
        status = json.loads(payload)
    except ValueError:
        return payload.decode(errors="replace").strip()
    return "" if status.get("status") == "Success" else str(status.get("message", "")).strip()
