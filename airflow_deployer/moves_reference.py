"""Renders `docs/moving.md`: what moved between Airflow's series, from the table that the import check works with.

`PYTHONPATH=base-image python -m airflow_deployer.moves_reference > docs/moving.md` writes it; a test proves that it is
current.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from airflow_deployer_pod.import_moves import SERIES, THINGS, Spelling

from airflow_deployer.airflow_profiles import PROFILES

_NEWEST = {profile.series: profile.locked for profile in PROFILES}

_INTRODUCTION = f"""\
# Moving DAGs to another Airflow

<!-- Generated from base-image/airflow_deployer_pod/import_moves.py: make docs -->

## Would my project work on {_NEWEST["3"]}?

Say so in `deployer.toml` and run `deployer up`:

```toml
[airflow]
version = "{_NEWEST["3"]}"
```

It builds the images of that version and imports every DAG file inside them, without a network and before anything in
the cluster changes. Where a file does not import, nothing is deployed, and the running Airflow goes on as it was; put
the old version back and everything is as before. In a pipeline, `DEPLOYER_AIRFLOW_VERSION={_NEWEST["3"]}` does the same
for one command.

What moved is told all at once: Python stops at the first import that fails, the check reads on, in that file and in the
modules of the project that it would have imported next.

```text
Nothing was deployed, the DAGs have 3 errors:
dags/orders.py, line 1: ImportError: cannot import name 'days_ago' from 'airflow.utils.dates'; instead:
  pendulum.today("UTC").add(days=-N)
dags/orders.py, line 2: airflow.hooks.base_hook.BaseHook is not in this Airflow; instead:
  from airflow.sdk import BaseHook
dags/orders.py, line 9: DAG(schedule_interval=) is not in this Airflow; instead: DAG(schedule=)
```

- What is gone, and is used as the file is imported, is an error.
- What is gone, and is used in a function, in a template or by a key of the task's context, would fail in a task: a
  warning. So is what is deprecated. Each is one line with its places, and in `deployer dev` it is told once for a file.
- What stands behind an `if` or in a `try` that catches `ImportError` is left alone: somebody has thought of it.
- Only the project's own files are looked at, `dags/` and what they import of `dags/` and `include/`. Names that are
  put together at run time, and templates in files of their own, are not seen.

The same holds in the other direction, for a DAG that was written for a newer Airflow than the one it is deployed to.

## One file for several series

Most names of 2.11 still work in 3.3, deprecated or not, so that a project can change its imports after the move.
Between 1.10 and 3.3 hardly any operator keeps its place, and the schedule has another name; `from airflow import DAG`
works everywhere. A file that has to serve all of them asks, as `dags/dummy.py` does:

```python
from datetime import datetime

import airflow
from airflow import DAG

try:
    from airflow.providers.standard.operators.empty import EmptyOperator
except ImportError:
    try:
        from airflow.operators.empty import EmptyOperator
    except ImportError:
        from airflow.operators.dummy_operator import DummyOperator as EmptyOperator

schedule = "schedule_interval" if airflow.__version__.startswith("1.") else "schedule"

with DAG(dag_id="dummy", start_date=datetime(2026, 1, 1), tags=["example"], **{{schedule: None}}) as dag:
    EmptyOperator(task_id="first") >> EmptyOperator(task_id="second")
```

1.10 and 2.x insist on a `start_date`, and 1.10 finds a DAG only in a variable (`as dag`). What 1.10 has nothing for
cannot be shared with it: the TaskFlow API (`@dag`, `@task`), mapped tasks, task groups, datasets.

Operators of the standard provider can be had in 2.11 too, with `apache-airflow-providers-standard` in
`requirements.txt`; the same imports then work in 2.11 and 3.x without a warning.

## What moved

A row is one thing: what works in each series, and, in *italics*, what works there and is deprecated. `(package)` marks
what needs another package in `requirements.txt`. `tests/e2e/test_import_moves.py` asks Airflow
{", ".join(_NEWEST.values())} about each of these names.
"""

_SECTIONS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("Imports", lambda text: text.startswith("airflow")),
    ("Arguments", lambda text: text.endswith("=)")),
    ("The context of a task, in templates and in Python", lambda text: text.startswith("{{")),
)


def render() -> str:
    """The whole page, as Markdown."""
    parts = [_INTRODUCTION]
    for title, belongs in _SECTIONS:
        parts.append(f"\n### {title}\n\n| {' | '.join(_NEWEST[series] for series in SERIES)} |\n")
        parts.append("|---" * len(SERIES) + "|\n")
        for thing in THINGS:
            if belongs(thing[0].text) and any(set(spelling.states) & set("dq-") for spelling in thing):
                parts.append(f"| {' | '.join(_cell(thing, series) for series in SERIES)} |\n")
    return "".join(parts)


def _cell(thing: Sequence[Spelling], series: str) -> str:
    shown = []
    for spelling in thing:
        state = spelling.state(series)
        if state == "-":
            continue
        text = spelling.text.replace("|", "\\|")
        text = text[2:] if text.startswith("= ") else f"`{text}`"
        text = f"*{text}*" if state in "dq" else text
        shown.append(f"{text} (package)" if state in "pq" else text)
    return "<br>".join(shown) or "-"


if __name__ == "__main__":
    sys.stdout.write(render())
