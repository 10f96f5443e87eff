"""Running other programs: output to a log file, the last line as live detail, a failure as one clear error.

Each program runs in a session of its own, so that Ctrl-C reaches it only through `stop_all`, which ends its whole
process group; nothing is left running behind an interrupted `cluster up`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from airflow_deployer.errors import LocalClusterError
from airflow_deployer.progress import Step

# In the environment of every program started for the native cluster; its value is the state directory and what it is
# for. It is how processes are found again whose record was lost (kill -9 between start and record).
MARK = "AIRFLOW_DEPLOYER_NATIVE"
COMMAND = "command"

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
_INHERITED = ("HOME", "LANG", "SSL_CERT_FILE", "SSL_CERT_DIR", *PROXIES)
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin", "/bin")
_DETAIL_WIDTH = 100

_running: set[int] = set()
_lock = threading.Lock()
_stopped = threading.Event()


def search_path() -> str:
    """The caller's PATH and the directories of system programs, which a user's PATH may lack."""
    path = [part for part in os.environ.get("PATH", "").split(os.pathsep) if part]
    return os.pathsep.join([*path, *(part for part in _SBIN if part not in path)])


def environment(state: Path, part: str, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a program of ours: what it needs of the caller's, the mark, `extra`.

    The caller's whole environment is not handed on: it may hold secrets that do not belong into long-lived processes.
    """
    values = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    values["PATH"] = search_path()
    values.setdefault("HOME", "/root")
    values[MARK] = f"{state}:{part}"
    values.update(extra or {})
    return values


def _end_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def stop_all() -> None:
    """End every program that a thread of this process is running now, and let no further one start."""
    _stopped.set()
    with _lock:
        pids = list(_running)
    for pid in pids:
        _end_group(pid)


def allow() -> None:
    """Let programs run again after `stop_all`."""
    _stopped.clear()


def run(
    argv: Sequence[str | Path],
    *,
    action: str,
    state: Path,
    log: Path,
    step: Step | None = None,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 900,
    hint: str = "",
) -> str:
    """Run a program to its end and return what it printed (both streams, in order).

    Args:
        action: what it is for, as in "installing packages"; opens the error message.
        state: the cluster's state directory, for the mark.
        log: file that the output is appended to.
        step: shows the last line of output as its live detail.
        environ: additions to the environment.
        timeout: seconds after which it is ended.
        hint: what to do when it fails; by default to read `log`.

    Raises:
        LocalClusterError: it could not be started, failed, or took too long; carries the last lines of its output.
    """
    arguments = [str(argument) for argument in argv]
    if _stopped.is_set():
        raise LocalClusterError(f"{action}: interrupted")
    tail: deque[str] = deque(maxlen=15)
    lines: list[str] = []
    timed_out = threading.Event()
    with log.open("a", encoding="utf-8") as sink:
        sink.write(f"$ {' '.join(arguments)}\n")
        try:
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment(state, COMMAND, environ),
                cwd=cwd or "/",
                start_new_session=True,
                text=True,
                encoding="utf-8",
                errors="replace",
            )
        except OSError as error:
            raise LocalClusterError(
                f"{action} failed: cannot run {arguments[0]}: {error.strerror}", hint=hint
            ) from error
        with _lock:
            _running.add(process.pid)

        def expire() -> None:
            timed_out.set()
            _end_group(process.pid)

        timer = threading.Timer(timeout, expire)
        timer.daemon = True
        timer.start()
        try:
            with process:
                assert process.stdout is not None  # noqa: S101 - narrows the type; stdout=PIPE sets it
                for line in process.stdout:
                    sink.write(line)
                    lines.append(line)
                    text = line.strip()
                    if text:
                        tail.append(text)
                        if step is not None:
                            step.update(text[:_DETAIL_WIDTH])
        except BaseException:
            _end_group(process.pid)
            process.wait()
            raise
        finally:
            timer.cancel()
            with _lock:
                _running.discard(process.pid)
    if timed_out.is_set():
        raise LocalClusterError(
            f"{action} failed: {Path(arguments[0]).name} did not end within {timeout:.0f} s",
            hint=hint or f"Read {log}",
            details=list(tail),
        )
    if process.returncode != 0:
        raise LocalClusterError(
            f"{action} failed: {Path(arguments[0]).name} ended with exit code {process.returncode}",
            hint=hint or f"Read {log}",
            details=list(tail),
        )
    return "".join(lines)


def read(argv: Sequence[str | Path], *, action: str, state: Path, timeout: float = 30) -> str:
    """Run a short program and return its standard output.

    Raises:
        LocalClusterError: it could not be started, failed, or took longer than `timeout` seconds.
    """
    arguments = [str(argument) for argument in argv]
    try:
        done = subprocess.run(
            arguments,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment(state, COMMAND),
            cwd="/",
            check=False,
        )
    except OSError as error:
        raise LocalClusterError(f"{action} failed: cannot run {arguments[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise LocalClusterError(f"{action} failed: {arguments[0]} did not end within {timeout:.0f} s") from error
    if done.returncode != 0:
        raise LocalClusterError(
            f"{action} failed: {Path(arguments[0]).name} ended with exit code {done.returncode}",
            details=done.stderr.strip().splitlines()[-15:],
        )
    return done.stdout
