"""The deployment's Postgres, reached by its own psql: in another way than the product's."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tests.e2e.conftest import Project


def sql(project: Project, statement: str, *, database: str = "airflow") -> str:
    """Run statements in the deployment's database; what they print."""
    done = subprocess.run(
        _psql(project, database), input=statement, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextmanager
def locked(project: Project, statement: str, *, database: str = "airflow") -> Iterator[None]:
    """Hold the locks of a statement that prints nothing for the time of the block: who needs them stays there.

    Args:
        statement: see https://www.postgresql.org/docs/current/explicit-locking.html.
    """
    session = subprocess.Popen(_psql(project, database), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with session:
        assert session.stdin is not None
        assert session.stdout is not None
        try:
            session.stdin.write(f"BEGIN;\n{statement};\n\\echo locked\n")
            session.stdin.flush()
            assert session.stdout.readline() == "locked\n"
            yield
        finally:
            session.stdin.close()  # which ends psql, and with it the lock
            session.wait(timeout=60)


def waits_for_a_lock(project: Project, statement: str) -> bool:
    """Whether a session in which the words of `statement` occur waits for such a lock."""
    waiting = f"SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%{statement}%'"  # noqa: S608
    return sql(project, waiting, database="postgres") != "0"


def _psql(project: Project, database: str) -> tuple[str, ...]:
    return (
        *("kubectl", "--context", project.cluster.context.name, "-n", project.names.namespace),
        *("exec", "-i", project.names.pod, "-c", "postgres", "--"),
        *("psql", "-U", "airflow", "-d", database, "-qAtX", "-v", "ON_ERROR_STOP=1"),
    )
