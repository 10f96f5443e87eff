"""The forking parent with small functions in the place of Airflow's; each test is the supervisor that it serves."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from airflow_deployer_pod.parent import Link, unsafe_to_fork

from tests.unit.base_image.conftest import POD_PACKAGE

PR_SET_CHILD_SUBREAPER = 36

FUNCTIONS = """
import atexit, os, random, signal, socket, sys, threading, time
IMPORTED_BY = os.getpid()
atexit.register(lambda: print("exit function", flush=True))
def show():
    print(os.getpid() == IMPORTED_BY, sys.argv, os.getsid(0) == os.getpid(), os.isatty(0), random.random(), flush=True)
    print(sorted(os.readlink(f"/proc/self/fd/{entry}").partition(":")[0] for entry in os.listdir("/proc/self/fd")
          if os.path.exists(f"/proc/self/fd/{entry}")), file=sys.stderr, flush=True)
    print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL)
def number():
    return 7
def text():
    sys.exit("no good")
def nothing():
    sys.exit()
def broken():
    raise ValueError("oh dear")
def threads():
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread done", flush=True))).start()
def forever():
    os.write(1, b"on and on")
    time.sleep(60)
def answer(connection):
    request = connection.recv(100)
    if request == b"hang":
        time.sleep(60)
    connection.sendall(b"answer to " + request)
