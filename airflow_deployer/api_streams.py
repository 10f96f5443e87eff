"""WebSocket streams to a pod through the Kubernetes API server: `portforward` and `exec`, on asyncio.

Authentication and trust come from the kubeconfig by way of the official client's configuration, as in `cluster`; its
asyncio side, `kubernetes.aio`, is the same aiohttp underneath, but its streams cannot bound the opening, check the
chosen subprotocol, resume TLS sessions or read refused credentials again, so aiohttp is used directly.

The subprotocol of both subresources is `v4.channel.k8s.io`: every frame starts with one byte, the channel
(https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urlsplit

from airflow_deployer.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    import aiohttp

SUBPROTOCOL = "v4.channel.k8s.io"
CLOSE_DEADLINE = 2.0

# TLS handshakes at once: more only make each of them slower, until the first ones run into their deadline.
_OPENING_AT_ONCE = 16
_OPEN_DEADLINE = 15.0


class UnavailableError(Exception):
    """No stream to the pod for now; another attempt may succeed."""


class RefusedError(Exception):
    """No stream to the pod, and trying again will not help."""


class ApiServer:
    """The API server of a context, with credentials that are read again when they stop working.

    Args:
        context: name of the kubeconfig's context.
        kubeconfig: its file, None for kubectl's default files.
    """

    def __init__(self, context: str, kubeconfig: str | None) -> None:
        import aiohttp

        self._context = context
        self._kubeconfig = kubeconfig
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=_OPEN_DEADLINE),
        )
        self._server = ""
        self._request: dict[str, Any] = {}
        self._kubeconfig_stamp: tuple[object, ...] = ()
        self._opening = asyncio.Semaphore(_OPENING_AT_ONCE)
        self._loading = asyncio.Lock()
        self._loads = 0
        self._sockets: set[socket.socket] = set()

    async def load(self) -> None:
        """Read server, trust and credentials from the kubeconfig, which may run its credential plugin.

        Raises:
            ClusterError: the kubeconfig or its context cannot be used.
        """
        self._kubeconfig_stamp = _stamp(self._kubeconfig)
        try:
            # In a thread, since a credential plugin may take seconds.
            self._server, self._request = await asyncio.to_thread(_load_kubeconfig, self._context, self._kubeconfig)
        except Exception as error:
            # The loader raises what its parts raise: OSError, ValueError, KeyError, TypeError, yaml's and its own.
            raise ClusterError(
                f"Cannot use the context {self._context!r} of the kubeconfig: {one_line(error)}.",
                hint=f"kubectl --context {self._context} cluster-info   shows whether the context works at all",
            ) from error
        self._loads += 1

    async def close(self) -> None:
        """Close every connection, at the latest after a second."""
        await self._session.close()
        # TLS says goodbye first and waits for an answer, which nobody is going to read once the loop is closed.
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for _ in range(100):
            if not self._open_sockets():
                break
            await asyncio.sleep(0.01)
        # Transports let go of their sockets in the loop's next turns.
        await asyncio.sleep(0.01)

    def _open_sockets(self) -> set[socket.socket]:
        self._sockets = {one for one in self._sockets if one.fileno() != -1}
        return self._sockets

    async def reload_if_changed(self) -> None:
        """Read the kubeconfig again if its files have changed, as they do when a local cluster is made anew."""
        if _stamp(self._kubeconfig) != self._kubeconfig_stamp:
            await self._reload(self._loads)

    async def _reload(self, seen: int) -> None:
        async with self._loading:
            # Only the first of many connections that were refused with the same credentials reads them again.
            if self._loads == seen:
                with contextlib.suppress(ClusterError):
                    await self.load()

    async def stateful_set_is_gone(self, namespace: str, name: str) -> bool:
        """Ask for the StatefulSet: True only for a 404 that Kubernetes itself answered about it.

        Raises:
            UnavailableError: no answer, with the reason.
        """
        import aiohttp

        path = f"/apis/apps/v1/namespaces/{quote(namespace)}/statefulsets/{quote(name)}"
        try:
            for _ in range(2):
                loads = self._loads
                async with self._session.get(self._server + path, **self._request) as response:
                    if response.status == 401:
                        await self._reload(loads)
                        continue
                    if response.status != 404:
                        return False
                    # A proxy or another server at this address answers 404 too, but not with this Status object.
                    status = await response.json(content_type=None)
                    return isinstance(status, dict) and status.get("reason") == "NotFound"
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            raise UnavailableError(f"the API server cannot be reached: {cause(error)}") from error
        return False

    async def pod_uid(self, namespace: str, pod: str) -> str | None:
        """Ask which pod has this name; None where there is none, it is being deleted, or it cannot be told.

        Raises:
            UnavailableError: no answer, with the reason.
        """
        import aiohttp

        path = f"/api/v1/namespaces/{quote(namespace)}/pods/{quote(pod)}"
        try:
            async with self._session.get(self._server + path, **self._request) as response:
                if response.status != 200:
                    return None
                metadata = (await response.json(content_type=None))["metadata"]
                return None if metadata.get("deletionTimestamp") else str(metadata["uid"])
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError, KeyError) as error:
            raise UnavailableError(f"the API server cannot be reached: {cause(error)}") from error

    @contextlib.asynccontextmanager
    async def get(
        self, path: str, query: Sequence[tuple[str, str]], silence: float
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Read something of a pod, for the time of the block.

        Args:
            silence: seconds after which an answer that brings nothing counts as broken off.

        Raises:
            UnavailableError: no answer, or no such pod.
            RefusedError: these credentials may not.
        """
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=silence)
        url = f"{self._server}{path}?{urlencode(query)}"
        loads = self._loads
        try:
            async with self._session.get(url, timeout=timeout, **self._request) as response:
                if response.status == 401:
                    await self._reload(loads)
                    raise UnavailableError("the API server does not accept the credentials (401)")
                if response.status == 403:
                    raise RefusedError("forbidden (403): it takes the verb get on pods and pods/log")
                if response.status >= 400:
                    raise UnavailableError(
                        "there is no such pod" if response.status == 404 else f"not now (HTTP {response.status})"
                    )
                yield response
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            raise UnavailableError(f"the API server cannot be reached: {cause(error)}") from error

    async def open_stream(
        self, namespace: str, pod: str, subresource: str, query: Sequence[tuple[str, str]]
    ) -> aiohttp.ClientWebSocketResponse[bool]:
        """Open one stream to a pod.

        Args:
            subresource: `portforward` or `exec`.
            query: its parameters; a key may occur more than once (`command`).

        Raises:
            UnavailableError: not now: no such pod, pod not running, API server away.
            RefusedError: not ever with these credentials or this server.
        """
        async with self._opening:
            loads = self._loads
            try:
                return await self._open_stream(namespace, pod, subresource, query)
            except _UnauthorizedError:
                await self._reload(loads)
        async with self._opening:
            try:
                return await self._open_stream(namespace, pod, subresource, query)
            except _UnauthorizedError as error:
                raise RefusedError("the API server does not accept the credentials (401)") from error

    async def _open_stream(
        self, namespace: str, pod: str, subresource: str, query: Sequence[tuple[str, str]]
    ) -> aiohttp.ClientWebSocketResponse[bool]:
        import aiohttp

        path = f"/api/v1/namespaces/{quote(namespace)}/pods/{quote(pod)}/{subresource}?{urlencode(query)}"
        try:
            stream = await asyncio.wait_for(
                self._session.ws_connect(
                    self._server + path,
                    protocols=(SUBPROTOCOL,),
                    max_msg_size=0,
                    timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_DEADLINE),
                    **self._request,
                ),
                _OPEN_DEADLINE,
            )
        except aiohttp.WSServerHandshakeError as error:
            if error.status == 401:
                raise _UnauthorizedError from error
            if error.status == 403:
                raise RefusedError(
                    f"forbidden (403): it takes the verbs get and create on pods/{subresource} in namespace {namespace}"
                ) from error
            reason = "there is no such pod" if error.status == 404 else f"the pod does not run (HTTP {error.status})"
            raise UnavailableError(reason) from error
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise UnavailableError(f"the API server cannot be reached: {cause(error)}") from error
        if stream.protocol != SUBPROTOCOL:
            await stream.close()
            raise RefusedError(f"the API server does not speak {SUBPROTOCOL}")
        connection = stream.get_extra_info("socket")
        if connection is not None:
            _keep_alive(connection)
            self._open_sockets().add(connection)
        trust = self._request.get("ssl")
        if trust is not None:
            trust.remember(stream.get_extra_info("ssl_object"))
        return stream


