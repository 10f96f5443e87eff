"""What a project ships: DAG content, plugins and requirements, their ids, and the build context made of them.

One walk (`ProjectReader`) yields the files; the content id, the image id and the build context all come from its
result, so what was counted is what is sent. **DAG content** is `dags/` and `include/`. `plugins/` and the
requirements are not: changing them makes another image, but not another content id.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING

from airflow_deployer.errors import ChangedError, ProjectError

if TYPE_CHECKING:
    from airflow_deployer.config import Project

IGNORE_FILE = ".deployerignore"

CONTENT_TAG_LENGTH = 12
"""Hex digits of an id that go into an image tag."""

MTIME = 315532800
"""Every file's time in a build context (1980-01-01, the earliest that a zip file can hold): it is not content."""

_IGNORED_FOLDERS = frozenset(
    {
        "__pycache__",
        ".git",
        ".hg",
        ".svn",
        ".idea",
        ".vscode",
        ".ipynb_checkpoints",
        ".mypy_cache",
        ".pytest_cache",
        ".ruff_cache",
    }
)
# Bytecode, what desktops leave behind, and what vim, Emacs, Kate, JetBrains and NFS write next to an open file.
_IGNORED_FILES = re.compile(
    r".*\.py[co]|\.DS_Store|Thumbs\.db|\..*\.sw[a-p]|4913|.*~|\.#.*|#.*#|\..*\.kate-swp|.*___jb_(?:tmp|old)___|\.nfs[0-9a-f]+",
    re.DOTALL,
)
_CHUNK = 1 << 20
# A file that was written less than this before it was read may be written again within one tick of its file system's
# clock, which shows nowhere but in its bytes. FAT has the slowest: 2 s.
_SETTLED_NS = 2_500_000_000

Ignored = Callable[[str], bool]
"""Says whether a path below the project folder (with "/" at its end if it is a folder) is left out."""

_ReadFile = Callable[[str, str, str, os.stat_result], "File"]
"""Reads a file: where it is, its name for messages, where it goes, and its status."""


@dataclass(frozen=True)
class File:
    """One file as it was read.

    Attributes:
        path: where it goes, with "/" as separator, for example `dags/team/daily.py`.
        source: where it was read; for a symbolic link the link itself.
        executable: whether its owner may execute it; all that is kept of its mode.
        size: bytes.
        digest: SHA-256 of its bytes.
    """

    path: str
    source: str
    executable: bool
    size: int
    digest: bytes


@dataclass(frozen=True)
class ProjectContent:
    """All files that a project ships, sorted by path.

    Attributes:
        dag_files: `dags/...` and `include/...`, the DAG content.
        plugin_files: `plugins/...`.
        requirements: `requirements.txt`, or None when there is none or it asks for nothing.
        content_id: 64 hex digits that identify the DAG content.
    """

    dag_files: tuple[File, ...]
    plugin_files: tuple[File, ...]
    requirements: File | None
    content_id: str

    @property
    def files(self) -> tuple[File, ...]:
        """Everything that goes into the image."""
        return (*self.dag_files, *self.plugin_files, *([self.requirements] if self.requirements else []))

    def runtime_id(self, *inputs: str) -> str:
        """An id of everything in the DAG image that is not DAG content; a change of it needs another pod.

        Args:
            inputs: as for `image_tag`.
        """
        files = (*self.plugin_files, *([self.requirements] if self.requirements else []))
        return files_id(files, *inputs)[:CONTENT_TAG_LENGTH]

    def image_tag(self, *inputs: str) -> str:
        """The DAG image's tag: the content id, then an id of everything else that the image is made of.

        Args:
            inputs: what the image is made of besides the project's files: base image, Dockerfile, platform.
        """
        image_id = files_id(self.files, *inputs)
        return f"{self.content_id[:CONTENT_TAG_LENGTH]}-{image_id[:CONTENT_TAG_LENGTH]}"


