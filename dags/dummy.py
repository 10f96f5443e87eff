"""The dummy DAG of the blog: a task after a task, neither of which does anything. It runs on Airflow 1.10, 2 and 3."""

from datetime import datetime

import airflow
from airflow import DAG

try:
    from airflow.providers.standard.operators.empty import EmptyOperator
except ImportError:
    try:
        from airflow.operators.empty import EmptyOperator
    except ImportError:
        from airflow.operators.dummy_operator import DummyOperator as EmptyOperator

schedule = "schedule_interval" if airflow.__version__.startswith("1.") else "schedule"

with DAG(dag_id="dummy", start_date=datetime(2026, 1, 1), tags=["example"], **{schedule: None}) as dag:
    EmptyOperator(task_id="first") >> EmptyOperator(task_id="second")
