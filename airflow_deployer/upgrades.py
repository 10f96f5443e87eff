"""Moving a deployment to another Airflow version: what will happen, and what must not happen by accident.

A newer Airflow migrates the database, and the older one cannot read it any more; the way back is a backup. The volume
claim remembers which version the database belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from airflow_deployer.airflow_profiles import PROFILES, find_profile, parse_version
from airflow_deployer.cluster import Object
from airflow_deployer.errors import DeployerError, UpgradeError
from airflow_deployer.manifests import AIRFLOW_VERSION, Names

_VERSION_LABEL = "app.kubernetes.io/version"


@dataclass(frozen=True)
class Upgrade:
    """A move of the database to a newer Airflow.

    Attributes:
        found: the version that the database belongs to.
        wanted: the version to be deployed.
        begun: whether the pod runs the wanted version already: an upgrade that was interrupted, with its backup made.
    """

    found: str
    wanted: str
    begun: bool

    def __str__(self) -> str:
        return f"Airflow {self.found} to {self.wanted}"


def data_version(claim: Object | None, stateful_set: Object | None, pod: Object | None) -> str | None:
    """The Airflow version that the database belongs to; None where there is none, or nobody knows.

    A claim from before the annotation has the version of what runs on it.
    """
    if claim is None:
        return None
    recorded = (claim["metadata"].get("annotations") or {}).get(AIRFLOW_VERSION)
    return recorded or _version(pod) or _version(stateful_set)


def plan(found: str | None, wanted: str, pod: Object | None, *, restoring: bool) -> Upgrade | None:
    """Find out whether the database will be migrated.

    Args:
        found: the version that the database belongs to, None where there is none yet.
        wanted: the version to be deployed.
        pod: the pod that runs now.
        restoring: whether the database will be replaced by that of a backup.

    Raises:
        UpgradeError: the wanted version is older and cannot read the database, or too new to migrate it.
    """
    old, new = parse_version(found or ""), parse_version(wanted)
    if found is None or old is None or new is None or old == new or restoring:
        return None
    if new < old:
        # Within a minor series the schema hardly ever changes; where it did, the pod itself refuses to start.
        if new[:2] == old[:2]:
            return None
        raise UpgradeError(
            f"Airflow {wanted} cannot be deployed: the database belongs to Airflow {found}, which the older one cannot "
            "read.",
            details=["Nothing was changed."],
            hint=f"stay on {found} in deployer.toml, or go back to a backup made with {wanted}: "
            "deployer up --restore FILE",
        )
    profile = find_profile(wanted)
    if profile is not None and old < profile.migrates_from:
        between = next((each for each in PROFILES if each is not profile and each.migrates_from <= old), profile)
        raise UpgradeError(
            f"Airflow {wanted} cannot be deployed: it cannot migrate the database, which belongs to Airflow {found}.",
            details=["Nothing was changed."],
            hint=f'go there by Airflow {between.locked}: airflow.version = "{between.locked}", deployer up --upgrade',
        )
    return Upgrade(found, wanted, begun=_version(pod) == wanted)


def announcement(upgrade: Upgrade, names: Names, *, drain: str) -> DeployerError:
    """What is said where an upgrade was not asked for, once the DAGs import: what will happen, and how to have it."""
    return UpgradeError(
        f"This is an upgrade, {upgrade}, which changes the database for good. What runs was not touched.",
        details=[
            f"1. the images are built, and the DAGs import with Airflow {upgrade.wanted}: done",
            f"2. running tasks are waited for, up to {drain} (--now: they start over), then Airflow stops",
            f"3. the database is backed up to {backup_name(names, upgrade)}",
            f"4. Airflow {upgrade.wanted} migrates the database and starts",
            "5. its health is checked, and that no run was lost",
            "The way back is offered where a step fails.",
        ],
        hint="deployer up --upgrade",
    )


@contextmanager
def with_way_back(upgrade: Upgrade, backup: Path | None) -> Iterator[None]:
    """Tell an error of the block, which comes after the backup, with the way back to what was there before.

    Args:
        backup: None where an earlier run made it.

    Raises:
        UpgradeError: a step failed.
    """
    try:
        yield
    except DeployerError as error:
        where = backup or f"the backup of Airflow {upgrade.found} that the first try has left in this folder"
        raise UpgradeError(
            f"The upgrade, {upgrade}, failed: {error.message}",
            details=[
                *error.details,
                f"The database of before is in {where}. The way back, image and database:",
                f"  DEPLOYER_AIRFLOW_VERSION={upgrade.found} deployer up --restore {backup or 'FILE'}",
            ],
            hint=f"mend the cause and run deployer up --upgrade again, or go back ({error.hint or 'deployer status'})",
        ) from error


def nothing_to_back_up(upgrade: Upgrade) -> UpgradeError:
    """What is said where there is a volume but no pod whose Postgres could dump the database."""
    return UpgradeError(
        f"The database cannot be backed up before the upgrade, {upgrade}: nothing runs. Nothing was changed.",
        hint=f"start what was there: DEPLOYER_AIRFLOW_VERSION={upgrade.found} deployer up; then deployer up --upgrade",
    )


def backup_name(names: Names, upgrade: Upgrade) -> Path:
    """The file that the backup before an upgrade is written to, in the project folder."""
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    return Path(f"{names.name}-{upgrade.found}-{stamp}.backup")


def _version(item: Object | None) -> str | None:
    return ((item or {}).get("metadata", {}).get("labels") or {}).get(_VERSION_LABEL)
