"""Which change of the Airflow version is an upgrade, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from airflow_deployer.errors import AirflowError, UpgradeError
from airflow_deployer.manifests import AIRFLOW_VERSION, Names
from airflow_deployer.upgrades import (
    Upgrade,
    announcement,
    backup_name,
    data_version,
    plan,
    with_way_back,
)

UPGRADE = Upgrade("2.11.2", "3.3.2", begun=False)


def item(version: str | None) -> dict[str, Any]:
    return {"metadata": {"labels": {"app.kubernetes.io/version": version} if version else {}}}


def claim(version: str | None) -> dict[str, Any]:
    return {"metadata": {"annotations": {AIRFLOW_VERSION: version} if version else None}}


@pytest.mark.parametrize(
    ("volume", "live", "pod", "version"),
    [
        (None, item("3.3.2"), None, None),
        (claim("2.11.2"), item("3.3.2"), item("3.3.2"), "2.11.2"),
        (claim(None), item("3.3.2"), item("2.11.2"), "2.11.2"),
        (claim(None), item("3.3.2"), None, "3.3.2"),
        (claim(None), None, None, None),
    ],
)
def test_the_claim_remembers_whose_the_database_is(volume: Any, live: Any, pod: Any, version: str | None) -> None:
    assert data_version(volume, live, pod) == version


@pytest.mark.parametrize(
    ("found", "wanted", "upgrade"),
    [
        (None, "3.3.2", None),
        ("3.3.2", "3.3.2", None),
        ("2.11.2", "3.3.2", UPGRADE),
        ("3.2.1", "3.3.2", Upgrade("3.2.1", "3.3.2", begun=False)),
        ("3.3.2", "3.3.1", None),
    ],
)
def test_a_newer_version_is_an_upgrade(found: str | None, wanted: str, upgrade: Upgrade | None) -> None:
    assert plan(found, wanted, item(found), restoring=False) == upgrade


def test_one_that_was_interrupted_after_the_backup_goes_on() -> None:
    assert plan("2.11.2", "3.3.2", item("3.3.2"), restoring=False) == Upgrade("2.11.2", "3.3.2", begun=True)


def test_an_older_version_is_refused_with_the_way_back() -> None:
    with pytest.raises(UpgradeError, match=r"Airflow 2\.11\.2 cannot be deployed: the database belongs") as caught:
        plan("3.3.2", "2.11.2", None, restoring=False)
    assert "deployer up --restore FILE" in caught.value.hint
    assert plan("3.3.2", "2.11.2", None, restoring=True) is None


def test_a_leap_that_the_migration_cannot_make_is_refused_with_the_step_between() -> None:
    with pytest.raises(
        UpgradeError, match=r"cannot migrate the database, which belongs to Airflow 1\.10\.15"
    ) as caught:
        plan("1.10.15", "3.3.2", None, restoring=False)
    assert 'airflow.version = "2.11.2"' in caught.value.hint
    assert plan("1.10.15", "2.11.2", None, restoring=False) == Upgrade("1.10.15", "2.11.2", begun=False)


def test_what_will_happen_is_told_with_the_command() -> None:
    error = announcement(UPGRADE, Names("shop", "team"), drain="60s")
    assert error.hint == "deployer up --upgrade"
    assert "Airflow 2.11.2 to 3.3.2" in error.message
    assert any("backed up to shop-2.11.2-" in line for line in error.details)


def test_a_failure_comes_with_the_way_back() -> None:
    with pytest.raises(UpgradeError, match="it is sick") as caught, with_way_back(UPGRADE, Path("b.backup")):
        raise AirflowError("it is sick.", details=["why"])
    assert caught.value.details[0] == "why"
    assert caught.value.details[-1].strip() == "DEPLOYER_AIRFLOW_VERSION=2.11.2 deployer up --restore b.backup"


def test_backups_have_names_of_their_own() -> None:
    assert backup_name(Names("shop", "team"), UPGRADE).name.startswith("shop-2.11.2-")
