"""What the pod reads of the table of series, and that what it runs there can run on that series' Python."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from airflow_deployer.airflow_profiles import AIRFLOW_1, AIRFLOW_2, AIRFLOW_3, PROFILES, Profile
from tests.unit.base_image.conftest import POD_PACKAGE, read_profile


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.series)
def test_the_pod_reads_what_the_build_writes(profile: Profile, tmp_path: Path) -> None:
    read = read_profile(profile, tmp_path)
    for name in (
        *("answer_path", "health_path", "health_components", "login", "secret_files", "fork", "imports"),
        *("scheduler_waits", "resets_interrupted"),
    ):
        assert getattr(read, name) == getattr(profile, name)
    assert [component.name for component in (read.web, read.scheduler, *read.others, read.migration)] == [
        process.name for process in (profile.web, profile.scheduler, *profile.others, profile.migration)
    ]
    assert read.web.kill_seconds == profile.web.kill_seconds


def test_a_process_is_a_command_of_airflow_or_a_module_of_ours(tmp_path: Path) -> None:
    read = read_profile(AIRFLOW_3, tmp_path)
    assert (read.scheduler.argv, read.scheduler.entry) == (
        ("airflow", "scheduler", "--skip-serve-logs"),
        "airflow.__main__:main",
    )
    dag_processor, triggerer = read.others
    module = "airflow_deployer_pod.dag_processor"
    assert (dag_processor.argv, dag_processor.entry) == ((sys.executable, "-m", module), f"{module}:main")
    assert (triggerer.stop_children, triggerer.kill_seconds) == (True, 8.0)
    web = read_profile(AIRFLOW_2, tmp_path).web
    assert (web.argv[1:3], web.entry) == (("-m", "gunicorn.app.wsgiapp"), "gunicorn.app.wsgiapp:run")
    assert web.argv[-1] == "airflow.www.app:cached_app()"
    assert read_profile(AIRFLOW_2, tmp_path).migration.argv == ("airflow", "db", "migrate")
    assert read_profile(AIRFLOW_1, tmp_path).migration.argv == ("airflow", "upgradedb")


def test_nothing_that_makes_the_application_or_loads_plugins_is_imported_before_a_fork() -> None:
    assert "airflow.api_fastapi.main" not in (*AIRFLOW_3.first_imports, *AIRFLOW_3.imports)


# What came after Python 3.8 and is easily used by mistake. `os.readlink` is old, `Path.readlink` is not.
TOO_NEW = {"removeprefix", "removesuffix", "waitstatus_to_exitcode", "readlink", "is_relative_to", "hardlink_to"}
NEEDED_BY_1_10 = (
    "__init__",
    "admin_user",
    "airflow_database",
    "content_store",
    "import_check",
    "import_root",
    "parsing",
    "profile",
    "supervisor",
)


@pytest.mark.parametrize("module", NEEDED_BY_1_10)
def test_what_every_series_runs_is_python_3_8(module: str) -> None:
    tree = ast.parse((POD_PACKAGE / f"{module}.py").read_text(), feature_version=(3, 8))
    names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)} - {"os.readlink"}
    assert [name for name in names if name.rpartition(".")[2] in TOO_NEW] == []
