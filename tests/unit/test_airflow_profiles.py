"""The table of Airflow's series: which version gets which, and what goes into the image."""

from __future__ import annotations

import json

import pytest

from airflow_deployer.airflow_profiles import (
    AIRFLOW_1,
    AIRFLOW_2,
    AIRFLOW_3,
    PROFILES,
    Profile,
    environment,
    find_profile,
    is_newer_than_known,
)


@pytest.mark.parametrize(
    ("version", "profile"),
    [
        ("3.3.2", AIRFLOW_3),
        ("3.2.0", AIRFLOW_3),
        ("2.11.2", AIRFLOW_2),
        ("2.7.0", AIRFLOW_2),
        ("1.10.15", AIRFLOW_1),
        ("2.6.3", None),
        ("3.1.8", None),
        ("1.9.0", None),
        ("1.10", None),
        ("3.4.0b1", None),
    ],
)
def test_a_version_gets_the_profile_of_its_series(version: str, profile: Profile | None) -> None:
    assert find_profile(version) is profile


@pytest.mark.parametrize("version", ["3.4.0", "4.0.0"])
def test_a_future_version_gets_the_newest_and_is_known_as_such(version: str) -> None:
    assert find_profile(version) is AIRFLOW_3
    assert is_newer_than_known(version)


def test_known_versions_are_not_called_new() -> None:
    assert not any(is_newer_than_known(version) for version in ("3.3.9", "3.2.1", "2.11.2", "1.10.15"))


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.series)
def test_every_profile_is_complete(profile: Profile) -> None:
    assert find_profile(profile.locked) is profile
    assert profile.python in profile.pythons
    assert f"python:{profile.python}-" in profile.parent
    major = int(profile.postgres_image.rpartition(":")[2])
    assert profile.postgres_majors[0] <= major <= profile.postgres_majors[1]
    document = json.loads(profile.pod_document())
    assert document["web"]["name"] == profile.web.name
    assert document["health_path"] == profile.health_path


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.series)
def test_no_secret_is_a_value_in_the_environment(profile: Profile) -> None:
    names = environment(profile, {})
    for secret in ("FERNET_KEY", "SQL_ALCHEMY_CONN", "SECRET_KEY", "JWT_SECRET"):
        assert not [name for name in names if name.endswith(secret)]
