"""Renders `docs/versions.md`: the table of Airflow's series, from `airflow_profiles`.

`python -m airflow_deployer.profile_reference > docs/versions.md` writes it; a test proves that it is current.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from airflow_deployer.airflow_profiles import DEFAULT_VERSION, PROFILES, Process, Profile

_INTRODUCTION = f"""\
# Airflow's versions

<!-- Generated from airflow_deployer/airflow_profiles.py: python -m airflow_deployer.profile_reference -->

`airflow.version` in `deployer.toml` decides everything else; without it, it is {DEFAULT_VERSION}:

```toml
[airflow]
version = "{PROFILES[1].locked}"
```

The packages of the newest release of each series are locked, with hashes, in `base-image/requirements/`. For another
version of a series, `deployer lock` writes such a lock into the project folder. A version that is newer than this
release of the deployer gets the newest profile, with a warning. More on each series:
[Airflow 3](airflow-3.md), [Airflow 2](airflow-2.md), [Airflow 1.10](airflow-1.10.md);
from one to the next: [upgrades](upgrades.md).
"""


def _processes(profile: Profile) -> str:
    return ", ".join(f"`{_command(each)}`" for each in (profile.web, profile.scheduler, *profile.others))


def _command(process: Process) -> str:
    if process.module:
        return f"python -m {process.module}"
    return " ".join(("airflow", *process.command))


def _yes(value: bool) -> str:
    return "yes" if value else "no"


_ROWS: tuple[tuple[str, Callable[[Profile], str]], ...] = (
    ("Locked release", lambda p: p.locked),
    ("Oldest version", lambda p: ".".join(map(str, p.first))),
    ("Python", lambda p: f"{', '.join(p.pythons)}; the lock is for {p.python}"),
    ("Parent image (`images.parent`)", lambda p: f"`{p.parent}`"),
    ("Database of a new deployment (`images.postgres`)", lambda p: f"`{p.postgres_image}`"),
    ("PostgreSQL", lambda p: f"{p.postgres_majors[0]} to {p.postgres_majors[1]}"),
    ("Further requirements", lambda p: ", ".join(f"`{each}`" for each in p.requirements) or "none"),
    ("Processes", _processes),
    ("Forked from one parent", lambda p: _yes(p.fork)),
    ("Migration", lambda p: f"`{_command(p.migration)}`"),
    ("Migrates databases of", lambda p: f"{'.'.join(map(str, p.migrates_from))} and later"),
    ("Login", lambda p: {"simple": "SimpleAuthManager", "fab": "Flask-AppBuilder"}[p.login] + ", user `admin`"),
    ("Ready when answered", lambda p: f"`{p.answer_path}`"),
    ("Health", lambda p: f"`{p.health_path}`: {', '.join(p.health_components)}"),
    ("REST API", lambda p: f"`{p.api.path}`, login by {p.api.login}" if p.api else "none that is stable"),
    ("DAG content goes into the running pod", lambda p: _yes(p.hot)),
    ("A run finishes on the content it began with", lambda p: _yes(p.versioned)),
)


def render() -> str:
    """The whole page, as Markdown."""
    parts = [_INTRODUCTION, "\n## The table\n\n"]
    parts.append("| | " + " | ".join(f"{profile.series}.x" for profile in PROFILES) + " |\n")
    parts.append("|---" * (len(PROFILES) + 1) + "|\n")
    for title, cell in _ROWS:
        parts.append(f"| {title} | " + " | ".join(cell(profile) for profile in PROFILES) + " |\n")
    for profile in PROFILES:
        parts.append(f"\n## Settings of {profile.series}.x\n\n")
        parts.append(
            "Those that hold the pod together cannot be set; the others can be replaced in `airflow.settings`.\n\n"
        )
        parts.append("| Setting | Value | |\n|---|---|---|\n")
        rows = [(name, value, "fixed") for name, value in profile.wiring.items()]
        rows += [(name, f"from the Secret's `{key}`", "fixed") for name, key in profile.secret_files.items()]
        rows += [(name, value, "") for name, value in profile.tuning.items()]
        for name, value, fixed in sorted(rows):
            shown = value if value.startswith("from ") else f"`{value}`"
            parts.append(f"| `{name}` | {shown} | {fixed} |\n")
    return "".join(parts)


if __name__ == "__main__":
    sys.stdout.write(render())
