"""The DAG content on the volume: complete versions that never change, and one link that says which of them is live.

    current                 -> versions/<version>, a relative link; replacing it by a rename is the one atomic switch
    versions/<version>/     dags/... and include/..., read-only; what did not change is a hard link to another version
    manifests/<version>.json  {"content_id", "files": {path: [executable, size, sha256]}, "dag_files": {...} | null}
    state.json              {"deployed_at", "deployed"}: what `deployer up` deployed last
    staging/<random>/       being written or being removed; whoever takes the lock next clears it away
    .lock                   held (flock) by whoever stages, switches or removes

A version is the first 12 hex digits of its content id. It exists once both its manifest and its folder are there, and
the folder comes last, by a rename: cut off at any point, what was live stays live and nothing half-written has a name.
`dag_files` is what the import check learned, per DAG file: `{"dag_ids": [...], "imports": [project files] | null,
"broken": bool}`; null where nothing is known yet. Only the standard library, and of that no more than is needed: the
supervisor and the agent must start fast.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, TypedDict

CONTENT_FOLDER = Path("/home/airflow/content")
IMAGE_FOLDER = Path("/opt/airflow-deployer/content")
"""Where an image carries its own content, `dags/` and `include/`."""

TOP_FOLDERS = ("dags", "include")
VERSION_LENGTH = 12
KEPT_VERSIONS = 10
"""So many of the newest versions stay even when nothing needs them: going back to one sends no bytes."""

_LOCK_SECONDS = 10.0  # at a container start: a process of the container before may still be ending
_MANY_FILES = 32  # from here on one sync of everything is cheaper than one of each file
_SEARCHED_BYTES = 1 << 18  # less than that is sent faster than the manifests of all versions are read
_CHUNK = 1 << 20
_CONTENT_ID = re.compile(r"[0-9a-f]{64}")
_CANNOT_LINK = frozenset({errno.EMLINK, errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS})


class ContentError(Exception):
    """The content cannot be staged or switched; what was live still is.

    Attributes:
        kind: what the protocol calls it: `no_space`, `invalid`, `busy`, `unknown_base` or `internal`.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class FileEntry(NamedTuple):
    """One file of a version: whether its owner may execute it, its size in bytes, the SHA-256 of its bytes in hex."""

    executable: bool
    size: int
    sha256: str


class DagFile(TypedDict):
    """What is known of a DAG file: its DAGs, the project's files that it imports (None: unknown), whether it failed."""

    dag_ids: list[str]
    imports: list[str] | None
    broken: bool


@dataclass(frozen=True)
class Manifest:
    """The files of one version by path, and what is known of its DAG files (None: nothing yet)."""

    content_id: str
    files: Mapping[str, FileEntry]
    dag_files: Mapping[str, DagFile] | None = None

    @property
    def version(self) -> str:
        """The short name of this content, which Airflow knows as the version of the bundle."""
        return self.content_id[:VERSION_LENGTH]


class State(TypedDict):
    """What is live, what was deployed last (content ids, empty when there is none), when, and how many files live."""

    live: str
    deployed: str
    deployed_at: int
    files: int


def files_id(files: Mapping[str, FileEntry]) -> str:
    """The content id, 64 hex digits over paths, modes and bytes: the same as `airflow_deployer.content.files_id`."""
    total = hashlib.sha256()
    for path, entry in sorted((path.encode(), entry) for path, entry in files.items()):
        mode = b"x" if entry.executable else b"-"
        total.update(b"%d:%s%c%s" % (len(path), path, mode, bytes.fromhex(entry.sha256)))
    return total.hexdigest()


def check_path(path: str) -> str:
    """Return `path` if it names a file below `dags/` or `include/`, and nothing else.

    Raises:
        ContentError: absolute, with `..`, an empty part, a NUL byte, or a name that is not UTF-8 or too long.
    """
    parts = path.split("/")
    try:
        too_long = any(len(part.encode()) > 255 for part in parts)
    except UnicodeEncodeError:
        raise ContentError("invalid", f"The path {path!a} is not UTF-8 text.") from None
    if parts[0] not in TOP_FOLDERS or len(parts) < 2 or too_long or "\0" in path or {"", ".", ".."} & set(parts):
        raise ContentError("invalid", f"The path {path!a} is not one of a file below dags/ or include/.")
    return path


