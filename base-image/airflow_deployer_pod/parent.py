"""Import Airflow once and fork each of its processes from there: no start costs an import, and the memory is shared.

The supervisor starts this process first and tells it over a socket, which it inherits, what to start (`Link` is the
supervisor's end). What is started is forked twice, so that it is handed to the supervisor, which then signals and reaps
it like a process that it has spawned itself. The same parent answers on a unix socket of its own: for each connection
it forks a child that checks staged DAG files (`import_check.answer`), warm, without an import of Airflow.

Forking is safe only in a process without threads and without connections. This one imports modules and does nothing
else: no plugin, no DAG, no query. It looks at itself before it says that it is ready, and gives up where that does not
hold; the supervisor then spawns each process as if there were no parent. Python's `random`, OpenSSL and Airflow's own
connection pools reset themselves in a forked child (`os.register_at_fork`), and the pools are empty anyway.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from airflow_deployer_pod.profile import Profile

CHECK_SOCKET = Path("/run/airflow-deployer/check.sock")

_REAP_SECONDS = 1.0
_MESSAGE_BYTES = 65536


class Link:
    """The supervisor's end of the socket to the parent: what to start goes out, what was started comes back."""

    def __init__(self) -> None:
        self._socket, self._other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._socket.fileno()

    @contextlib.contextmanager
    def parents_end(self) -> Iterator[int]:
        """The descriptor that the parent inherits; closed here afterwards, so that its end is seen."""
        with self._other:
            yield self._other.fileno()

    def start(self, component: str, entry: str, argv: Sequence[str], output: int) -> None:
        """Ask for a process; `{"event": "started"}` or `{"event": "failed"}` answers.

        Args:
            component: what the answer calls it.
            entry: `module:function`, called without arguments.
            argv: the command that does the same, which it sees as `sys.argv` and is called in the list of processes.
            output: the descriptor that becomes its standard output and error output.

        Raises:
            OSError: the parent is gone.
        """
        command = {"component": component, "entry": entry, "argv": list(argv)}
        socket.send_fds(self._socket, [json.dumps(command).encode()], [output])

    def receive(self) -> list[dict[str, Any]] | None:
        """What has arrived; None once the parent is gone and everything it said was read."""
        messages: list[dict[str, Any]] = []
        while True:
            try:
                data = self._socket.recv(_MESSAGE_BYTES)
            except BlockingIOError:
                return messages
            except ConnectionError:
                data = b""
            if not data:
                return messages or None
            messages.append(json.loads(data))

    def close(self) -> None:
        """Close this end; a parent that still lives ends by that."""
        self._socket.close()


