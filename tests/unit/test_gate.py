"""The import check's report: what stops a deploy, what is only told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from airflow_deployer.errors import GateError
from airflow_deployer.gate import GateReport, parse_report

PROBLEM: dict[str, Any] = {
    "path": "include/shop.py",
    "line": 3,
    "dag_file": "dags/orders.py",
    "kind": "import",
    "exception": "ModuleNotFoundError",
    "message": "No module named 'pandas'",
    "traceback": ["Traceback (most recent call last):", '  File "include/shop.py", line 3, in <module>'],
}


def report(**parts: Any) -> GateReport:
    document = {
        "airflow": "3.3.2",
        "seconds": 4.2,
        "files": [{"path": "dags/orders.py", "dag_ids": ["orders"], "seconds": 0.2}],
        "errors": [],
        "needs_database": [],
        "duplicates": [],
        "skipped": [],
    }
    return parse_report(json.dumps(document | parts) + "\n", 0, [])


def test_a_clean_report_stops_nothing() -> None:
    clean = report()
    clean.raise_for_errors()
    assert (clean.dag_ids, clean.summary, clean.warnings) == (["orders"], "1 DAG in 1 file", [])


def test_one_error_is_shown_with_file_line_cause_and_traceback() -> None:
    with pytest.raises(GateError) as caught:
        report(errors=[PROBLEM]).raise_for_errors()
    assert caught.value.message == (
        "Nothing was deployed, the DAGs have an error:\n"
        "include/shop.py, line 3: ModuleNotFoundError: No module named 'pandas' (while importing dags/orders.py)"
    )
    assert "requirements.txt" in caught.value.hint
    assert caught.value.details == tuple(PROBLEM["traceback"])


def test_two_dags_with_one_id_are_shown_with_their_places() -> None:
    places = [{"path": "dags/a.py", "line": 4}, {"path": "dags/b.py", "line": None}]
    with pytest.raises(GateError) as caught:
        report(duplicates=[{"dag_id": "orders", "places": places}]).raise_for_errors()
    assert '2 DAGs have the id "orders": dags/a.py, line 4 and dags/b.py' in caught.value.message
    assert caught.value.hint == "Give each DAG an id of its own."


def test_a_file_with_neither_a_dag_nor_an_error_is_not_waited_for() -> None:
    files = [{"path": f"dags/{name}.py", "dag_ids": ids, "seconds": 0.1} for name, ids in (("a", ["a"]), ("b", []))]
    unanswered, broken = PROBLEM | {"dag_file": "dags/c.py"}, PROBLEM | {"dag_file": "dags/d.py"}
    found = report(files=files, needs_database=[unanswered], errors=[broken])
    assert found.shown == {"a.py", "c.py", "d.py"}


def test_many_errors_are_counted_and_cut() -> None:
    with pytest.raises(GateError) as caught:
        report(errors=[PROBLEM] * 25).raise_for_errors()
    lines = caught.value.message.splitlines()
    assert (lines[0], len(lines), lines[-1]) == ("Nothing was deployed, the DAGs have 25 errors:", 22, "... and 5 more")
    assert caught.value.details == ()


def test_what_only_the_database_knows_is_a_warning() -> None:
    unanswered = PROBLEM | {
        "path": "dags/orders.py",
        "exception": "AirflowRuntimeError",
        "message": "VARIABLE_NOT_FOUND",
    }
    found = report(needs_database=[unanswered])
    found.raise_for_errors()
    assert found.warnings == [
        "dags/orders.py, line 3: AirflowRuntimeError: VARIABLE_NOT_FOUND - Airflow will be asked once it runs"
    ]


MOVED: dict[str, Any] = {
    "path": "dags/orders.py",
    "line": 2,
    "name": "airflow.operators.bash.BashOperator",
    "gone": False,
    "advice": "from x import BashOperator",
}


def test_what_moved_in_airflow_is_told_with_its_replacement() -> None:
    broken = PROBLEM | {"path": "dags/orders.py", "kind": "moved", "advice": "from x import Y"}
    following = broken | {"line": 4, "exception": "", "message": "z is not in this Airflow", "advice": ""}
    with pytest.raises(GateError) as caught:
        report(errors=[broken, following], moved=[MOVED]).raise_for_errors()
    assert caught.value.message.splitlines() == [
        "Nothing was deployed, the DAGs have 2 errors:",
        "dags/orders.py, line 3: ModuleNotFoundError: No module named 'pandas'; instead: from x import Y",
        "dags/orders.py, line 4: z is not in this Airflow",
        "Besides:",
        "airflow.operators.bash.BashOperator is deprecated; instead: from x import BashOperator "
        "(dags/orders.py, line 2)",
    ]
    assert "another Airflow than 3.3.2" in caught.value.hint


def test_who_moves_a_project_gets_the_whole_list() -> None:
    with pytest.raises(GateError) as caught:
        report(errors=[PROBLEM | {"kind": "moved"}] * 150).raise_for_errors()
    assert len(caught.value.message.splitlines()) == 151


def test_warnings_of_what_moved_are_one_line_for_a_name_and_few() -> None:
    many = [MOVED | {"line": line} for line in range(1, 50)]
    later = MOVED | {"name": "{{ next_ds }}", "gone": True, "advice": "{{ data_interval_end | ds }}"}
    assert report(moved=[*many, later]).warnings == [
        "{{ next_ds }} is not in Airflow 3.3.2, a task will fail; instead: {{ data_interval_end | ds }} "
        "(dags/orders.py, line 2)",
        "airflow.operators.bash.BashOperator is deprecated; instead: from x import BashOperator "
        "(dags/orders.py, line 1; dags/orders.py, line 2; dags/orders.py, line 3 and 46 more)",
    ]
    several = [MOVED | {"name": f"airflow.x{number}"} for number in range(60)]
    warnings = report(moved=several).warnings
    assert (len(warnings), warnings[-1]) == (11, "... and 50 more of what moved in Airflow")


def test_a_project_without_a_dag_is_a_warning() -> None:
    found = report(files=[], skipped=["dags/notes.py"])
    assert found.warnings == ["No DAG was found; skipped for lack of the words airflow and dag: dags/notes.py"]


@pytest.mark.parametrize(
    ("output", "exit_code", "reason"),
    [
        ("", 0, "its report cannot be read"),
        ('{"airflow": 3}', 0, "its report cannot be read"),
        ("", 1, "exit code 1"),
        ("", 137, "it was killed, probably for lack of memory"),
    ],
)
def test_a_check_that_fails_itself_is_an_error(output: str, exit_code: int, reason: str) -> None:
    with pytest.raises(GateError, match=reason) as caught:
        parse_report(output, exit_code, ["last words"])
    assert caught.value.details == ("last words",)
