"""A local port that leads to a port of the deployment's pod and outlives that pod.

One WebSocket with the subprotocol `v4.channel.k8s.io` per TCP connection, on the pod's `portforward` subresource
(https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/#get-connect-portforward-requests-of-pod).
Every frame starts with one byte, the channel: 0 carries data, 1 the node's error text. The first two bytes on each
channel repeat the port, little endian (k8s.io/kubelet, `pkg/cri/streaming/portforward/websocket.go`).

The protocol cannot say that one direction has ended: closing the WebSocket ends both. A client that has sent its last
byte is therefore served until the pod closes or has been silent for `HALF_CLOSE_SILENCE` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from airflow_deployer.api_streams import ApiServer, RefusedError, UnavailableError, close_stream, one_line
from airflow_deployer.errors import ForwardError

if TYPE_CHECKING:
    import aiohttp

LOOPBACK = "localhost"
"""The address that stands for both loopback addresses, 127.0.0.1 and ::1."""

HALF_CLOSE_SILENCE = 30.0

_DATA, _ERROR = 0, 1
_PORT_PREFIX = 2
_CHUNK = 64 * 1024
# What a client sent is kept for a second attempt while it is known that no pod has seen it, up to this many bytes.
_REPLAY_LIMIT = 64 * 1024
_BACKLOG = 1024
_FIRST_BYTE = 0.01
_FIRST_DELAY, _LONGEST_DELAY = 0.05, 2.0
# How long a new connection is held open while there is no pod to serve it.
_PATIENCE = 30.0
_POLL_INTERVAL = 10.0
# However many connections fail, the API server is not asked more often.
_SHORTEST_POLL = 1.0
# `up` deletes and recreates a StatefulSet to change an immutable field, so one look is not enough to call it gone.
_GONE_AFTER = 3.0
_ERROR_TEXT_LIMIT = 4096
# The runtime's texts for "nobody has seen the bytes": nothing listens yet, or the pod's sandbox is not there (any more)
# (containerd, `internal/cri/server/sandbox_portforward*.go`; others relay the first as the kernel words it).
_NOT_LISTENING = "connection refused"
_UNDELIVERED = (_NOT_LISTENING, "failed to find sandbox", "sandbox container", "network namespace for sandbox")


@dataclass(frozen=True)
class Target:
    """A port of the pod `<name>-0` of the StatefulSet `name`; `kubeconfig` None means kubectl's default files."""

    context: str
    namespace: str
    name: str
    port: int
    kubeconfig: str | None = None

    @property
    def pod(self) -> str:
        """The name of the StatefulSet's only pod."""
        return f"{self.name}-0"

    def __str__(self) -> str:
        return f"port {self.port} of pod {self.pod} in namespace {self.namespace} (context {self.context})"


async def serve(
    target: Target,
    *,
    address: str = LOOPBACK,
    port: int,
    on_ready: Callable[[int], None],
    stop: asyncio.Event,
    log: Callable[[str], None],
) -> None:
    """Forward until `stop` is set or the StatefulSet is gone; a missing pod or API server ends nothing.

    Args:
        target: what the local port leads to.
        address: the address to listen on; `LOOPBACK` means 127.0.0.1 and, where there is one, ::1.
        port: the local port, 0 for any free one.
        on_ready: called once with the local port as soon as connections are accepted.
        stop: ends the forward and every connection.
        log: takes one line for each thing worth knowing; never a secret.

    Raises:
        ForwardError: the port is taken, the kubeconfig cannot be used, or there is no such StatefulSet.
    """
    listeners = _bind(address, port)
    servers: list[asyncio.Server] = []
    api = ApiServer(target.context, target.kubeconfig)
    try:
        await api.load()
        forward = _Forward(target, api, log)
        await forward.require_stateful_set()
        for listener in listeners:
            servers.append(await asyncio.start_server(forward.accept, sock=listener, backlog=_BACKLOG, limit=_CHUNK))
        on_ready(int(listeners[0].getsockname()[1]))
        await forward.run(stop)
    finally:
        for server in servers:
            server.close()
        for listener in listeners:
            listener.close()
        await api.close()
        # Transports let go of their sockets in the loop's next turns.
        await asyncio.sleep(0.01)


