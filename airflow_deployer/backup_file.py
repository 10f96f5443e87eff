"""The file of a backup, written and read: an uncompressed tar, so that everybody can get at the dump.

    dump.pgdump     what `pg_dump --format=custom` wrote
    secrets.json    the key that stored connections and variables are encrypted with
    manifest.json   what is in the dump, and where it comes from
    SHA256SUMS      of the three, as `sha256sum --check` reads it

The dump comes first because its size is known last: its header is written when its end is there, so that nothing is
ever held in memory. The manifest is the reason why a file that was cut off is found out without reading it.

Source of the headers: https://www.gnu.org/software/tar/manual/html_node/Standard.html. Sizes above 8 GiB are written in
base 256, as GNU tar does.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from airflow_deployer.errors import BackupError

FORMAT: Literal[1] = 1
DUMP, SECRETS, MANIFEST, CHECKSUMS = "dump.pgdump", "secrets.json", "manifest.json", "SHA256SUMS"

_BLOCK = 512
_CHUNK = 1 << 20
_MODE = 0o600
# What is read as a whole: far above any real one.
_LARGEST_DOCUMENT = 64 << 20

OnBytes = Callable[[int], None]
Stream = io.BufferedReader | io.FileIO


class Table(msgspec.Struct, frozen=True):
    """What a table holds.

    Attributes:
        rows: how many.
        checksum: of all rows in any order, as `pod_postgres.Psql.table_content` computes it.
    """

    rows: int
    checksum: str


class Source(msgspec.Struct, frozen=True):
    """The deployment that a backup was made of.

    Attributes:
        content_id: the DAG content that was live, as 64 hex digits; empty where the pod did not tell.
        image: the DAG image, by digest.
    """

    context: str
    namespace: str
    name: str
    image: str
    content_id: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a backup holds, without the dump.

    Attributes:
        format: of the file.
        deployer: the version that wrote it.
        airflow: the version of Airflow.
        postgres: the version of the server, such as `17.6`; pg_restore must be of this major version or a later one.
        alembic_revisions: the rows of `alembic_version`.
        created_at: RFC 3339 by the pod's clock; the moment that the dump shows.
        database_bytes: `pg_database_size`, with indices.
        tables: by name with schema, such as `public.dag_run`.
        dump_bytes: the size of the dump.
    """

    format: int = FORMAT
    deployer: str
    airflow: str
    postgres: str
    alembic_revisions: tuple[str, ...]
    created_at: str
    source: Source
    database_bytes: int
    tables: dict[str, Table]
    dump_bytes: int = 0

    @property
    def postgres_major(self) -> int:
        """Such as 17."""
        return int(self.postgres.split(".")[0])

    @property
    def rows(self) -> int:
        """Of all tables."""
        return sum(table.rows for table in self.tables.values())


class Secrets(msgspec.Struct, frozen=True):
    """What it takes to read the stored values on another cluster, and nothing else of the deployment's Secret.

    The database's password and the keys of sessions and tokens belong to a deployment, not to its data.

    Attributes:
        fernet_key: one or more keys separated by commas, the newest first (`[core] fernet_key`).
    """

    fernet_key: str = msgspec.field(name="fernet-key")

    def __repr__(self) -> str:
        return "Secrets(...)"


class Writer:
    """A backup that is being written; made by `writing`."""

    def __init__(self, stream: io.FileIO, path: Path) -> None:
        self._stream = stream
        self._path = path
        self._digest = hashlib.sha256()
        self._finished = False
        self.dump_bytes = 0
        self._write(bytes(_BLOCK))

    def write(self, data: bytes) -> None:
        """Append to the dump.

        Raises:
            BackupError: the disk is full, or fails.
        """
        self._write(data)
        self._digest.update(data)
        self.dump_bytes += len(data)

    def dump_beginning(self, size: int) -> bytes:
        """The first bytes of the dump, at most `size`, as the file holds them."""
        return os.pread(self._stream.fileno(), min(size, self.dump_bytes), _BLOCK)

    def finish(self, manifest: Manifest, secrets: Secrets) -> Manifest:
        """Complete the file and read it again from its beginning to its end; return the manifest that it holds.

        Raises:
            BackupError: the disk is full, or does not hold what was written.
        """
        self._write(bytes(-self.dump_bytes % _BLOCK))
        manifest = msgspec.structs.replace(manifest, dump_bytes=self.dump_bytes)
        sums = [f"{self._digest.hexdigest()}  {DUMP}\n"]
        for name, document in ((SECRETS, secrets), (MANIFEST, manifest)):
            data = msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"
            sums.append(f"{hashlib.sha256(data).hexdigest()}  {name}\n")
            self._write_member(name, data)
        self._write_member(CHECKSUMS, "".join(sums).encode())
        self._write(bytes(2 * _BLOCK))
        with _told(self._path, "write"):
            self._stream.seek(0)
        self._write(_header(DUMP, self.dump_bytes))
        with _told(self._path, "write"):
            os.fsync(self._stream.fileno())
        written = _read(self._stream, self._path, lambda size: None)
        if written.manifest != manifest or written.secrets != secrets:
            raise BackupError(f"Cannot write the backup {self._path}: the disk does not hold what was written.")
        self._finished = True
        return manifest

    @property
    def finished(self) -> bool:
        """Whether the file is complete and checked."""
        return self._finished

    def _write_member(self, name: str, data: bytes) -> None:
        self._write(_header(name, len(data)) + data + bytes(-len(data) % _BLOCK))

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        with _told(self._path, "write"):
            while view:
                view = view[self._stream.write(view) :]