class ProjectReader:
    """Reads one project, and reads it again at the cost of what has changed.

    A file whose status (size, times, inode, mode) is what it was when it was read is not read again.

    Args:
        project: the project folder.
        paths: the `[project]` settings, relative to it.

    Attributes:
        newest_ns: when the file that was written last was written, of those read; nanoseconds since the epoch.
    """

    def __init__(self, project: Path, paths: Project) -> None:
        self.newest_ns = 0
        self._project = project.resolve()
        self._paths = paths
        self._known: dict[str, tuple[os.stat_result, File]] = {}

    def read(self) -> ProjectContent:
        """Walk the project's folders once and read every file that is not ignored and may have changed.

        Raises:
            ProjectError: no `dags/`, no DAG file in it, or a file that cannot be shipped, with its path.
        """
        project, paths = self._project, self._paths
        self.newest_ns = 0
        if not _folder_exists(project / paths.dags, paths.dags):
            raise ProjectError(
                f"Cannot deploy {project}: it has no folder {paths.dags}/.",
                hint=f"Run this in the folder that holds {paths.dags}/, or begin one: mkdir {paths.dags}",
            )
        ignored = _ignore_patterns(project)

        def walk(folder: str, target: str) -> Iterator[File]:
            return _walk(project, folder, target, ignored, self._read_file)

        dag_files = tuple(sorted((*walk(paths.dags, "dags"), *walk(paths.include, "include")), key=_sort_key))
        if not any(file.path.startswith("dags/") and file.path.endswith((".py", ".zip")) for file in dag_files):
            raise ProjectError(
                f"Cannot deploy {project}: {paths.dags}/ holds no DAG file (*.py or *.zip).",
                hint=f"Put a DAG into {paths.dags}/ (a file that {IGNORE_FILE} lists does not count).",
            )
        content = ProjectContent(
            dag_files=dag_files,
            plugin_files=tuple(sorted(walk(paths.plugins, "plugins"), key=_sort_key)),
            requirements=_requirements(project, paths.requirements, self._read_file),
            content_id=files_id(dag_files),
        )
        self._known = {file.path: self._known[file.path] for file in content.files if file.path in self._known}
        return content

    def _read_file(self, source: str, name: str, target: str, status: os.stat_result) -> File:
        self.newest_ns = max(self.newest_ns, status.st_mtime_ns)
        known = self._known.get(target)
        if known is not None and known[1].source == source and _same_status(known[0], status):
            return known[1]
        began = time.time_ns()
        file = _read_file(source, name, target, status, largest=self._paths.max_file_bytes)
        if began - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS:
            self._known[target] = (status, file)
        else:
            self._known.pop(target, None)
        return file


def read_project(project: Path, paths: Project) -> ProjectContent:
    """Walk the project's folders once and read every file that is not ignored.

    Args:
        project: the project folder.
        paths: the `[project]` settings, relative to it.

    Raises:
        ProjectError: no `dags/`, no DAG file in it, or a file that cannot be shipped, with its path.
    """
    return ProjectReader(project, paths).read()


def ignore_rule(project: Path) -> Ignored:
    """The rule by which files of this project are left out: names that editors and Python use, and `.deployerignore`.

    Raises:
        ProjectError: `.deployerignore` cannot be read.
    """
    ignored = _ignore_patterns(project)
    return lambda path: any(map(_ignored_name, path.split("/"))) or ignored(path)


def read_folder(folder: Path) -> tuple[File, ...]:
    """All files of one folder, sorted, their paths relative to it (the base image's build context)."""
    folder = folder.resolve()
    return tuple(sorted(_walk(folder, ".", "", _nothing_ignored, _read_file), key=_sort_key))


def read_single_file(source: Path, path: str) -> File:
    """One file that goes to `path` in a build context.

    Raises:
        ProjectError: it cannot be read.
    """
    return _read_file(str(source), source.name, path, source.stat())


def files_id(files: Iterable[File], *inputs: str) -> str:
    """64 hex digits over the files' paths, modes and bytes, and over further inputs."""
    total = hashlib.sha256()
    for file in files:
        path = file.path.encode()
        total.update(b"%d:%s%c%s" % (len(path), path, b"x" if file.executable else b"-", file.digest))
    for text in inputs:
        total.update(b"|%d:%s" % (len(text.encode()), text.encode()))
    return total.hexdigest()


