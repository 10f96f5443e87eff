"""docs/versions.md is what the code says."""

from __future__ import annotations

from pathlib import Path

from airflow_deployer import profile_reference

PAGE = Path(__file__).parents[2] / "docs/versions.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == profile_reference.render(), (
        "run: python -m airflow_deployer.profile_reference > docs/versions.md"
    )
