"""The background forward: a real process against a stand-in API server, started, kept, replaced and ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from airflow_deployer import background_forward
from airflow_deployer.background_forward import ensure, find, log_file, port_holder, state_directory, stop
from airflow_deployer.errors import ForwardError
from airflow_deployer.port_forward import Target
from tests.unit.fake_api_server import FakeApiServer


@pytest.fixture
def api() -> Iterator[FakeApiServer]:
    with FakeApiServer() as server, socket.create_server(("127.0.0.1", 0)) as backend:
        server.backend = backend.getsockname()[1]

        def greet() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = backend.accept()
                    with connection:
                        connection.sendall(b"hello")

        threading.Thread(target=greet, daemon=True).start()
        yield server
        with contextlib.suppress(OSError):
            backend.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def target(api: FakeApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    kubeconfig = api.write_kubeconfig(tmp_path / "kubeconfig", token="secret-token")
    target = Target("fake", "ns", "airflow", 8080, kubeconfig)
    yield target
    stop(target)


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def greeting(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        return connection.recv(5)


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def test_it_serves_once_ensure_returns_and_stops_when_told(target: Target, port: int) -> None:
    state = ensure(target, port)
    assert greeting(port) == b"hello"
    assert find(target) == state
    assert state.url == f"http://localhost:{port}"
    assert stop(target)
    with pytest.raises(ConnectionRefusedError):
        greeting(port)
    assert find(target) is None
    assert not stop(target)


def test_ensure_keeps_the_one_that_runs(target: Target, port: int) -> None:
    assert ensure(target, port) == ensure(target, port)


def test_another_port_replaces_it(target: Target, port: int) -> None:
    first = ensure(target, port)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        other = int(listener.getsockname()[1])
    second = ensure(target, other)
    assert second.pid != first.pid
    assert greeting(other) == b"hello"
    with pytest.raises(ConnectionRefusedError):
        greeting(port)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_suspended_one_is_replaced(target: Target, port: int, number: signal.Signals) -> None:
    first = ensure(target, port)
    os.kill(first.pid, number)
    # Signals take effect a moment after they were sent.
    wait_until(lambda: find(target) is None or background_forward._is_stopped(first.pid))
    second = ensure(target, port)
    assert second.pid != first.pid
    assert greeting(port) == b"hello"


def test_it_is_of_a_session_of_its_own_and_holds_none_of_the_caller_s_descriptors(target: Target, port: int) -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    state = ensure(target, port)
    os.close(write)
    # Held open anywhere else, the pipe would not be at its end: this is `deployer up | tee`.
    assert os.read(read, 1) == b""
    os.close(read)
    assert os.getsid(state.pid) not in (os.getsid(0), 0)
    if Path("/proc").is_dir():
        opened = {str(link.readlink()) for link in Path(f"/proc/{state.pid}/fd").iterdir()}
        assert opened >= {"/dev/null", str(log_file(target))}
        assert Path(f"/proc/{state.pid}/cwd").resolve() == Path("/")


def test_a_pipeline_around_the_command_that_starts_it_ends(target: Target, port: int) -> None:
    program = (
        "import sys\n"
        "from airflow_deployer.background_forward import ensure\n"
        "from airflow_deployer.port_forward import Target\n"
        f"ensure({target!r}, {port})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert greeting(port) == b"hello"


def test_it_ends_by_itself_when_the_stateful_set_is_gone(target: Target, port: int, api: FakeApiServer) -> None:
    ensure(target, port)
    api.stateful_set_exists = False
    api.pod_exists = False
    with contextlib.suppress(ConnectionResetError):
        greeting(port)
    wait_until(lambda: find(target) is None)
    wait_until(lambda: not list(state_directory().glob("*.json")))
    assert "is gone from namespace ns" in log_file(target).read_text()


def test_its_own_reason_for_not_starting_is_told(target: Target, port: int, api: FakeApiServer) -> None:
    api.stateful_set_exists = False
    with pytest.raises(ForwardError, match="there is no StatefulSet airflow"):
        ensure(target, port)
    assert find(target) is None


def test_a_crash_while_starting_is_told_with_its_last_lines(
    target: Target, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background_forward.sys, "executable", "/bin/false")  # type: ignore[attr-defined]
    with pytest.raises(ForwardError, match="ended while it started"):
        ensure(target, port)


def test_a_start_that_takes_too_long_is_ended(target: Target, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_forward, "_START_DEADLINE", 0.01)
    with pytest.raises(ForwardError, match="was not ready"):
        ensure(target, port)
    time.sleep(0.2)
    assert find(target) is None


def test_a_taken_port_is_told_before_anything_is_started(target: Target, port: int) -> None:
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ForwardError, match=f"port {port} is taken by"):
        ensure(target, port)
    assert not log_file(target).exists()


def test_its_own_forward_does_not_stand_in_the_way_another_s_does(target: Target, port: int) -> None:
    ensure(target, port)
    assert port_holder(target, port) is None
    holder = port_holder(replace(target, namespace="other"), port)
    assert holder is not None
    assert holder.startswith("the port-forward to port 8080 of pod airflow-0 in namespace ns")


def test_a_process_that_was_given_the_same_number_is_never_ended(target: Target, port: int) -> None:
    state = ensure(target, port)
    os.kill(state.pid, signal.SIGKILL)
    wait_until(lambda: find(target) is None)
    with subprocess.Popen(["sleep", "60"]) as innocent:
        (file,) = state_directory().glob("*.json")
        document = json.loads(file.read_text())
        document["pid"] = innocent.pid
        file.write_text(json.dumps(document))
        assert find(target) is None
        assert not stop(target)
        with pytest.raises(ProcessLookupError):
            background_forward._signal(replace(state, pid=innocent.pid), signal.SIGKILL)
        assert innocent.poll() is None
        innocent.terminate()


def test_a_damaged_state_file_counts_as_none(target: Target, port: int) -> None:
    state_directory().mkdir(parents=True)
    for content in ("", "{", "[]", '{"target": 1}', '{"pid": 1}'):
        background_forward._path(target, "json").write_text(content)
        assert find(target) is None
    assert greeting(ensure(target, port).port) == b"hello"


def test_what_it_leaves_is_the_owner_s_alone_and_holds_no_secret(target: Target, port: int) -> None:
    state = ensure(target, port)
    greeting(port)
    assert state_directory().stat().st_mode & 0o777 == 0o700
    for file in state_directory().iterdir():
        assert file.stat().st_mode & 0o077 == 0, file
        assert "secret-token" not in file.read_text()
    command = Path(f"/proc/{state.pid}/cmdline")
    if command.exists():
        assert b"secret-token" not in command.read_bytes()


def test_the_log_is_cut_when_it_grows_too_long(tmp_path: Path) -> None:
    program = (
        "from airflow_deployer import background_forward\n"
        "background_forward._LOG_LIMIT = 2000\n"
        "log = background_forward._bounded_log()\n"
        "for number in range(100): log(f'line {number}' + 'x' * 80)\n"
    )
    log = tmp_path / "log"
    with log.open("ab") as file:
        subprocess.run([sys.executable, "-c", program], stdout=file, check=True)
    assert log.stat().st_size < 2200
    assert "line 99" in log.read_text()