@contextlib.contextmanager
def writing(path: Path, *, force: bool) -> Iterator[Writer]:
    """Write a backup beside its place, and put it there once `Writer.finish` has checked it.

    What is written is never readable for others. A run that is killed leaves a hidden file `.NAME.partial`, which the
    next one to the same path takes over.

    Args:
        force: replace a file that is there.

    Raises:
        BackupError: there is a file, the folder cannot be written, or another backup is writing there.
    """
    _require_free(path, force=force)
    partial = path.with_name(f".{path.name}.partial")
    with _told(path, "write"):
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, _MODE)
    # Without a buffer: what does not fit on the disk would fail a second time when it is closed.
    with os.fdopen(descriptor, "r+b", buffering=0) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BackupError(
                f"Cannot write the backup {path}: another backup is being written there.", hint="choose another file"
            ) from None
        try:
            with _told(path, "write"):
                os.fchmod(descriptor, _MODE)
                stream.truncate()
            writer = Writer(stream, path)
            yield writer
            if writer.finished:
                _require_free(path, force=force)
                with _told(path, "write"):
                    partial.replace(path)
                    _sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class Backup:
    """A backup that was read and found whole; its file stays open."""

    path: Path
    stream: Stream
    manifest: Manifest
    secrets: Secrets

    def dump(self) -> Iterator[bytes]:
        """The dump in pieces.

        Raises:
            BackupError: the file cannot be read any more.
        """
        left = self.manifest.dump_bytes
        with _told(self.path, "read"):
            self.stream.seek(_BLOCK)
            while left:
                data = self.stream.read(min(left, _CHUNK))
                if not data:
                    raise _truncated(self.path)
                left -= len(data)
                yield data


@contextlib.contextmanager
def opened(path: Path, on_bytes: OnBytes = lambda size: None) -> Iterator[Backup]:
    """Open a backup and check every byte of it.

    Args:
        on_bytes: told how many bytes of the dump have been checked.

    Raises:
        BackupError: there is no such file, or it is none of ours, cut off, damaged, or of a newer format.
    """
    with _told(path, "read"):
        stream = path.open("rb")
    with stream:
        yield _read(stream, path, on_bytes)


def _read(stream: Stream, path: Path, on_bytes: OnBytes) -> Backup:
    with _told(path, "read"):
        size = os.fstat(stream.fileno()).st_size
        members = _members(stream, path, size)
        manifest = _manifest(stream, path, members)
        if list(members) != [DUMP, SECRETS, MANIFEST, CHECKSUMS]:
            raise _damaged(path, f"its members are {', '.join(members)}")
        digests = {DUMP: _digest(stream, path, members[DUMP], on_bytes)}
        digests |= {name: _digest(stream, path, members[name], lambda size: None) for name in (SECRETS, MANIFEST)}
        sums = _document(stream, path, members[CHECKSUMS])
        for name, digest in digests.items():
            if f"{digest}  {name}\n".encode() not in sums:
                raise _damaged(path, f"{name} is not what {CHECKSUMS} says")
        if sums != "".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode():
            raise _damaged(path, CHECKSUMS)
        _require_padding(stream, path, members, size)
        if manifest.dump_bytes != members[DUMP].size:
            raise _damaged(path, f"{DUMP} is not as long as {MANIFEST} says")
        try:
            secrets = msgspec.json.decode(_document(stream, path, members[SECRETS]), type=Secrets)
        except msgspec.DecodeError as error:
            raise _damaged(path, f"{SECRETS}: {error}") from None
    return Backup(path, stream, manifest, secrets)


@dataclass(frozen=True)
class _Member:
    """Where the content of a member is."""

    offset: int
    size: int

    @property
    def end(self) -> int:
        """Where the next header is."""
        return self.offset + self.size + -self.size % _BLOCK