def write_context(target: IO[bytes], files: Iterable[File], dockerfile: str | None = None) -> None:
    """Write a build context as a tar archive.

    Args:
        target: binary file, left open.
        files: what it holds; read again, and checked to be what they were.
        dockerfile: text of a generated `Dockerfile`, if `files` has none.

    Raises:
        ProjectError: a file changed since it was read, so its id would be a lie.
    """
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as archive:
        if dockerfile is not None:
            text = dockerfile.encode()
            archive.addfile(_member("Dockerfile", size=len(text), mode=0o644), BytesIO(text))
        folders: set[str] = set()
        for file in files:
            for folder in _parents(file.path):
                if folder not in folders:
                    folders.add(folder)
                    archive.addfile(_member(folder, size=0, mode=0o755, kind=tarfile.DIRTYPE))
            _add_file(archive, file)


def _add_file(archive: tarfile.TarFile, file: File) -> None:
    try:
        with open(file.source, "rb") as stream:  # noqa: PTH123 - Path.open costs twice as much, for thousands of files
            reader = _HashingReader(stream)
            archive.addfile(_member(file.path, size=file.size, mode=0o755 if file.executable else 0o644), reader)
            unchanged = reader.digest() == file.digest and not stream.read(1)
    except OSError:
        unchanged = False
    if not unchanged:
        raise ChangedError(
            f"Cannot deploy {_shown(file.path)}: it changed while it was being read.", hint="Run the command again."
        )


