"""The versions of the DAG content on the volume: what is live, what a cut leaves behind, what is removed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from airflow_deployer_pod.content_store import (
    ContentError,
    FileEntry,
    Stage,
    Store,
    check_entry,
    check_path,
    files_id,
)
from pytest_mock import MockerFixture

from airflow_deployer import content

Files = Mapping[str, bytes]
FIRST = {"dags/a.py": b"a", "dags/team/b c.py": b"", "include/\u00fc\nmlaut.sql": b"select"}


def entries(files: Files) -> dict[str, FileEntry]:
    return {path: FileEntry(False, len(data), hashlib.sha256(data).hexdigest()) for path, data in files.items()}


def stage(store: Store, files: Files, base: Files | None = None) -> Stage:
    """Stage `files` as a change of `base`, and bring what is needed."""
    new, old = entries(files), entries(base or {})
    put = {path: entry for path, entry in new.items() if old.get(path) != entry}
    staged = store.stage(
        files_id(new), files_id(old) if base is not None else None, put, [path for path in old if path not in new]
    )
    try:
        for path in staged.need:
            staged.write(files[path])
        staged.finish()
    except ContentError:
        staged.discard()
        raise
    return staged


def live(store: Store) -> dict[str, bytes]:
    root = store.current
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store in which FIRST is live, deployed at 1."""
    image = tmp_path / "image"
    write(image, FIRST)
    found = Store(tmp_path / "content")
    assert found.adopt(image, files_id(entries(FIRST)), 1)
    return found


def write(folder: Path, files: Files) -> None:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def test_the_content_id_is_that_of_the_host(tmp_path: Path) -> None:
    write(tmp_path, FIRST)
    (tmp_path / "dags" / "a.py").chmod(0o755)
    project = content.read_folder(tmp_path)
    there = {file.path: FileEntry(file.executable, file.size, file.digest.hex()) for file in project}
    assert files_id(there) == content.files_id(project)
    assert [entry.executable for entry in there.values()].count(True) == 1


@pytest.mark.parametrize("path", ["dags/a.py", "include/a b/\u00e4\n.sql", "dags/..a", "dags/\\.py"])
def test_a_path_below_the_content_folders_is_taken(path: str) -> None:
    assert check_path(path) == path


@pytest.mark.parametrize(
    "path",
    [
        *("", "/dags/a", "dags", "dags/", "dags//a", "dags/./a", "dags/../a", "../dags/a", "plugins/a.py"),
        *("dags/a\0b", "dags/\udce4.py", "dags/" + "x" * 256),
    ],
)
def test_any_other_path_is_refused(path: str) -> None:
    with pytest.raises(ContentError, match="The path"):
        check_path(path)


@pytest.mark.parametrize(("size", "digest"), [(-1, "0" * 64), ("1", "0" * 64), (1, "0" * 63), (1, None), (1, "Z" * 64)])
def test_an_entry_that_is_none_is_refused(size: Any, digest: Any) -> None:
    with pytest.raises(ContentError, match="size or digest"):
        check_entry(False, size, digest)


def test_the_content_of_the_image_becomes_live_once(store: Store, tmp_path: Path) -> None:
    assert live(store) == FIRST
    content_id = files_id(entries(FIRST))
    assert store.state() == {"live": content_id, "deployed": content_id, "deployed_at": 1, "files": 3}
    assert not store.adopt(tmp_path / "image", content_id, 1)
    with pytest.raises(ContentError, match="not 000000000000, which the StatefulSet names"):
        store.adopt(tmp_path / "image", "0" * 64, 2)
    assert live(store) == FIRST


def test_a_restart_keeps_what_was_synced_and_a_deploy_replaces_it(store: Store, tmp_path: Path) -> None:
    first_id = files_id(entries(FIRST))
    second = {**FIRST, "dags/a.py": b"b"}
    stage(store, second, FIRST).switch()
    assert store.state()["deployed"] == first_id
    assert not store.adopt(tmp_path / "image", first_id, 1)
    assert live(store) == second
    assert store.adopt(tmp_path / "image", first_id, 2)
    assert live(store) == FIRST
    assert store.state()["deployed_at"] == 2


def test_a_deploy_into_the_running_pod_outlives_its_restart(store: Store, tmp_path: Path) -> None:
    second = {**FIRST, "dags/a.py": b"b"}
    stage(store, second, FIRST).switch(deployed_at=5)
    # The old container starts again with its old environment, then a new pod with the new one.
    assert not store.adopt(tmp_path / "image", files_id(entries(FIRST)), 1)
    assert not store.adopt(tmp_path / "image", files_id(entries(second)), 5)
    assert live(store) == second


def test_a_change_links_what_stays_and_keeps_what_was(store: Store) -> None:
    second = {"dags/a.py": b"a2", "dags/team/b c.py": b"", "dags/renamed.sql": b"select"}
    staged = stage(store, second, FIRST)
    assert staged.need == ["dags/a.py"]
    assert live(store) == FIRST
    before = store.current.resolve()
    at = staged.switch()
    assert live(store) == second
    after = store.current.resolve()
    assert (after / "dags/team/b c.py").stat().st_ino == (before / "dags/team/b c.py").stat().st_ino
    assert (after / "dags/a.py").stat().st_mode & 0o777 == 0o444
    assert abs((after / "dags/a.py").stat().st_mtime - at) < 1.0
    assert {file.name for file in store.versions.iterdir()} == {before.name, after.name}


