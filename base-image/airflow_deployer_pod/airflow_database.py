"""What the content agent asks and tells Airflow's database directly, in SQL: an Airflow of its own would need seconds.

`dag` says when a file was parsed, `import_error` what failed, `dag_priority_parsing_request` is how a parse is asked
for (`airflow/models`). Airflow 3 names a file by its path in its bundle, and the version with it; Airflow 2 by its
whole path, and which version it was parsed from only the DAG processor can tell.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from airflow_deployer_pod import followed

BUNDLE_NAME = "dags"

CONNECTION_FILE = Path("/run/secrets/airflow-deployer/sql-alchemy-conn")


def libpq_url(sqlalchemy_url: str) -> str:
    """Turn SQLAlchemy's `postgresql+psycopg2://...` into the URL that Postgres' own library takes."""
    return re.sub(r"^(postgres(?:ql)?)\+\w+://", r"\1://", sqlalchemy_url.strip())


class DatabaseError(Exception):
    """The database cannot be reached, or refuses."""


@dataclass(frozen=True)
class Parsed:
    """What Airflow has parsed of one version.

    Attributes:
        files: paths below `dags/` whose DAGs were parsed.
        errors: paths below `dags/` with the text of their import error.
        remaining: paths among those that must vanish whose DAGs are still there.
    """

    files: frozenset[str]
    errors: Mapping[str, str]
    remaining: frozenset[str]


class AirflowDatabase(Protocol):
    """What the agent needs of Airflow's database."""

    def dag_files(self) -> dict[str, list[str]]:
        """The ids of all DAGs that are not stale, by the path of their file below the DAG folder."""

    def request_parsing(self, files: Iterable[str]) -> None:
        """Have the DAG processor refresh the bundle and parse these files before all others."""

    def parsed(self, version: str, since: float, files: Iterable[str], removed: Iterable[str]) -> Parsed | None:
        """What was parsed of `version` since a time (seconds since 1970); None until the bundle has been refreshed."""

    def needed_versions(self) -> set[str]:
        """The versions that a run that is not finished, or a DAG that is not stale, names."""

    def close(self) -> None:
        """End the connection."""


