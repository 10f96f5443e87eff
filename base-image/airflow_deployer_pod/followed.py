"""From when on the DAG processor has parsed nothing but one version: where Airflow's tables know of no versions.

The DAG processor writes it, in a file of this container; the content agent reads it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

FOLLOWED_FILE = Path("/run/airflow-deployer/followed.json")


class Followed(NamedTuple):
    """A version, and the time (seconds since 1970) after which nothing of an older one is stored."""

    version: str
    since: float


def write(followed: Followed, file: Path = FOLLOWED_FILE) -> None:
    """Tell that a version is followed."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(followed), encoding="utf-8")
    os.replace(new, file)  # noqa: PTH105 - Path.replace is the same


def read(file: Path = FOLLOWED_FILE) -> Followed | None:
    """What the DAG processor follows; None as long as it has not said so."""
    try:
        return Followed(*json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