def test_going_back_needs_no_bytes(store: Store) -> None:
    second = {**FIRST, "dags/a.py": b"b"}
    stage(store, second, FIRST).switch()
    back = stage(store, FIRST)
    assert back.need == []
    back.switch()
    assert live(store) == FIRST
    again = stage(store, FIRST, FIRST)
    again.switch(deployed_at=7)
    assert store.state()["deployed_at"] == 7


def test_a_digest_or_an_id_that_does_not_fit_is_refused(store: Store) -> None:
    with pytest.raises(ContentError, match="These files are the content"):
        store.stage("0" * 64, None, entries(FIRST))
    for base in ("0" * 64, "../state", ""):
        with pytest.raises(ContentError, match="is not on the volume"):
            store.stage(files_id(entries(FIRST)), base, {})
    new = entries({"dags/x.py": b"xx"})
    for data, text in ((b"yy", "changed while it was sent"), (b"xxx", "More bytes"), (b"x", "are missing")):
        staged = store.stage(files_id(new), None, new)
        with pytest.raises(ContentError, match=text):
            staged.write(data)
            staged.finish()
        staged.discard()
    assert live(store) == FIRST
    assert list(store.staging.iterdir()) == []


def test_a_file_where_another_needs_a_folder_is_refused(store: Store) -> None:
    both = {"dags/x": b"1", "dags/x/y.py": b"2"}
    with pytest.raises(ContentError) as caught:
        stage(store, both).discard()
    assert caught.value.kind == "invalid"
    # The lock is free, and nothing is left.
    stage(store, FIRST).discard()
    assert list(store.staging.iterdir()) == []


def test_who_comes_second_is_told_so(store: Store) -> None:
    first = stage(store, {**FIRST, "dags/a.py": b"b"}, FIRST)
    other = Store(store.folder)
    with pytest.raises(ContentError) as caught:
        stage(other, FIRST)
    assert caught.value.kind == "busy"
    first.discard()
    stage(other, FIRST).discard()


@pytest.mark.parametrize("cut", range(7))
def test_a_switch_that_is_cut_off_anywhere_leaves_one_whole_content_live(
    store: Store, mocker: MockerFixture, cut: int
) -> None:
    second = {**FIRST, "dags/a.py": b"b"}
    staged = stage(store, second, FIRST)
    calls = 0

    class Cut(BaseException):
        pass

    def counted(real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > cut:
                raise Cut
            return real(*arguments, **options)

        return call

    # A process that is killed removes nothing: nor may this one.
    mocker.patch("airflow_deployer_pod.content_store._remove_tree")
    for name in ("rename", "symlink_to"):
        mocker.patch.object(Path, name, counted(getattr(Path, name)))
    with contextlib.suppress(Cut):
        staged.switch(deployed_at=9)
    mocker.stopall()
    found = Store(store.folder)
    assert live(found) == (second if cut >= 4 else FIRST)
    assert found.live_manifest().files == entries(live(found))
    # Whoever comes next finishes it.
    stage(found, second).switch(deployed_at=9)
    assert live(found) == second
    assert found.state()["deployed_at"] == 9
    assert list(found.staging.iterdir()) == []


def test_a_full_volume_changes_nothing(store: Store, mocker: MockerFixture) -> None:
    new = {**FIRST, "dags/a.py": b"b" * 10}
    staged = store.stage(files_id(entries(new)), files_id(entries(FIRST)), entries({"dags/a.py": new["dags/a.py"]}))
    mocker.patch("os.fsync", side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(ContentError) as caught:
        staged.write(new["dags/a.py"])
    staged.discard()
    assert (caught.value.kind, str(caught.value)) == ("no_space", "The volume is full.")
    mocker.stopall()
    assert live(store) == FIRST
    assert list(store.staging.iterdir()) == []


def test_a_volume_without_hard_links_gets_copies(store: Store, mocker: MockerFixture) -> None:
    mocker.patch("os.link", side_effect=OSError(errno.EPERM, "Operation not permitted"))
    second = {**FIRST, "dags/a.py": b"b"}
    stage(store, second, FIRST).switch()
    assert live(store) == second


def test_versions_that_nothing_needs_are_removed(store: Store) -> None:
    base: Files = FIRST
    names = [str(store.live_version())]
    for number in range(6):
        new = {**FIRST, "dags/a.py": b"%d" % number}
        stage(store, new, base).switch()
        base = new
        names.append(str(store.live_version()))
    for number, name in enumerate(names):
        os.utime(store.manifests / f"{name}.json", (number, number))
    assert store.remove_unneeded([names[1], "gone"], kept=2) == [names[4], names[3], names[2], names[0]]
    assert {folder.name for folder in store.versions.iterdir()} == {names[1], names[5], names[6]}
    assert {file.stem for file in store.manifests.iterdir()} == {names[1], names[5], names[6]}
    assert list(store.staging.iterdir()) == []
    assert live(store) == base


def test_leftovers_and_broken_manifests_do_no_harm(store: Store) -> None:
    (store.staging / "left").mkdir()
    (store.staging / "left" / "file").write_text("x")
    (store.manifests / "000000000000.json").write_text("{")
    (store.versions / "000000000000").mkdir()
    assert store.manifest("000000000000") is None
    stage(store, {**FIRST, "dags/a.py": b"b"}, FIRST).switch()
    assert list(store.staging.iterdir()) == []