@contextlib.contextmanager
def forwarded(target: Target, *, log: Callable[[str], None] = lambda line: None) -> Iterator[int]:
    """Forward an ephemeral port of 127.0.0.1 for the time of the block, from a thread of this process.

    Raises:
        ForwardError: as `serve`.
    """
    ready: SimpleQueue[int | BaseException] = SimpleQueue()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    def run() -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(serve(target, address="127.0.0.1", port=0, on_ready=ready.put, stop=stop, log=log))
        except BaseException as error:
            # Whoever waits for the port must hear of every failure, or would wait for ever.
            ready.put(error)
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    thread = threading.Thread(target=run, name=f"forward-{target.name}", daemon=True)
    thread.start()
    try:
        result = ready.get()
        if isinstance(result, BaseException):
            raise result
        yield result
    finally:
        # The loop is closed already where the forward has ended by itself.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=10)


def check_port_free(address: str, port: int) -> str | None:
    """Tell who holds a local port, as "name (pid N)" where that can be known; None when `serve` could listen on it.

    Raises:
        ForwardError: the port cannot be listened on for another reason (a privileged port, a foreign address).
    """
    try:
        listeners = _bind(address, port)
    except _PortTakenError as error:
        return error.holder
    for listener in listeners:
        listener.close()
    return None


class _PortTakenError(ForwardError):
    """Somebody else listens there."""

    def __init__(self, host: str, port: int) -> None:
        self.holder = _port_holder(host, port) or "another process"
        super().__init__(
            f"Cannot listen on port {port} of {host}: it is taken by {self.holder}.",
            hint=f"end {self.holder}, or choose another local port",
        )