class _UnauthorizedError(Exception):
    """The API server answered 401."""


def _load_kubeconfig(context: str, kubeconfig: str | None) -> tuple[str, dict[str, Any]]:
    """Return the server's URL and what each request to it takes: headers, TLS, proxy."""
    from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

    from kubernetes.client import Configuration
    from kubernetes.config import load_kube_config

    configuration = Configuration()
    load_kube_config(config_file=kubeconfig, context=context, client_configuration=configuration)  # type: ignore[no-untyped-call]
    server = str(configuration.host).rstrip("/")
    authentication: Any = configuration.auth_settings()
    request: dict[str, Any] = {
        "headers": {setting["key"]: setting["value"] for setting in authentication.values() if setting["value"]}
    }
    if server.startswith("https"):
        request["ssl"] = _trust(configuration)
        if configuration.tls_server_name:
            request["server_hostname"] = configuration.tls_server_name
    host = urlsplit(server).hostname or ""
    if configuration.proxy and not proxy_bypass_environment(host, {"no": configuration.no_proxy or ""}):
        request["proxy"] = configuration.proxy
        request["proxy_headers"] = configuration.proxy_headers
    return server, request


def _trust(configuration: Any) -> _ResumingContext:
    context = _ResumingContext(ssl.PROTOCOL_TLS_CLIENT)
    if configuration.ssl_ca_cert:
        context.load_verify_locations(configuration.ssl_ca_cert)
    else:
        context.load_default_certs()
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, configuration.key_file)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class _ResumingContext(ssl.SSLContext):
    """TLS towards one server that resumes the last session, which spares both ends the certificates' arithmetic."""

    _session: ssl.SSLSession | None = None

    def remember(self, connection: ssl.SSLObject | None) -> None:
        """Resume this connection's session from now on, if it is a new one and the server gave a ticket for it."""
        # Looking at `session` costs some kilobytes that CPython never frees, so not on every connection.
        if connection is None or connection.session_reused:
            return
        session = connection.session
        if session is not None and session.has_ticket:
            self._session = session

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        """Start a connection (asyncio offers no parameter for the session)."""
        return super().wrap_bio(incoming, outgoing, server_side, server_hostname, session or self._session)


