"""What the agent makes of the addresses and paths in Airflow's database; the queries need a real one (tests/e2e)."""

from __future__ import annotations

import pytest
from airflow_deployer_pod.airflow_database import _archive, libpq_url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql+psycopg2://a:b%40@h:5432/d?sslmode=require\n", "postgresql://a:b%40@h:5432/d?sslmode=require"),
        ("postgresql://a@h/d", "postgresql://a@h/d"),
    ],
)
def test_the_address_is_one_that_postgres_takes(url: str, expected: str) -> None:
    assert libpq_url(url) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [("team/a.py", "team/a.py"), ("team/pack.zip/inner/a.py", "team/pack.zip"), ("pack.zip", "pack.zip")],
)
def test_a_dag_in_an_archive_belongs_to_the_archive(path: str, expected: str) -> None:
    assert _archive(path) == expected
