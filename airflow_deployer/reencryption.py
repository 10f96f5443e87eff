"""The values that Airflow stores encrypted, from one deployment's key to another's.

A deployment keeps its own Fernet key: the pod reads the Secret through a volume that follows a change only after a
minute or so, and a key that changed together with the database would leave one of the two without the other whenever
something breaks in between. So the values are moved to the key, in the restored database, before anybody uses it.

The columns are those that `airflow rotate-fernet-key` knows (`airflow/cli/commands/rotate_fernet_key_command.py` of
3.3, fewer in earlier versions).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from airflow_deployer.errors import BackupError
from airflow_deployer.pod_postgres import Psql

_BATCH = 500


@dataclass(frozen=True)
class _Column:
    """A column of values that may be encrypted.

    Attributes:
        label: what a person knows the row by.
        condition: which rows are encrypted.
    """

    table: str
    column: str
    label: str
    condition: str


_COLUMNS = (
    _Column("connection", "password", "conn_id", "is_encrypted"),
    _Column("connection", "extra", "conn_id", "is_extra_encrypted"),
    _Column("connection_test_request", "password", "connection_id", "is_encrypted"),
    _Column("connection_test_request", "extra", "connection_id", "is_extra_encrypted"),
    _Column("variable", "val", "key", "is_encrypted"),
    # Not encrypted before 2.9, and left as they were by its migration: then they are JSON.
    _Column("trigger", "kwargs", "id", "kwargs::text !~ '^[{]'"),
)


@dataclass(frozen=True)
class Reencrypted:
    """How many values were encrypted anew, and which could not be read, as `table.column of row`."""

    values: int
    unreadable: tuple[str, ...]


async def reencrypt(psql: Psql, *, old_keys: str, new_keys: str, on_value: Callable[[int], None]) -> Reencrypted:
    """Decrypt every stored value with one deployment's key and encrypt it with the other's, in one transaction.

    Args:
        old_keys, new_keys: Fernet keys separated by commas; the first of the new ones encrypts.
        on_value: told how many are done.

    Raises:
        BackupError: a key is none.
        PostgresError: as of `Psql.query`.
    """
    if old_keys == new_keys:
        return Reencrypted(0, ())
    rotate = _rotation(old_keys, new_keys)
    done = 0
    unreadable: list[str] = []
    await psql.query("BEGIN")
    for column in _COLUMNS:
        if not await _exists(psql, column):
            continue
        rows = await psql.query(
            f"SELECT id, {column.label}, {column.column} FROM public.{column.table}"  # noqa: S608 - our own names
            f" WHERE {column.condition} AND {column.column}::text <> '' ORDER BY 1"
        )
        updates = []
        for key, label, value in rows:
            rotated = rotate(value)
            if rotated is None:
                unreadable.append(f"{column.table}.{column.column} of {label}")
            else:
                updates.append(f"('{key}', '{rotated}')")
        for start in range(0, len(updates), _BATCH):
            batch = updates[start : start + _BATCH]
            await psql.query(
                f"UPDATE public.{column.table} AS t SET {column.column} = new.value"  # noqa: S608 - hex, digits, base64
                f" FROM (VALUES {', '.join(batch)}) AS new (id, value) WHERE t.id::text = new.id"
            )
            done += len(batch)
            on_value(done)
    await psql.query("COMMIT")
    return Reencrypted(done, tuple(unreadable))


async def _exists(psql: Psql, column: _Column) -> bool:
    needed = {column.column, "id", column.label}
    rows = await psql.query(
        "SELECT column_name FROM information_schema.columns"  # noqa: S608 - our own names
        f" WHERE table_schema = 'public' AND table_name = '{column.table}'"
    )
    return needed <= {name for (name,) in rows}


def _rotation(old_keys: str, new_keys: str) -> Callable[[str], str | None]:
    """A function from one token to another; None for what the old keys do not decrypt."""
    from cryptography.fernet import Fernet, InvalidToken, MultiFernet

    def keyring(keys: str) -> MultiFernet:
        return MultiFernet([Fernet(key.strip()) for key in keys.split(",")])

    try:
        old, new = keyring(old_keys), keyring(new_keys)
    except ValueError:
        raise BackupError("The Fernet key of the backup or of this deployment is none.") from None

    def rotate(token: str) -> str | None:
        try:
            return new.encrypt(old.decrypt(token.encode())).decode()
        except InvalidToken:
            return None

    return rotate
