"""What is added to an import check's findings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from airflow_deployer_pod.import_advice import advise

if TYPE_CHECKING:
    from airflow_deployer_pod.import_check import Finding


def finding(path: str, line: int | None, message: str, **parts: Any) -> Finding:
    found: Any = {
        "path": path,
        "line": line,
        "dag_file": path,
        "kind": "import",
        "exception": "ModuleNotFoundError",
        "message": message,
        "traceback": ["Traceback"],
        "advice": "",
    }
    made: Finding = found | parts
    return made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty project."""
    (tmp_path / "dags" / "lib").mkdir(parents=True)
    (tmp_path / "include").mkdir()
    return tmp_path


def put(root: Path, path: str, *lines: str) -> None:
    (root / path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


DUMMY = "from airflow.operators.dummy_operator import DummyOperator"
BASH = "from airflow.operators.bash_operator import BashOperator"
NO_DUMMY = "No module named 'airflow.operators.dummy_operator'"
EMPTY = "from airflow.providers.standard.operators.empty import EmptyOperator"


def test_an_error_gets_its_replacement_and_those_behind_it_are_told_too(root: Path) -> None:
    put(root, "dags/a.py", "from airflow import DAG", DUMMY, BASH, "with DAG('a', schedule_interval=None):", "    pass")
    found = advise(root, {"dags/a.py": []}, [finding("dags/a.py", 2, NO_DUMMY)], "3").errors
    assert [(each["line"], each["kind"], each["message"], each["advice"]) for each in found] == [
        (2, "moved", NO_DUMMY, EMPTY),
        (
            3,
            "moved",
            "airflow.operators.bash_operator.BashOperator is not in this Airflow",
            "from airflow.providers.standard.operators.bash import BashOperator",
        ),
        (4, "moved", "DAG(schedule_interval=) is not in this Airflow", "DAG(schedule=)"),
    ]


def test_an_argument_is_recognised_by_its_name_where_the_line_is_another(root: Path) -> None:
    put(root, "dags/a.py", "from airflow.decorators import dag", "@dag(schedule_interval=None)", "def a(): ...", "a()")
    message = "DAG.__init__() got an unexpected keyword argument 'schedule_interval'"
    found = advise(root, {"dags/a.py": []}, [finding("dags/a.py", 4, message, exception="TypeError")], "3")
    assert [(each["line"], each["advice"]) for each in found.errors] == [(4, "DAG(schedule=)")]
    assert [moved["name"] for moved in found.moved] == ["airflow.decorators.dag"]


def test_modules_that_a_broken_file_would_have_imported_are_read_too(root: Path) -> None:
    put(root, "dags/a.py", DUMMY, "import include.shop", "from lib import tools", "from lib.other import x")
    put(root, "include/shop.py", BASH)
    put(root, "dags/lib/__init__.py")
    put(root, "dags/lib/tools.py", "from .deep import y")
    put(root, "dags/lib/deep.py", BASH)
    put(root, "dags/lib/other.py", "def f():", f"    {BASH}")
    put(root, "dags/lib/unused.py", BASH)
    found = advise(root, {"dags/a.py": []}, [finding("dags/a.py", 1, NO_DUMMY)], "3")
    assert [(each["path"], each["line"], each["dag_file"]) for each in found.errors] == [
        ("dags/a.py", 1, "dags/a.py"),
        ("dags/lib/deep.py", 1, "dags/a.py"),
        ("include/shop.py", 1, "dags/a.py"),
    ]
    assert [(moved["path"], moved["line"], moved["gone"]) for moved in found.moved] == [("dags/lib/other.py", 2, True)]


def test_what_has_been_imported_is_there_whatever_the_table_says(root: Path) -> None:
    put(root, "dags/a.py", "import include.shop", "x")
    put(root, "include/shop.py", DUMMY)
    error = finding("dags/a.py", 2, "name 'x' is not defined", exception="NameError")
    found = advise(root, {"dags/a.py": ["include/shop.py"]}, [error], "3")
    assert ([each["kind"] for each in found.errors], found.moved) == (["import"], [])


def test_what_is_deprecated_or_fails_in_a_task_is_no_error(root: Path) -> None:
    put(root, "dags/a.py", "from airflow.operators.bash import BashOperator", "def f():", f"    {DUMMY}")
    found = advise(root, {"dags/a.py": []}, [], "3")
    assert found.errors == []
    assert [(moved["line"], moved["gone"], moved["advice"]) for moved in found.moved] == [
        (1, False, "from airflow.providers.standard.operators.bash import BashOperator"),
        (3, True, EMPTY),
    ]


def test_a_dag_of_a_newer_airflow_is_told_what_this_one_has(root: Path) -> None:
    put(root, "dags/a.py", "from airflow.sdk import DAG", "DAG('a', schedule=None)")
    error = finding("dags/a.py", 1, "No module named 'airflow.sdk'")
    assert [each["advice"] for each in advise(root, {"dags/a.py": []}, [error], "2").errors] == [
        "from airflow import DAG"
    ]
    assert [each["advice"] for each in advise(root, {"dags/a.py": []}, [error], "1.10").errors] == [
        "from airflow import DAG",
        "DAG(schedule_interval=)",
    ]


def test_a_provider_that_is_not_installed_is_named(root: Path) -> None:
    put(root, "dags/a.py", "from airflow.providers.http.hooks.http import HttpHook")
    error = finding("dags/a.py", 1, "No module named 'airflow.providers.http'")
    (found,) = advise(root, {"dags/a.py": []}, [error], "3").errors
    assert (found["kind"], found["advice"]) == ("import", "apache-airflow-providers-http in requirements.txt")


def test_archives_and_files_that_are_gone_are_passed_over(root: Path) -> None:
    found = advise(root, {"dags/a.zip": [], "dags/gone.py": []}, [finding("dags/gone.py", None, "x")], "3")
    assert (len(found.errors), found.moved) == (1, [])
