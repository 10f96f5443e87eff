"""From which version of the content a process imports the project's modules."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from airflow_deployer_pod.content_store import TOP_FOLDERS


def use_root(root: Path, content: Path) -> None:
    """Import the project's modules (`include.shop`, or `shop` in `dags/`) from one version, and from no other.

    Every other entry of `sys.path` through which `include` or `dags` of any version could be found goes: `include` is
    mostly a namespace package, which Python puts together from all entries that have a folder of that name. Programs
    that a task starts are given the same by PYTHONPATH.
    """
    first, folder = str(root), os.path.realpath(content)
    sys.path[:] = [first, *(entry for entry in sys.path if not _leads_to_content(entry, folder))]
    others = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    kept = [entry for entry in others if not _leads_to_content(entry, folder)]
    os.environ["PYTHONPATH"] = os.pathsep.join([first, *kept])
    importlib.invalidate_caches()


def use_version(root: Path, content: Path) -> None:
    """The same for an Airflow that does not put the DAG folder on `sys.path` itself when it imports a DAG file."""
    use_root(root, content)
    dags = str(root / "dags")
    if dags not in sys.path:
        sys.path.append(dags)


def _leads_to_content(entry: str, content: str) -> bool:
    """Whether modules of some version are found through an entry of `sys.path`."""
    if not entry:
        return False
    places = [entry, *(f"{entry}/{top}" for top in TOP_FOLDERS)]
    return any(f"{os.path.realpath(place)}/".startswith(f"{content}/") for place in places)
