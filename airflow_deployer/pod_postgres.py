"""Postgres in the pod, by its own programs in the container `postgres`: psql, pg_dump, pg_restore.

They log in on the local socket, which asks for no password, and work whenever Postgres does, whatever state Airflow is
in. Sources: https://www.postgresql.org/docs/current/app-psql.html, app-pgdump.html, app-pgrestore.html.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from airflow_deployer import credentials, manifests
from airflow_deployer.api_streams import ApiServer, RefusedError, UnavailableError
from airflow_deployer.backup_file import Table
from airflow_deployer.errors import BackupError
from airflow_deployer.hold import Hold, held
from airflow_deployer.manifests import Names
from airflow_deployer.pod_exec import CommandError, PodExec

MAINTENANCE_DATABASE = "postgres"
APPLICATION = "airflow-deployer"
"""`application_name` of the sessions of `Postgres.psql`."""

_LOGIN = (f"--username={credentials.POSTGRES_USER}", "--no-password")
_PSQL = ("psql", *_LOGIN, "--no-psqlrc", "--quiet", "--tuples-only", "--csv", "--set=ON_ERROR_STOP=1")

# What decides how values look as text, so that the same rows have the same checksum on every server.
_PLAIN_TEXT = """
SET client_encoding = 'UTF8'; SET TimeZone = 'UTC'; SET DateStyle = 'ISO, YMD'; SET IntervalStyle = 'postgres';
SET extra_float_digits = 1; SET bytea_output = 'hex'; SET xmloption = 'content'; SET search_path = 'pg_catalog'
"""

_TABLES = """
SELECT nspname || '.' || relname, format('%I.%I', nspname, relname)
FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
WHERE relkind = 'r' AND nspname <> 'information_schema' AND nspname !~ '^pg_'
AND NOT EXISTS (SELECT FROM pg_depend WHERE classid = 'pg_class'::regclass AND objid = pg_class.oid AND deptype = 'e')
ORDER BY 1
"""

_ROW = "('x' || left(encode(sha256(convert_to(t::text, 'UTF8')), 'hex'), 16))::bit(64)::bigint"

# Without a limit on locks it would wait for a migration for as long as that takes, and hold up whatever comes after.
_DUMP = ("pg_dump", *_LOGIN, "--format=custom", "--lock-wait-timeout=60s")
# Of 378 MB, zstd 1 made 72 MB in 2.5 s, gzip 1 made 92 MB in 11.6 s.
_ZSTD_SINCE = 16

# With nobody to read it any more, pg_dump would wait for ever, with its locks: container runtimes leave a command alone
# whose connection has gone, but close its input. No child may outlive this shell: it would become one of the
# postmaster, which takes the end of a stranger for the crash of a backend.
_WATCHED = """
"$@" </dev/null & child=$!
while kill -0 $child 2>/dev/null; do
  read -r -t 0.2 _
  [ $? -eq 1 ] && kill $child && break
done
wait $child
"""

# `head` ends after so many bytes, which is how a program that reads to the end sees one: exec cannot close stdin alone.
_PIPED = 'set -o pipefail; head --bytes="$1" | "${@:2}"'
_LISTED = 'set -o pipefail; head --bytes="$1" | { pg_restore --list && cat >/dev/null; }'
_RESTORE = ("pg_restore", *_LOGIN, "--exit-on-error", "--single-transaction", "--no-owner", "--no-privileges")
_TOC_BYTES = 16 << 20

_FREE = 'df --output=avail --block-size=1 "$PGDATA" | tail -n 1'

# Airflow's state as the supervisor tells it, from inside the pod: it takes no further permission.
_READINESS = (
    f"exec 3<>/dev/tcp/127.0.0.1/{manifests.PROBE_PORT} && "
    "printf 'GET /readyz HTTP/1.0\\r\\n\\r\\n' >&3 && timeout 10 cat <&3; true"
)

_ANSWER_SECONDS = 60.0
# Statements and transfers get on without a sign for long: a large table is read, all its indices are built.
_SILENT_SECONDS = 3600.0
_LEFT_SECONDS = 5.0

OnBytes = Callable[[int], None]
_T = TypeVar("_T")


class PostgresError(BackupError):
    """A statement or program failed in the pod's Postgres."""


