"""Streams to one port of the pod, and the ones that wait warm for the next request.

A stream is one WebSocket with the subprotocol `v4.channel.k8s.io` on the pod's `portforward` subresource
(https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/#get-connect-portforward-requests-of-pod).
Every frame starts with one byte, the channel: 0 carries data, 1 the node's error text. The first two bytes on each
channel repeat the port, little endian (k8s.io/kubelet, `pkg/cri/streaming/portforward/websocket.go`).

To open one takes two TLS handshakes, from here to the API server and from there to the node, and the node connects to
the pod's port at once (containerd, `pkg/cri/sbserver/sandbox_portforward_linux.go`). So a waiting stream holds a
connection of the server in the pod: there are few, none waits for long, and at rest there is none. A server that closes
a waiting connection is heard of one second late (the same file), so only requests that may be repeated are given to a
waiting stream.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol

from airflow_deployer.api_streams import close_stream, one_line
from airflow_deployer.http_exchange import HttpExchange

if TYPE_CHECKING:
    import aiohttp

_DATA, _ERROR = 0, 1
_DATA_FRAME = bytes([_DATA])
_PORT_PREFIX = 2
_ERROR_TEXT_LIMIT = 4096

# A browser opens up to six connections to a server.
_MOST_FRESH = 6
_MOST_USED = 32
FRESH_FOR = 30.0
"""How long a stream that nobody used waits, in seconds; what serves Airflow sets no limit of its own."""
USED_FOR = 1.0
"""How long one waits after an answer: servers close idle connections, the hastiest after 2 s (gunicorn)."""
# Time for what is under way, such as the rest of a page; shorter than what a used stream waits.
_REFILL_DELAY = 0.5
_OPENING_AT_ONCE = 2
_OPENING_STEP = 0.004


class Receiver(Protocol):
    """Who takes what comes from the pod."""

    def deliver(self, data: memoryview) -> None:
        """Take bytes."""

    async def drained(self) -> None:
        """Return when more can be taken."""

    def stream_ended(self) -> None:
        """Take note that nothing more comes."""


class PortStream:
    """One stream, which is read from its opening on: what it brings goes to the receiver of the moment."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse[bool], ended: Callable[[PortStream], None]) -> None:
        self.exchange = HttpExchange()
        self.has_waited = False
        """Whether it was opened before there was something to send, so that the pod's end may be closed by now."""
        self.is_over = False
        self.failure = ""
        """Why it is over; empty where the pod has closed its connection."""
        self.expiry: asyncio.TimerHandle | None = None
        self._socket = socket
        self._ended = ended
        self._receiver: Receiver | None = None
        self._reading = asyncio.ensure_future(self._read())

    def attach(self, receiver: Receiver | None) -> None:
        """Have what comes go to this receiver; to nobody while it waits."""
        self._receiver = receiver

    async def send(self, data: bytes) -> None:
        """Send bytes to the pod, no faster than it takes them.

        Raises:
            ConnectionError: the stream is over; `failure` is going to tell why.
        """
        self.exchange.sent(data)
        await self._socket.send_bytes(_DATA_FRAME + data)

    async def close(self) -> None:
        """Close it, whatever state it is in."""
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        await close_stream(self._socket)

    async def _read(self) -> None:
        try:
            self.failure = await self._receive()
        finally:
            self.is_over = True
            if self._receiver is not None:
                self._receiver.stream_ended()
            self._ended(self)

    async def _receive(self) -> str:
        """Pass on what comes, no faster than the receiver takes it; return why it ended."""
        from aiohttp import WSMsgType

        prefix = {_DATA: _PORT_PREFIX, _ERROR: _PORT_PREFIX}
        while True:
            message = await self._socket.receive()
            if message.type is not WSMsgType.BINARY:
                return "" if message.type is WSMsgType.CLOSE else "the connection to the API server broke"
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
                return one_line(bytes(payload[:_ERROR_TEXT_LIMIT]).decode(errors="replace"))
            if self._receiver is None:
                return "the pod sent something that nobody had asked for"
            self.exchange.received(payload)
            self._receiver.deliver(payload)
            if self.exchange.is_done:
                self._receiver.stream_ended()
            await self._receiver.drained()