def check_entry(executable: object, size: object, sha256: object) -> FileEntry:
    """Return the entry that a peer described.

    Raises:
        ContentError: it has other types or values.
    """
    if not isinstance(size, int) or size < 0 or not isinstance(sha256, str) or not _CONTENT_ID.fullmatch(sha256):
        raise ContentError("invalid", "A file's size or digest is not one.")
    return FileEntry(bool(executable), size, sha256)


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Turn what the file system says into an error of ours."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise ContentError("no_space", "The volume is full.") from None
        # One path is both a file and a folder, or too long.
        refused = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
        kind = "invalid" if error.errno in refused else "internal"
        raise ContentError(kind, f"The volume cannot be written: {error.strerror} ({error.filename!a}).") from None


class Store:
    """The content folder of one deployment.

    Args:
        folder: where the volume is mounted.
    """

    def __init__(self, folder: Path = CONTENT_FOLDER) -> None:
        self.folder = folder
        self.versions = folder / "versions"
        self.manifests = folder / "manifests"
        self.staging = folder / "staging"
        self.current = folder / "current"

    def live_version(self) -> str | None:
        """The version that `current` leads to; None when there is none."""
        with contextlib.suppress(OSError):
            version = os.path.basename(os.readlink(self.current))  # noqa: PTH115, PTH119 - Python 3.8 has no readlink
            if (self.versions / version).is_dir():
                return version
        return None

    def hold_live(self) -> tuple[str, int]:
        """The live version, and a descriptor that keeps it on the volume as long as a process has it open.

        Raises:
            ContentError: there is no content.
        """
        while True:
            version = self.live_version()
            if version is None:
                raise ContentError("internal", f"There is no DAG content in {self.folder}.")
            try:
                descriptor = os.open(self.root(version), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:  # removed just now, so another one is live
                continue
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                if self.live_version() == version:
                    return version, descriptor
            os.close(descriptor)

    def live_manifest(self) -> Manifest:
        """The manifest of what is live; an empty one when nothing is."""
        version = self.live_version()
        return (version and self.manifest(version)) or Manifest(files_id({}), {}, {})

    def manifest(self, version: str) -> Manifest | None:
        """The manifest of one version; None when this version does not exist."""
        if not (self.versions / version).is_dir():
            return None
        try:
            document = json.loads((self.manifests / f"{version}.json").read_bytes())
            files = {path: FileEntry(*entry) for path, entry in document["files"].items()}
            return Manifest(document["content_id"], files, document.get("dag_files"))
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def root(self, version: str) -> Path:
        """The folder of one version."""
        return self.versions / version

    def state(self) -> State:
        """What is live and what was deployed last."""
        deployed, deployed_at = self._deployed()
        live = self.live_manifest()
        return {
            "live": live.content_id if live.files or self.live_version() else "",
            "deployed": deployed,
            "deployed_at": deployed_at,
            "files": len(live.files),
        }

    def _deployed(self) -> tuple[str, int]:
        try:
            document = json.loads((self.folder / "state.json").read_bytes())
            return str(document["deployed"]), int(document["deployed_at"])
        except (OSError, ValueError, LookupError, TypeError):
            return "", -1

    def lock(self, seconds: float = 0.0) -> Lock:
        """Take the lock; the kernel frees it when this process ends, however it does.

        Args:
            seconds: how long to wait for another holder.

        Raises:
            ContentError: `busy`.
        """
        deadline = time.monotonic() + seconds
        with _reported():
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return Lock(descriptor)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    raise ContentError("busy", "Another sync or deploy is staging content right now.") from None
                time.sleep(0.05)

    def adopt(self, image: Path, content_id: str, deployed_at: int) -> bool:
        """At a container start: make the image's content live if it was deployed after what the volume holds.

        A container that restarts, or a pod made again from the same StatefulSet, keeps what is live, synced content
        included. What an interrupted process left behind is removed.

        Args:
            image: the folder of the image that holds `dags/` and `include/`.
            content_id: the id of that content, as the StatefulSet names it.
            deployed_at: when it was deployed; grows with every deploy.

        Returns:
            Whether the image's content became live.

        Raises:
            ContentError: the volume cannot be written, or the image holds something else than it should.
        """
        lock = self.lock(_LOCK_SECONDS)
        try:
            with _reported():
                for folder in (self.versions, self.manifests, self.staging):
                    folder.mkdir(parents=True, exist_ok=True)
            self._clear_staging()
            if self.live_version() and deployed_at <= self._deployed()[1]:
                return False
            stage = self._stage_image(image, content_id)
            try:
                stage.switch(deployed_at)
            finally:
                stage.discard()
            return True
        finally:
            lock.release()

    def _stage_image(self, image: Path, content_id: str) -> Stage:
        known = self.manifest(content_id[:VERSION_LENGTH])
        if known and known.content_id == content_id:
            return Stage(self, known, None, Lock(-1))
        files: dict[str, FileEntry] = {}
        sources: dict[str, str] = {}
        with _reported():
            for path, source, status in _walk(image):
                files[path] = FileEntry(bool(status.st_mode & stat.S_IXUSR), status.st_size, _digest(source))
                sources[path] = source
        if (found := files_id(files)) != content_id:
            raise ContentError(
                "invalid",
                f"the image holds the DAG content {found[:VERSION_LENGTH]}, not {content_id[:VERSION_LENGTH]}, which "
                "the StatefulSet names. Deploy again; do not change the image or the environment by hand.",
            )
        stage = self._begin(Manifest(content_id, files), self.live_manifest(), Lock(-1))
        try:
            for path in stage.need:
                with open(sources[path], "rb", buffering=0) as stream:  # noqa: PTH123 - as above
                    # Even an empty file is written once, by an empty chunk.
                    stage.write(stream.read(_CHUNK))
                    while chunk := stream.read(_CHUNK):
                        stage.write(chunk)
            stage.finish()
        except BaseException:
            stage.discard()
            raise
        return stage

    def stage(
        self, content_id: str, base: str | None, put: Mapping[str, FileEntry], remove: Sequence[str] = ()
    ) -> Stage:
        """Begin a new set: a kept version, plus `put`, minus `remove`. It holds the lock until it is ended.

        Args:
            content_id: the id that the result must have.
            base: the content id of the kept version that `put` and `remove` refer to; None for an empty one.
            put: the files that are new or changed, by path.
            remove: the paths that are gone.

        Raises:
            ContentError: `busy`, `unknown_base`, or `invalid` when the result is another content.
        """
        before: Manifest | None = Manifest(files_id({}), {})
        if base is not None:
            before = self.manifest(base[:VERSION_LENGTH]) if _CONTENT_ID.fullmatch(base) else None
        if before is None or (base is not None and before.content_id != base):
            raise ContentError("unknown_base", f"The content {str(base)[:VERSION_LENGTH]!a} is not on the volume.")
        files = dict(before.files)
        for path in remove:
            files.pop(path, None)
        for path, entry in put.items():
            files[check_path(path)] = entry
        if (found := files_id(files)) != content_id:
            raise ContentError(
                "invalid", f"These files are the content {found[:VERSION_LENGTH]}, not {content_id[:VERSION_LENGTH]}."
            )
        lock = self.lock()
        try:
            self._clear_staging()
            known = self.manifest(content_id[:VERSION_LENGTH])
            if known and known.content_id == content_id:
                return Stage(self, known, None, lock)
            # What is live is read anyway, and mostly holds nearly everything.
            return self._begin(Manifest(content_id, files), before if base is not None else self.live_manifest(), lock)
        except BaseException:
            lock.release()
            raise

    def _begin(self, manifest: Manifest, base: Manifest, lock: Lock) -> Stage:
        folder = self.staging / _random_name()
        stage = Stage(self, manifest, folder, lock)
        try:
            with _reported():
                stage.fill(base)
        except BaseException:
            _remove_tree(folder)
            raise
        return stage

    def _clear_staging(self) -> None:
        with contextlib.suppress(OSError):
            for leftover in self.staging.iterdir():
                _remove_tree(leftover)

    def kept_manifests(self) -> list[Manifest]:
        """All versions on the volume, the newest first."""
        found: list[tuple[float, Manifest]] = []
        with contextlib.suppress(OSError):
            for file in self.manifests.glob("*.json"):
                manifest = self.manifest(file.stem)
                if manifest:
                    found.append((file.stat().st_mtime, manifest))
        return [manifest for _, manifest in sorted(found, key=lambda item: -item[0])]

    def remove_unneeded(self, needed: Iterable[str], kept: int = KEPT_VERSIONS) -> list[str]:
        """Remove the versions that neither are live, nor among the newest, nor needed, nor held (`hold_live`).

        Args:
            needed: the versions that unfinished runs and known DAGs name.
            kept: how many of the newest stay in any case.

        Returns:
            The versions that were removed.

        Raises:
            ContentError: `busy`, or the volume cannot be written.
        """
        keep = set(needed)
        lock = self.lock()
        try:
            with _reported():
                times = {entry.name[:-5]: entry.stat().st_mtime for entry in os.scandir(self.manifests)}
                folders = [entry.name for entry in os.scandir(self.versions)]
                newest = sorted(folders, key=lambda version: -times.get(version, 0.0))
                keep.update(newest[:kept], filter(None, [self.live_version()]))
                removed = [version for version in newest if version not in keep]
                removed = [version for version in removed if not _is_held(self.versions / version)]
                for version in removed:
                    # Moved away first: a version whose removal is cut off is none that anybody could still use.
                    leftover = self.staging / _random_name()
                    (self.versions / version).rename(leftover)
                    (self.manifests / f"{version}.json").unlink(missing_ok=True)
                    _remove_tree(leftover)
            return removed
        finally:
            lock.release()

    def write_manifest(self, manifest: Manifest) -> None:
        """Write a version's manifest."""
        document = {"content_id": manifest.content_id, "files": manifest.files, "dag_files": manifest.dag_files}
        self.prepare(document).rename(self.manifests / f"{manifest.version}.json")

    def prepare(self, document: Mapping[str, Any]) -> Path:
        """Write a file that only has to be given its name."""
        file = self.staging / _random_name()
        try:
            with file.open("wb") as stream:
                stream.write(json.dumps(document, separators=(",", ":")).encode())
                stream.flush()
                os.fsync(stream.fileno())
        except OSError:
            _remove_tree(file)
            raise
        return file


@dataclass
class Lock:
    """The store's lock, held by an open file descriptor; -1 when somebody else holds it for us."""

    descriptor: int

    def release(self) -> None:
        """Give it back; does nothing the second time."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


@dataclass
class Stage:
    """A complete set in the making: first its missing bytes (`need`, `write`, `finish`), then `switch` or `discard`.

    Attributes:
        manifest: what it will be.
        need: the paths whose bytes have to come, in this order; empty for a version that exists.
    """

    store: Store
    manifest: Manifest
    folder: Path | None
    lock: Lock
    need: list[str] = field(default_factory=list)
    _next: int = 0
    _stream: IO[bytes] | None = None
    _left: int = 0
    _hash: Any = None

    @property
    def root(self) -> Path:
        """The folder that holds `dags/` and `include/` of this set."""
        return self.folder or self.store.root(self.manifest.version)

    @property
    def needed_bytes(self) -> int:
        """How many bytes have to come in all."""
        return sum(self.manifest.files[path].size for path in self.need)

    def fill(self, base: Manifest) -> None:
        """Make the folders, and link what a kept version holds already."""
        assert self.folder is not None  # noqa: S101 - only a new set is filled
        self.folder.mkdir()
        made = set()
        for top in TOP_FOLDERS:
            (self.folder / top).mkdir()
            made.add(top)
        missing: list[str] = []
        source, target = f"{self.store.root(base.version)}/", f"{self.folder}/"
        for path, entry in self.manifest.files.items():
            parent = path[: path.rindex("/")]
            if parent not in made:
                os.makedirs(target + parent, exist_ok=True)  # noqa: PTH103 - Path costs twice as much, for thousands
                made.add(parent)
            if base.files.get(path) != entry or not _link(source + path, target + path):
                missing.append(path)
        if missing:
            self._fill_from_elsewhere(missing, base)

    def _fill_from_elsewhere(self, missing: list[str], base: Manifest) -> None:
        """Look for the same bytes at another path of the base (a renamed file), or for many bytes in any version."""
        wanted = {self.manifest.files[path] for path in missing}
        places: dict[FileEntry, str] = {}
        searched = [base]
        if sum(entry.size for entry in wanted) >= _SEARCHED_BYTES:
            searched += self.store.kept_manifests()
        for manifest in searched:
            for path, entry in manifest.files.items():
                if entry in wanted:
                    places.setdefault(entry, str(self.store.root(manifest.version) / path))
        for path in missing:
            place = places.get(self.manifest.files[path])
            if not place or not _link(place, f"{self.folder}/{path}"):
                self.need.append(path)

    def write(self, data: bytes) -> None:
        """Take the next bytes of what is needed; they may end one file and begin others.

        Raises:
            ContentError: `no_space`, or `invalid` for a file that has another digest, or for bytes too many.
        """
        view = memoryview(data)
        with _reported():
            while view or self._next < len(self.need):
                if self._stream is None:
                    if self._next == len(self.need):
                        raise ContentError("invalid", "More bytes came than were announced.")
                    path = self.need[self._next]
                    self._stream = open(f"{self.folder}/{path}", "xb", buffering=0)  # noqa: PTH123, SIM115 - as above
                    self._left = self.manifest.files[path].size
                    self._hash = hashlib.sha256()
                part = view[: self._left]
                while part:
                    written = self._stream.write(part) or 0
                    self._hash.update(part[:written])
                    self._left -= written
                    view, part = view[written:], part[written:]
                if self._left:
                    return
                self._end_file()

    def _end_file(self) -> None:
        assert self._stream is not None  # noqa: S101 - called where it is open
        path = self.need[self._next]
        entry = self.manifest.files[path]
        if self._hash.hexdigest() != entry.sha256:
            raise ContentError("invalid", f"{path!a} changed while it was sent.")
        os.fchmod(self._stream.fileno(), 0o555 if entry.executable else 0o444)
        if len(self.need) < _MANY_FILES:
            os.fsync(self._stream.fileno())
        self._stream.close()
        self._stream = None
        self._next += 1

    def finish(self) -> None:
        """End the writing; from here on the set is complete and on the disk.

        Raises:
            ContentError: bytes are missing, or the disk refuses them.
        """
        with _reported():
            if self.need:
                self.write(b"")
            if self._next < len(self.need):
                raise ContentError("invalid", f"The bytes of {self.need[self._next]!a} are missing.")
            if len(self.need) >= _MANY_FILES:
                os.sync()

    def switch(self, deployed_at: int | None = None, dag_files: Mapping[str, DagFile] | None = None) -> float:
        """Make this set live, and end the stage.

        Args:
            deployed_at: given when this is a deploy: what a container that starts later compares with its own.
            dag_files: what is known of its DAG files.

        Returns:
            When it happened, in seconds since 1970 by this machine's clock.

        Raises:
            ContentError: the volume cannot be written; what was live still is.
        """
        try:
            with _reported():
                return self._switch(deployed_at, dag_files)
        finally:
            self.discard()

    def _switch(self, deployed_at: int | None, dag_files: Mapping[str, DagFile] | None) -> float:
        store, version = self.store, self.manifest.version
        before = store.live_manifest()
        known = self.manifest.dag_files if dag_files is None else dag_files
        if self.folder or known != self.manifest.dag_files:
            self.manifest = Manifest(self.manifest.content_id, self.manifest.files, known)
            store.write_manifest(self.manifest)
        else:
            # It counts as one of the newest again.
            os.utime(store.manifests / f"{version}.json")
        if self.folder:
            if store.root(version).exists():
                # Its manifest was lost.
                store.root(version).rename(store.staging / _random_name())
            self.folder.rename(store.root(version))
            self.folder = None
        _sync_folder(store.versions)
        # What needs space comes before the switch.
        state = None
        if deployed_at is not None:
            state = store.prepare({"deployed_at": deployed_at, "deployed": self.manifest.content_id})
        at = time.time()
        if store.live_version() != version:
            root = f"{store.root(version)}/"
            now = time.time_ns()
            for path, entry in self.manifest.files.items():
                if before.files.get(path) != entry:
                    # Airflow parses again at once what is newer than its last parse; an old version has old times.
                    os.utime(root + path, ns=(now, now))
            link = store.staging / _random_name()
            link.symlink_to(Path("versions", version))
            at = time.time()
            link.rename(store.current)
        if state is not None:
            state.rename(store.folder / "state.json")
        _sync_folder(store.folder)
        return at

    def discard(self) -> None:
        """Remove what was staged, and give the lock back; does nothing the second time."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self.folder is not None:
            _remove_tree(self.folder)
            self.folder = None
        self.lock.release()


def _walk(image: Path) -> Iterator[tuple[str, str, os.stat_result]]:
    """Every file below the top folders of `image`: its path, where it is, and its status."""
    for top in TOP_FOLDERS:
        for folder, _, names in os.walk(image / top):
            for name in names:
                source = f"{folder}/{name}"
                yield f"{os.path.relpath(source, image)}", source, os.stat(source)  # noqa: PTH116 - as above


def _digest(source: str) -> str:
    content = hashlib.sha256()
    with open(source, "rb", buffering=0) as stream:  # noqa: PTH123 - Path.open costs twice as much
        while chunk := stream.read(_CHUNK):
            content.update(chunk)
    return content.hexdigest()


def _link(source: str, target: str) -> bool:
    """Make `target` the same file as `source`, or a copy where that cannot be; False when the source is not there."""
    try:
        os.link(source, target, follow_symlinks=False)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        import shutil

        shutil.copy2(source, target)
    return True


def _is_held(folder: Path) -> bool:
    """Whether some process holds this version; it was not live any more, so none begins to."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _random_name() -> str:
    return os.urandom(8).hex()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_tree(folder: Path) -> None:
    """Remove a folder or a file as far as possible: what is left over is tried again by the next one with the lock."""
    import shutil

    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            folder.unlink()
