"""The cluster's long-lived processes: started detached, found again by pid and start time, ended exactly.

A pid alone says nothing: after a crash or a reboot it may belong to somebody else. A process is ours when its start
time (field 22 of /proc/PID/stat, clock ticks since boot) and the boot id are those recorded when it was started, or
when its environment carries our mark.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from airflow_deployer.errors import LocalClusterError

from .commands import MARK, environment
from .layout import Layout

_PROC = Path("/proc")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class ProcessSpec:
    """What a process is to be.

    Args:
        name: also the name of its record and its log.
        argv: program (absolute path) and arguments.
        environ: additions to the environment.
        inputs: files it reads at its start; a change of their content means a restart.
    """

    name: str
    argv: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict)
    inputs: tuple[Path, ...] = ()

    def fingerprint(self) -> str:
        """Changes whenever the running process must be replaced."""
        digest = hashlib.sha256(json.dumps([self.argv, sorted(self.environ.items())]).encode())
        for path in self.inputs:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class ProcessRecord:
    """A process that was started: `start_time` in clock ticks since the boot that `boot_id` names."""

    pid: int
    start_time: int
    boot_id: str
    fingerprint: str


def parse_start_time(stat: str) -> int | None:
    """The start time in a line of /proc/PID/stat, None for a zombie, which runs no more.

    The second field is the program's name in parentheses and may itself hold blanks and parentheses.
    """
    fields = stat[stat.rindex(")") + 2 :].split()
    if fields[0] in ("Z", "X"):
        return None
    return int(fields[19])


def start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None when there is none."""
    try:
        return parse_start_time((_PROC / str(pid) / "stat").read_text())
    except (OSError, ValueError):
        return None


def boot_id() -> str:
    """The kernel's name for this boot."""
    return _BOOT_ID.read_text().strip()


def is_running(record: ProcessRecord) -> bool:
    """Whether the recorded process, and not another one with its pid, still runs."""
    return record.boot_id == boot_id() and start_time(record.pid) == record.start_time


