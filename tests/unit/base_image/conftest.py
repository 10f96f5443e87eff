"""The modules that run in the pod; `pythonpath` in pyproject.toml makes them importable, as a .pth file does there."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from airflow_deployer_pod import import_check as import_check_module
from airflow_deployer_pod import profile as profile_module
from airflow_deployer_pod import supervisor as supervisor_module

from airflow_deployer.airflow_profiles import Profile

POD_PACKAGE = Path(supervisor_module.__file__).parent


def read_profile(profile: Profile, folder: Path) -> profile_module.Profile:
    """What the pod of a series reads of its profile, after the build has written it."""
    file = folder / "profile.json"
    file.write_text(profile.pod_document())
    return profile_module.Profile.read(file)


@pytest.fixture(scope="session")
def supervisor() -> ModuleType:
    """`airflow_deployer_pod.supervisor`."""
    return supervisor_module


@pytest.fixture(scope="session")
def import_check() -> ModuleType:
    """`airflow_deployer_pod.import_check`."""
    return import_check_module
