"""What this image's Airflow needs of the pod: its processes, its health, its login.

Read from `profile.json`, which the build of the image writes. What a field means and why it has its value is in the
table of all series that the file is made from, `airflow_deployer/airflow_profiles.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROFILE_FILE = Path(__file__).parents[1] / "profile.json"


@dataclass(frozen=True)
class Component:
    """One of Airflow's processes and how patiently it is stopped.

    Args:
        name: prefix of its log lines.
        argv: the command.
        entry: the same as a function, `module:function`, for a process that is forked and reads `argv` from `sys.argv`.
        kill_seconds: send SIGKILL after this time. The scheduler's is `Settings.stop_seconds` instead.
        stop_children: send SIGTERM to its children too.
    """

    name: str
    argv: tuple[str, ...]
    entry: str = "airflow.__main__:main"
    kill_seconds: float = 5.0
    stop_children: bool = False

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Component:
        """Read one process of the profile: a command of `airflow`, or a module of this package."""
        command = tuple(document["command"])
        module = document["module"]
        more = {
            "name": document["name"],
            "kill_seconds": document["kill_seconds"],
            "stop_children": document["stop_children"],
        }
        if module:
            return cls(argv=(sys.executable, "-m", module, *command), entry=f"{module}:{document['function']}", **more)
        return cls(argv=("airflow", *command), **more)


@dataclass(frozen=True)
class Profile:
    """What differs between the series of Airflow in the pod.

    Args:
        web: started first, stopped last.
        scheduler: started once `web` answers, stopped first; its children are the running tasks.
        others: started with `web`; they run no tasks.
        migration: brings the schema up to date.
        answer_path: `web` answers it with 200 as soon as it serves.
        health_path: Airflow's health document.
        health_components: what has to be healthy in it.
        login: how the admin user comes to be, `simple` or `fab`.
        secret_files: variables whose values are in files of the mounted Secret.
        scheduler_waits: whether the scheduler waits for running tasks after SIGTERM; another one is held up meanwhile.
        resets_interrupted: whether Airflow itself has tasks start over that were running when it was killed.
        fork: whether one parent may import Airflow and fork the processes.
        first_imports: modules that the parent must have before anything is forked.
        imports: modules that it imports next.
    """

    web: Component
    scheduler: Component
    others: tuple[Component, ...]
    migration: Component
    answer_path: str
    health_path: str
    health_components: tuple[str, ...]
    login: str = "simple"
    secret_files: Mapping[str, str] = field(default_factory=dict)
    scheduler_waits: bool = True
    resets_interrupted: bool = True
    fork: bool = True
    first_imports: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path = PROFILE_FILE) -> Profile:
        """Read what the build wrote."""
        document = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            web=Component.from_document(document["web"]),
            scheduler=Component.from_document(document["scheduler"]),
            others=tuple(map(Component.from_document, document["others"])),
            migration=Component.from_document(document["migration"]),
            answer_path=document["answer_path"],
            health_path=document["health_path"],
            health_components=tuple(document["health_components"]),
            login=document["login"],
            secret_files=document["secret_files"],
            scheduler_waits=document["scheduler_waits"],
            resets_interrupted=document["resets_interrupted"],
            fork=document["fork"],
            first_imports=tuple(document["first_imports"]),
            imports=tuple(document["imports"]),
        )
