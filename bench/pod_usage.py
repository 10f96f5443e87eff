"""What a pod takes of its node, read from /proc and the node's cgroups: needs root on the node itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


def memory(uid: str) -> float:
    """Megabytes (10^6 bytes) of the pod with this UID: the proportional set sizes of all its processes.

    Source: `smaps_rollup` in proc(5).
    """
    kilobytes = 0
    for process, _ in _processes(uid):
        try:
            lines = (process / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kilobytes * 1024 / 1e6


def processor_seconds(uid: str) -> float:
    """Seconds of processor time that the pod with this UID has used, ended processes included.

    Raises:
        LookupError: no process of it is found, or the node keeps no such account.
    """
    for _, cgroups in _processes(uid):
        for line in cgroups:
            _, controllers, path = line.split(":", 2)
            pod = _path_to(path, uid)
            # Version 1 has a hierarchy for each controller, version 2 a single one (cgroups(7)).
            account = _CGROUPS / "cpuacct" / pod / "cpuacct.usage"
            if "cpuacct" in controllers.split(",") and account.is_file():
                return int(account.read_text()) / 1e9
            account = _CGROUPS / pod / "cpu.stat"
            if not controllers and account.is_file():
                return int(account.read_text().split()[1]) / 1e6
    raise LookupError(f"no processor account of pod {uid}")


class ProcessorMeter:
    """The share of a core that a pod takes, over windows of so many seconds.

    A window begins where the last one ended, so meters that are read in turn measure at the same time.
    """

    def __init__(self, uid: str, seconds: float) -> None:
        self._uid = uid
        self._seconds = seconds
        self._began = time.monotonic()
        self._used = processor_seconds(uid)

    def measure(self) -> float:
        """Percent of one core."""
        time.sleep(max(0.0, self._began + self._seconds - time.monotonic()))
        now, used = time.monotonic(), processor_seconds(self._uid)
        percent = 100 * (used - self._used) / (now - self._began)
        self._began, self._used = now, used
        return percent


def _processes(uid: str) -> Iterator[tuple[Path, list[str]]]:
    """The folders in /proc of the pod's processes, with their cgroups."""
    for process in _PROC.glob("[0-9]*"):
        try:
            cgroups = (process / "cgroup").read_text().splitlines()
        except OSError:
            continue
        if any(_path_to(line, uid) for line in cgroups):
            yield process, cgroups


def _path_to(path: str, uid: str) -> str:
    """The relative path up to the pod's own cgroup, empty where it is not of this pod."""
    parts = path.strip("/").split("/")
    for index, part in enumerate(parts):
        # The systemd driver writes underscores.
        if uid in part or uid.replace("-", "_") in part:
            return "/".join(parts[: index + 1])
    return ""
