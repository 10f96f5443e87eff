"""The port-forward that goes on in the background: a process of its own, found again by the next command.

`ensure` starts it as `python -m airflow_deployer.background_forward` in its own session with every descriptor
detached, and returns once it accepts connections. It leaves a state file and a bounded log in
`$XDG_STATE_HOME/airflow-deployer/forwards` (https://specifications.freedesktop.org/basedir-spec/latest/) and ends by
itself when its StatefulSet is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from airflow_deployer.errors import ForwardError
from airflow_deployer.port_forward import LOOPBACK, Target, check_port_free

_START_DEADLINE = 40.0
"""Seconds: a credential plugin and an API server that does not answer are waited for."""
_STOP_DEADLINE = 5.0
_LOCK_DEADLINE = _START_DEADLINE + 4 * _STOP_DEADLINE
_RELEASE_DEADLINE = 2.0
_LOG_LIMIT = 256 * 1024


@dataclass(frozen=True)
class ForwardState:
    """A forward that runs in the background, as its state file tells."""

    target: Target
    address: str
    port: int
    pid: int
    started: str
    """Which process had this `pid`, so that a later one of the same number is not taken for it."""

    @property
    def url(self) -> str:
        """Where Airflow answers."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"http://{host}:{self.port}"


def state_directory() -> Path:
    """Return where state files and logs are, below `$XDG_STATE_HOME` or `~/.local/state`."""
    home = os.environ.get("XDG_STATE_HOME", "")
    # The specification says to ignore a relative path.
    base = Path(home) if home.startswith("/") else Path.home() / ".local" / "state"
    return base / "airflow-deployer" / "forwards"


def log_file(target: Target) -> Path:
    """Return the log of the target's forward; it exists once one has been started."""
    return _path(target, "log")


def find(target: Target) -> ForwardState | None:
    """Return the running background forward of the target's deployment, whichever ports it joins, or None."""
    return _read_running(_path(target, "json"))


def port_holder(target: Target, port: int, address: str = LOOPBACK) -> str | None:
    """Tell who stands in the way of `ensure` with these arguments; None when nobody does.

    The deployment's own background forward never does: `ensure` keeps or replaces it.

    Raises:
        ForwardError: the port cannot be listened on for another reason than being taken.
    """
    holder = check_port_free(address, port)
    if holder is None:
        return None
    for state in _running():
        if state.port == port:
            own = _path(state.target, "json") == _path(target, "json")
            return None if own else f"the port-forward to {state.target} (pid {state.pid})"
    return holder


def ensure(target: Target, port: int, address: str = LOOPBACK) -> ForwardState:
    """Have a forward run in the background: keep the one that does just this, else replace or start it.

    Args:
        target: what the local port leads to.
        port: the local port, from 1 on.
        address: the local address to listen on.

    Raises:
        ForwardError: the port is taken, the forward failed to start (with its own reason), or it did not in time.
    """
    target = _absolute(target)
    with _locked(target):
        state = find(target)
        if state is not None:
            if (state.target, state.port, state.address) == (target, port, address) and _answers(state):
                return state
            _end(state)
        holder = port_holder(target, port, address)
        last = _read_state(_path(target, "json"))
        if last is not None and last.port == port:
            # A process counts as gone a moment before the kernel has closed its sockets.
            deadline = time.monotonic() + _RELEASE_DEADLINE
            while holder is not None and time.monotonic() < deadline:
                time.sleep(0.02)
                holder = port_holder(target, port, address)
        if holder is not None:
            raise ForwardError(
                f"Cannot start the port-forward: port {port} is taken by {holder}.",
                hint=f"end {holder}, or choose another local port with --port",
            )
        return _start(target, port, address)


def stop(target: Target) -> bool:
    """End the background forward of the target's deployment; False when none was running.

    Raises:
        ForwardError: the process cannot be ended.
    """
    with _locked(target):
        state = find(target)
        if state is not None:
            _end(state)
        _path(target, "json").unlink(missing_ok=True)
        return state is not None


# -- state ------------------------------------------------------------------------------------------------------


def _path(target: Target, suffix: str) -> Path:
    """One deployment has one forward, so the port and the kubeconfig are no part of the name."""
    words = (target.context, target.namespace, target.name)
    legible = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", word)[:40] for word in words)
    digest = hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]
    return state_directory() / f"{legible}-{digest}.{suffix}"


