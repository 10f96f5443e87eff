"""What parsing a DAG file is called in this image's Airflow: the part of its profile that is about DAG content.

Read from `profile.json`, which the build of the image writes; `Parsing` in `airflow_deployer/airflow_profiles.py` says
what a field means and has the values of each series.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airflow_deployer_pod.profile import PROFILE_FILE


@dataclass(frozen=True)
class Parsing:
    """Names, `module:attribute`, and settings of one series of Airflow; an empty name is of something it lacks."""

    series: str
    source: str
    dag_bag: str
    dag: str
    dag_context: str
    list_files: str
    might_contain_dag: str
    serialize: str
    error_log: str
    timeout_section: str
    without_database: Mapping[str, str]

    @classmethod
    def read(cls, path: Path = PROFILE_FILE) -> Parsing:
        """Read what the build wrote."""
        document = json.loads(path.read_text(encoding="utf-8"))
        return cls(series=document["series"], **document["parsing"])


def load(name: str) -> Any:
    """What `module:attribute` names; the attribute may have dots."""
    module, _, attributes = name.partition(":")
    found: Any = importlib.import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return found
