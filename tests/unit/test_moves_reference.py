"""docs/moving.md is what the code says, and its examples are what it says of them."""

from __future__ import annotations

import re
from pathlib import Path

from airflow_deployer_pod.import_moves import SERIES, Series

from airflow_deployer import moves_reference

PAGE = Path(__file__).parents[2] / "docs/moving.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == moves_reference.render(), "run: make docs"


def test_nothing_is_to_be_said_of_the_files_for_all_series() -> None:
    examples = re.findall(r"```python\n(.*?)```", moves_reference.render(), re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        for series in SERIES:
            assert [use for use in Series(series).read(example.encode()).uses if not use.handled] == []
