"""The dummy DAG of the blog: a task after a task, neither of which does anything."""

from __future__ import annotations

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG

with DAG(dag_id="dummy", schedule=None, tags=["example"]):
    EmptyOperator(task_id="first") >> EmptyOperator(task_id="second")
