"""The file of a backup: written, read, and refused in whatever way it is not what it should be."""

from __future__ import annotations

import fcntl
import io
import os
import resource
import subprocess
import tarfile
from pathlib import Path

import msgspec
import pytest

from airflow_deployer import backup_file
from airflow_deployer.backup_file import Manifest, Secrets, Source, Table
from airflow_deployer.errors import BackupError

SECRETS = Secrets("a-fernet-key")
MANIFEST = Manifest(
    deployer="0.1.0",
    airflow="3.3.2",
    postgres="17.6",
    alembic_revisions=("abc",),
    created_at="2026-11-23T16:00:00.000000Z",
    source=Source("kind-dev", "team-a", "airflow", "registry/airflow@sha256:00", "c0ffee"),
    database_bytes=12_000_000,
    tables={"public.dag_run": Table(3, "123"), "public.variable": Table(1, "-5")},
)


def write(path: Path, dump: bytes = b"PGDMP and more", *, force: bool = False) -> Path:
    with backup_file.writing(path, force=force) as writer:
        writer.write(dump[:5])
        writer.write(dump[5:])
        writer.finish(MANIFEST, SECRETS)
    return path


@pytest.mark.parametrize("size", [0, 5, 511, 512, 513, 3_000_000])
def test_what_is_written_is_read(tmp_path: Path, size: int) -> None:
    dump = os.urandom(size)
    path = write(tmp_path / "a.backup", dump)
    seen: list[int] = []
    with backup_file.opened(path, seen.append) as backup:
        assert b"".join(backup.dump()) == dump
        assert backup.secrets == SECRETS
        assert backup.manifest == msgspec.structs.replace(MANIFEST, dump_bytes=size)
    assert (backup.manifest.postgres_major, backup.manifest.rows) == (17, 4)
    assert not size or max(seen) == size


def test_the_file_is_a_tar_for_everybody(tmp_path: Path) -> None:
    dump = os.urandom(1000)
    path = write(tmp_path / "a.backup", dump)
    subprocess.run(["tar", "xf", path], cwd=tmp_path, check=True)
    assert (tmp_path / "dump.pgdump").read_bytes() == dump
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=True)
    assert (tmp_path / "secrets.json").read_text() == '{\n "fernet-key": "a-fernet-key"\n}\n'
    assert (tmp_path / "secrets.json").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "manifest.json").read_text().startswith('{\n "format": 1,')


def test_only_the_owner_can_read_it_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "a.backup"
    before = os.umask(0)
    try:
        with backup_file.writing(path, force=False) as writer:
            (partial,) = tmp_path.iterdir()
            assert partial.stat().st_mode & 0o777 == 0o600
            writer.finish(MANIFEST, SECRETS)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_not_finished_never_gets_the_name(tmp_path: Path) -> None:
    path = tmp_path / "a.backup"
    with pytest.raises(RuntimeError), backup_file.writing(path, force=False) as writer:
        writer.write(b"half")
        raise RuntimeError
    with backup_file.writing(path, force=False) as writer:
        writer.write(b"half")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_only_by_force(tmp_path: Path) -> None:
    path = write(tmp_path / "a.backup", b"the old one")
    before = path.read_bytes()
    with pytest.raises(BackupError, match="the file exists") as caught, backup_file.writing(path, force=False):
        pass
    assert "--force" in caught.value.hint
    with pytest.raises(RuntimeError), backup_file.writing(path, force=True):
        raise RuntimeError
    assert path.read_bytes() == before
    write(path, b"the new one", force=True)
    with backup_file.opened(path) as backup:
        assert b"".join(backup.dump()) == b"the new one"


def test_a_file_that_came_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.backup"
    with pytest.raises(BackupError, match="the file exists"), backup_file.writing(path, force=False) as writer:
        path.write_text("somebody's")
        writer.finish(MANIFEST, SECRETS)
    assert path.read_text() == "somebody's"


def test_two_at_once_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a.backup"
    with (tmp_path / ".a.backup.partial").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BackupError, match="another backup"), backup_file.writing(path, force=False):
            pass
    # What a run that was killed has left is taken over.
    (tmp_path / ".a.backup.partial").write_bytes(b"x" * 10_000)
    with backup_file.opened(write(path)) as backup:
        assert b"".join(backup.dump()) == b"PGDMP and more"


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(BackupError, match="No such file or directory"):
        write(tmp_path / "nowhere" / "a.backup")
    with pytest.raises(BackupError, match="is a folder"):
        write(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with (
            pytest.raises(BackupError, match="File too large"),
            backup_file.writing(tmp_path / "a.backup", force=False) as writer,
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
            writer.write(bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_every_byte_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.backup", b"PGDMP" + b"dump" * 100)
    whole = path.read_bytes()
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with (
            pytest.raises(BackupError, match=r"damaged|no file that deployer|format is|cut off"),
            backup_file.opened(path),
        ):
            pass


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.backup", b"PGDMP" + b"dump" * 100)
    whole = path.read_bytes()
    for size in range(512, len(whole), 13):
        path.write_bytes(whole[:size])
        with pytest.raises(BackupError, match=r"cut off|damaged \(it has no manifest"), backup_file.opened(path):
            pass
    path.write_bytes(whole + b"\0")
    with pytest.raises(BackupError, match="something follows its end"), backup_file.opened(path):
        pass


def tar_of(**members: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "no file that deployer backup made"),
        (b"hello", "no file that deployer backup made"),
        (os.urandom(5000), "no file that deployer backup made"),
        (bytes(5000), "was never completed"),
        (b"PGDMP" + bytes(5000), "dump by pg_dump alone"),
        (tar_of(photos=b"..."), "no file that deployer backup made"),
    ],
)
def test_foreign_files(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "a.backup"
    path.write_bytes(content)
    with pytest.raises(BackupError, match=cause) as caught, backup_file.opened(path):
        pass
    assert caught.value.hint


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(BackupError, match="No such file"), backup_file.opened(tmp_path / "a.backup"):
        pass
    with pytest.raises(BackupError, match="Is a directory"), backup_file.opened(tmp_path):
        pass


def test_a_newer_format_is_told_from_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "a.backup")
    path.write_bytes(path.read_bytes().replace(b'"format": 1,', b'"format": 2,'))
    with (
        pytest.raises(BackupError, match="its format is 2, and this deployer knows 1 only") as caught,
        backup_file.opened(path),
    ):
        pass
    assert "upgrade airflow-deployer" in caught.value.hint


def test_a_dump_above_8_gib_has_a_size_that_tar_knows() -> None:
    header = backup_file._header(backup_file.DUMP, 9 << 30)
    assert tarfile.TarInfo.frombuf(header, "utf-8", "strict").size == 9 << 30
    assert len(header) == 512


def test_the_key_is_not_shown() -> None:
    assert "a-fernet-key" not in repr(SECRETS)
