"""The interpreter of the machine that an image is made from: which one, what is wrong with it, what of it is taken."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from airflow_deployer.errors import LocalClusterError
from airflow_deployer.local_cluster.native import interpreter
from airflow_deployer.local_cluster.native.layout import Layout


def install(versions: Path, name: str, program: str = "#!/bin/sh\n") -> Path:
    """An installation directory as pyenv makes it, with `program` as its interpreter."""
    prefix = versions / name
    path = prefix / "bin" / f"python{name.rpartition('.')[0]}"
    path.parent.mkdir(parents=True)
    path.write_text(program)
    path.chmod(0o755)
    return prefix


def test_where_pyenv_keeps_its_interpreters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert interpreter.versions_directory({}) == tmp_path / ".pyenv/versions"
    assert interpreter.versions_directory({"PYENV_ROOT": ""}) == tmp_path / ".pyenv/versions"
    assert interpreter.versions_directory({"PYENV_ROOT": "/opt/pyenv"}) == Path("/opt/pyenv/versions")


def test_the_newest_of_its_series_is_taken(tmp_path: Path) -> None:
    assert interpreter.find(tmp_path / "none", "3.8") is None
    for name in ("3.8.9", "3.8.18", "3.7.17", "3.80.1"):
        install(tmp_path, name)
    (tmp_path / "3.8.20").mkdir()
    (tmp_path / "3.8-dev").mkdir()
    assert interpreter.find(tmp_path, "3.8") == tmp_path / "3.8.18"


def test_without_one_the_error_says_what_is_missing_and_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    with pytest.raises(LocalClusterError) as caught:
        interpreter.require("3.8", "library/python:3.8-slim-bookworm", layout.state)
    assert "making library/python:3.8-slim-bookworm failed" in caught.value.message
    assert f"{tmp_path}/versions/3.8.*" in caught.value.message
    assert "`pyenv install 3.8`" in caught.value.hint


def test_one_without_the_modules_that_airflow_needs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    prefix = install(tmp_path / "versions", "3.8.18", "#!/bin/sh\nprintf 'lzma\\nssl\\n'\n")
    with pytest.raises(LocalClusterError) as caught:
        interpreter.require("3.8", "an image", layout.state)
    assert caught.value.message == f"making an image failed: {prefix}/bin/python3.8 was built without lzma, ssl"
    assert "`pyenv install --force 3.8.18`" in caught.value.hint


def test_its_own_installation_is_packed_for_another_place(tmp_path: Path) -> None:
    prefix = install(tmp_path, "3.8.18", f"\0ELF\0{tmp_path}/3.8.18/lib\0")
    library = prefix / "lib/python3.8"
    for name, text in {
        "bin/pydoc3.8": f"#!{prefix}/bin/python3.8\n",
        "bin/black": "installed later",
        "bin/python3.8-gdb.py": "",
        "lib/libpython3.8.a": "",
        "lib/node_modules/x.js": "",
        "share/man/python.1": "",
        "lib/python3.8/os.py": "",
        "lib/python3.8/__pycache__/os.cpython-38.pyc": "",
        "lib/python3.8/test/test_os.py": "",
        "lib/python3.8/sqlite3/test/dbapi.py": "",
        "lib/python3.8/site-packages/black.py": "",
    }.items():
        path = prefix / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (prefix / "bin/python3").symlink_to("python3.8")
    os.link(library / "os.py", library / "same.py")

    interpreter.pack(prefix, tmp_path / "interpreter.tar")
    with tarfile.open(tmp_path / "interpreter.tar") as archive:
        members = {member.name: member for member in archive.getmembers()}
        assert sorted(members) == [
            "bin/pydoc3.8",
            "bin/python3",
            "bin/python3.8",
            "lib/python3.8",
            "lib/python3.8/os.py",
            "lib/python3.8/same.py",
            "lib/python3.8/sqlite3",
        ]
        assert members["bin/python3"].linkname == "python3.8"
        assert members["lib/python3.8/same.py"].isreg()
        assert all((member.uid, member.gid, member.uname) == (0, 0, "") for member in members.values())
        script = archive.extractfile("bin/pydoc3.8")
        assert script is not None
        assert script.read() == b"#!/usr/local/bin/python3.8\n"
        # A program's bytes stay: another length would break it.
        program = archive.extractfile("bin/python3.8")
        assert program is not None
        assert program.read() == (prefix / "bin/python3.8").read_bytes()
        assert members["bin/python3.8"].mode == 0o755