def _members(stream: Stream, path: Path, size: int) -> dict[str, _Member]:
    """Read the headers, each of which must be byte for byte as we write it."""
    members: dict[str, _Member] = {}
    offset = 0
    while True:
        stream.seek(offset)
        block = stream.read(_BLOCK)
        if offset and block == bytes(_BLOCK):
            return members
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            if not offset:
                raise _foreign(path, block) from None
            if len(block) < _BLOCK:
                raise _truncated(path) from None
            raise _damaged(path, f"no header at byte {offset}") from None
        if not offset and info.name != DUMP:
            raise _foreign(path, block)
        if block != _header(info.name, info.size):
            raise _damaged(path, f"the header at byte {offset}")
        member = members[info.name] = _Member(offset + _BLOCK, info.size)
        if member.end > size:
            raise _truncated(path)
        offset = member.end


def _manifest(stream: Stream, path: Path, members: dict[str, _Member]) -> Manifest:
    """Read the manifest, first of all for the format: a newer one may have other members."""
    if MANIFEST not in members:
        raise _damaged(path, f"it has no {MANIFEST}")
    data = _document(stream, path, members[MANIFEST])
    try:
        found = msgspec.json.decode(data, type=dict[str, object]).get("format")
        if isinstance(found, int) and found > FORMAT:
            raise BackupError(
                f"Cannot read the backup {path}: its format is {found}, and this deployer knows {FORMAT} only.",
                hint="pip install --upgrade airflow-deployer",
            )
        return msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as error:
        raise _damaged(path, f"{MANIFEST}: {error}") from None


def _document(stream: Stream, path: Path, member: _Member) -> bytes:
    if member.size > _LARGEST_DOCUMENT:
        raise _damaged(path, f"a document of {member.size} bytes")
    stream.seek(member.offset)
    return stream.read(member.size)


def _digest(stream: Stream, path: Path, member: _Member, on_bytes: OnBytes) -> str:
    digest = hashlib.sha256()
    stream.seek(member.offset)
    left = member.size
    while left:
        data = stream.read(min(left, _CHUNK))
        if not data:
            raise _truncated(path)
        digest.update(data)
        left -= len(data)
        on_bytes(member.size - left)
    return digest.hexdigest()


def _require_padding(stream: Stream, path: Path, members: dict[str, _Member], size: int) -> None:
    """Make sure that what belongs to no member is zero: the blocks' rest, and the two blocks at the end."""
    end = 0
    for member in members.values():
        stream.seek(member.offset + member.size)
        end = member.end
        if any(stream.read(end - member.offset - member.size)):
            raise _damaged(path, f"at byte {end}")
    if size < end + 2 * _BLOCK:
        raise _truncated(path)
    stream.seek(end)
    if size > end + 2 * _BLOCK or any(stream.read()):
        raise _damaged(path, "something follows its end")


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = _MODE
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _require_free(path: Path, *, force: bool) -> None:
    if path.is_dir():
        raise BackupError(f"Cannot write the backup {path}: that is a folder.", hint=f"deployer backup {path}/FILE")
    if not force and os.path.lexists(path):
        raise BackupError(
            f"Cannot write the backup {path}: the file exists.",
            hint=f"choose another, or: deployer backup {path} --force",
        )


def _sync_folder(folder: Path) -> None:
    """Make the new name last; some file systems cannot, and need not."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _told(path: Path, action: str) -> Iterator[None]:
    """Tell the operating system's errors as ours."""
    try:
        yield
    except OSError as error:
        raise BackupError(f"Cannot {action} the backup {path}: {error.strerror or error}.") from error


def _foreign(path: Path, beginning: bytes) -> BackupError:
    if beginning and not any(beginning):
        return BackupError(f"Cannot read the backup {path}: it was never completed.", hint="take another backup")
    if beginning.startswith(b"PGDMP"):
        return BackupError(
            f"Cannot read the backup {path}: it is a dump by pg_dump alone, without the manifest and the key.",
            hint="deployer backup FILE   makes what deployer restore reads",
        )
    return BackupError(
        f"Cannot read the backup {path}: it is no file that deployer backup made.",
        hint="deployer backup FILE   makes what deployer restore reads",
    )


def _truncated(path: Path) -> BackupError:
    return BackupError(
        f"Cannot read the backup {path}: it is cut off.",
        hint="copy it again from where it came, or take another backup",
    )


def _damaged(path: Path, what: str) -> BackupError:
    return BackupError(
        f"Cannot read the backup {path}: it is damaged ({what}).",
        hint="copy it again from where it came, or take another backup",
    )
