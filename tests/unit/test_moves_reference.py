"""docs/moving.md is what the code says, and its examples are what it says of them."""

from __future__ import annotations

import re
from pathlib import Path

from airflow_deployer_pod.import_moves import SERIES, Series

from airflow_deployer import moves_reference

PAGE = Path(__file__).parents[2] / "docs/moving.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == moves_reference.render(), "run: make docs"


def test_the_example_for_all_series_is_the_dummy_dag_and_nothing_is_to_be_said_of_it() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", moves_reference.render(), re.DOTALL)
    dummy = (PAGE.parents[1] / "dags/dummy.py").read_text(encoding="utf-8")
    assert dummy.partition('"""\n\n')[2] == example
    for series in SERIES:
        assert [use for use in Series(series).read(dummy.encode()).uses if not use.handled] == []