@contextlib.contextmanager
def _locked(target: Target) -> Iterator[None]:
    """Let one process at a time start or stop the deployment's forward."""
    try:
        state_directory().mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(_path(target, "lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ForwardError(f"Cannot keep the port-forward's state in {state_directory()}: {error.strerror}.") from error
    try:
        deadline = time.monotonic() + _LOCK_DEADLINE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ForwardError(
                        f"Cannot start or stop the port-forward to {target}: another command has been at it for "
                        f"{_LOCK_DEADLINE:.0f} s.",
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def _write_state(state: ForwardState) -> None:
    path = _path(state.target, "json")
    temporary = path.with_suffix(f".{state.pid}.tmp")
    temporary.touch(mode=0o600)
    temporary.write_text(json.dumps(asdict(state)), encoding="utf-8")
    temporary.replace(path)


def _read_state(path: Path) -> ForwardState | None:
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return ForwardState(**{**document, "target": Target(**document["target"])})
    except (OSError, ValueError, TypeError, KeyError):
        # Unreadable is as good as absent: it is written anew with the next start.
        return None


def _read_running(path: Path) -> ForwardState | None:
    state = _read_state(path)
    return state if state is not None and _identity(state.pid) == state.started else None


def _running() -> Iterator[ForwardState]:
    for path in state_directory().glob("*.json"):
        state = _read_running(path)
        if state is not None:
            yield state


def _identity(pid: int) -> str | None:
    """Name a process for good: its number comes again, its number with its start time and the boot does not.

    None when there is no such process, or only its remains that nobody has waited for.
    """
    try:
        # proc_pid_stat(5): the second field may hold blanks and brackets, so count from the last bracket on; the state
        # is field 3, the start time field 22.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return None if fields[0] in "ZX" else f"{boot}/{fields[19]}"
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    listed = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.split(maxsplit=1)
    return None if not listed or listed[0].startswith("Z") else listed[1].strip()


def _answers(state: ForwardState) -> bool:
    """Tell whether the forward accepts connections; it opens no stream for one that says nothing and leaves."""
    host = "127.0.0.1" if state.address == LOOPBACK else state.address
    try:
        socket.create_connection((host, state.port), timeout=1.0).close()
    except OSError:
        return False
    return not _is_stopped(state.pid)


def _is_stopped(pid: int) -> bool:
    """Tell whether a process is suspended (SIGSTOP): the kernel still accepts connections for it."""
    with contextlib.suppress(OSError):
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
            in "Tt"
        )
    return False


# -- start and end ------------------------------------------------------------------------------------------------


def _start(target: Target, port: int, address: str) -> ForwardState:
    request = json.dumps({"target": asdict(target), "port": port, "address": address})
    result, child_end = os.pipe()
    with os.fdopen(result, "rb") as pipe:
        try:
            with _open_log(target) as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "airflow_deployer.background_forward", str(child_end), request],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=_import_directory(),
                    pass_fds=(child_end,),
                    start_new_session=True,
                )
        except OSError as error:
            raise ForwardError(f"Cannot start the port-forward: {error}.") from error
        finally:
            os.close(child_end)
        # The process that was started only leaves the forward behind and is gone at once.
        answer = _receive_answer(pipe.fileno())
    if answer is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if answer is None:
        raise ForwardError(
            f"The port-forward to {target} was not ready after {_START_DEADLINE:.0f} s.",
            details=_last_lines(log_file(target)),
        )
    if not answer:
        raise ForwardError(
            f"The port-forward to {target} ended while it started.", details=_last_lines(log_file(target))
        )
    message = json.loads(answer)
    if "error" in message:
        raise ForwardError(message["error"], hint=message["hint"])
    state = find(target)
    if state is None:
        raise ForwardError(
            f"The port-forward to {target} ended as soon as it was ready.", details=_last_lines(log_file(target))
        )
    return state


def _receive_answer(descriptor: int) -> bytes | None:
    """Read what the forward says about its start: empty when it died, None when it said nothing in time."""
    deadline = time.monotonic() + _START_DEADLINE
    answer = b""
    while not answer.endswith(b"\n"):
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        part = os.read(descriptor, 4096)
        if not part:
            return b""
        answer += part
    return answer


