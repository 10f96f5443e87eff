"""`deployer restore`: the database of a deployment replaced by that of a backup, all or nothing.

The backup goes into a new database beside the one in use, where it is compared with its manifest, while Airflow goes
on. Then Airflow is held, two databases change their names in one transaction, and Airflow starts again. Whatever breaks
before that transaction leaves everything as it was but for a database that nobody uses; what breaks after it is undone
by the same transaction the other way round. A run that was killed leaves databases behind that the next one drops.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets as random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from airflow_deployer import credentials, lease, reencryption
from airflow_deployer.airflow_profiles import parse_version
from airflow_deployer.backup import megabytes, require_deployment, with_postgres
from airflow_deployer.backup_file import Backup, Manifest, Table
from airflow_deployer.cluster import POD, Object
from airflow_deployer.connection import Session
from airflow_deployer.errors import BackupError, DeployerError
from airflow_deployer.pod_postgres import APPLICATION, MAINTENANCE_DATABASE, Postgres, PostgresError, Psql
from airflow_deployer.progress import Progress, Step
from airflow_deployer.reencryption import Reencrypted
from airflow_deployer.reports import RestoreReport

LOADED, REPLACED = "airflow_restore_", "airflow_before_"
"""How the names of databases begin that are being loaded, and that were in use before."""

_CURRENT = credentials.POSTGRES_DATABASE
_SCHEMA_FILE = "/opt/airflow-deployer/schema.json"
_POLL_SECONDS = 1.0
_SHOW_SECONDS = 0.2
# An Airflow that has ended so often since the change does not heal.
_RESTARTS = 2
_LONGEST_BACK_OFF = 300.0  # of the kubelet, before it starts a container that crashes again
# What Postgres writes of the changes beside the tables themselves, until its next checkpoint (`max_wal_size`).
_LARGEST_LOG_BYTES = 1 << 30
_LEAST_FREE_BYTES = 64 << 20
_ATTEMPTS = 3
_RECONNECT_SECONDS = 60.0
_LEAVE_SECONDS = 15.0


@dataclass
class _Stopwatch:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def lap(self, title: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[title] = round(self.seconds.get(title, 0.0) + time.monotonic() - began, 2)


def question(session: Session, backup: Backup) -> str:
    """What a person is asked before the database is replaced."""
    manifest, names = backup.manifest, session.names
    return (
        f"Replace the database of {names.name!r} in namespace {names.namespace!r} (context {session.context.name!r}) "
        f"with all its runs, connections and variables by the backup of {manifest.source.name!r} in namespace "
        f"{manifest.source.namespace!r} at {manifest.created_at[:19]}Z ({manifest.rows:,} rows of Airflow "
        f"{manifest.airflow})?"
    )


def restore(session: Session, backup: Backup, progress: Progress, *, now: bool) -> RestoreReport:
    """Replace the deployment's database, under its lock.

    Args:
        now: do not wait for running tasks.

    Raises:
        BackupError: the backup does not fit the deployment, there is no space, or a step failed; the old database is in
            use, unless the message says otherwise.
    """
    names = session.names
    require_deployment(session)
    with lease.held(session.cluster, names.namespace, names.lease, labels=names.labels, doing="restore"):
        return replace(session, backup, progress, now=now)


def replace(session: Session, backup: Backup, progress: Progress, *, now: bool) -> RestoreReport:
    """Replace the database for somebody who holds the lock; errors as of `restore`."""
    stateful_set, _, secret = require_deployment(session)
    deployed = stateful_set["metadata"]["labels"].get("app.kubernetes.io/version", "")
    watch = _Stopwatch()

    async def run(postgres: Postgres) -> Reencrypted:
        work = _Restore(session, postgres, backup, secret[credentials.FERNET_KEY], progress, watch)
        with progress.step("Check"):
            await work.check(deployed)
        return await work.run(now=now)

    reencrypted = with_postgres(session, run)
    manifest = backup.manifest
    return RestoreReport(
        context=session.context.name,
        namespace=session.names.namespace,
        name=session.names.name,
        file=str(backup.path),
        created_at=manifest.created_at,
        tables=len(manifest.tables),
        rows=manifest.rows,
        reencrypted=reencrypted.values,
        unreadable=reencrypted.unreadable,
        seconds=watch.seconds,
    )


@dataclass
class _Restore:
    """One restore: the parts of `replace`."""

    session: Session
    postgres: Postgres
    backup: Backup
    fernet_key: str
    progress: Progress
    watch: _Stopwatch
    # Whether the databases may have been renamed, and how often Airflow had been started by then.
    _switched: bool = False
    _restarts: int = 0

    @property
    def manifest(self) -> Manifest:
        return self.backup.manifest

    async def check(self, deployed: str) -> None:
        """Refuse what cannot work, before anything is touched but the remains of earlier restores.

        Args:
            deployed: the deployment's version of Airflow.
        """
        async with self.postgres.psql(MAINTENANCE_DATABASE) as server:
            await self._check(server, deployed)

    async def _check(self, server: Psql, deployed: str) -> None:
        major = int(await server.value("SHOW server_version_num")) // 10000
        if self.manifest.postgres_major > major:
            raise BackupError(
                f"The backup is of PostgreSQL {self.manifest.postgres}, and the deployment runs {major}, which cannot "
                "read what a later one has dumped.",
                details=["Nothing was changed."],
                hint=f'a deployment with images.postgres = "postgres:{self.manifest.postgres_major}" or later can: '
                "where the database that is there is of no more use, deployer down --purge and deployer up make one",
            )
        await _end_other_sessions(server)
        require_known_schema(self.manifest, deployed, await self.postgres.known_schema(_SCHEMA_FILE))
        for name in await _databases(server, LOADED):
            self.progress.info(f"Dropping {name}, which an interrupted restore has left.")
            await _drop(server, name)
        await self._require_space(server)

    async def _require_space(self, server: Psql) -> None:
        needed = (
            self.manifest.database_bytes + min(self.manifest.database_bytes, _LARGEST_LOG_BYTES) + _LEAST_FREE_BYTES
        )
        free = await self.postgres.free_bytes()
        if free >= needed:
            return
        details = ["Nothing was changed. The old database stays until the new one has proved itself."]
        for name in await _databases(server, REPLACED):
            size = int(await server.value(f"SELECT pg_database_size('{name}')"))
            details.append(f"{megabytes(size)} are the database {name}, from before a restore that was interrupted.")
        raise BackupError(
            f"There is no space for the restored database: it takes {megabytes(needed)} on the volume, and "
            f"{megabytes(free)} are free.",
            details=details,
            hint="enlarge storage.size in deployer.toml and run deployer up",
        )

    async def run(self, *, now: bool) -> Reencrypted:
        """Load, compare, hold Airflow, switch, start it, and drop what was there before."""
        loaded = f"{LOADED}{random.token_hex(4)}"
        replaced = f"{REPLACED}{datetime.now(timezone.utc):%Y%m%d_%H%M%S}"
        try:
            reencrypted = await self._load(loaded)
            await self._switch("Switch", replaced, loaded, now=now)
            with self.progress.step("Airflow") as step, self.watch.lap("away"):
                await self._healthy(step)
        except BaseException as error:
            await self._undo(replaced, loaded, error)
            raise
        try:
            async with self.postgres.psql(MAINTENANCE_DATABASE) as server:
                with self.progress.step("Old database") as step:
                    for name in await _databases(server, REPLACED):
                        step.update(f"dropping {name}")
                        await _drop(server, name)
                    step.done("dropped")
        except PostgresError as error:
            self.progress.warning(
                f"{error.message} The database of before takes space until the next restore drops it."
            )
        return reencrypted

    # -- before the switch ---------------------------------------------------------------------------------------------

    async def _load(self, name: str) -> Reencrypted:
        async with self.postgres.psql(MAINTENANCE_DATABASE) as server:
            # template0 has nothing in it that the dump might bring too.
            await server.query(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")
        with self.progress.step("Load") as step, self.watch.lap("load"):
            began = shown = time.monotonic()
            total = self.manifest.dump_bytes

            def on_bytes(sent: int) -> None:
                nonlocal shown
                now = time.monotonic()
                if sent == total:
                    step.update(f"{megabytes(total)} sent, building the indices")
                elif now - shown > _SHOW_SECONDS:
                    shown = now
                    step.update(f"{megabytes(sent)} of {megabytes(total)}, {megabytes(sent / (now - began))}/s")

            await self.postgres.restore(name, total, self.backup.dump(), on_bytes)
            seconds = time.monotonic() - began
            step.done(f"{megabytes(total)}, {megabytes(total / seconds)}/s")
        async with self.postgres.psql(name) as psql:
            with self.progress.step("Compare") as step, self.watch.lap("compare"):
                found = await psql.table_contents(lambda table: step.update(f"counting {table}"))
                _require_same(self.manifest.tables, found)
                step.done(f"{len(found)} tables, {self.manifest.rows:,} rows, each as the backup says")
            with self.progress.step("Stored secrets") as step, self.watch.lap("compare"):
                done = await reencryption.reencrypt(
                    psql,
                    old_keys=self.backup.secrets.fernet_key,
                    new_keys=self.fernet_key,
                    on_value=lambda number: step.update(f"{number} values"),
                )
                await self._keep_login(psql)
                # A dump holds no statistics, and without them the first queries take the wrong way.
                step.update("collecting statistics")
                await psql.query("ANALYZE")
                step.done(
                    f"{done.values} values encrypted with this deployment's key" if done.values else "as they are"
                )
        if done.unreadable:
            self.progress.warning(
                f"{len(done.unreadable)} stored value(s) could not be read with the backup's key, and stay as they "
                f"are: {', '.join(done.unreadable[:5])}"
            )
        return done

    async def _keep_login(self, restored: Psql) -> None:
        """Where the users are in the database (Airflow 2 and 1.10), let our own keep the password of our Secret."""
        table = "SELECT to_regclass('public.ab_user')"
        if not await restored.value(table):
            return
        user = credentials.ADMIN_USER
        async with self.postgres.psql(_CURRENT) as current:
            if not await current.value(table):
                return
            password = await current.value(f"SELECT password FROM public.ab_user WHERE username = '{user}'")  # noqa: S608
        if password:
            quoted = password.replace("'", "''")
            await restored.query(f"UPDATE public.ab_user SET password = '{quoted}' WHERE username = '{user}'")  # noqa: S608

    # -- the switch ----------------------------------------------------------------------------------------------------

    async def _switch(self, title: str, replaced: str, successor: str, *, now: bool) -> None:
        """Have Airflow stopped, call the database in use `replaced`, and put its successor in its place."""
        with self.progress.step(title) as step, self.watch.lap("away"):
            step.update("stopping Airflow" if now else "waiting for running tasks (--now does not wait)")
            drain = float(self.session.settings.timeouts.drain)
            async with self.postgres.held(drain=drain, now=now) as held:
                step.update("changing the database")
                self._restarts = _restarts(self._pod())
                self._switched = True
                for attempt in range(_ATTEMPTS):
                    held.ensure()
                    try:
                        async with self.postgres.psql(MAINTENANCE_DATABASE) as server:
                            await _rename(server, [(_CURRENT, replaced), (successor, _CURRENT)])
                        return
                    except PostgresError:
                        # Somebody has logged in between the two: the agent of a `deployer dev`, say.
                        if attempt == _ATTEMPTS - 1:
                            raise

    async def _healthy(self, step: Step) -> None:
        """Wait until Airflow calls all its components healthy."""
        timeout = float(self.session.settings.timeouts.ready)
        began = time.monotonic()
        deadline = began + timeout
        while True:
            try:
                readiness, pod = await self.postgres.readiness(), self._pod()
            except DeployerError as error:
                # An API server that is away for a moment says nothing about Airflow.
                if time.monotonic() > deadline:
                    raise
                step.update(error.message)
                await asyncio.sleep(_POLL_SECONDS)
                continue
            if readiness.get("ready"):
                step.done("healthy")
                return
            phase = readiness.get("phase", "")
            if phase == "migrating the database":
                # It has a deadline of its own in the pod.
                deadline = time.monotonic() + timeout
            step.update(", ".join(readiness.get("missing") or ()) or "waiting for it to start")
            crashes = _restarts(pod) - self._restarts
            waiting = _waits_for_restart(pod)
            if waiting and not crashes:
                # From before: the kubelet has not noticed yet that there is another database.
                deadline = max(deadline, began + _LONGEST_BACK_OFF + timeout)
            if crashes >= _RESTARTS or (crashes and waiting) or time.monotonic() > deadline:
                raise BackupError(
                    "Airflow does not become healthy with the restored database.",
                    details=[line for line in (_last_words(pod), phase and f"It is {phase}.") if line],
                )
            await asyncio.sleep(_POLL_SECONDS)

    def _pod(self) -> Object:
        names = self.session.names
        return self.session.cluster.get(POD, names.namespace, names.pod) or {}

    # -- back ----------------------------------------------------------------------------------------------------------

    async def _undo(self, replaced: str, loaded: str, error: BaseException) -> None:
        """Put the old database back in its place if it has left it, and drop the new one.

        Raises:
            BackupError: the old database was replaced, and is back or could not be put back.
        """
        deadline = time.monotonic() + _RECONNECT_SECONDS
        while True:
            try:
                was_replaced = await self._put_back(replaced, loaded)
                break
            except DeployerError as second:
                if not self._switched:
                    # What was loaded is in nobody's way, and the next restore drops it.
                    return
                if time.monotonic() < deadline:
                    await asyncio.sleep(_POLL_SECONDS)
                    continue
                raise BackupError(
                    f"The restore failed, and so did its way back: {error}",
                    details=[
                        second.message,
                        f"If there is a database {replaced}, it is the one of before, and the restored one is in use.",
                    ],
                    hint="once the pod can be reached: deployer status; deployer restore drops what is left over",
                ) from error
        if was_replaced and isinstance(error, DeployerError):
            raise BackupError(
                f"The restore was undone, and the database of before is in use again: {error.message}",
                details=error.details,
                hint=error.hint or "deployer status",
            ) from error

    async def _put_back(self, replaced: str, loaded: str) -> bool:
        """Undo the switch if it has happened, which is returned, and drop what was loaded."""
        async with self.postgres.psql(MAINTENANCE_DATABASE) as server:
            await _end_other_sessions(server)
            was_replaced = replaced in await _databases(server, replaced)
            if was_replaced:
                # Nothing that runs now is worth waiting for.
                await self._switch("Way back", loaded, replaced, now=True)
            await _drop(server, loaded)
        return was_replaced


def require_known_schema(manifest: Manifest, deployed: str, known: dict[str, Any] | None) -> None:
    """Refuse a backup that the deployed Airflow cannot migrate.

    Args:
        known: what the image knows; where Airflow does not run to be asked, the versions have to tell.
    """
    theirs, ours = parse_version(manifest.airflow), parse_version(deployed)
    newer = theirs is not None and ours is not None and theirs > ours
    if (not newer) if known is None else set(manifest.alembic_revisions) <= set(known["revisions"]):
        return
    way = (
        f"deploy Airflow {manifest.airflow} first (airflow.version in deployer.toml), then restore"
        if newer
        else "restore it to a deployment of that version, and upgrade that one (deployer up --upgrade)"
    )
    raise BackupError(
        f"The backup is of Airflow {manifest.airflow}, whose schema ({', '.join(manifest.alembic_revisions)}) the "
        f"deployed Airflow {deployed} does not know.",
        details=["Nothing was changed."],
        hint=way,
    )


def _require_same(expected: dict[str, Table], found: dict[str, Table]) -> None:
    """Make sure that every table has the rows that the manifest says."""
    differences = []
    for name in sorted(expected.keys() | found.keys()):
        before, after = expected.get(name), found.get(name)
        if before != after:
            was = f"{before.rows} rows" if before else "missing"
            now = f"{after.rows} rows" if after else "missing"
            differences.append(
                f"{name}: {was} in the backup, {now} restored" + (", other values" if was == now else "")
            )
    if differences:
        raise BackupError(
            f"The restored database is not that of the backup: {len(differences)} table(s) differ. The old one stays.",
            details=differences[:10],
            hint="run the command again; if it says the same, take another backup",
        )


async def _databases(server: Psql, prefix: str) -> list[str]:
    """The databases of ours whose names begin so."""
    pattern = prefix.replace("_", r"\_")
    rows = await server.query(f"SELECT datname FROM pg_database WHERE datname LIKE '{pattern}%' ORDER BY 1")  # noqa: S608
    return [name for (name,) in rows]


async def _end_other_sessions(server: Psql) -> None:
    """End what a run that was killed, or a connection that broke, may still be at: a statement goes on to its end."""
    deadline = time.monotonic() + _LEAVE_SECONDS
    others = (
        f"FROM pg_stat_activity WHERE application_name = '{APPLICATION}' AND datname = '{MAINTENANCE_DATABASE}'"
        " AND pid <> pg_backend_pid()"
    )
    while await server.value(f"SELECT count(pg_terminate_backend(pid)) {others}") != "0":
        if time.monotonic() > deadline:
            raise PostgresError(f"An earlier restore is still at work in Postgres after {_LEAVE_SECONDS:.0f} s.")
        await asyncio.sleep(0.1)


async def _drop(server: Psql, name: str) -> None:
    await server.query(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


async def _rename(server: Psql, renames: list[tuple[str, str]]) -> None:
    """Rename databases in one transaction, once nobody is connected to them.

    The first of the statements waits some seconds for those who are told to go, and keeps new ones out meanwhile.
    """
    names = ", ".join(f"'{old}'" for old, _ in renames)
    leave = f"SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname IN ({names})"  # noqa: S608
    statements = [f"ALTER DATABASE {old} RENAME TO {new}" for old, new in renames]
    await server.query(";\n".join(["BEGIN", leave, *statements, "COMMIT"]))


def _restarts(pod: Object) -> int:
    statuses = pod.get("status", {}).get("containerStatuses", [])
    return sum(int(status.get("restartCount", 0)) for status in statuses if status["name"] == "airflow")


def _waits_for_restart(pod: Object) -> bool:
    statuses = pod.get("status", {}).get("containerStatuses", [])
    states = [(status.get("state") or {}).get("waiting") or {} for status in statuses if status["name"] == "airflow"]
    return any(state.get("reason") == "CrashLoopBackOff" for state in states)


def _last_words(pod: Object) -> str:
    """What the supervisor left as the cause of its end."""
    for status in pod.get("status", {}).get("containerStatuses", []):
        if status["name"] == "airflow":
            for state in (status.get("state") or {}, status.get("lastState") or {}):
                if message := (state.get("terminated") or {}).get("message"):
                    return str(message).strip()
    return ""
