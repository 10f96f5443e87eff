"""What is for a reader in a task's log, in the formats of both REST APIs."""

from __future__ import annotations

from airflow_deployer.task_logs import TaskLogEntry, from_events, from_text

TEXT = """ INFO - ::group::Log message source details
*** Found local files:
***   * /home/airflow/logs/dag_id=orders/run_id=r1/task_id=load/attempt=1.log
 INFO - ::endgroup::
[2026-11-23T16:00:01.123+0000] {local_task_job_runner.py:123} INFO - ::group::Pre task execution logs
[2026-11-23T16:00:01.200+0000] {taskinstance.py:2631} INFO - Starting attempt 1 of 1
[2026-11-23T16:00:01.300+0000] {taskinstance.py:731} INFO - ::endgroup::
[2026-11-23T16:00:01.400+0000] {logging_mixin.py:190} INFO - says one
and a second line
[2026-11-23T16:00:01.500+0000] {orders.py:9} WARNING - careful
[2026-11-23T16:00:01.600+0000] {taskinstance.py:3336} ERROR - Task failed with exception
Traceback (most recent call last):
  File "/opt/airflow/lib/python3.11/site-packages/airflow/models/taskinstance.py", line 776, in _execute_task
    result = _execute_callable(context=context, **execute_callable_kwargs)
             ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "/home/airflow/dags/orders.py", line 12, in load
    return {}["x"]
           ~~^^^^^
KeyError: 'x'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "/home/airflow/dags/orders.py", line 14, in load
    raise RuntimeError("no x\\nat all")
RuntimeError: no x
at all
[2026-11-23T16:00:01.700+0000] {taskinstance.py:1226} INFO - Marking task as FAILED. dag_id=orders, task_id=load
[2026-11-23T16:00:01.800+0000] {standard_task_runner.py:124} ERROR - Failed to execute job 6 for task load (no x
at all; 32430)
Traceback (most recent call last):
  File "/home/airflow/dags/orders.py", line 14, in load
    raise RuntimeError("no x\\nat all")
RuntimeError: no x
at all
[2026-11-23T16:00:01.900+0000] {local_task_job_runner.py:266} INFO - Task exited with return code 1
"""


def test_the_text_of_airflow_2_is_taken_apart() -> None:
    entries = from_text(TEXT)
    assert [(entry.level, entry.text) for entry in entries] == [
        ("info", "::group::Log message source details"),
        ("info", "*** Found local files:"),
        ("info", "***   * /home/airflow/logs/dag_id=orders/run_id=r1/task_id=load/attempt=1.log"),
        ("info", "::endgroup::"),
        ("info", "::group::Pre task execution logs"),
        ("info", "Starting attempt 1 of 1"),
        ("info", "::endgroup::"),
        ("info", "says one"),
        ("info", "and a second line"),
        ("warning", "careful"),
        ("error", "Task failed with exception"),
        ("info", "Marking task as FAILED. dag_id=orders, task_id=load"),
        ("info", "Task exited with return code 1"),
    ]
    assert entries[-3].error == (
        "/opt/airflow/lib/python3.11/site-packages/airflow/models/taskinstance.py:776 in _execute_task",
        "/home/airflow/dags/orders.py:12 in load",
        "KeyError: 'x'",
        "/home/airflow/dags/orders.py:14 in load",
        "RuntimeError: no x",
        "at all",
    )


def test_what_comes_without_its_beginning_is_shown_as_it_is() -> None:
    assert from_text("\nand a third line\n") == [TaskLogEntry("and a third line", "", ())]


def test_the_messages_of_airflow_3() -> None:
    cause = {
        "exc_type": "KeyError",
        "exc_value": "'x'",
        "frames": [{"filename": "/home/airflow/dags/orders.py", "lineno": 12, "name": "load"}],
    }
    events = [
        "plain",
        {"event": "says one", "level": "info", "logger": "task.stdout"},
        {"event": "Task failed", "level": "error", "logger": "task", "error_detail": [cause]},
    ]
    assert from_events(events) == [
        TaskLogEntry("plain", "", ()),
        TaskLogEntry("says one", "info", (), printed=True),
        TaskLogEntry("Task failed", "error", ("/home/airflow/dags/orders.py:12 in load", "KeyError: 'x'")),
    ]
