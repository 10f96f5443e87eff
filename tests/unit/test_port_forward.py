"""The port-forward against a stand-in API server: what it carries, what it survives, when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from ipaddress import IPv4Address
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from airflow_deployer import port_forward, port_streams
from airflow_deployer.errors import ClusterError, ForwardError
from airflow_deployer.port_forward import Target, check_port_free, forwarded, serve
from tests.unit.fake_api_server import FakeApiServer

MEGABYTE = 1024 * 1024


class Backend:
    """A TCP server that plays the program in the pod: `talk` is run in a thread for each connection."""

    def __init__(self, talk: Callable[[socket.socket], None]) -> None:
        self._talk = talk
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self._talk(connection)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


def echo(connection: socket.socket) -> None:
    while data := connection.recv(65536):
        connection.sendall(data)


@pytest.fixture
def api() -> Iterator[FakeApiServer]:
    with FakeApiServer() as server:
        yield server


@pytest.fixture
def backend(api: FakeApiServer) -> Iterator[Callable[[Callable[[socket.socket], None]], Backend]]:
    backends: list[Backend] = []

    def make(talk: Callable[[socket.socket], None]) -> Backend:
        backends.append(Backend(talk))
        api.backend = backends[-1].port
        return backends[-1]

    yield make
    for one in backends:
        one.close()


@pytest.fixture
def target(api: FakeApiServer, tmp_path: Path) -> Target:
    return Target("fake", "ns", "airflow", 8080, api.write_kubeconfig(tmp_path / "kubeconfig", token="token-1"))


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def port(target: Target, log: list[str]) -> Iterator[int]:
    with forwarded(target, log=log.append) as local:
        yield local


def connect(port: int, host: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection((host, port), timeout=20)


def receive_all(connection: socket.socket) -> bytes:
    parts = []
    while data := connection.recv(65536):
        parts.append(data)
    return b"".join(parts)


def kernel_buffers(*, connections: int) -> int:
    """The bytes that the kernel may hold on the way of so many connections (tcp(7), `tcp_rmem` and `tcp_wmem`)."""
    limits = [Path("/proc/sys/net/ipv4", name).read_text(encoding="ascii").split() for name in ("tcp_rmem", "tcp_wmem")]
    return connections * sum(int(largest) for _, _, largest in limits)


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


Make = Callable[[Callable[[socket.socket], None]], Backend]


def test_bytes_arrive_unchanged_both_ways(backend: Make, port: int) -> None:
    backend(echo)
    sent = os.urandom(3 * MEGABYTE)
    with connect(port) as connection:
        sender = threading.Thread(target=connection.sendall, args=(sent,))
        sender.start()
        received = bytearray()
        while len(received) < len(sent):
            received += connection.recv(65536)
        sender.join()
    assert bytes(received) == sent


def test_two_hundred_connections_at_once_are_all_served(backend: Make, port: int, api: FakeApiServer) -> None:
    backend(echo)
    connections = [connect(port) for _ in range(200)]
    for number, connection in enumerate(connections):
        connection.sendall(f"{number:03}".encode())
    for number, connection in enumerate(connections):
        assert connection.recv(3) == f"{number:03}".encode()
        connection.close()


def test_the_pod_s_close_reaches_the_client_after_its_last_byte(backend: Make, port: int) -> None:
    backend(lambda connection: connection.sendall(b"x" * MEGABYTE))
    with connect(port) as connection:
        assert receive_all(connection) == b"x" * MEGABYTE


def test_a_client_that_has_sent_its_last_byte_is_still_answered(backend: Make, port: int) -> None:
    def answer_late(connection: socket.socket) -> None:
        if connection.recv(100) == b"question":
            time.sleep(0.3)
            connection.sendall(b"answer")

    backend(answer_late)
    with connect(port) as connection:
        connection.sendall(b"question")
        connection.shutdown(socket.SHUT_WR)
        assert receive_all(connection) == b"answer"


def test_a_client_that_left_does_not_hold_a_silent_stream_for_ever(
    backend: Make, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port_forward, "HALF_CLOSE_SILENCE", 0.2)
    ended = threading.Event()

    def wait_for_end(connection: socket.socket) -> None:
        connection.recv(5)
        with contextlib.suppress(OSError):
            connection.recv(1)
        ended.set()

    backend(wait_for_end)
    with connect(port) as connection:
        connection.sendall(b"hello")
    assert ended.wait(5)


def test_a_reset_connection_ends_only_itself(backend: Make, port: int) -> None:
    backend(echo)
    with connect(port) as survivor:
        survivor.sendall(b"before")
        assert survivor.recv(6) == b"before"
        for _ in range(5):
            victim = connect(port)
            victim.sendall(b"x" * 1000)
            victim.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            victim.close()
        survivor.sendall(b"after")
        assert survivor.recv(5) == b"after"


def test_a_slow_client_stops_the_pod_instead_of_filling_memory(backend: Make, port: int, api: FakeApiServer) -> None:
    held = kernel_buffers(connections=2)
    size = held + 64 * MEGABYTE
    backend(lambda connection: connection.sendall(b"x" * size))
    with connect(port) as connection:
        assert connection.recv(1) == b"x"
        time.sleep(1.0)
        # What the socket buffers on the way hold, and not much more.
        assert api.from_pod < held + 32 * MEGABYTE
        assert len(receive_all(connection)) == size - 1


def test_a_slow_pod_stops_the_client_instead_of_filling_memory(backend: Make, port: int, api: FakeApiServer) -> None:
    go_on = threading.Event()

    def read_late(connection: socket.socket) -> None:
        go_on.wait(20)
        connection.sendall(str(len(receive_all(connection))).encode())

    backend(read_late)
    with connect(port) as connection:
        connection.settimeout(1.0)
        held, sent = kernel_buffers(connections=3), 0
        with contextlib.suppress(TimeoutError):
            while sent < held + 64 * MEGABYTE:
                sent += connection.send(b"x" * 65536)
        assert sent < held + 32 * MEGABYTE
        go_on.set()


def test_a_connection_waits_for_a_missing_pod(backend: Make, port: int, api: FakeApiServer, log: list[str]) -> None:
    backend(echo)
    api.pod_exists = False
    with connect(port) as connection:
        connection.sendall(b"hello")
        wait_until(lambda: api.streams >= 2)
        api.pod_exists = True
        assert connection.recv(5) == b"hello"
    waiting = [line for line in log if "there is no such pod" in line]
    assert len(waiting) == 1, "the same trouble is logged once"
    assert "connected again" in log


def test_a_connection_waits_for_a_pod_that_does_not_listen_yet(backend: Make, port: int, api: FakeApiServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        api.backend = unused.getsockname()[1]
    with connect(port) as connection:
        connection.sendall(b"hello")
        wait_until(lambda: api.streams >= 3)
        backend(echo)
        assert connection.recv(5) == b"hello", "what was sent meanwhile is not lost"


def test_a_connection_does_not_wait_for_ever(port: int, api: FakeApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_forward, "_PATIENCE", 0.3)
    api.pod_exists = False
    with connect(port) as connection, pytest.raises(ConnectionResetError):
        connection.recv(1)


def test_delivered_bytes_are_never_sent_twice(backend: Make, port: int, api: FakeApiServer, log: list[str]) -> None:
    api.error_text = (
        "error forwarding port 8080 to pod x, uid : failed to execute portforward in network namespace "
        '"/run/netns/x": read tcp4 127.0.0.1:1->127.0.0.1:8080: read: connection reset by peer'
    )
    with connect(port) as connection:
        connection.sendall(b"POST once")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    # Without a byte sent, or if nobody listened, another attempt is harmless; here the pod may have seen the request.
    # The other streams are those that were to wait for a request, when the forward began and when the client came.
    assert api.streams <= 3
    assert any("connection reset by peer" in line for line in log)


def test_a_stream_that_breaks_is_an_error_for_the_client_not_an_end(
    backend: Make, port: int, api: FakeApiServer
) -> None:
    backend(lambda connection: connection.sendall(b"x" * MEGABYTE))
    api.drop_after = 100_000
    with connect(port) as connection, pytest.raises(ConnectionResetError):
        receive_all(connection)
    api.drop_after = None
    with connect(port) as connection:
        assert len(receive_all(connection)) == MEGABYTE


def test_an_unreachable_api_server_is_waited_for(backend: Make, port: int, api: FakeApiServer) -> None:
    backend(echo)
    with connect(port) as connection:
        connection.sendall(b"hello")
        assert connection.recv(5) == b"hello"
        api.stop()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with connect(port) as connection:
        connection.sendall(b"again")
        time.sleep(0.5)
        api.start()
        assert connection.recv(5) == b"again"


def test_new_credentials_are_read_from_the_kubeconfig(
    backend: Make, port: int, api: FakeApiServer, target: Target
) -> None:
    backend(echo)
    api.accepted_token = "token-2"
    assert target.kubeconfig is not None
    api.write_kubeconfig(Path(target.kubeconfig), token="token-2")
    with connect(port) as connection:
        connection.sendall(b"hello")
        assert connection.recv(5) == b"hello"


def test_rejected_credentials_end_the_connection_and_never_reach_the_log(
    port: int, api: FakeApiServer, log: list[str]
) -> None:
    api.accepted_token = "token-2"
    with connect(port) as connection, pytest.raises(ConnectionResetError):
        connection.recv(1)
    assert any("401" in line for line in log)
    assert "token-" not in "".join(log)


def test_a_missing_permission_is_named(port: int, api: FakeApiServer, log: list[str]) -> None:
    api.forbidden = True
    with connect(port) as connection, pytest.raises(ConnectionResetError):
        connection.recv(1)
    assert any("get and create on pods/portforward in namespace ns" in line for line in log)


def make_certificate(path: Path) -> Path:
    """Write a self-signed certificate for 127.0.0.1 and its key into one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fake")])
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(certificate.public_bytes(pem) + secret)
    return path