class _HashingReader:
    """Counts what passes through, so that one read serves the archive and the check."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._hash.update(data)
        return data

    def digest(self) -> bytes:
        return self._hash.digest()


def _member(path: str, *, size: int, mode: int, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(path)
    member.size, member.mode, member.mtime, member.type = size, mode, MTIME, kind
    return member


def _parents(path: str) -> Iterator[str]:
    position = path.find("/")
    while position != -1:
        yield path[:position]
        position = path.find("/", position + 1)


def _sort_key(file: File) -> bytes:
    return file.path.encode()


def _nothing_ignored(path: str) -> bool:
    return False


def _ignored_name(name: str) -> bool:
    return name in _IGNORED_FOLDERS or _IGNORED_FILES.fullmatch(name) is not None


def _ignore_patterns(project: Path) -> Ignored:
    """The patterns of `.deployerignore` (gitignore syntax, relative to the project folder)."""
    try:
        text = (project / IGNORE_FILE).read_text("utf-8")
    except FileNotFoundError:
        return _nothing_ignored
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ProjectError(f"Cannot read {IGNORE_FILE}: {reason}.") from None
    from pathspec import GitIgnoreSpec

    try:
        spec = GitIgnoreSpec.from_lines(text.splitlines())
    except ValueError as error:
        raise ProjectError(f"Cannot read {IGNORE_FILE}: {error}.") from None
    matches: Ignored = spec.match_file
    return matches


def _walk(project: Path, folder: str, target: str, ignored: Ignored, read: _ReadFile) -> Iterator[File]:
    """The files below `folder`, which need not exist; `project` is resolved and bounds symbolic links."""
    start = os.path.normpath(project / folder)
    if not _folder_exists(Path(start), folder):
        return
    name = "" if folder == "." else os.path.relpath(start, project)
    _inside_project(start, name, project)
    yield from _walk_folder(start, name, target, ignored, read, project, (os.path.realpath(start),))


def _folder_exists(path: Path, name: str) -> bool:
    try:
        status = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise _broken_link(name, "leads nowhere") from None
        return False
    except OSError as error:
        raise ProjectError(f"Cannot read the folder {_shown(name)}: {error.strerror}.") from None
    if not stat.S_ISDIR(status.st_mode):
        raise ProjectError(f"Cannot deploy {_shown(name)}: it is not a folder.")
    return True


def _walk_folder(
    folder: str,
    name: str,
    target: str,
    ignored: Ignored,
    read: _ReadFile,
    project: Path,
    above: tuple[str, ...],
) -> Iterator[File]:
    """The files of one folder and those below it.

    Args:
        folder: where it is.
        name: its path below the project, for patterns and for messages.
        target: its path in the image.
        ignored: the project's patterns.
        read: reads one file.
        project: what symbolic links may not lead out of.
        above: real paths of the folders that lead here; meeting one of them again is a loop.
    """
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise ProjectError(f"Cannot read the folder {_shown(name)}: {error.strerror}.") from None
    for entry in entries:
        path = f"{name}/{entry.name}" if name else entry.name
        if _ignored_name(entry.name) or ignored(path):
            continue
        inner = f"{target}/{entry.name}" if target else entry.name
        if entry.is_symlink():
            _inside_project(entry.path, path, project)
        try:
            status = entry.stat()
        except OSError as error:
            raise ProjectError(f"Cannot read {_shown(path)}: {error.strerror}.") from None
        if stat.S_ISDIR(status.st_mode):
            if ignored(f"{path}/"):
                continue
            real = os.path.realpath(entry.path) if entry.is_symlink() else f"{above[-1]}/{entry.name}"
            if real in above:
                raise ProjectError(
                    f"Cannot deploy {_shown(path)}: it is a symbolic link to a folder that holds it.",
                    hint=f"Remove the link, or list it in {IGNORE_FILE}.",
                )
            yield from _walk_folder(entry.path, path, inner, ignored, read, project, (*above, real))
        elif stat.S_ISREG(status.st_mode):
            yield read(entry.path, path, inner, status)
        else:
            raise ProjectError(
                f"Cannot deploy {_shown(path)}: it is {_kind(status.st_mode)}, not a file.",
                hint=f"Remove it, or list it in {IGNORE_FILE}.",
            )


def _inside_project(path: str, name: str, project: Path) -> None:
    try:
        real = os.path.realpath(path, strict=True)
    except OSError as error:
        raise _broken_link(name, "leads in a circle" if error.errno == errno.ELOOP else "leads nowhere") from None
    if real != str(project) and not real.startswith(f"{project}{os.sep}"):
        raise ProjectError(
            f"Cannot deploy {_shown(name)}: it is a symbolic link to {_shown(real)}, outside the project.",
            hint=f"Copy what it leads to into the project, or list the link in {IGNORE_FILE}.",
        )


def _broken_link(name: str, reason: str) -> ProjectError:
    return ProjectError(
        f"Cannot deploy {_shown(name)}: it is a symbolic link that {reason}.",
        hint=f"Remove the link, or list it in {IGNORE_FILE}.",
    )


def _same_status(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_ino, one.st_dev, one.st_size, one.st_mtime_ns, one.st_ctime_ns, one.st_mode) == (
        other.st_ino,
        other.st_dev,
        other.st_size,
        other.st_mtime_ns,
        other.st_ctime_ns,
        other.st_mode,
    )


def _read_file(source: str, name: str, target: str, status: os.stat_result, *, largest: int | None = None) -> File:
    """Read a file in full.

    Args:
        largest: the bytes that it may have.

    Raises:
        ProjectError: it cannot be read, is too large, or has a name that is no text.
    """
    if largest is not None and status.st_size > largest:
        raise ProjectError(
            f"Cannot deploy {_shown(name)}: it has {status.st_size / 1e6:.0f} MB, and `project.max_file_size` allows "
            f"{largest / 1e6:.0f} MB.",
            hint=f"Keep large data out of the project, list it in {IGNORE_FILE}, or set project.max_file_size.",
        )
    try:
        target.encode()
    except UnicodeEncodeError:
        raise ProjectError(
            f"Cannot deploy {_shown(name)}: its name is not UTF-8 text, so Airflow could not store it.",
            hint=f"Rename it, or list it in {IGNORE_FILE}.",
        ) from None
    content, size = hashlib.sha256(), 0
    try:
        with open(source, "rb", buffering=0) as stream:  # noqa: PTH123 - as above
            while chunk := stream.read(_CHUNK):
                content.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise ProjectError(f"Cannot read {_shown(name)}: {error.strerror}.") from None
    return File(target, source, bool(status.st_mode & stat.S_IXUSR), size, content.digest())


def _requirements(project: Path, name: str, read: _ReadFile) -> File | None:
    path = project / name
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ProjectError(f"Cannot deploy {name}: it is not a file.")
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ProjectError(f"Cannot read {name}: {error.strerror}.") from None
    if all(not line.strip() or line.lstrip().startswith(b"#") for line in lines):
        return None
    _inside_project(str(path), name, project)
    file = read(str(path), name, "requirements.txt", status)
    return File(file.path, file.source, executable=False, size=file.size, digest=file.digest)


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISSOCK: "a socket",
        stat.S_ISFIFO: "a named pipe",
        stat.S_ISBLK: "a device",
        stat.S_ISCHR: "a device",
    }
    return next((name for test, name in kinds.items() if test(mode)), "something special")


def _shown(path: str) -> str:
    """A path for a message: what a terminal cannot print is escaped."""
    return path if path.isprintable() else ascii(path)
