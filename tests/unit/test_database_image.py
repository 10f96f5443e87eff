"""The database's image: the major version stays what the volume's data has."""

from __future__ import annotations

from typing import Any

import pytest

from airflow_deployer.config import Airflow, Images, Settings
from airflow_deployer.database_image import POSTGRES_MAJOR, choose, major_version
from airflow_deployer.errors import ConfigurationError


def settings(version: str = "3.3.2", postgres: str | None = None) -> Settings:
    return Settings(airflow=Airflow(version=version), images=Images(postgres=postgres))


def claim(major: str | None) -> dict[str, Any]:
    return {"metadata": {"name": "airflow-data", "annotations": {POSTGRES_MAJOR: major} if major else None}}


def stateful_set(image: str) -> dict[str, Any]:
    return {"spec": {"template": {"spec": {"containers": [{"name": "postgres", "image": image}]}}}}


@pytest.mark.parametrize(
    ("image", "major"),
    [
        ("postgres:17", 17),
        ("localhost:5000/library/postgres:15.4-alpine", 15),
        ("postgres:9.6", 9),
        ("postgres:16-bookworm@sha256:ab", 16),
        ("postgres", None),
        ("team/db:latest", None),
        ("localhost:5000/db", None),
    ],
)
def test_the_major_version_of_a_tag(image: str, major: int | None) -> None:
    assert major_version(image) == major


@pytest.mark.parametrize(
    ("wanted", "volume", "live", "image"),
    [
        (settings(), None, None, "postgres:17"),
        (settings("2.11.2"), None, None, "postgres:15"),
        (settings(postgres="team/db:16"), None, None, "team/db:16"),
        (settings(), claim("15"), None, "postgres:15"),
        (settings(), claim("17"), None, "postgres:17"),
        (settings(), claim(None), stateful_set("localhost:5000/library/postgres:16"), "postgres:16"),
        (settings(postgres="postgres:15-alpine"), claim("15"), None, "postgres:15-alpine"),
        (settings(postgres="team/db:latest"), claim("15"), None, "team/db:latest"),
    ],
)
def test_the_data_decides(wanted: Settings, volume: Any, live: Any, image: str) -> None:
    assert choose(wanted, volume, live) == image


@pytest.mark.parametrize(
    ("wanted", "data", "message"),
    [
        (settings(postgres="postgres:17"), "15", r"postgres:17 \(images.postgres\) cannot be started: .*PostgreSQL 15"),
        (settings(), "13", r"Airflow 3\.3\.2 cannot be deployed: .* PostgreSQL 13, and it supports 14 to 18"),
    ],
)
def test_another_major_version_is_refused_with_the_two_commands(wanted: Settings, data: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        choose(wanted, claim(data), None)
    assert [line.strip().split()[:2] for line in caught.value.details[1:]] == [
        ["deployer", "backup"],
        ["deployer", "down"],
    ]