class Psql:
    """One session of psql, which is one of Postgres; made by `Postgres.psql`."""

    def __init__(self, command: PodExec) -> None:
        self._command = command

    async def query(self, statement: str, *, seconds: float = _SILENT_SECONDS) -> list[list[str]]:
        """Run statements and return their rows as text; NULL is an empty string.

        Raises:
            PostgresError: Postgres refuses, or the connection to the pod broke.
        """
        # Only a result is written at once, so the end of one is marked by another.
        mark = secrets.token_hex(16)
        text = bytearray()
        try:
            await self._command.write(f"{statement};\nSELECT '{mark}';\n".encode())
            while (line := await asyncio.wait_for(self._command.read_line(), seconds)) != mark.encode():
                text += line + b"\n"
        except UnavailableError as error:
            raise PostgresError(f"Postgres in the pod: {_cause(self._command, error)}.") from None
        except asyncio.TimeoutError:
            raise PostgresError(f"Postgres in the pod did not answer within {seconds:.0f} s.") from None
        # A line of one NULL is empty.
        return [row or [""] for row in csv.reader(io.StringIO(text.decode(), newline=""))]

    async def value(self, statement: str) -> str:
        """The one value that a statement returns; empty where there is no row."""
        rows = await self.query(statement)
        return rows[0][0] if rows else ""

    async def table_contents(self, on_table: Callable[[str], None]) -> dict[str, Table]:
        """The content of every table that pg_dump dumps, by its name with schema; changes the session's settings.

        A row counts with the first 64 bits of its SHA-256, and a table with their sum: the order does not matter.
        """
        await self.query(_PLAIN_TEXT)
        contents = {}
        for name, quoted in await self.query(_TABLES):
            on_table(name)
            rows = await self.query(f"SELECT count(*), coalesce(sum({_ROW}), 0) FROM {quoted} AS t")  # noqa: S608
            contents[name] = Table(int(rows[0][0]), rows[0][1])
        return contents