def _stamp(kubeconfig: str | None) -> tuple[object, ...]:
    """Describe the state of the kubeconfig's files, to see later whether they have changed."""
    paths = kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config"
    stamps: list[object] = []
    for path in filter(None, paths.split(os.pathsep)):
        try:
            status = Path(path).expanduser().stat()
            stamps.append((status.st_mtime_ns, status.st_size, status.st_ino))
        except OSError:
            stamps.append(None)
    return tuple(stamps)


def _keep_alive(connection: socket.socket) -> None:
    """Notice within a minute that the API server's machine is gone; a WebSocket ping would stall behind data."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def cause(error: Exception) -> str:
    """Say what broke without the client library's description of the connection around it."""
    # aiohttp.ClientConnectorError has the one, ClientConnectorCertificateError the other.
    inner = getattr(error, "os_error", None) or getattr(error, "certificate_error", None) or error
    return one_line(getattr(inner, "strerror", None) or inner)


def one_line(error: object) -> str:
    """The error's text without line breaks, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def in_background(context: str, kubeconfig: str | None) -> Iterator[tuple[ApiServer, Callable[..., Future[Any]]]]:
    """Have an API server whose streams live on in a thread of their own, for code that is not on asyncio.

    Yields the API server, and what hands a coroutine to that thread and returns the future of its result.

    Raises:
        ClusterError: the kubeconfig or its context cannot be used.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="api streams", daemon=True)
    thread.start()

    def submit(work: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, loop)

    async def make() -> ApiServer:
        api = ApiServer(context, kubeconfig)
        try:
            await api.load()
        except BaseException:
            await api.close()
            raise
        return api

    try:
        api = submit(make()).result()
        try:
            yield api, submit
        finally:
            with contextlib.suppress(Exception):
                submit(api.close()).result(timeout=5.0)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=5.0)
        if not thread.is_alive():
            loop.close()


async def close_stream(stream: aiohttp.ClientWebSocketResponse[bool]) -> None:
    """Close a stream, by force where its closing frame waits behind data that the pod does not take."""
    connection = stream.get_extra_info("socket")
    try:
        await asyncio.wait_for(stream.close(), CLOSE_DEADLINE)
    except asyncio.TimeoutError:
        # The closing frame waits behind data that the pod does not take, and would for as long as the pod lives.
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