def test_tls_sessions_are_resumed(tmp_path: Path) -> None:
    with FakeApiServer(make_certificate(tmp_path / "certificate")) as api:
        backend = Backend(echo)
        api.backend = backend.port
        target = Target("fake", "ns", "airflow", 8080, api.write_kubeconfig(tmp_path / "kubeconfig", token="token-1"))
        with forwarded(target) as port:
            wait_until(lambda: api.open_streams == 1)
            for _ in range(3):
                with connect(port) as connection:
                    connection.sendall(b"hello")
                    assert connection.recv(5) == b"hello"
        backend.close()
        # The first one is the stream that waits from the beginning; the server forgets a session that ended badly.
        assert not api.resumed[0]
        assert api.resumed.count(True) >= 2


def test_a_server_that_the_kubeconfig_does_not_trust_gets_nothing(tmp_path: Path) -> None:
    log: list[str] = []
    certificate = make_certificate(tmp_path / "certificate")
    with FakeApiServer(certificate) as api:
        target = Target("fake", "ns", "airflow", 8080, api.write_kubeconfig(tmp_path / "kubeconfig", token="token-1"))
        other = make_certificate(tmp_path / "other").read_bytes()
        served = certificate.read_bytes()
        certificate.write_bytes(other)
        with forwarded(target, log=log.append):
            pass
        certificate.write_bytes(served)
        assert api.requests == 0
    assert any("CERTIFICATE_VERIFY_FAILED" in line for line in log), log


