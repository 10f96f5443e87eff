"""Which PostgreSQL a deployment gets: the major version that its volume's data has, for a new one Airflow's choice.

PostgreSQL does not start on the data directory of another major version
(https://www.postgresql.org/docs/current/upgrading.html), so the claim remembers the one it was made with.
"""

from __future__ import annotations

import re

from airflow_deployer.cluster import Object
from airflow_deployer.config import Settings
from airflow_deployer.errors import ConfigurationError

POSTGRES_MAJOR = "airflow-deployer/postgres-major"
"""Annotation of the volume claim: the major version of the data on it."""


def major_version(image: str) -> int | None:
    """The major version that an image's tag names: 17 of `postgres:17.2-alpine`; None where it names none."""
    tag = image.partition("@")[0].rpartition("/")[2].partition(":")[2]
    match = re.match(r"v?(\d+)(?:[.-]|$)", tag)
    return int(match[1]) if match else None


def data_major(claim: Object | None, stateful_set: Object | None) -> int | None:
    """The major version of the data on the volume; None where there is no volume or nobody knows.

    A claim from before the annotation has the version of the StatefulSet that uses it.
    """
    if claim is None:
        return None
    recorded = (claim["metadata"].get("annotations") or {}).get(POSTGRES_MAJOR, "")
    if recorded.isdecimal():
        return int(recorded)
    if stateful_set is None:
        return None
    containers = stateful_set["spec"]["template"]["spec"]["containers"]
    return next((major_version(item["image"]) for item in containers if item["name"] == "postgres"), None)


def choose(settings: Settings, claim: Object | None, stateful_set: Object | None) -> str:
    """The database's image, as the settings would name it.

    Raises:
        ConfigurationError: the image that was set, or Airflow, cannot work with the data on the volume.
    """
    profile, wanted = settings.airflow.profile, settings.images.postgres
    data = data_major(claim, stateful_set)
    if data is None or claim is None:
        return wanted or profile.postgres_image
    volume = f"the volume {claim['metadata']['name']} holds data of PostgreSQL {data}"
    oldest, newest = profile.postgres_majors
    if not oldest <= data <= newest:
        raise ConfigurationError(
            f"Airflow {settings.airflow.version} cannot be deployed: {volume}, and it supports {oldest} to {newest}.",
            details=_MOVE,
            hint=_FIRST,
        )
    if wanted is not None and (major_version(wanted) or data) != data:
        raise ConfigurationError(
            f"{wanted} (images.postgres) cannot be started: {volume}, which another major version cannot read.",
            details=_MOVE,
            hint=_FIRST,
        )
    if wanted is not None:
        return wanted
    return profile.postgres_image if major_version(profile.postgres_image) == data else f"postgres:{data}"


_MOVE = [
    "Nothing was changed. To move the data to another major version:",
    "  deployer backup airflow.backup        (with the settings that it runs with now)",
    "  deployer down --purge && deployer up && deployer restore airflow.backup        (with the new ones)",
]
_FIRST = "leave images.postgres out to stay on the version that the volume has, or move the data with the two commands"