"""

DRIVER = """
import socket, sys
from pathlib import Path
from airflow_deployer_pod.parent import Parent
Parent(socket.socket(fileno=int(sys.argv[2])), Path(sys.argv[1]), FIRST, REST, "functions:answer").run()
print("the supervisor is gone", flush=True)
"""


class Served:
    """A running parent, the link to it, and what it says."""

    def __init__(self, folder: Path, first: list[str], rest: list[str]) -> None:
        (folder / "functions.py").write_text(FUNCTIONS)
        (folder / "slow.py").write_text("import time; time.sleep(1)")
        (folder / "threads.py").write_text(
            "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
        )
        (folder / "connects.py").write_text("import socket; kept = socket.socket()")
        self.check_socket = folder / "check.sock"
        self.link = Link()
        self.pids: list[int] = []
        driver = DRIVER.replace("FIRST", repr(first)).replace("REST", repr(rest))
        with self.link.parents_end() as descriptor:
            self.process = subprocess.Popen(
                [sys.executable, "-c", driver, self.check_socket, str(descriptor)],
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": f"{POD_PACKAGE.parent}:{folder}", "PYTHONDONTWRITEBYTECODE": "1"},
            )

    def hear(self) -> list[dict[str, Any]] | None:
        """What comes next, or None at the parent's end."""
        assert select.select([self.link.fileno()], [], [], 10)[0], "the parent says nothing"
        return self.link.receive()

    def hear_one(self) -> dict[str, Any]:
        """The next message, which must be the only one."""
        messages = self.hear()
        assert messages is not None
        (message,) = messages
        return message

    def begin(self, function: str, *argv: str) -> tuple[int, int]:
        """Have a process started; return its id and the descriptor to read its output from."""
        reader, writer = os.pipe()
        self.link.start("some", f"functions:{function}", argv or ("program",), writer)
        os.close(writer)
        message = self.hear_one()
        assert message == {"event": "started", "component": "some", "pid": message["pid"]}
        self.pids.append(message["pid"])
        return message["pid"], reader

    def run(self, function: str, *argv: str) -> tuple[int, str]:
        """Start a process, wait for its end; return the exit code and the output."""
        pid, reader = self.begin(function, *argv)
        with os.fdopen(reader) as stream:
            output = stream.read()
        # It is a child of ours, not of the parent's.
        _, status = os.waitpid(pid, 0)
        self.pids.remove(pid)
        return os.waitstatus_to_exitcode(status), output

    def check(self, request: bytes) -> socket.socket:
        """Ask for a check; return the connection."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(10)
        connection.connect(str(self.check_socket))
        connection.sendall(request)
        return connection

    def children(self) -> list[int]:
        """The processes of its checks."""
        return [
            int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]

    def end(self) -> str:
        """Wait for the end of the parent; return what it wrote."""
        output: str = self.process.communicate(timeout=10)[0].decode()
        return output


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Any]:
    """Make parents that import what a test names; this process adopts what they fork, as the supervisor does."""
    served: list[Served] = []
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def begin(first: tuple[str, ...] = ("functions",), rest: tuple[str, ...] = ("json",)) -> Served:
        served.append(Served(tmp_path, list(first), list(rest)))
        return served[-1]

    yield begin
    for one in served:
        checks = one.children() if one.process.poll() is None else []
        one.link.close()
        one.process.kill()
        for pid in checks:
            with contextlib.suppress(ProcessLookupError):  # one that ended meanwhile
                os.kill(pid, signal.SIGKILL)
        one.process.communicate()
        for pid in one.pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture
def parent(make: Any) -> Served:
    """A parent that is ready."""
    one: Served = make()
    assert one.hear_one()["event"] == "ready"
    return one


def test_what_is_forked_is_a_process_of_its_own(parent: Served) -> None:
    code, output = parent.run("show", "airflow", "scheduler", "--once")
    assert code == 0
    shown, descriptors, signals, last = output.splitlines()
    assert shown.startswith("False ['airflow', 'scheduler', '--once'] True False ")
    # Nothing of the parent's stays open: no socket, and standard input is empty.
    assert descriptors == "['/dev/null', 'pipe', 'pipe']"
    assert signals == "True True"
    assert last == "exit function"
    # Random numbers are not those of the process before.
    assert parent.run("show")[1].partition("\n")[0].split()[-1] != shown.split()[-1]


@pytest.mark.parametrize(
    ("function", "code", "output"),
    [
        ("number", 7, ""),
        ("text", 1, "no good"),
        ("nothing", 0, ""),
        ("broken", 1, "ValueError: oh dear"),
        ("threads", 0, "thread done"),
        ("missing", 1, "has no attribute 'missing'"),
    ],
)
def test_a_process_ends_as_a_program_would(parent: Served, function: str, code: int, output: str) -> None:
    ended, text = parent.run(function)
    assert ended == code
    assert output in text
    assert text.endswith("exit function\n")


def test_a_module_sees_its_arguments_as_if_it_were_run_by_its_name(parent: Served) -> None:
    assert parent.run("show", "python", "-m", "some.module", "--one")[1].startswith("False ['some.module', '--one'] ")


def test_a_signal_reaches_what_was_forked(parent: Served) -> None:
    pid, reader = parent.begin("forever")
    assert os.read(reader, 100) == b"on and on"
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
    parent.pids.remove(pid)
    os.close(reader)


def test_a_process_is_forked_before_all_is_imported(make: Any) -> None:
    one = make(rest=("json", "slow"))
    assert one.run("number")[0] == 7
    assert one.hear_one()["event"] == "ready"


@pytest.mark.parametrize(("module", "cause"), [("threads", "started 1 threads"), ("connects", "opened a connection")])
def test_a_process_that_must_not_be_forked_says_so_and_ends(make: Any, module: str, cause: str) -> None:
    one = make(rest=(module,))
    message = one.hear_one()
    assert message["event"] == "unsafe"
    assert cause in message["cause"]
    assert one.hear() is None
    assert not one.check_socket.exists()


def test_the_parent_ends_with_the_supervisor(parent: Served) -> None:
    parent.link.close()
    assert parent.end() == "the supervisor is gone\nexit function\n"


def test_a_dead_parent_is_noticed(parent: Served) -> None:
    pid, reader = parent.begin("forever")
    parent.process.kill()
    assert parent.hear() is None
    # What it has forked goes on.
    assert os.read(reader, 100) == b"on and on"
    os.kill(pid, 0)
    os.close(reader)


def test_checks_are_answered_beside_one_that_hangs(parent: Served) -> None:
    assert parent.check_socket.stat().st_mode & 0o777 == 0o600
    with parent.check(b"hang"):
        for number in range(3):
            with parent.check(b"%d" % number) as connection:
                assert connection.recv(100) == b"answer to %d" % number
                assert connection.recv(100) == b""
        assert parent.run("number")[0] == 7


def test_the_children_of_checks_are_collected(parent: Served) -> None:
    with parent.check(b"1") as connection:
        assert connection.recv(100)
    deadline = time.monotonic() + 5
    while parent.children() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert parent.children() == []


def test_threads_and_connections_are_seen_in_proc(tmp_path: Path) -> None:
    for folder in ("task/1", "fd"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "fd" / "1").symlink_to("/dev/null")
    (tmp_path / "fd" / "3").symlink_to("socket:[77]")
    assert unsafe_to_fork({3}, tmp_path) is None
    assert "connection" in str(unsafe_to_fork(set(), tmp_path))
    (tmp_path / "task" / "2").mkdir()
    assert "started 1 threads" in str(unsafe_to_fork({3}, tmp_path))


def test_a_command_carries_its_descriptor() -> None:
    link = Link()
    with link.parents_end() as descriptor:
        other = socket.socket(fileno=os.dup(descriptor))
    reader, writer = os.pipe()
    link.start("some", "module:function", ("a", "b"), writer)
    os.close(writer)
    data, descriptors, _, _ = socket.recv_fds(other, 1000, 1)
    assert json.loads(data) == {"component": "some", "entry": "module:function", "argv": ["a", "b"]}
    os.write(descriptors[0], b"x")
    assert os.read(reader, 1) == b"x"
    other.close()
    os.close(descriptors[0])
    os.close(reader)
    assert link.receive() is None
    link.close()
