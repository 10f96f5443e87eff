"""The mounts below a directory of ours, and taking them away."""

from __future__ import annotations

import re
from pathlib import Path

from airflow_deployer.errors import LocalClusterError

from .commands import read
from .layout import Layout


def mount_points(mountinfo: str, directory: Path) -> list[Path]:
    """The mount points at or below `directory`, deepest and latest first, of a /proc/PID/mountinfo (proc(5))."""
    found = []
    for line in mountinfo.splitlines():
        fields = line.split()
        # Blanks and the like are written as octal escapes.
        point = Path(re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), fields[4]))
        if point == directory or directory in point.parents:
            found.append(point)
    return found[::-1]


def unmount_below(layout: Layout, directory: Path) -> None:
    """Unmount everything below `directory`; what is still in use goes as soon as it is not.

    Raises:
        LocalClusterError: something cannot be unmounted.
    """
    for point in mount_points(Path("/proc/self/mountinfo").read_text(), directory):
        try:
            read(["umount", point], action=f"unmounting {point}", state=layout.state)
        except LocalClusterError:
            read(["umount", "--lazy", point], action=f"unmounting {point}", state=layout.state)
