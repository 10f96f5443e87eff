"""What Airflow says of itself where it has no REST API, read from the tables of Airflow 1.10's database.

    python -I -m airflow_deployer_pod.airflow_report

Run by exec, it answers each line of standard input, a question, with a line of JSON:

    dags             {"rows": [[DAG ID, IS PAUSED, LAST PARSED, FILE], ...]}
    import_errors    {"rows": [[FILE, STACK TRACE, LAST SEEN], ...]}
    running_tasks    {"rows": [[DAG ID, RUN ID, TASK ID], ...]}

Files are absolute, times RFC 3339 in UTC or null. `{"error": TEXT}` comes where the database does not answer. It ends
with standard input, or when nothing was asked for a while: whoever asked may have gone without a word.
"""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from airflow_deployer_pod.airflow_database import CONNECTION_FILE, libpq_url

_STATEMENTS = {
    # The scheduler notes here when it has parsed the DAG, whether or not it had anything to run.
    "dags": (
        "SELECT dag_id, is_paused, last_scheduler_run, fileloc FROM dag WHERE is_active AND NOT is_subdag"
        " ORDER BY dag_id"
    ),
    "import_errors": "SELECT filename, stacktrace, timestamp FROM import_error ORDER BY filename",
    "running_tasks": (
        "SELECT ti.dag_id, run.run_id, ti.task_id FROM task_instance AS ti"
        " JOIN dag_run AS run ON run.dag_id = ti.dag_id AND run.execution_date = ti.execution_date"
        " WHERE ti.state = 'running' ORDER BY ti.start_date, ti.task_id"
    ),
}

_SILENCE_SECONDS = 120.0


class Database:
    """Airflow's database, over one connection that is made when it is first needed and again when it broke."""

    def __init__(self, connection_file: Path = CONNECTION_FILE) -> None:
        self._file = connection_file
        self._connection: Any = None

    def answer(self, question: str) -> dict[str, Any]:
        """Answer one question; never raises for what the database does."""
        import psycopg2

        if question not in _STATEMENTS:
            return {"error": f"no such question: {question}"}
        for attempt in range(2):
            try:
                if self._connection is None:
                    url = libpq_url(self._file.read_text(encoding="utf-8"))
                    self._connection = psycopg2.connect(url, connect_timeout=3, application_name="airflow-report")
                    self._connection.autocommit = True
                with self._connection.cursor() as cursor:
                    cursor.execute(_STATEMENTS[question])
                    return {"rows": [[_plain(value) for value in row] for row in cursor.fetchall()]}
            except (psycopg2.Error, OSError) as error:
                cause = str(error).strip().partition("\n")[0]
                broken = self._connection is not None and self._connection.closed
                self.close()
                if attempt or not broken:
                    return {"error": cause}
        raise AssertionError

    def close(self) -> None:
        """End the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _plain(value: Any) -> Any:
    return value.astimezone(timezone.utc).isoformat() if isinstance(value, datetime) else value


def _questions() -> Iterator[str]:
    """The lines of standard input, until its end or until none comes any more."""
    pending = b""
    while select.select([0], [], [], _SILENCE_SECONDS)[0]:
        data = os.read(0, 4096)
        if not data:
            return
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")


def main() -> None:
    """Answer until there are no more questions."""
    database = Database()
    for question in _questions():
        sys.stdout.write(json.dumps(database.answer(question)) + "\n")
        sys.stdout.flush()
    database.close()


if __name__ == "__main__":
    main()
