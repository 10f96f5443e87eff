"""A CPython of this machine for an image whose series no Debian release provides any more: found, checked, packed.

pyenv builds it from source against the libraries of the machine's Debian release, which is the image's too.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

from airflow_deployer.errors import LocalClusterError

from .commands import read

# Where it stands in the image, as in the public ones.
PREFIX = "/usr/local"

# A build leaves out silently what it found no development package for; Airflow, pip and venv need these.
_NEEDED = ("bz2", "ctypes", "ensurepip", "hashlib", "lzma", "readline", "sqlite3", "ssl", "uuid", "venv", "zlib")
_IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError:
        print(name)
"""

# CPython's own installation, nothing that was installed into it later. pip comes anew from ensurepip.
_PARTS = (
    "bin/python*",
    "bin/pydoc*",
    "bin/idle*",
    "bin/2to3*",
    "include/python*",
    "lib/libpython*",
    "lib/pkgconfig",
    "lib/python*",
)
_LEFT_OUT = ("site-packages", "__pycache__", "test", "tests", "idle_test", "*.a", "*.o", "*-gdb.py")


def versions_directory(environ: Mapping[str, str]) -> Path:
    """Where pyenv keeps its interpreters: below PYENV_ROOT, by default ~/.pyenv."""
    return Path(environ.get("PYENV_ROOT") or "~/.pyenv").expanduser() / "versions"


def find(versions: Path, series: str) -> Path | None:
    """The installation directory of the newest interpreter of a series such as `3.8`."""
    found: list[tuple[int, Path]] = []
    for path in versions.glob(f"{series}.*"):
        match = re.fullmatch(rf"{re.escape(series)}\.(\d+)", path.name)
        if match is not None and (path / "bin" / f"python{series}").is_file():
            found.append((int(match[1]), path))
    return max(found)[1] if found else None


def require(series: str, image: str, state: Path) -> Path:
    """The installation directory of an interpreter that an image can be made from.

    Raises:
        LocalClusterError: there is none, it does not run, or it lacks modules.
    """
    versions = versions_directory(os.environ)
    found = find(versions, series)
    if found is None:
        raise LocalClusterError(
            f"making {image} failed: no Debian release provides CPython {series} any more, and this machine has none "
            f"(looked for {versions}/{series}.*)",
            hint=f"Install one with pyenv (`pyenv install {series}`), or set PYENV_ROOT to the directory of the pyenv "
            "that has it, then run this again.",
        )
    program = found / "bin" / f"python{series}"
    argv: list[str | Path] = [program, "-I", "-c", _IMPORT_ALL, *_NEEDED]
    lacking = read(argv, action=f"asking {program} for its modules", state=state).split()
    if lacking:
        raise LocalClusterError(
            f"making {image} failed: {program} was built without {', '.join(lacking)}",
            hint=f"Install the development packages of those libraries, then build it again: "
            f"`pyenv install --force {found.name}`.",
        )
    return found


def pack(prefix: Path, archive: Path) -> None:
    """Write the interpreter as a tar archive, its texts rewritten from `prefix` to `PREFIX`."""
    with tarfile.open(archive, "w") as sink:
        for path in _files(prefix):
            member = sink.gettarinfo(path, str(path.relative_to(prefix)))
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            if path.is_symlink() or path.is_dir():
                sink.addfile(member)
                continue
            content = path.read_bytes()
            if b"\0" not in content:
                content = content.replace(str(prefix).encode(), PREFIX.encode())
            # Two names of one file (a hard link) would refer to a member that holds what was there before.
            member.type = tarfile.REGTYPE
            member.linkname = ""
            member.size = len(content)
            sink.addfile(member, io.BytesIO(content))


def _files(prefix: Path) -> Iterator[Path]:
    """Everything of `prefix` that belongs into an image, each directory before what is in it."""
    pending = sorted((path for pattern in _PARTS for path in prefix.glob(pattern)), reverse=True)
    while pending:
        path = pending.pop()
        if any(fnmatch(path.name, pattern) for pattern in _LEFT_OUT):
            continue
        yield path
        if path.is_dir() and not path.is_symlink():
            pending += sorted(path.iterdir(), reverse=True)
