"""What the agent makes of the addresses and paths in Airflow's database; the queries need a real one (tests/e2e)."""

from __future__ import annotations

from pathlib import Path

import pytest
from airflow_deployer_pod import followed
from airflow_deployer_pod.airflow_database import DATABASES, FolderDatabase, _archive, libpq_url

from airflow_deployer.airflow_profiles import PROFILES


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


def test_every_series_has_its_tables() -> None:
    assert {profile.parsing.source for profile in PROFILES} == set(DATABASES)


def test_nothing_is_parsed_of_a_version_that_the_dag_processor_does_not_follow(tmp_path: Path) -> None:
    file = tmp_path / "followed.json"
    database = FolderDatabase(tmp_path / "none", "/home/airflow/dags/", file)
    assert database.parsed("two", 0.0, ["a.py"], []) is None
    followed.write(followed.Followed("one", 1.5), file)
    assert followed.read(file) == ("one", 1.5)
    assert database.parsed("two", 0.0, ["a.py"], []) is None
    file.write_text("[")
    assert followed.read(file) is None


@pytest.mark.parametrize(
    ("fileloc", "expected"),
    [
        ("/home/airflow/dags/team/a.py", "team/a.py"),
        ("/home/airflow/dags/pack.zip/a.py", "pack.zip"),
        ("/opt/examples/a.py", "/opt/examples/a.py"),
    ],
)
def test_a_place_in_the_dag_folder_is_a_path_below_it(fileloc: str, expected: str) -> None:
    assert FolderDatabase(folder="/home/airflow/dags")._relative(fileloc) == expected
