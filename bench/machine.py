"""The machine that measures, described: a figure means nothing without it."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

from airflow_deployer import __version__
from airflow_deployer.config import Airflow
from bench.programs import Kubectl, ProgramError, run

_VERSIONS: dict[str, Sequence[str]] = {
    "commit": ("git", "describe", "--always", "--dirty"),
    "docker": ("docker", "version", "--format", "{{.Server.Version}}"),
    "tilt": ("tilt", "version"),
    "skaffold": ("skaffold", "version"),
}


def describe(kubectl: Kubectl) -> dict[str, str]:
    """Name, value: processor, memory, kernel, versions, and what else the machine was doing."""
    versions = json.loads(kubectl("version", "--output", "json"))
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB",
        "load before": ", ".join(f"{load:.2f}" for load in os.getloadavg()) + " (1, 5 and 15 minutes)",
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "distribution": platform.freedesktop_os_release().get("PRETTY_NAME", "unknown"),
        "kubernetes": f"{versions['serverVersion']['gitVersion']} ({kubectl.context})",
        "kubectl": versions["clientVersion"]["gitVersion"],
        "python": platform.python_version(),
        "airflow": Airflow().version,
        "deployer": __version__,
    }
    for name, command in _VERSIONS.items():
        try:
            found[name] = run(command, folder=Path(__file__).parent).splitlines()[0]
        except (OSError, ProgramError, IndexError):
            continue
    return found


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
