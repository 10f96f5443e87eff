"""A stand-in for the API server and the node behind it, for the faults of a port-forward that cannot be provoked.

It speaks the `v4.channel.k8s.io` port-forward protocol as the kubelet does and connects each stream to a real TCP
port. What goes wrong is set by its attributes.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import struct
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType

from aiohttp import WSMsgType, web

DATA, ERROR = b"\0", b"\1"


class FakeApiServer:
    """An API server at 127.0.0.1 with at most one StatefulSet and its pod; it speaks TLS with a `certificate`."""

    def __init__(self, certificate: Path | None = None) -> None:
        self._certificate = certificate
        self.resumed: list[bool | None] = []
        """For each stream over TLS, whether its session was resumed."""
        self.port = 0
        self.backend = 0
        """The TCP port that the "pod" forwards to."""
        self.pod_exists = True
        self.stateful_set_exists = True
        self.not_found_body: object = {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}
        self.accepted_token: str | None = None
        self.forbidden = False
        self.error_text = ""
        """Written to the error channel of the next streams instead of connecting them."""
        self.drop_after: int | None = None
        """Cut the connection of a stream after this many bytes from the pod, without a closing frame."""
        self.late_close = 0.0
        """Seconds until a stream whose "pod" has closed its connection is closed too; containerd takes 1 s."""
        self.pod_uid = "uid-1"
        self.requests = 0
        self.streams = 0
        self.open_streams = 0
        self.from_pod = 0
        self.to_pod = 0
        self._loop = asyncio.new_event_loop()
        self._runner: web.AppRunner | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FakeApiServer:
        self._thread.start()
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    def stop(self) -> None:
        """Stop listening and cut every connection."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)

    def write_kubeconfig(self, path: Path, *, token: str) -> str:
        """Write a kubeconfig whose only context, `fake`, leads here; return its path."""
        path.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "fake",
                    "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
                    "clusters": [{"name": "fake", "cluster": self._cluster()}],
                    "users": [{"name": "fake", "user": {"token": token}}],
                }
            )
        )
        return str(path)

    def _cluster(self) -> dict[str, str]:
        if self._certificate is None:
            return {"server": f"http://127.0.0.1:{self.port}"}
        return {"server": f"https://127.0.0.1:{self.port}", "certificate-authority": str(self._certificate)}

    async def _start(self) -> None:
        application = web.Application()
        application.router.add_get("/apis/apps/v1/namespaces/{ns}/statefulsets/{name}", self._checked(self._get))
        application.router.add_get("/api/v1/namespaces/{ns}/pods/{pod}", self._checked(self._get_pod))
        application.router.add_get("/api/v1/namespaces/{ns}/pods/{pod}/portforward", self._checked(self._forward))
        self._runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self._runner.setup()
        tls = None
        if self._certificate is not None:
            tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            tls.load_cert_chain(self._certificate)
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True, ssl_context=tls)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def _checked(
        self, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            self.requests += 1
            if self.accepted_token and request.headers.get("Authorization") != f"Bearer {self.accepted_token}":
                return web.json_response({"kind": "Status", "reason": "Unauthorized"}, status=401)
            return await handler(request)

        return handle

    async def _get(self, request: web.Request) -> web.StreamResponse:
        if not self.stateful_set_exists:
            return web.json_response(self.not_found_body, status=404)
        return web.json_response({"kind": "StatefulSet"})

    async def _get_pod(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"kind": "Pod", "metadata": {"uid": self.pod_uid}})

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        self.streams += 1
        if self._certificate is not None:
            assert request.transport is not None
            self.resumed.append(request.transport.get_extra_info("ssl_object").session_reused)
        if self.forbidden:
            return web.json_response({"kind": "Status", "reason": "Forbidden"}, status=403)
        if not self.pod_exists:
            return web.json_response(self.not_found_body, status=404)
        stream = web.WebSocketResponse(protocols=("v4.channel.k8s.io",), max_msg_size=0, timeout=1)
        await stream.prepare(request)
        prefix = struct.pack("<H", int(request.query["ports"]))
        await stream.send_bytes(DATA + prefix)
        await stream.send_bytes(ERROR + prefix)
        if self.error_text:
            await stream.send_bytes(ERROR + self.error_text.encode())
            await stream.close()
            return stream
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.backend)
        except ConnectionRefusedError:
            text = f"error forwarding port: failed to dial {self.backend}: connect: connection refused"
            await stream.send_bytes(ERROR + text.encode())
            await stream.close()
            return stream
        downward = asyncio.ensure_future(self._pod_to_stream(reader, stream, request))
        self.open_streams += 1
        try:
            async for message in stream:
                if message.type is WSMsgType.BINARY and message.data[:1] == DATA:
                    writer.write(message.data[1:])
                    await writer.drain()
                    self.to_pod += len(message.data) - 1
        except ConnectionError:
            pass
        finally:
            self.open_streams -= 1
            downward.cancel()
            await asyncio.gather(downward, return_exceptions=True)
            writer.transport.abort()
        return stream

    async def _pod_to_stream(
        self, reader: asyncio.StreamReader, stream: web.WebSocketResponse, request: web.Request
    ) -> None:
        sent = 0
        while data := await reader.read(32 * 1024):
            await stream.send_bytes(DATA + data)
            self.from_pod += len(data)
            sent += len(data)
            if self.drop_after is not None and sent >= self.drop_after:
                assert request.transport is not None
                request.transport.abort()
                return
        await asyncio.sleep(self.late_close)
        await stream.close()