def test_looking_whether_the_port_is_open_opens_no_more_than_the_stream_that_waits(
    port: int, backend: Make, api: FakeApiServer
) -> None:
    backend(echo)
    for _ in range(10):
        connect(port).close()
        time.sleep(0.02)
    time.sleep(0.2)
    assert api.streams <= 2, "the one from the beginning was refused where no program listened yet"


REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


class WebProgram:
    """Answers every request on a connection with `ANSWER`, and keeps what it was asked."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.connections: list[socket.socket] = []

    def talk(self, connection: socket.socket) -> None:
        self.connections.append(connection)
        while data := connection.recv(65536):
            self.requests.append(data)
            connection.sendall(ANSWER)


def ask(port: int, request: bytes = REQUEST) -> bytes:
    with connect(port) as connection:
        connection.sendall(request)
        return connection.recv(65536)


def test_a_server_that_waits_for_the_end_after_its_last_answer_hears_it_at_once(
    backend: Make, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port_streams, "USED_FOR", 60.0)  # a stream that is kept for another request hears it then
    ended: list[bool] = []

    def talk(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(ANSWER.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        ended.append(connection.recv(1) == b"")

    backend(talk)
    with connect(port) as connection:
        connection.sendall(REQUEST)
        assert receive_all(connection).endswith(b"hello")
        wait_until(lambda: ended == [True])


def test_a_request_finds_a_stream_that_waits_and_leaves_it_to_the_next(
    backend: Make, target: Target, api: FakeApiServer
) -> None:
    program = WebProgram()
    backend(program.talk)
    with forwarded(target) as port:
        wait_until(lambda: api.open_streams == 1)
        for _ in range(50):
            assert ask(port) == ANSWER
        # Another one was opened to wait, by the time the first had been taken.
        assert api.streams <= 3
    assert len(program.requests) == 50


def test_short_requests_at_once_share_a_few_streams(backend: Make, port: int, api: FakeApiServer) -> None:
    program = WebProgram()
    backend(program.talk)
    with ThreadPoolExecutor(20) as clients:
        assert all(answer == ANSWER for answer in clients.map(lambda _: ask(port), range(400)))
    assert len(program.requests) == 400
    assert api.streams < 60


def test_a_request_that_must_not_be_repeated_gets_a_stream_of_its_own(
    backend: Make, port: int, api: FakeApiServer
) -> None:
    program = WebProgram()
    backend(program.talk)
    wait_until(lambda: api.streams >= 1)
    before = api.streams
    for _ in range(3):
        assert ask(port, b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n") == ANSWER
    assert api.streams >= before + 3


def test_a_stream_whose_connection_the_program_had_closed_costs_no_request(
    backend: Make, target: Target, api: FakeApiServer
) -> None:
    program = WebProgram()
    backend(program.talk)
    # As containerd does it: the end is heard of later than the connection is closed.
    api.late_close = 0.5
    with forwarded(target) as port:
        wait_until(lambda: len(program.connections) == 1)
        assert ask(port) == ANSWER
        wait_until(lambda: len(program.connections) >= 2)
        for connection in program.connections:
            connection.shutdown(socket.SHUT_RDWR)
        time.sleep(0.05)
        assert ask(port) == ANSWER
    assert len(program.requests) == 2


def test_streams_that_wait_are_dropped_with_the_first_that_ends(
    backend: Make, target: Target, api: FakeApiServer
) -> None:
    program = WebProgram()
    backend(program.talk)
    with forwarded(target) as port:
        with ThreadPoolExecutor(4) as clients:
            list(clients.map(lambda _: ask(port), range(8)))
        time.sleep(0.3)
        assert api.open_streams >= 2
        program.connections[-1].shutdown(socket.SHUT_RDWR)
        wait_until(lambda: api.open_streams == 0)
        assert ask(port) == ANSWER


def test_nothing_waits_at_rest(
    backend: Make, target: Target, api: FakeApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port_streams, "FRESH_FOR", 0.3)
    monkeypatch.setattr(port_streams, "USED_FOR", 0.1)
    program = WebProgram()
    backend(program.talk)
    with forwarded(target) as port:
        assert ask(port) == ANSWER
        wait_until(lambda: api.open_streams == 0)
        opened = api.streams
        time.sleep(0.7)
        assert api.streams <= opened + 1
        assert api.open_streams == 0
        assert ask(port) == ANSWER


def test_streams_to_an_earlier_pod_are_dropped(
    backend: Make, target: Target, api: FakeApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast(monkeypatch)
    backend(echo)
    with forwarded(target):
        wait_until(lambda: api.open_streams == 1)
        time.sleep(0.3)
        assert api.open_streams == 1
        api.pod_uid = "uid-2"
        wait_until(lambda: api.open_streams == 0)


def test_websockets_and_streamed_answers_come_through_as_they_are_sent(
    target: Target, api: FakeApiServer, log: list[str]
) -> None:
    async def stream(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        answer.enable_chunked_encoding()
        await answer.prepare(request)
        for number in range(5):
            await answer.write(f'{{"number": {number}}}\n'.encode())
            await asyncio.sleep(0.1)
        return answer

    async def echo_messages(request: web.Request) -> web.StreamResponse:
        socket_ = web.WebSocketResponse()
        await socket_.prepare(request)
        async for message in socket_:
            await socket_.send_str(f"echo {message.data}")
        return socket_

    async def run() -> None:
        application = web.Application()
        application.router.add_get("/stream", stream)
        application.router.add_get("/socket", echo_messages)
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        api.backend = runner.addresses[0][1]
        stop = asyncio.Event()
        ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(serve(target, port=0, on_ready=ready.set_result, stop=stop, log=log.append))
        url = f"http://127.0.0.1:{await ready}"
        loop = asyncio.get_running_loop()
        async with aiohttp.ClientSession() as session:
            came = []
            async with session.get(f"{url}/stream") as answer:
                async for line in answer.content:
                    came.append((json.loads(line)["number"], loop.time()))
            assert [number for number, _ in came] == list(range(5))
            assert all(later - earlier > 0.05 for (_, earlier), (_, later) in itertools.pairwise(came))
            async with session.ws_connect(f"{url}/socket") as socket_:
                for number in range(20):
                    await socket_.send_str(str(number))
                    assert await socket_.receive_str() == f"echo {number}"
        stop.set()
        await task
        await runner.cleanup()

    asyncio.run(run())


def run_serve(target: Target, *, seconds: float, log: list[str]) -> bool:
    """Serve for at most so long; True when the forward ended by itself."""

    async def limited() -> bool:
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(seconds, stop.set)
        await serve(target, port=0, on_ready=lambda port: None, stop=stop, log=log.append)
        return not stop.is_set()

    return asyncio.run(limited())


def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_forward, "_POLL_INTERVAL", 0.05)
    monkeypatch.setattr(port_forward, "_SHORTEST_POLL", 0.05)
    monkeypatch.setattr(port_forward, "_GONE_AFTER", 0.5)


def test_it_ends_when_the_stateful_set_is_gone(
    target: Target, api: FakeApiServer, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast(monkeypatch)
    threading.Timer(0.3, lambda: setattr(api, "stateful_set_exists", False)).start()
    assert run_serve(target, seconds=10, log=log)
    assert log == ["StatefulSet airflow is gone from namespace ns: ending"]


def test_it_outlives_a_stateful_set_that_is_made_anew(
    target: Target, api: FakeApiServer, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast(monkeypatch)
    threading.Timer(0.3, lambda: setattr(api, "stateful_set_exists", False)).start()
    threading.Timer(0.5, lambda: setattr(api, "stateful_set_exists", True)).start()
    assert not run_serve(target, seconds=1.5, log=log)


def test_somebody_else_s_404_is_not_an_answer_about_the_stateful_set(
    target: Target, api: FakeApiServer, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast(monkeypatch)
    api.stateful_set_exists = False
    api.not_found_body = "nothing here"
    assert not run_serve(target, seconds=1.0, log=log)


def test_without_a_stateful_set_it_does_not_start(target: Target, api: FakeApiServer) -> None:
    api.stateful_set_exists = False
    with pytest.raises(ForwardError, match="there is no StatefulSet airflow") as caught, forwarded(target):
        pass
    assert "deployer up" in caught.value.hint


def test_a_kubeconfig_without_the_context_is_an_error(target: Target) -> None:
    unknown = Target("unknown", "ns", "airflow", 8080, target.kubeconfig)
    with pytest.raises(ClusterError, match="Cannot use the context 'unknown'"), forwarded(unknown):
        pass


def test_it_listens_on_both_loopback_addresses_and_nowhere_else(target: Target, backend: Make, log: list[str]) -> None:
    backend(echo)

    async def run() -> None:
        stop = asyncio.Event()
        ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(serve(target, port=0, on_ready=ready.set_result, stop=stop, log=log.append))
        port = await ready
        for host in ("127.0.0.1", "::1") if socket.has_ipv6 else ("127.0.0.1",):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            writer.close()
            await writer.wait_closed()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.2", port)
        stop.set()
        await task

    asyncio.run(run())


@pytest.mark.parametrize("holder", ["127.0.0.1", "0.0.0.0", "::1"])  # noqa: S104
def test_a_taken_port_is_said_to_be_taken_and_by_whom(target: Target, holder: str, log: list[str]) -> None:
    family = socket.AF_INET6 if ":" in holder else socket.AF_INET
    with socket.create_server((holder, 0), family=family) as taken:
        port = taken.getsockname()[1]
        who = check_port_free("localhost", port)
        assert who is not None
        with pytest.raises(ForwardError, match=f"port {port} .* is taken by"):
            asyncio.run(serve(target, port=port, on_ready=lambda port: None, stop=asyncio.Event(), log=log.append))
        if Path("/proc/net/tcp").exists():
            assert who.endswith(f"(pid {os.getpid()})")
    assert check_port_free("localhost", port) is None


def test_an_address_of_another_machine_is_an_error(target: Target) -> None:
    with pytest.raises(ForwardError, match=r"Cannot listen on port 8080 of 192\.0\.2\.1"):
        check_port_free("192.0.2.1", 8080)


def test_nothing_is_left_after_the_block(target: Target, backend: Make) -> None:
    backend(echo)
    threads = threading.active_count()
    with forwarded(target) as port:
        connection = connect(port)
        connection.sendall(b"hello")
        assert connection.recv(5) == b"hello"
    with connection, contextlib.suppress(ConnectionResetError):
        assert connection.recv(1) == b""
    assert check_port_free("127.0.0.1", port) is None
    wait_until(lambda: threading.active_count() <= threads + 1)