def _absolute(target: Target) -> Target:
    """Make the kubeconfig's paths independent of the working directory, which the forward does not keep."""
    if target.kubeconfig is None:
        return target
    paths = (str(Path(part).expanduser().absolute()) for part in target.kubeconfig.split(os.pathsep) if part)
    return Target(target.context, target.namespace, target.name, target.port, os.pathsep.join(paths))


def _import_directory() -> Path:
    """Return the directory to start in: an installed package is found from anywhere, a checkout from its top."""
    top = Path(__file__).resolve().parents[1]
    return Path("/") if top.name in ("site-packages", "dist-packages") else top


def _open_log(target: Target) -> BinaryIO:
    # Appending, so that every writer goes on at the end after the log was cut.
    descriptor = os.open(log_file(target), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    return os.fdopen(descriptor, "ab", buffering=0)


def _last_lines(log: Path) -> list[str]:
    try:
        return log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
    except OSError:
        return []


def _end(state: ForwardState) -> None:
    """End the process and wait until it is gone, and its port free.

    Raises:
        ForwardError: it belongs to somebody else, or outlives SIGKILL.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            _signal(state, number)
            # A suspended process hears nothing else before it goes on.
            _signal(state, signal.SIGCONT)
        except ProcessLookupError:
            return
        except PermissionError as error:
            raise ForwardError(
                f"Cannot end the port-forward to {state.target}: process {state.pid} belongs to another user."
            ) from error
        deadline = time.monotonic() + _STOP_DEADLINE
        while time.monotonic() < deadline:
            if _identity(state.pid) != state.started:
                return
            time.sleep(0.02)
    raise ForwardError(f"Cannot end the port-forward to {state.target}: process {state.pid} does not end.")


def _signal(state: ForwardState, number: signal.Signals) -> None:
    """Send a signal to this very process: never to a later one that was given the same number."""
    if not hasattr(os, "pidfd_open"):
        if _identity(state.pid) != state.started:
            raise ProcessLookupError
        os.kill(state.pid, number)
        return
    # The descriptor holds on to the process, so that the check still counts when the signal is sent.
    process = os.pidfd_open(state.pid)
    try:
        if _identity(state.pid) != state.started:
            raise ProcessLookupError
        signal.pidfd_send_signal(process, number)
    finally:
        os.close(process)


# -- in the background ----------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """Run the forward in the process that `ensure` started: the descriptor to answer on, and the request as JSON."""
    answer_to = int(arguments[0])
    # The forward must be nobody's child: whoever started it need not wait for its end.
    if os.fork():
        os._exit(0)
    os.chdir("/")
    request = json.loads(arguments[1])
    return _run(Target(**request["target"]), request["port"], request["address"], answer_to)


def _run(target: Target, port: int, address: str, answer_to: int) -> int:
    import asyncio

    from airflow_deployer.port_forward import serve

    state = ForwardState(target, address, port, os.getpid(), started=str(_identity(os.getpid())))

    def answer(message: dict[str, str]) -> None:
        with os.fdopen(answer_to, "wb", buffering=0) as pipe, contextlib.suppress(BrokenPipeError):
            pipe.write(json.dumps(message).encode() + b"\n")

    def ready(_: int) -> None:
        _write_state(state)
        log(f"forwarding {address}:{port} to {target}, pid {state.pid}")
        answer({})

    async def forward() -> None:
        end = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, end.set)
        await serve(target, address=address, port=port, on_ready=ready, stop=end, log=log)

    log = _bounded_log()
    try:
        asyncio.run(forward())
    except ForwardError as error:
        log(error.message)
        answer({"error": error.message, "hint": error.hint})
        return 1
    finally:
        path = _path(target, "json")
        left = _read_state(path)
        if left is not None and left.pid == state.pid:
            path.unlink(missing_ok=True)
    log("ended")
    return 0


def _bounded_log() -> Callable[[str], None]:
    """Return a function that writes a line with the time to standard output, which is the log file."""

    def log(line: str) -> None:
        with contextlib.suppress(OSError):
            if os.fstat(1).st_size > _LOG_LIMIT:
                os.ftruncate(1, 0)
            os.write(1, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n".encode(errors="replace"))

    return log


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
