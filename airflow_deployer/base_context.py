"""The base image's build context: its folder, and the locked packages of the Airflow version that is wanted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_deployer.content import File, read_folder, read_single_file
from airflow_deployer.errors import ConfigurationError

if TYPE_CHECKING:
    from airflow_deployer.config import Settings

SHIPPED_LOCKS = "requirements"
"""Folder of the build context with the locks that come along, `<version>.txt`; it is not sent itself."""


def base_image_folder() -> Path:
    """Where the build context is: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "base_image"
    return installed if installed.is_dir() else package.parent / "base-image"


def project_lock(project: Path, version: str) -> Path:
    """The file in the project folder that `deployer lock` writes for a version of Airflow."""
    return project / f"airflow-{version}.txt"


def find_lock(project: Path, settings: Settings) -> Path | None:
    """The lock of `airflow.version`: the project's own, else the one that comes along.

    Returns:
        None where `images.base` names a ready-made image, which has its packages.

    Raises:
        ConfigurationError: there is neither.
    """
    if settings.images.base:
        return None
    version = settings.airflow.version
    own, shipped = project_lock(project, version), base_image_folder() / SHIPPED_LOCKS / f"{version}.txt"
    for lock in (own, shipped):
        if lock.is_file():
            return lock
    raise ConfigurationError(
        f"Cannot deploy Airflow {version}: its packages are not locked, there is no {own.name} in the project.",
        hint="deployer lock",
    )


def locked_versions(lock: Path) -> dict[str, str]:
    """The version of each package in a lock."""
    text = lock.read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;]+)", text, re.MULTILINE))


def context_files(lock: Path) -> tuple[File, ...]:
    """What is sent to build the base image; of the locks this one alone, so that no other one changes the tag."""
    files = [file for file in read_folder(base_image_folder()) if not file.path.startswith(f"{SHIPPED_LOCKS}/")]
    return (*files, read_single_file(lock, "requirements.txt"))
