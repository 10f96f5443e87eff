"""Renders `docs/configuration.md` from the keys that `config` declares.

`python -m airflow_deployer.config_reference > docs/configuration.md` writes it; a test proves that it is current.
"""

from __future__ import annotations

import sys
from typing import Any, get_args, get_origin

from airflow_deployer.config import CONFIG_FILE, ENVIRONMENT_PREFIX, PYPROJECT_TABLE, Duration, Key, Settings, keys

_INTRODUCTION = f"""\
# Configuration

<!-- Generated from airflow_deployer/config.py: python -m airflow_deployer.config_reference > docs/configuration.md -->

Every key has a default: a folder with only `dags/` deploys without any configuration. Later sources win:

1. `{CONFIG_FILE}` in the project folder, or the table `[{PYPROJECT_TABLE}]` in its `pyproject.toml`; content in
   both is an error. `--config FILE` reads that file instead.
2. Environment variables that begin with `{ENVIRONMENT_PREFIX}`; an empty one counts as unset.
3. Command line flags.

An unknown key, a value of a wrong type and a value that cannot be are errors (exit code 2) that name the place.
Durations are written as `90s`, `5m` or `1h30m`, amounts of memory and processors as in Kubernetes (`500m`, `2`, `5Gi`).
Tables are merged key by key: setting one limit leaves the other defaults alone. In the environment a table is a JSON
object: `{ENVIRONMENT_PREFIX}AIRFLOW_ENV='{{"REGION": "eu"}}'`.

```toml
# {CONFIG_FILE}
name = "shop"
context = "kind-kind"

[airflow.settings.core]
parallelism = 4

[storage]
size = "10Gi"
```
"""

_TYPES = {str: "string", int: "integer", bool: "boolean", Duration: "duration"}


def render() -> str:
    """The whole page, as Markdown."""
    defaults = Settings()
    sections: dict[str, list[Key]] = {}
    for key in keys().values():
        table = key.name.partition(".")[0] if "." in key.name else ""
        sections.setdefault(table, []).append(key)
    parts = [_INTRODUCTION]
    for table, members in sections.items():
        parts.append(f"\n## {f'`[{table}]`' if table else 'Top level'}\n")
        if table:
            parts.append(f"\n{type(getattr(defaults, table)).__doc__}\n")
        for key in members:
            parts.append(_render_key(key))
    return "".join(parts)


def _render_key(key: Key) -> str:
    facts = [
        f"Type: {_type_name(key.type)}",
        f"default: {_default(key.default)}",
        f"environment: `{key.variable}`",
        *([f"flag: `{key.flag}`"] if key.flag else []),
    ]
    return f"\n### `{key.name}`\n\n{key.description}\n\n{'; '.join(facts)}.\n"


def _type_name(value_type: Any) -> str:
    if get_origin(value_type) is dict:
        depth = 1 + (get_origin(get_args(value_type)[1]) is dict)
        return "table" if depth == 1 else "table of tables"
    # An optional key cannot be set to nothing, only left out: its type is that of its value.
    names = [_TYPES[part] for part in (get_args(value_type) or (value_type,)) if part is not type(None)]
    return " or ".join(names)


def _default(value: object) -> str:
    if value is None:
        return "unset"
    if value == {}:
        return "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if isinstance(value, int) and not isinstance(value, Duration) else f'`"{value}"`'


if __name__ == "__main__":
    sys.stdout.write(render())