class Postgres:
    """The database server in the pod of a deployment.

    Every method raises `PostgresError` when Postgres refuses or the connection to the pod breaks.
    """

    def __init__(self, api: ApiServer, names: Names) -> None:
        self._api = api
        self._names = names

    @contextlib.asynccontextmanager
    async def psql(self, database: str) -> AsyncIterator[Psql]:
        """A session with a database, for the time of the block; what it has not committed is rolled back."""
        async with self._running(*_PSQL, f"--dbname=dbname={database} application_name={APPLICATION}") as command:
            yield Psql(command)

    async def dump(self, database: str, snapshot: str, write: Callable[[bytes], None], *, major: int) -> None:
        """Dump a database in pg_dump's custom format.

        Args:
            major: the server's major version, which is that of pg_dump.
            snapshot: of a transaction that is open, as `pg_export_snapshot()` named it.
            write: takes the dump, piece by piece.
        """
        compression = "zstd:1" if major >= _ZSTD_SINCE else "1"
        arguments = (*_DUMP, f"--compress={compression}", f"--snapshot={snapshot}", f"--dbname={database}")
        async with self._running("bash", "-c", _WATCHED, "pg_dump", *arguments) as command:
            while data := await _bounded(command, command.read()):
                write(data)

    async def dumped_tables(self, beginning: bytes) -> set[str]:
        """Have pg_restore read a dump's table of contents; the tables whose rows it says are there, with schema.

        Args:
            beginning: the dump's first bytes; the contents are at the front.
        """
        listed = bytearray()
        async with self._running("bash", "-c", _LISTED, "pg_restore", str(len(beginning))) as command:
            await _fed(command, [beginning], lambda size: None, listed)
        # `3456; 0 16402 TABLE DATA public dag airflow`
        lines = (line.partition(" TABLE DATA ") for line in listed.decode(errors="replace").splitlines())
        return {".".join(entry.split(" ")[:2]) for _, found, entry in lines if found}

    async def restore(self, database: str, size: int, dump: Iterable[bytes], on_bytes: OnBytes) -> None:
        """Fill an empty database from a dump in one transaction.

        Args:
            size: of the dump, in bytes.
            on_bytes: told how many of them have been sent.
        """
        arguments = (str(size), *_RESTORE, f"--dbname={database}")
        async with self._running("bash", "-c", _PIPED, "pg_restore", *arguments) as command:
            await _fed(command, dump, on_bytes, bytearray())

    def held(self, *, drain: float, now: bool) -> AbstractAsyncContextManager[Hold]:
        """Have Airflow stopped in the block: `hold.held`."""
        return held(self._api, self._names, drain=drain, now=now)

    async def free_bytes(self) -> int:
        """What is free on the volume for the database's user (df(1))."""
        return int(await self._output("postgres", "bash", "-c", _FREE, "df"))

    async def readiness(self) -> dict[str, Any]:
        """The supervisor's own account of Airflow (docs/pod.md, `/readyz`); empty where no supervisor answers."""
        try:
            text = await self._output("postgres", "bash", "-c", _READINESS, "readiness")
            document = json.loads(text.partition("\r\n\r\n")[2])
        except ValueError:
            return {}
        return document if isinstance(document, dict) else {}

    async def known_schema(self, path: str) -> dict[str, Any] | None:
        """What the deployed image knows of Airflow's schema (`schema_revisions.py`); None where Airflow is down."""
        try:
            document: dict[str, Any] = json.loads(await self._output("airflow", "cat", path))
        except (PostgresError, ValueError):
            return None
        return document

    async def _output(self, container: str, *command: str) -> str:
        async with self._running(*command, container=container) as running:
            text = bytearray()
            while data := await _bounded(running, running.read(), _ANSWER_SECONDS):
                text += data
        return text.decode(errors="replace")

    @contextlib.asynccontextmanager
    async def _running(self, *command: str, container: str = "postgres") -> AsyncIterator[PodExec]:
        try:
            running = await PodExec.start(self._api, self._names.namespace, self._names.pod, container, command)
            try:
                yield running
            except CommandError as error:
                details = running.complaints[-6:]
                raise PostgresError(
                    f"{command_name(command)} failed: {_cause(running, error)}.", details=details
                ) from None
            finally:
                await running.close()
        except (UnavailableError, RefusedError) as error:
            raise PostgresError(
                f"Cannot reach Postgres in pod {self._names.pod}: {error}.",
                hint="deployer status   shows the state of the pod",
            ) from None


def command_name(command: tuple[str, ...]) -> str:
    """What a command is to a person: the program behind `bash -c` too."""
    return command[3] if command[0] == "bash" else command[0]


async def _fed(command: PodExec, chunks: Iterable[bytes], on_bytes: OnBytes, output: bytearray) -> None:
    """Write to a command and read what it says until it ends."""

    async def feed() -> None:
        sent = 0
        for chunk in chunks:
            await command.write(chunk)
            sent += len(chunk)
            on_bytes(sent)

    async def listen() -> None:
        while data := await _bounded(command, command.read()):
            output.extend(data)

    feeder, listener = asyncio.create_task(feed()), asyncio.create_task(listen())
    try:
        await asyncio.wait((feeder, listener), return_when=asyncio.FIRST_COMPLETED)
        if feeder.done() and feeder.exception() is not None and not listener.done():
            # Why it does not read any more comes on the other channels, a moment later.
            await asyncio.wait((listener,), timeout=_LEFT_SECONDS)
        if listener.done():
            # It may well end before it has read everything, as `pg_restore --list` does.
            await listener
            return
        await feeder
        await listener
    finally:
        feeder.cancel()
        listener.cancel()
        await asyncio.gather(feeder, listener, return_exceptions=True)


async def _bounded(command: PodExec, reading: Awaitable[_T], seconds: float = _SILENT_SECONDS) -> _T:
    try:
        return await asyncio.wait_for(reading, seconds)
    except asyncio.TimeoutError:
        raise UnavailableError(f"the pod said nothing for {seconds:.0f} s; {command.trouble}".rstrip("; ")) from None


def _cause(command: PodExec, error: Exception) -> str:
    """The first error that Postgres or its program reported, else what is known of the end of the command."""
    for line in command.complaints:
        for word in ("FATAL:", "ERROR:", "error:"):
            if word in line:
                return line.rpartition(word)[2].strip().rstrip(".")
    return str(error).rstrip(".")