def _environ(pid: int) -> dict[str, str]:
    try:
        raw = (_PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return {}
    pairs = (entry.decode(errors="replace").partition("=") for entry in raw.split(b"\0") if entry)
    return {name: value for name, _, value in pairs}


def _program(pid: int) -> str:
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0", 1)[0].decode(errors="replace")
    except OSError:
        return ""


def root_is_overlay_in(mountinfo: str, directory: Path) -> bool:
    """Whether a process's root file system is an overlay with its writable layer below `directory` (proc(5))."""
    for line in mountinfo.splitlines():
        fields = line.split()
        if fields[4] == "/":
            return f"upperdir={directory}/" in fields[-1]
    return False


def in_containers(directory: Path) -> list[int]:
    """The processes in containers whose file systems lie below `directory`, whoever their parent is by now."""
    found = []
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if root_is_overlay_in((entry / "mountinfo").read_text(), directory):
                    found.append(int(entry.name))
    return found


def is_first_in_container(status: str) -> bool:
    """Whether a /proc/PID/status is that of a pid namespace's first process, seen from outside (`NSpid`, proc(5))."""
    for line in status.splitlines():
        if line.startswith("NSpid:"):
            ids = line.split()[1:]
            return len(ids) > 1 and ids[-1] == "1"
    return False


def end_containers(directory: Path, *, grace: float) -> None:
    """End the containers whose file systems lie below `directory`.

    SIGTERM goes to the first process of each, as from a container runtime: how the others end is its matter. After
    `grace` seconds all that is left is killed.
    """
    first = []
    for pid in in_containers(directory):
        with contextlib.suppress(OSError):
            if is_first_in_container((_PROC / str(pid) / "status").read_text()):
                first.append(pid)
    end(first, grace=grace)
    end(in_containers(directory), grace=0)


def end(pids: Iterable[int], *, grace: float, first: signal.Signals = signal.SIGTERM) -> None:
    """Send `first`, wait up to `grace` seconds for all of them to end, then SIGKILL.

    Each process is remembered by its start time, so a pid that is used again meanwhile is left alone.
    """
    known = {pid: started for pid in pids if (started := start_time(pid)) is not None}

    def alive() -> list[int]:
        return [pid for pid, started in known.items() if start_time(pid) == started]

    def send(number: signal.Signals) -> None:
        for pid in alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while alive() and time.monotonic() < deadline:
            time.sleep(0.02)

    if grace > 0:
        send(first)
        wait(grace)
    send(signal.SIGKILL)
    wait(5)


class ProcessTable:
    """The processes of one native cluster."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def _path(self, name: str) -> Path:
        return self._layout.processes / f"{name}.json"

    def log(self, name: str) -> Path:
        """Where the process prints."""
        return self._layout.logs / f"{name}.log"

    def record(self, name: str) -> ProcessRecord | None:
        """What was recorded when the process was last started, whether or not it still runs."""
        try:
            return ProcessRecord(**json.loads(self._path(name).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def pid(self, name: str) -> int | None:
        """The process's pid while it runs."""
        record = self.record(name)
        return record.pid if record is not None and is_running(record) else None

    def started(self, name: str) -> float:
        """When the running process was started, in seconds since the epoch; 0 when it does not run."""
        record = self.record(name)
        if record is None or not is_running(record):
            return 0
        since_boot = record.start_time / os.sysconf("SC_CLK_TCK")
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot

    def marked(self, part: str | None = None) -> list[int]:
        """The processes whose environment carries this cluster's mark (of one part, or of any), ourselves excepted."""
        prefix = f"{self._layout.state}:"
        found = []
        for entry in _PROC.iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                value = _environ(int(entry.name)).get(MARK, "")
                if value == f"{prefix}{part}" or (part is None and value.startswith(prefix)):
                    found.append(int(entry.name))
        return found

    def ensure(self, spec: ProcessSpec) -> bool:
        """Start the process unless exactly this one runs already; True when it was started.

        One that runs with other arguments or other input files is replaced.
        """
        fingerprint = spec.fingerprint()
        record = self.record(spec.name)
        if record is not None and is_running(record):
            if record.fingerprint == fingerprint:
                return False
            self.stop(spec.name)
        # Its own children carry the mark as well and may have to outlive it (containerd's shims): the program decides.
        end([pid for pid in self.marked(spec.name) if _program(pid) == spec.argv[0]], grace=5)
        self._start(spec, fingerprint)
        return True

    def _start(self, spec: ProcessSpec, fingerprint: str) -> None:
        log = self.log(spec.name)
        if log.exists() and log.stat().st_size > 20_000_000:
            log.replace(log.with_suffix(".log.1"))
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        # `env` only changes to / and then becomes the program: a daemon must not hold on to the caller's directory.
        # SIGPIPE is ignored in Python and would stay so in the program.
        pid = os.posix_spawn(
            "/usr/bin/env",
            ["env", "-C", "/", *spec.argv],
            environment(self._layout.state, spec.name, spec.environ),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
            setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGHUP],
        )
        record = {"pid": pid, "start_time": start_time(pid) or 0, "boot_id": boot_id(), "fingerprint": fingerprint}
        path = self._path(spec.name)
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(record))
        temporary.replace(path)

    def stop(self, name: str, *, grace: float = 15) -> None:
        """End the process and forget it: SIGTERM, after `grace` seconds SIGKILL."""
        record = self.record(name)
        if record is not None and is_running(record):
            end([record.pid], grace=grace)
        self._path(name).unlink(missing_ok=True)

    def last_lines(self, name: str, count: int = 12) -> list[str]:
        """The end of the process's log."""
        try:
            with self.log(name).open("rb") as stream:
                stream.seek(max(0, self.log(name).stat().st_size - 20_000))
                return stream.read().decode(errors="replace").splitlines()[-count:]
        except OSError:
            return []

    def wait(self, name: str, ready: Callable[[], bool], *, timeout: float, hint: str = "") -> None:
        """Wait until `ready` says so.

        Args:
            hint: what helps when it does not start; by default to read its log.

        Raises:
            LocalClusterError: the process ended meanwhile, or was not ready within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        hint = hint or f"Read {self.log(name)}, then run `deployer cluster up` again."
        while not ready():
            if self.pid(name) is None:
                raise LocalClusterError(
                    f"starting {name} failed: it ended at once",
                    hint=hint,
                    details=self.last_lines(name),
                )
            if time.monotonic() > deadline:
                raise LocalClusterError(
                    f"starting {name} failed: it is not ready after {timeout:.0f} s",
                    hint=hint,
                    details=self.last_lines(name),
                )
            time.sleep(0.05)

    def start_until_ready(
        self, spec: ProcessSpec, ready: Callable[[], bool], *, timeout: float, restarting_for: float
    ) -> None:
        """Start the process and wait until `ready` says so; one that ends by itself is started again, as by a
        service manager, for the first `restarting_for` seconds.

        Raises:
            LocalClusterError: the process ended after that, or was not ready within `timeout` seconds of a start.
        """
        deadline = time.monotonic() + restarting_for
        while True:
            self.ensure(spec)
            try:
                return self.wait(spec.name, ready, timeout=timeout)
            except LocalClusterError:
                if self.pid(spec.name) is not None or time.monotonic() > deadline:
                    raise
            time.sleep(0.5)
