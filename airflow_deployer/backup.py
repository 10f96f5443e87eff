"""`deployer backup`: the database of a deployment into a file, while Airflow goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from airflow_deployer import __version__, backup_file, credentials, lease
from airflow_deployer.api_streams import ApiServer
from airflow_deployer.backup_file import Manifest, Secrets, Source, Table, Writer
from airflow_deployer.cluster import POD, SECRET, STATEFUL_SET, Object
from airflow_deployer.config import Settings
from airflow_deployer.connection import Session, connect, deployed_image, live_content
from airflow_deployer.errors import BackupError
from airflow_deployer.pod_postgres import Postgres
from airflow_deployer.progress import Progress
from airflow_deployer.reports import BackupReport

_TABLE_OF_CONTENTS_BYTES = 16 << 20
_SHOW_SECONDS = 0.2

_FACTS = """
SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), current_setting('server_version'),
pg_database_size(current_database())
"""

_T = TypeVar("_T")


def backup(settings: Settings, file: Path, progress: Progress, *, force: bool) -> BackupReport:
    """Write a backup of the deployment's database, under its lock.

    Args:
        force: replace a file that is there.

    Raises:
        BackupError: there is nothing to back up, the file cannot be written, or the connection to the pod broke.
    """
    session = connect(settings)
    names = session.names
    # Before the lock, which needs a namespace that there may not be.
    require_deployment(session)
    with lease.held(session.cluster, names.namespace, names.lease, labels=names.labels, doing="backup"):
        return write(session, file, progress, force=force)


def write(session: Session, file: Path, progress: Progress, *, force: bool = False) -> BackupReport:
    """Write a backup for somebody who holds the lock; errors as of `backup`."""
    began = time.monotonic()
    stateful_set, _, secret = require_deployment(session)
    secrets = Secrets(secret[credentials.FERNET_KEY])
    with backup_file.writing(file, force=force) as writer, progress.step("Backup") as step:

        async def run(postgres: Postgres) -> Manifest:
            contents, manifest = await _dump(postgres, writer, _described(session, stateful_set), step.update)
            step.update("checking the file")
            listed = await postgres.dumped_tables(writer.dump_beginning(_TABLE_OF_CONTENTS_BYTES))
            if listed != contents.keys():
                odd = ", ".join(sorted(listed ^ contents.keys())[:5])
                raise BackupError(
                    f"The dump does not hold what the database does: {odd}.", hint="run the command again"
                )
            # Not in this loop, which has to hear the pod meanwhile: a large file takes a while to be on the disk.
            return await asyncio.to_thread(writer.finish, manifest, secrets)

        manifest = with_postgres(session, run)
        seconds = time.monotonic() - began
        step.done(f"{megabytes(manifest.dump_bytes)} in {seconds:.1f} s")
    return BackupReport(
        context=session.context.name,
        namespace=session.names.namespace,
        name=session.names.name,
        file=str(file),
        bytes=file.stat().st_size,
        database_bytes=manifest.database_bytes,
        tables=len(manifest.tables),
        rows=manifest.rows,
        airflow_version=manifest.airflow,
        postgres_version=manifest.postgres,
        created_at=manifest.created_at,
        seconds=round(seconds, 2),
    )


def require_deployment(session: Session) -> tuple[Object, Object, dict[str, str]]:
    """The StatefulSet, its pod and the values of the Secret, all of which a backup or a restore takes.

    Raises:
        BackupError: one of them is not there.
    """
    cluster, names = session.cluster, session.names
    stateful_set = cluster.get(STATEFUL_SET, names.namespace, names.name)
    pod = cluster.get(POD, names.namespace, names.pod)
    secret = cluster.get(SECRET, names.namespace, names.secret)
    if stateful_set is None or pod is None or secret is None:
        missing = (
            "it is not deployed" if stateful_set is None else "it has no pod" if pod is None else "its Secret is gone"
        )
        raise BackupError(
            f"Cannot reach the database of {names.name} in namespace {names.namespace!r}: {missing}.",
            hint="deployer up   deploys it; its volume keeps the database",
        )
    return stateful_set, pod, credentials.decode(secret["data"])


def with_postgres(session: Session, work: Callable[[Postgres], Coroutine[Any, Any, _T]]) -> _T:
    """Run `work` in a loop of its own, with the Postgres of the deployment's pod."""

    async def run() -> _T:
        api = ApiServer(session.context.name, session.context.kubeconfig)
        try:
            await api.load()
            return await work(Postgres(api, session.names))
        finally:
            await api.close()

    return asyncio.run(run())


def megabytes(size: float) -> str:
    """A number of bytes for a person."""
    return f"{size / 1e6:,.1f} MB"


def _described(session: Session, stateful_set: Object) -> Callable[..., Manifest]:
    """A manifest of this deployment, but for what only its database knows."""
    image = deployed_image(stateful_set)
    live = (live_content(session) or {}).get("live")
    source = Source(
        context=session.context.name,
        namespace=session.names.namespace,
        name=session.names.name,
        image=image.reference if image else "",
        content_id=live or (image.content_id if image else ""),
    )
    airflow = stateful_set["metadata"]["labels"].get("app.kubernetes.io/version", "")

    def manifest(**facts: Any) -> Manifest:
        return Manifest(deployer=__version__, airflow=airflow, source=source, **facts)

    return manifest


async def _dump(
    postgres: Postgres, writer: Writer, describe: Callable[..., Manifest], show: Callable[[str], None]
) -> tuple[dict[str, Table], Manifest]:
    """Dump the database, and count and sum up its tables at the same time, in one and the same snapshot."""
    counted = ""
    began = shown = time.monotonic()

    def write(data: bytes) -> None:
        nonlocal shown
        writer.write(data)
        now = time.monotonic()
        if now - shown > _SHOW_SECONDS:
            shown = now
            show(f"{megabytes(writer.dump_bytes)}, {megabytes(writer.dump_bytes / (now - began))}/s{counted}")

    def on_table(name: str) -> None:
        nonlocal counted
        counted = f", counting {name}"

    async with postgres.psql(credentials.POSTGRES_DATABASE) as psql:
        # The snapshot lives as long as this transaction, whose session must not be ended for being idle in it.
        await psql.query(
            "SET idle_in_transaction_session_timeout = 0; BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY"
        )
        snapshot = await psql.value("SELECT pg_export_snapshot()")
        ((created_at, version, size),) = await psql.query(_FACTS)
        if not await psql.value("SELECT to_regclass('alembic_version')"):
            raise BackupError("There is nothing to back up: the database has no tables of Airflow yet.")
        revisions = await psql.query("SELECT version_num FROM alembic_version ORDER BY 1")
        major = int(version.split(".")[0])
        dumping = asyncio.create_task(postgres.dump(credentials.POSTGRES_DATABASE, snapshot, write, major=major))
        counting = asyncio.create_task(psql.table_contents(on_table))
        try:
            contents, _ = await asyncio.gather(counting, dumping)
        finally:
            for task in (dumping, counting):
                task.cancel()
            await asyncio.gather(dumping, counting, return_exceptions=True)
    manifest = describe(
        postgres=version.split(" ")[0],
        alembic_revisions=tuple(revision for (revision,) in revisions),
        created_at=created_at,
        database_bytes=int(size),
        tables=contents,
    )
    return contents, manifest