class PortStreams:
    """Opens streams and keeps some waiting: as many as the last minute's requests would have used, at rest none."""

    def __init__(self, open_stream: Callable[[], Awaitable[aiohttp.ClientWebSocketResponse[bool]]]) -> None:
        self._open_stream = open_stream
        self._fresh: list[PortStream] = []
        self._used: list[PortStream] = []
        self._opening: set[asyncio.Task[PortStream]] = set()
        self._waiters: deque[asyncio.Future[PortStream]] = deque()
        self._opening_more: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._wanted = 1
        self._taken_at = float("-inf")
        self._refilling: asyncio.TimerHandle | None = None
        self._is_closed = False

    def prepare(self) -> None:
        """Begin to open a stream if none waits, as there is going to be a request."""
        if not (self._fresh or self._used or self._opening):
            self._start_opening()

    async def open(self) -> PortStream:
        """Open a stream; raises as `ApiServer.open_stream`."""
        return PortStream(await self._open_stream(), self._ended)

    async def take(self) -> PortStream:
        """Return a stream that waits, or else open one; raises as `ApiServer.open_stream`."""
        loop = asyncio.get_running_loop()
        self._taken_at = loop.time()
        if self._refilling is None:
            self._refilling = loop.call_later(_REFILL_DELAY, self._refill)
        waiting = self._used or self._fresh
        if waiting:
            stream = waiting.pop()
            if stream.expiry is not None:
                stream.expiry.cancel()
            return stream
        self._wanted = min(self._wanted + 1, _MOST_FRESH)
        waiter: asyncio.Future[PortStream] = loop.create_future()
        self._waiters.append(waiter)
        self._open_for_waiters()
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.give_back(waiter.result())
            raise
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def give_back(self, stream: PortStream) -> None:
        """Keep a stream for the next request if it can serve one, else close it."""
        stream.attach(None)
        if stream.is_over or self._is_closed or not stream.exchange.is_between_requests:
            self._discard(stream)
        elif not self._serve_waiter(stream):
            self._keep(stream, self._used, _MOST_USED, USED_FOR)

    def drop_waiting(self) -> None:
        """Close every stream that waits, as the pod they lead to is gone or going."""
        for waiting in (self._used, self._fresh):
            while waiting:
                stream = waiting.pop()
                if stream.expiry is not None:
                    stream.expiry.cancel()
                self._discard(stream)

    async def close(self) -> None:
        """Close the streams that wait and those that are being closed or opened."""
        self._is_closed = True
        for timer in (self._refilling, self._opening_more):
            if timer is not None:
                timer.cancel()
        for opening in self._opening:
            opening.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)
        self.drop_waiting()
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _serve_waiter(self, stream: PortStream) -> bool:
        if self._waiters:
            self._waiters.popleft().set_result(stream)
            return True
        return False

    def _open_for_waiters(self) -> None:
        """Open streams for those who wait, the third and further ones little by little.

        A short request gives its stream back before another one is open, and with all opening at once none would.
        """
        loop = asyncio.get_running_loop()
        while len(self._opening) < min(len(self._waiters), _OPENING_AT_ONCE):
            self._start_opening()
        if len(self._opening) < len(self._waiters) and self._opening_more is None:
            self._opening_more = loop.call_later(_OPENING_STEP, self._open_more)

    def _open_more(self) -> None:
        self._opening_more = None
        if len(self._opening) < len(self._waiters):
            self._start_opening()
            self._open_for_waiters()

    def _refill(self) -> None:
        self._refilling = None
        # One after the other: the handshakes take their time from the requests that are being served.
        if self._is_closed or self._opening or len(self._fresh) >= self._wanted:
            return
        if asyncio.get_running_loop().time() - self._taken_at < FRESH_FOR:
            self._start_opening()

    def _start_opening(self) -> None:
        opening = asyncio.ensure_future(self.open())
        self._opening.add(opening)
        opening.add_done_callback(self._opened)

    def _opened(self, opening: asyncio.Task[PortStream]) -> None:
        self._opening.discard(opening)
        if opening.cancelled():
            return
        error = opening.exception()
        if error is not None:
            # It matters only to whoever waits; the next request opens its own and says what is wrong.
            if self._waiters:
                self._waiters.popleft().set_exception(error)
            return
        stream = opening.result()
        # Whoever waits gets it even if it is over already, and says why.
        if self._serve_waiter(stream):
            return
        if self._is_closed or stream.is_over:
            self._discard(stream)
        else:
            self._keep(stream, self._fresh, _MOST_FRESH, FRESH_FOR)
            self._refill()

    def _keep(self, stream: PortStream, waiting: list[PortStream], most: int, seconds: float) -> None:
        if len(waiting) >= most:
            self._discard(stream)
            return
        stream.has_waited = True
        waiting.append(stream)
        stream.expiry = asyncio.get_running_loop().call_later(seconds, self._expire, stream)

    def _expire(self, stream: PortStream) -> None:
        if stream in self._fresh:
            self._fresh.remove(stream)
            self._wanted = max(1, self._wanted - 1)
        else:
            self._used.remove(stream)
        self._discard(stream)
        self._refill()

    def _ended(self, stream: PortStream) -> None:
        """Drop all that wait once one of them ends: what they lead to is on its way out."""
        if stream in self._fresh or stream in self._used:
            self.drop_waiting()

    def _discard(self, stream: PortStream) -> None:
        closing = asyncio.ensure_future(stream.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