def _bind(address: str, port: int) -> list[socket.socket]:
    """Bind and listen; the caller closes the sockets."""
    hosts = ("127.0.0.1", "::1") if address == LOOPBACK else (address,)
    listeners: list[socket.socket] = []
    try:
        for host in hosts:
            # Both loopback addresses share the port that the first one got.
            wanted = listeners[0].getsockname()[1] if listeners else port
            try:
                listeners.append(_listener(host, wanted))
            except OSError as error:
                if error.errno == errno.EADDRINUSE and (port or not listeners):
                    raise _PortTakenError(host, port) from error
                # Without IPv6, and for an ephemeral port that only ::1 has in use, 127.0.0.1 alone will do.
                if listeners:
                    continue
                raise ForwardError(
                    f"Cannot listen on port {port} of {host}: {error.strerror or error}.",
                    hint="choose a local port from 1024 on" if error.errno == errno.EACCES else "",
                ) from error
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _listener(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, where = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # Lets a restarted forward listen at once although connections of the last one are still in TIME_WAIT.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind(where)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _port_holder(host: str, port: int) -> str | None:
    """Find the process that listens on a port, by /proc (Linux; proc(5)); None where that cannot be read."""
    inodes = set(_listening_inodes(host, port))
    if not inodes:
        return None
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(descriptor.readlink()) in wanted:
                        return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
        except OSError:
            continue
    return None


def _listening_inodes(host: str, port: int) -> Iterator[str]:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            local, _, local_port = fields[1].rpartition(":")
            listens = fields[3] == "0A"
            if listens and int(local_port, 16) == port and _proc_address(local) in (host, "0.0.0.0", "::"):  # noqa: S104
                yield fields[9]


def _proc_address(text: str) -> str:
    """Decode an address of /proc/net/tcp: 32-bit words, each in the machine's (here little endian) byte order."""
    packed = b"".join(bytes.fromhex(text[at : at + 8])[::-1] for at in range(0, len(text), 8))
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


class _Forward:
    """The accepted connections and the watch over the StatefulSet."""

    def __init__(self, target: Target, api: ApiServer, log: Callable[[str], None]) -> None:
        self.target = target
        self.api = api
        self._log = log
        self._connections: set[asyncio.Task[None]] = set()
        self._doubt = asyncio.Event()
        self._reported: set[str] = set()

    async def open_stream(self) -> aiohttp.ClientWebSocketResponse[bool]:
        """Open one stream to the pod's port; raises as `ApiServer.open_stream`."""
        return await self.api.open_stream(
            self.target.namespace, self.target.pod, "portforward", [("ports", str(self.target.port))]
        )

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take one TCP connection; whatever happens to it stays with it."""
        connection = asyncio.ensure_future(_Connection(self, reader, writer).run())
        self._connections.add(connection)
        connection.add_done_callback(self._finished)

    def _finished(self, connection: asyncio.Task[None]) -> None:
        self._connections.discard(connection)
        if not connection.cancelled() and (error := connection.exception()) is not None:
            self.report_trouble(f"a connection failed: {type(error).__name__}: {error}")

    def report_trouble(self, line: str) -> None:
        """Log why connections wait or fail, once until one succeeds, and look whether the StatefulSet is gone."""
        if line not in self._reported:
            self._log(line)
        self._reported.add(line)
        self._doubt.set()

    def report_success(self) -> None:
        """Log that connections succeed again."""
        if self._reported:
            self._log("connected again")
        self._reported.clear()

    async def require_stateful_set(self) -> None:
        """Look before the first connection.

        Raises:
            ForwardError: there is no such StatefulSet.
        """
        try:
            gone = await self.api.stateful_set_is_gone(self.target.namespace, self.target.name)
        except UnavailableError as error:
            self.report_trouble(str(error))
            return
        if gone:
            raise ForwardError(
                f"Cannot forward to {self.target}: there is no StatefulSet {self.target.name}.",
                hint="deployer up   makes it",
            )

    async def run(self, stop: asyncio.Event) -> None:
        """Return when `stop` is set or the StatefulSet is gone; no connection is left then."""
        stopped = asyncio.ensure_future(stop.wait())
        gone = asyncio.ensure_future(self._until_gone())
        try:
            await asyncio.wait({stopped, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                gone.result()
        finally:
            tasks = {stopped, gone, *self._connections}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_gone(self) -> None:
        loop = asyncio.get_running_loop()
        missing_since: float | None = None
        while True:
            if missing_since is None:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._doubt.wait(), _POLL_INTERVAL)
            await asyncio.sleep(_SHORTEST_POLL)
            self._doubt.clear()
            try:
                gone = await self.api.stateful_set_is_gone(self.target.namespace, self.target.name)
            except UnavailableError as error:
                missing_since = None
                self.report_trouble(str(error))
                # What connections do not ask for again can wait for the next look.
                self._doubt.clear()
                await self.api.reload_if_changed()
                continue
            if not gone:
                missing_since = None
                continue
            missing_since = missing_since if missing_since is not None else loop.time()
            if loop.time() - missing_since >= _GONE_AFTER:
                self._log(f"StatefulSet {self.target.name} is gone from namespace {self.target.namespace}: ending")
                return


class _Connection:
    """One TCP connection of a client and, in turn, the streams that are tried for it."""

    def __init__(self, forward: _Forward, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._forward = forward
        self._reader = reader
        self._writer = writer
        # What the client sent as long as no pod can have seen it; None once one may have.
        self._undelivered: bytearray | None = bytearray()
        self._heard_at = 0.0
        self._draining = False

    async def run(self) -> None:
        """Serve the client until either side ends; every failure ends this connection only."""
        try:
            await self._serve()
            # Sends what is left, then the end.
            self._writer.close()
            await self._writer.wait_closed()
        except RefusedError as error:
            self._forward.report_trouble(f"cannot serve a connection to {self._forward.target}: {error}")
            _reset(self._writer)
        except OSError:
            # The client's side broke: nobody is left to be told.
            pass
        finally:
            self._writer.transport.abort()

    async def _serve(self) -> None:
        """Return when the connection has come to its proper end, or the client has left while it waited.

        Raises:
            RefusedError: it has not, and the client is to see an error.
            OSError: the client's side broke.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _PATIENCE
        delay = _FIRST_DELAY
        # A client that only looks whether the port is open leaves at once, and no stream is opened for it.
        with contextlib.suppress(asyncio.TimeoutError):
            self._undelivered = bytearray(await asyncio.wait_for(self._reader.read(_CHUNK), _FIRST_BYTE))
        while not (self._writer.transport.is_closing() or (self._reader.at_eof() and not self._undelivered)):
            try:
                await self._relay(await self._forward.open_stream())
                return
            except UnavailableError as error:
                if loop.time() + delay > deadline:
                    raise RefusedError(str(error)) from error
                self._forward.report_trouble(f"waiting for {self._forward.target}: {error}")
            await asyncio.sleep(delay)
            delay = min(delay * 2, _LONGEST_DELAY)

    async def _relay(self, stream: aiohttp.ClientWebSocketResponse[bool]) -> None:
        """Copy both ways until one side ends.

        Raises:
            UnavailableError: the stream failed before any pod can have seen a byte.
            RefusedError: it failed later.
            OSError: the client's side broke.
        """
        sending = asyncio.ensure_future(self._send(stream))
        receiving = asyncio.ensure_future(self._receive(stream))
        try:
            await asyncio.wait({sending, receiving}, return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done():
                sending.result()
                await self._linger(receiving)
            if receiving.done():
                receiving.result()
        finally:
            sending.cancel()
            receiving.cancel()
            await asyncio.gather(sending, receiving, return_exceptions=True)
            await close_stream(stream)

    async def _linger(self, receiving: asyncio.Future[None]) -> None:
        """Go on receiving for a client that has sent its last byte, until the pod is silent for too long."""
        loop = asyncio.get_running_loop()
        self._heard_at = loop.time()
        while not receiving.done():
            await asyncio.wait({receiving}, timeout=1.0)
            if not self._draining and loop.time() - self._heard_at > HALF_CLOSE_SILENCE:
                return

    async def _send(self, stream: aiohttp.ClientWebSocketResponse[bool]) -> None:
        """Copy from the client until its last byte, no faster than the stream takes it."""
        channel = bytes([_DATA])
        data = bytes(self._undelivered or b"")
        while True:
            if data:
                try:
                    await stream.send_bytes(channel + data)
                except ConnectionError:
                    # The receiving side tells what is wrong with the stream.
                    return
            data = await self._reader.read(_CHUNK)
            if not data:
                return
            if self._undelivered is not None:
                self._undelivered += data
                if len(self._undelivered) > _REPLAY_LIMIT:
                    self._undelivered = None

    async def _receive(self, stream: aiohttp.ClientWebSocketResponse[bool]) -> None:
        """Copy to the client until the pod closes, no faster than the client takes it."""
        from aiohttp import WSMsgType

        loop = asyncio.get_running_loop()
        prefix = {_DATA: _PORT_PREFIX, _ERROR: _PORT_PREFIX}
        while True:
            message = await stream.receive()
            if message.type is not WSMsgType.BINARY:
                break
            payload = memoryview(message.data)
            channel = payload[0] if payload else _DATA
            payload = payload[1:]
            if prefix.get(channel):
                skipped = min(prefix[channel], len(payload))
                prefix[channel] -= skipped
                payload = payload[skipped:]
            if not payload:
                continue
            if channel == _ERROR:
                raise self._failure(one_line(bytes(payload[:_ERROR_TEXT_LIMIT]).decode(errors="replace")))
            if self._undelivered is not None:
                self._undelivered = None
                self._forward.report_success()
            self._writer.write(payload)
            self._draining = True
            await self._writer.drain()
            self._draining = False
            self._heard_at = loop.time()
        if message.type is not WSMsgType.CLOSE:
            raise self._failure("the connection to the API server broke")

    def _failure(self, reason: str) -> UnavailableError | RefusedError:
        """Tell a failure that another stream may mend from one that the client must see."""
        sent = self._undelivered
        text = reason.lower()
        if sent is not None and (not sent or any(mark in text for mark in _UNDELIVERED)):
            return UnavailableError("nothing listens on that port of the pod" if _NOT_LISTENING in text else reason)
        return RefusedError(reason)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Have the coming close seen as an error: a client must not take a part for the whole."""
    connection = writer.get_extra_info("socket")
    if connection is not None:
        with contextlib.suppress(OSError):
            # struct linger: on, 0 seconds (socket(7)).
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
