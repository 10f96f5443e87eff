"""A local port that leads to a port of the deployment's pod and outlives that pod.

Each TCP connection has a stream to the pod (`port_streams`) of its own, so that one that is slow, reset or stuck stays
alone. The protocol of these streams cannot say that one direction has ended: closing it ends both. A client that has
sent its last byte is therefore served until its last answer is complete, the pod closes, or has been silent for
`HALF_CLOSE_SILENCE` seconds.
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
from typing import TYPE_CHECKING, cast

from airflow_deployer.api_streams import ApiServer, RefusedError, UnavailableError
from airflow_deployer.errors import ForwardError
from airflow_deployer.http_exchange import can_be_repeated
from airflow_deployer.port_streams import PortStream, PortStreams

if TYPE_CHECKING:
    import aiohttp

LOOPBACK = "localhost"
"""The address that stands for both loopback addresses, 127.0.0.1 and ::1."""

HALF_CLOSE_SILENCE = 30.0

# What is held of a client's bytes before it is made to wait; a turn of the loop may add asyncio's 256 KiB.
_CLIENT_BUFFER = 64 * 1024
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
    loop = asyncio.get_running_loop()
    listeners = _bind(address, port)
    servers: list[asyncio.Server] = []
    api = ApiServer(target.context, target.kubeconfig)
    try:
        await api.load()
        forward = _Forward(target, api, log)
        await forward.require_stateful_set()
        forward.streams.prepare()
        for listener in listeners:
            servers.append(await loop.create_server(forward.make_client, sock=listener, backlog=_BACKLOG))
        on_ready(int(listeners[0].getsockname()[1]))
        await forward.run(stop)
    finally:
        for server in servers:
            server.close()
        for listener in listeners:
            listener.close()
        await api.close()


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
        self.streams = PortStreams(self._open_stream)
        self._pod_uid: str | None = None

    async def _open_stream(self) -> aiohttp.ClientWebSocketResponse[bool]:
        return await self.api.open_stream(
            self.target.namespace, self.target.pod, "portforward", [("ports", str(self.target.port))]
        )

    def make_client(self) -> _Client:
        """Return the protocol of a TCP connection that is about to be accepted."""
        return _Client(self._accept)

    def _accept(self, client: _Client) -> None:
        """Take one TCP connection; whatever happens to it stays with it."""
        self.streams.prepare()
        connection = asyncio.ensure_future(_Connection(self, client).run())
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
            await self.streams.close()

    async def _until_gone(self) -> None:
        loop = asyncio.get_running_loop()
        missing_since: float | None = None
        await self._look_at_pod()
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
                await self._look_at_pod()
                continue
            missing_since = missing_since if missing_since is not None else loop.time()
            if loop.time() - missing_since >= _GONE_AFTER:
                self._log(f"StatefulSet {self.target.name} is gone from namespace {self.target.namespace}: ending")
                return

    async def _look_at_pod(self) -> None:
        """Drop the streams that wait if they lead to an earlier pod; their own end may be late or never come."""
        with contextlib.suppress(UnavailableError):
            uid = await self.api.pod_uid(self.target.namespace, self.target.pod)
            if uid != self._pod_uid and self._pod_uid is not None:
                self.streams.drop_waiting()
            self._pod_uid = uid


class _Client(asyncio.Protocol):
    """The client's end of one TCP connection: its bytes wait here, few at a time, until they are asked for."""

    def __init__(self, accept: Callable[[_Client], None]) -> None:
        self._accept = accept
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._holds_back = False
        self._waiter: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self.has_ended = False
        """Whether it has sent its last byte."""
        self.lost: asyncio.Future[None] = self._loop.create_future()
        """Done when the connection is closed for both ways."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take note of the connection (called by asyncio, like those that follow)."""
        self.transport = cast("asyncio.Transport", transport)
        self._accept(self)

    def data_received(self, data: bytes) -> None:
        """Keep bytes; stop the client where nobody asks for them."""
        self._received += data
        if len(self._received) > _CLIENT_BUFFER and not self._holds_back:
            self._holds_back = True
            self.transport.pause_reading()
        self.wake()

    def eof_received(self) -> bool:
        """Take note of the last byte; the other way stays open."""
        self.has_ended = True
        self.wake()
        return True

    def connection_lost(self, error: Exception | None) -> None:
        """Take note of the end."""
        self.has_ended = True
        if not self.lost.done():
            self.lost.set_result(None)
        self.resume_writing()
        self.wake()

    def pause_writing(self) -> None:
        """Have the pod wait for the client."""
        self._drained = self._loop.create_future()

    def resume_writing(self) -> None:
        """Have the pod go on."""
        if self._drained is not None:
            self._drained.set_result(None)
            self._drained = None

    @property
    def is_slow(self) -> bool:
        """Whether it has yet to take what was sent to it."""
        return self._drained is not None

    async def drained(self) -> None:
        """Return when the client takes more, or is gone."""
        if self._drained is not None:
            # The pod's stream waits for it as the connection's task may, and either may be cancelled.
            await asyncio.shield(self._drained)

    def wake(self) -> None:
        """Have `wait` return."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self, seconds: float | None = None) -> None:
        """Return when something has happened, at the latest after so many seconds."""
        self._waiter = self._loop.create_future()
        timer = self._loop.call_later(seconds, self.wake) if seconds is not None else None
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def has_bytes(self) -> bool:
        """Whether there are bytes that nobody has asked for."""
        return bool(self._received)

    def read(self) -> bytes:
        """Return what there is."""
        data = bytes(self._received)
        self._received.clear()
        if self._holds_back and not self.lost.done():
            self._holds_back = False
            self.transport.resume_reading()
        return data


class _StaleError(Exception):
    """A stream that had waited was of no use, and what was sent on it may be sent again."""


class _Connection:
    """One TCP connection of a client and, in turn, the streams that are tried for it."""

    def __init__(self, forward: _Forward, client: _Client) -> None:
        self._forward = forward
        self._client = client
        # What the client sent as long as no pod can have seen it; None once one may have.
        self._undelivered: bytearray | None = bytearray()
        self._heard_at = 0.0

    async def run(self) -> None:
        """Serve the client until either side ends; every failure ends this connection only."""
        client = self._client
        try:
            await self._serve()
            # Sends what is left, then the end.
            client.transport.close()
            await client.lost
        except RefusedError as error:
            self._forward.report_trouble(f"cannot serve a connection to {self._forward.target}: {error}")
            _reset(client.transport)
        finally:
            client.transport.abort()

    async def _serve(self) -> None:
        """Return when the connection has come to its proper end, or the client has left.

        Raises:
            RefusedError: it has not, and the client is to see an error.
        """
        client = self._client
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _PATIENCE
        delay = _FIRST_DELAY
        # A client that only looks whether the port is open leaves at once, and no stream is opened for it.
        if not client.has_bytes():
            await client.wait(_FIRST_BYTE)
        data = client.read()
        self._undelivered = bytearray(data)
        may_wait = can_be_repeated(data)
        while not (client.lost.done() or (client.has_ended and not self._undelivered and not client.has_bytes())):
            try:
                streams = self._forward.streams
                stream = await (streams.take() if may_wait else streams.open())
                await self._relay(stream)
                return
            except _StaleError:
                may_wait = False
                continue
            except UnavailableError as error:
                if loop.time() + delay > deadline:
                    raise RefusedError(str(error)) from error
                self._forward.report_trouble(f"waiting for {self._forward.target}: {error}")
            may_wait = False
            await asyncio.sleep(delay)
            delay = min(delay * 2, _LONGEST_DELAY)

    async def _relay(self, stream: PortStream) -> None:
        """Copy both ways until one side ends.

        Raises:
            _StaleError: the stream had waited too long, and a new one can take its place.
            UnavailableError: the stream failed before any pod can have seen a byte.
            RefusedError: it failed later.
        """
        try:
            stream.attach(self)
            await self._send(stream)
            if not (stream.is_over or stream.exchange.is_between_requests or stream.exchange.is_done):
                await self._linger(stream)
            if stream.is_over:
                self._examine(stream)
        finally:
            self._forward.streams.give_back(stream)

    async def _send(self, stream: PortStream) -> None:
        """Copy from the client until its last byte, the stream's end or the last answer, no faster than it is taken.

        A server that has given its last answer may wait for our end, and all its other clients with it (gunicorn with
        threads, for up to 2 s); its own end is heard of a second late.
        """
        client = self._client
        data = bytes(self._undelivered or b"")
        while True:
            if data:
                try:
                    await stream.send(data)
                except ConnectionError:
                    # What ended it is known when the last that came has been read.
                    while not stream.is_over:
                        await client.wait(1.0)
                    return
            while not (client.has_bytes() or client.has_ended or stream.is_over or stream.exchange.is_done):
                await client.wait()
            if stream.is_over or stream.exchange.is_done or not client.has_bytes():
                return
            data = client.read()
            if self._undelivered is not None:
                self._undelivered += data
                if len(self._undelivered) > _REPLAY_LIMIT:
                    self._undelivered = None

    async def _linger(self, stream: PortStream) -> None:
        """Go on receiving for a client that has sent its last byte, until the pod is silent for too long."""
        client = self._client
        loop = asyncio.get_running_loop()
        self._heard_at = loop.time()
        exchange = stream.exchange
        while not (stream.is_over or exchange.is_between_requests or exchange.is_done or client.lost.done()):
            await client.wait(1.0)
            if not client.is_slow and loop.time() - self._heard_at > HALF_CLOSE_SILENCE:
                return

    def _examine(self, stream: PortStream) -> None:
        """Raise what the end of the stream means for the client, nothing where the pod has closed its connection."""
        sent = self._undelivered
        if stream.has_waited and sent is not None and stream.exchange.can_be_repeated:
            raise _StaleError
        if not stream.failure:
            return
        text = stream.failure.lower()
        if sent is not None and (not sent or any(mark in text for mark in _UNDELIVERED)):
            raise UnavailableError(
                "nothing listens on that port of the pod" if _NOT_LISTENING in text else stream.failure
            )
        raise RefusedError(stream.failure)

    # -- what the stream tells -----------------------------------------------------------------------------------

    def deliver(self, data: memoryview) -> None:
        """Pass bytes of the pod on to the client."""
        if self._undelivered is not None:
            self._undelivered = None
            self._forward.report_success()
        self._client.transport.write(data)
        self._heard_at = asyncio.get_running_loop().time()
        if self._client.has_ended:
            self._client.wake()

    async def drained(self) -> None:
        """Return when the client takes more."""
        await self._client.drained()

    def stream_ended(self) -> None:
        """Have the connection look at what the stream's end means."""
        self._client.wake()


def _reset(transport: asyncio.Transport) -> None:
    """Have the coming close seen as an error: a client must not take a part for the whole."""
    connection = transport.get_extra_info("socket")
    if connection is not None:
        with contextlib.suppress(OSError):
            # struct linger: on, 0 seconds (socket(7)).
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
