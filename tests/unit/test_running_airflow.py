"""Who is asked about a running Airflow, and the names of its files."""

from __future__ import annotations

import pytest

from airflow_deployer.airflow_profiles import AIRFLOW_1, AIRFLOW_2, AIRFLOW_3
from airflow_deployer.running_airflow import RunningTask, dag_file


@pytest.mark.parametrize(
    ("path", "file"),
    [
        ("team/orders.py", "team/orders.py"),
        ("/home/airflow/dags/team/orders.py", "team/orders.py"),
        ("/home/airflow/content/current/dags/orders.py", "orders.py"),
        ("/home/airflow/content/versions/f892a77d2e54/dags/orders.py", "orders.py"),
        ("/home/airflow/dags/dags/orders.py", "dags/orders.py"),
        ("/opt/airflow/lib/example.py", "/opt/airflow/lib/example.py"),
    ],
)
def test_the_file_of_a_dag_is_named_as_in_the_project(path: str, file: str) -> None:
    assert dag_file(path) == file


def test_a_task_is_named_with_its_run_and_its_index_where_it_is_mapped() -> None:
    assert str(RunningTask("orders", "r1", "load", -1)) == "orders.load of r1"
    assert str(RunningTask("orders", "r1", "load", 3)) == "orders.load[3] of r1"


def test_what_new_content_counts_for() -> None:
    assert [profile.content_scope for profile in (AIRFLOW_3, AIRFLOW_2, AIRFLOW_1)] == ["run", "task", "pod"]