class Parent:
    """The process that forks the others.

    Args:
        commands: the inherited socket.
        check_socket: where staged files are checked.
        first_imports: modules that must be there before anything is forked.
        imports: modules that are imported next, while what is asked for is forked already.
        answer: checks what one connection asks for, `module:function`.
    """

    def __init__(
        self,
        commands: socket.socket,
        check_socket: Path = CHECK_SOCKET,
        first_imports: Collection[str] = (),
        imports: Collection[str] = (),
        answer: str = "airflow_deployer_pod.import_check:answer",
    ) -> None:
        self._commands = commands
        self._check_socket = check_socket
        self._first_imports = first_imports
        self._imports = imports
        self._answer = answer
        self._listener: socket.socket | None = None
        self._checks: set[int] = set()

    def run(self) -> None:
        """Import, then fork what is asked for until the supervisor is gone."""
        begin = time.monotonic()
        # Nothing that is imported becomes garbage, so looking for some is a tenth of the time.
        gc.disable()
        for module in self._first_imports:
            importlib.import_module(module)
        for module in self._imports:
            if not self._serve(0.0):
                return
            importlib.import_module(module)
        if cause := unsafe_to_fork({self._commands.fileno()}):
            self._send(event="unsafe", cause=cause)
            return
        # A collection in a child would write to every object's header, and thereby copy the memory it shares.
        gc.collect()
        gc.freeze()
        self._listen()
        self._send(event="ready", seconds=round(time.monotonic() - begin, 2))
        while self._serve(_REAP_SECONDS if self._checks else None):
            pass

    def _listen(self) -> None:
        self._check_socket.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            listener.bind(str(self._check_socket))
        finally:
            os.umask(mask)
        listener.listen()
        listener.setblocking(False)
        self._listener = listener

    def _serve(self, seconds: float | None) -> bool:
        """Do what is asked for within `seconds`; False once the supervisor is gone."""
        waiting = [self._commands, *([self._listener] if self._listener else [])]
        readable, _, _ = select.select(waiting, [], [], seconds)
        for pid in list(self._checks):
            if os.waitpid(pid, os.WNOHANG)[0]:
                self._checks.discard(pid)
        if self._listener in readable:
            self._check()
        return self._commands not in readable or self._start()

    def _start(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._commands, _MESSAGE_BYTES, 1)
        if not data:
            return False
        command = json.loads(data)
        (output,) = descriptors
        try:
            between = os.fork()
            if between == 0:
                # This one ends at once, and its child becomes one of the supervisor: PID 1, or the nearest subreaper.
                try:
                    if os.fork():
                        os._exit(0)
                except BaseException:
                    os._exit(1)
                self._become(command, output)
            if os.waitpid(between, 0)[1]:
                raise OSError("the second fork failed")
        except OSError as error:
            self._send(event="failed", component=command["component"], cause=str(error))
        finally:
            os.close(output)
        return True

    def _become(self, command: dict[str, Any], output: int) -> NoReturn:
        """In the child: be the process that was asked for."""

        def process() -> None:
            # As posix_spawn would have it: a session of its own, and nothing of the parent's but its memory.
            os.setsid()
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.close(output)
            self._send(event="started", component=command["component"], pid=os.getpid())
            self._let_go()
            argv = command["argv"]
            # What the interpreter makes of `python -m module ...`.
            sys.argv = argv[2:] if argv[1:2] == ["-m"] else argv
            set_title(" ".join(argv))
            sys.exit(load(command["entry"])())

        run_and_exit(process)

    def _check(self) -> None:
        assert self._listener is not None  # noqa: S101 - it was readable
        try:
            connection, _ = self._listener.accept()
        except OSError:  # whoever called has gone
            return
        with connection:
            try:
                pid = os.fork()
            except OSError as error:
                print(f"No process for a check: {error}", flush=True)
                return
            if pid == 0:

                def process() -> None:
                    os.setsid()
                    self._let_go()
                    connection.setblocking(True)
                    set_title("airflow-deployer check")
                    load(self._answer)(connection)

                run_and_exit(process)
            self._checks.add(pid)

    def _let_go(self) -> None:
        self._commands.close()
        if self._listener:
            self._listener.close()
        gc.enable()

    def _send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # the supervisor is gone, and with it everything
            self._commands.send(json.dumps(message).encode())


def load(entry: str) -> Callable[..., Any]:
    """The function that `module:function` names."""
    module, _, function = entry.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def run_and_exit(function: Callable[[], object]) -> NoReturn:
    """Run the function and end this process as the interpreter would, without taking a million objects apart first."""
    code = 1
    try:
        try:
            function()
            code = 0
        except SystemExit as error:
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        # What a forked `multiprocessing.Process` does at its end: join the threads (and first tell the idle ones of
        # `concurrent.futures` to end, which no public function does), then the exit functions.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
    finally:
        os._exit(code)


def unsafe_to_fork(expected: Collection[int], proc: Path = Path("/proc/self")) -> str | None:
    """Say why this process must not be forked; None when it may.

    Args:
        expected: descriptors of sockets that may be open.
        proc: this process in the proc file system (proc(5)).
    """
    threads = sum(1 for _ in (proc / "task").iterdir())
    if threads > 1:
        return f"the import of Airflow has started {threads - 1} threads"
    for entry in (proc / "fd").iterdir():
        with contextlib.suppress(OSError):
            if entry.readlink().name.startswith("socket:") and int(entry.name) not in expected:
                return "the import of Airflow has opened a connection"
    return None


def set_title(title: str) -> None:
    """Set what the list of processes shows, by a package that comes with Airflow; without it nothing happens."""
    with contextlib.suppress(ImportError):
        importlib.import_module("setproctitle").setproctitle(title)


def main(descriptor: int) -> None:
    """Run the parent with the inherited socket `descriptor`."""
    set_title("airflow-deployer parent")
    profile = Profile.read()
    Parent(socket.socket(fileno=descriptor), CHECK_SOCKET, profile.first_imports, profile.imports).run()


if __name__ == "__main__":
    main(int(sys.argv[1]))