class _PostgresDatabase:
    """Airflow's own database, over one connection that is made when it is first needed.

    Raises:
        DatabaseError: from every method.
    """

    def __init__(self, connection_file: Path = CONNECTION_FILE) -> None:
        self._file = connection_file
        self._connection: Any = None

    def _execute(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        # The driver is imported only here: 20 ms that a question about the state need not wait for.
        import psycopg2

        for attempt in range(2):
            try:
                if self._connection is None:
                    url = libpq_url(self._file.read_text(encoding="utf-8"))
                    self._connection = psycopg2.connect(url, connect_timeout=3, application_name="content-agent")
                    self._connection.autocommit = True
                with self._connection.cursor() as cursor:
                    cursor.execute(statement, parameters)
                    return list(cursor.fetchall()) if cursor.description else []
            except (psycopg2.Error, OSError) as error:
                stale = self._connection is not None and self._connection.closed
                self.close()
                # A connection that was there may have ended with a restart of Postgres; a new one shows.
                if attempt or not stale:
                    raise DatabaseError(str(error).strip().partition("\n")[0]) from None
        raise AssertionError

    def close(self) -> None:
        """See `AirflowDatabase`."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class BundleDatabase(_PostgresDatabase):
    """That of an Airflow that reads DAG files from a bundle (3.0 and later)."""

    def __init__(self, connection_file: Path = CONNECTION_FILE) -> None:
        super().__init__(connection_file)
        self._refreshed: dict[str, datetime] = {}

    def dag_files(self) -> dict[str, list[str]]:
        """See `AirflowDatabase`."""
        found: dict[str, list[str]] = {}
        rows = self._execute(
            "SELECT relative_fileloc, dag_id FROM dag WHERE bundle_name = %s AND NOT is_stale"
            " AND relative_fileloc IS NOT NULL",
            BUNDLE_NAME,
        )
        for path, dag_id in rows:
            found.setdefault(_archive(path), []).append(dag_id)
        return found

    def request_parsing(self, files: Iterable[str]) -> None:
        """See `AirflowDatabase`."""
        # The id that Airflow itself gives (`generate_md5_hash` in `models/dagbag.py`): asking twice is asking once.
        rows = [
            (hashlib.md5(f"{BUNDLE_NAME}:{file}".encode(), usedforsecurity=False).hexdigest(), file) for file in files
        ]
        self._execute(
            "INSERT INTO dag_priority_parsing_request (id, bundle_name, relative_fileloc)"
            " SELECT id, %s, file FROM unnest(%s::text[], %s::text[]) AS request (id, file) ON CONFLICT DO NOTHING",
            BUNDLE_NAME,
            [id for id, _ in rows],
            [file for _, file in rows],
        )

    def parsed(self, version: str, since: float, files: Iterable[str], removed: Iterable[str]) -> Parsed | None:
        """See `AirflowDatabase`."""
        bundle = self._execute("SELECT version, last_refreshed FROM dag_bundle WHERE name = %s", BUNDLE_NAME)
        if not bundle or bundle[0][0] != version:
            return None
        # The first refresh that showed this version: later ones change nothing about what was parsed of it.
        refreshed = self._refreshed.setdefault(f"{version} {since}", bundle[0][1])
        wanted = list(files)
        after = datetime.fromtimestamp(since, timezone.utc)
        done = self._execute(
            "SELECT DISTINCT relative_fileloc FROM dag WHERE bundle_name = %s AND bundle_version = %s"
            " AND last_parsed_time >= %s",
            BUNDLE_NAME,
            version,
            after,
        )
        errors = self._execute(
            "SELECT filename, stacktrace FROM import_error WHERE bundle_name = %s AND timestamp >= %s",
            BUNDLE_NAME,
            max(refreshed, after),
        )
        gone = list(removed)
        left = (
            self._execute(
                "SELECT DISTINCT relative_fileloc FROM dag WHERE bundle_name = %s AND NOT is_stale"
                " AND relative_fileloc = ANY(%s)",
                BUNDLE_NAME,
                gone,
            )
            if gone
            else []
        )
        known = set(wanted)
        return Parsed(
            frozenset(_archive(path) for (path,) in done) & known,
            {_archive(path): text for path, text in errors if _archive(path) in known},
            frozenset(path for (path,) in left),
        )

    def needed_versions(self) -> set[str]:
        """See `AirflowDatabase`."""
        rows = self._execute(
            "SELECT bundle_version FROM dag_run WHERE state IN ('queued', 'running')"
            " UNION SELECT bundle_version FROM dag WHERE NOT is_stale"
            " UNION SELECT version FROM dag_bundle"
            # Callbacks of a failed task run on the version of its DAG, not on that of its run.
            " UNION SELECT dag_version.bundle_version FROM dag_run"
            " JOIN task_instance USING (dag_id, run_id)"
            " JOIN dag_version ON dag_version.id = task_instance.dag_version_id"
            " WHERE dag_run.state IN ('queued', 'running')"
        )
        return {version for (version,) in rows if version}


class FolderDatabase(_PostgresDatabase):
    """That of an Airflow that reads DAG files from one folder (2.x).

    Args:
        connection_file: holds SQLAlchemy's URL.
        folder: `[core] dags_folder`.
        followed_file: where the DAG processor says which version it follows.
    """

    def __init__(
        self,
        connection_file: Path = CONNECTION_FILE,
        folder: str | None = None,
        followed_file: Path = followed.FOLLOWED_FILE,
    ) -> None:
        super().__init__(connection_file)
        self._folder = (folder or os.environ.get("AIRFLOW__CORE__DAGS_FOLDER", "/home/airflow/dags")).rstrip("/") + "/"
        self._followed_file = followed_file

    def dag_files(self) -> dict[str, list[str]]:
        """See `AirflowDatabase`."""
        found: dict[str, list[str]] = {}
        rows = self._execute(
            "SELECT fileloc, dag_id FROM dag WHERE is_active AND starts_with(fileloc, %s)", self._folder
        )
        for path, dag_id in rows:
            found.setdefault(self._relative(path), []).append(dag_id)
        return found

    def request_parsing(self, files: Iterable[str]) -> None:
        """See `AirflowDatabase`."""
        # The id that Airflow itself gives (`generate_md5_hash` in `models/dagbag.py`): asking twice is asking once.
        places = [f"{self._folder}{file}" for file in files]
        self._execute(
            "INSERT INTO dag_priority_parsing_request (id, fileloc)"
            " SELECT id, file FROM unnest(%s::text[], %s::text[]) AS request (id, file) ON CONFLICT DO NOTHING",
            [hashlib.md5(place.encode(), usedforsecurity=False).hexdigest() for place in places],
            places,
        )

    def parsed(self, version: str, since: float, files: Iterable[str], removed: Iterable[str]) -> Parsed | None:
        """See `AirflowDatabase`; the DAG processor stands for the bundle."""
        now = followed.read(self._followed_file)
        if now is None or now.version != version:
            return None
        wanted, gone = set(files), [f"{self._folder}{path}" for path in removed]
        after = datetime.fromtimestamp(max(now.since, since), timezone.utc)
        done = self._execute("SELECT DISTINCT fileloc FROM dag WHERE is_active AND last_parsed_time >= %s", after)
        errors = self._execute("SELECT filename, stacktrace FROM import_error WHERE timestamp >= %s", after)
        left = (
            self._execute("SELECT DISTINCT fileloc FROM dag WHERE is_active AND fileloc = ANY(%s)", gone)
            if gone
            else []
        )
        return Parsed(
            frozenset(self._relative(path) for (path,) in done) & wanted,
            {self._relative(path): text for path, text in errors if self._relative(path) in wanted},
            frozenset(self._relative(path) for (path,) in left),
        )

    def needed_versions(self) -> set[str]:
        """None: what a running task uses, it holds (`folder_scheduler.py`). Asks whether the database answers."""
        self._execute("SELECT 1")
        return set()

    def _relative(self, fileloc: str) -> str:
        return _archive(fileloc[len(self._folder) :]) if fileloc.startswith(self._folder) else fileloc


DATABASES: Mapping[str, Callable[[], AirflowDatabase]] = {"bundle": BundleDatabase, "folder": FolderDatabase}
"""By what Airflow reads DAG files from (`Parsing.source`)."""


def _archive(path: str) -> str:
    """The file on disk: a DAG inside a zip file is known by the archive's path and its own."""
    archive, found, _ = path.partition(".zip/")
    return f"{archive}.zip" if found else path
