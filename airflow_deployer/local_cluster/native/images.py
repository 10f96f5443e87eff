"""The images that the native cluster brings: pause, and stand-ins for the public images the project builds on.

The stand-ins come from one `debootstrap` of each Debian release they build on. They carry the machine's CA bundle and
its way to the package index, since a mirror or proxy may present a certificate that only this machine knows.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from airflow_deployer.errors import LocalClusterError
from airflow_deployer.progress import Progress, Step

from . import interpreter, mounts, packages, registry
from .commands import PROXIES, run
from .docker_engine import SOCKET
from .layout import Layout

if TYPE_CHECKING:
    from docker import DockerClient

FILES = Path(__file__).parent / "files"
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
PAUSE = f"{registry.HOST}/airflow-deployer/pause:1"
_ROOT_REPOSITORY = "airflow-deployer/debian"
# Documentation and translations, which nothing in a container reads.
_LEFT_OUT = (
    "usr/share/doc",
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "var/lib/apt/lists",
    "var/cache/apt",
)
_DPKG_LEAVES_OUT = "".join(f"path-exclude /{path}/*\n" for path in _LEFT_OUT[:4])


@dataclass(frozen=True)
class StandIn:
    """An image to be in the registry, made from a Dockerfile and files of `files/`.

    Args:
        suite: the Debian release it builds on.
        version: of Python (`3.13`) or Postgres (`17`), the Dockerfile's build argument VERSION.
        on_demand: made only when it is asked for by name.
        copied: its Python is an interpreter of this machine.
    """

    repository: str
    tag: str
    dockerfile: str
    suite: str
    version: str
    files: tuple[str, ...] = ()
    on_demand: bool = False
    copied: bool = False

    @property
    def name(self) -> str:
        """Repository and tag."""
        return f"{self.repository}:{self.tag}"

    @property
    def arguments(self) -> dict[str, str]:
        """The Dockerfile's build arguments."""
        return {"SUITE": self.suite, "VERSION": self.version}


_ENTRYPOINT = ("postgres-entrypoint.sh",)
STAND_INS = (
    StandIn("library/python", "3.13-slim-trixie", "python.Dockerfile", "trixie", "3.13"),
    StandIn("library/postgres", "17", "postgres.Dockerfile", "trixie", "17", _ENTRYPOINT),
    StandIn("library/python", "3.11-slim-bookworm", "python.Dockerfile", "bookworm", "3.11", on_demand=True),
    StandIn(
        "library/python",
        "3.8-slim-bookworm",
        "copied-python.Dockerfile",
        "bookworm",
        "3.8",
        on_demand=True,
        copied=True,
    ),
    StandIn("library/postgres", "15", "postgres.Dockerfile", "bookworm", "15", _ENTRYPOINT, on_demand=True),
)


def wanted(names: Iterable[str]) -> list[StandIn]:
    """The stand-ins that are always made, and those for the public images of these names (`postgres:15`)."""
    asked = {f"library/{name}" for name in names}
    return [stand_in for stand_in in STAND_INS if stand_in.name in asked or not stand_in.on_demand]


def index_url(environ: Mapping[str, str], pip_conf: str) -> str | None:
    """The package index that pip uses on this machine where it is not the default one: environment, then pip.conf.

    None as well for one that a container cannot reach (`file:`) or may not know (a password in the address would end
    in an image layer).
    """
    url = environ.get("PIP_INDEX_URL", "")
    for line in pip_conf.splitlines():
        name, _, value = line.partition("=")
        if not url and name.strip() == "index-url":
            url = value.strip()
    parts = urlsplit(url)
    return url if parts.scheme in ("http", "https") and parts.password is None else None


def _inputs(stand_in: StandIn) -> str:
    digest = hashlib.sha256(json.dumps([_root_inputs(stand_in.suite), stand_in.arguments]).encode())
    for name in (stand_in.dockerfile, *stand_in.files):
        digest.update((FILES / name).read_bytes())
    if stand_in.copied:
        digest.update(Path(interpreter.__file__).read_bytes())
    return digest.hexdigest()[:16]


def _root_inputs(suite: str) -> str:
    bundle = CA_BUNDLE.read_bytes() if CA_BUNDLE.exists() else b""
    parts = [suite, packages.debian_mirror() or "", _DPKG_LEAVES_OUT, _pip_index() or ""]
    return hashlib.sha256(json.dumps(parts).encode() + bundle).hexdigest()[:16]


def _pip_index() -> str | None:
    for path in (
        Path("~/.config/pip/pip.conf").expanduser(),
        Path("~/.pip/pip.conf").expanduser(),
        Path("/etc/pip.conf"),
    ):
        if path.is_file():
            return index_url(os.environ, path.read_text())
    return index_url(os.environ, "")


def _read_record(layout: Layout) -> dict[str, dict[str, str]]:
    try:
        return dict(json.loads(layout.images_record.read_text()))
    except (OSError, ValueError):
        return {}


def _is_current(layout: Layout, repository: str, tag: str, inputs: str) -> bool:
    entry = _read_record(layout).get(f"{repository}:{tag}", {})
    return entry.get("inputs") == inputs and registry.digest(repository, tag) == entry.get("digest")


def _remember(layout: Layout, repository: str, tag: str, inputs: str) -> None:
    found = registry.digest(repository, tag)
    if found is None:
        raise LocalClusterError(f"pushing {repository}:{tag} failed: the registry does not have it afterwards")
    record = _read_record(layout) | {f"{repository}:{tag}": {"inputs": inputs, "digest": found}}
    temporary = layout.images_record.with_suffix(".new")
    temporary.write_text(json.dumps(record, indent=2))
    temporary.replace(layout.images_record)


def _docker() -> DockerClient:
    import docker

    return docker.DockerClient(base_url=f"unix://{SOCKET}", timeout=600)


def _context(files: Mapping[str, Path]) -> io.BytesIO:
    """A build context: a tar archive of the files under their names in the context."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, path in files.items():
            member = tarfile.TarInfo(name)
            member.size = path.stat().st_size
            member.mode = 0o755
            with path.open("rb") as stream:
                archive.addfile(member, stream)
    buffer.seek(0)
    return buffer


def _follow(messages: Any, *, action: str, step: Step, log: Path) -> None:
    """Read the Docker Engine's progress messages to their end; its `error` message becomes ours."""
    tail: list[str] = []
    with log.open("a", encoding="utf-8") as sink:
        for message in messages:
            if "error" in message:
                raise LocalClusterError(f"{action} failed: {message['error']}", hint=f"Read {log}", details=tail[-15:])
            text = str(message.get("stream") or message.get("status") or "").strip()
            if text:
                sink.write(f"{text}\n")
                tail.append(text)
                step.update(text.splitlines()[-1][:100])


def _build_and_push(
    layout: Layout,
    repository: str,
    tag: str,
    files: Mapping[str, Path],
    inputs: str,
    step: Step,
    arguments: Mapping[str, str] | None = None,
) -> None:
    import docker.errors

    reference = f"{registry.HOST}/{repository}"
    log = layout.logs / "images.log"
    proxies = {name: os.environ[name] for name in PROXIES if name in os.environ}
    client = _docker()
    try:
        # The machine's own network: apt inside reaches what apt outside reaches.
        built = client.api.build(
            fileobj=_context(files),
            custom_context=True,
            tag=f"{reference}:{tag}",
            network_mode="host",
            buildargs=proxies | dict(arguments or {}),
            rm=True,
            forcerm=True,
            decode=True,
        )
        _follow(built, action=f"building {repository}:{tag}", step=step, log=log)
        pushed = client.api.push(reference, tag=tag, stream=True, decode=True)
        _follow(pushed, action=f"pushing {repository}:{tag}", step=step, log=log)
    except docker.errors.DockerException as error:
        raise LocalClusterError(f"building {repository}:{tag} failed: {error}", hint=f"Read {log}") from error
    finally:
        client.close()
    _remember(layout, repository, tag, inputs)


def ensure_pause(layout: Layout, progress: Progress) -> None:
    """Have the pods' sandbox image in the registry: one small static C program.

    Raises:
        LocalClusterError: it could not be compiled, built or pushed.
    """
    source = FILES / "pause.c"
    inputs = hashlib.sha256(source.read_bytes() + (FILES / "pause.Dockerfile").read_bytes()).hexdigest()[:16]
    if _is_current(layout, "airflow-deployer/pause", "1", inputs):
        return
    with progress.step("Pause image") as step, tempfile.TemporaryDirectory(dir=layout.cache) as directory:
        program = Path(directory) / "pause"
        run(
            ["gcc", "-Os", "-static", "-s", "-o", program, source],
            action="compiling the pause program",
            state=layout.state,
            log=layout.logs / "images.log",
        )
        files = {"Dockerfile": FILES / "pause.Dockerfile", "pause": program}
        _build_and_push(layout, "airflow-deployer/pause", "1", files, inputs, step)
        step.done(PAUSE)


def _ensure_root_file_system(layout: Layout, suite: str, progress: Progress) -> Path:
    """The archive of a minimal Debian root file system; made by `debootstrap` unless the cache has it."""
    archive = layout.cache / f"debian-{suite}-{_root_inputs(suite)}.tar"
    if archive.exists():
        return archive
    with progress.step(f"Debian {suite} root file system") as step:
        root = Path(tempfile.mkdtemp(prefix="rootfs-", suffix=".partial", dir=layout.cache))
        try:
            mirror = packages.debian_mirror()
            run(
                [
                    "debootstrap",
                    "--variant=minbase",
                    "--include=ca-certificates",
                    suite,
                    root,
                    *([mirror] if mirror else []),
                ],
                action=f"making a Debian {suite} root file system",
                state=layout.state,
                log=layout.logs / "debootstrap.log",
                step=step,
            )
            for name in _LEFT_OUT:
                shutil.rmtree(root / name, ignore_errors=True)
                (root / name).mkdir(parents=True, exist_ok=True)
            (root / "var/lib/apt/lists/partial").mkdir(parents=True)
            (root / "etc/dpkg/dpkg.cfg.d/slim").write_text(_DPKG_LEAVES_OUT)
            (root / "etc/resolv.conf").unlink(missing_ok=True)
            (root / "etc/hostname").unlink(missing_ok=True)
            if CA_BUNDLE.exists():
                shutil.copyfile(CA_BUNDLE, root / CA_BUNDLE.relative_to("/"))
            index = _pip_index()
            if index is not None:
                (root / "etc/pip.conf").write_text(f"[global]\nindex-url = {index}\n")
                (root / "etc/uv").mkdir()
                (root / "etc/uv/uv.toml").write_text(f'[[index]]\nurl = "{index}"\ndefault = true\n')
            # A temporary directory is its owner's alone; as the root of an image it must be everybody's.
            root.chmod(0o755)
            partial = archive.with_suffix(".partial")
            run(
                ["tar", "-C", root, "--numeric-owner", "--one-file-system", "-cf", partial, "."],
                action="packing the root file system",
                state=layout.state,
                log=layout.logs / "debootstrap.log",
            )
            partial.replace(archive)
        finally:
            # debootstrap mounts /proc in there; an interrupted one leaves it.
            mounts.unmount_below(layout, root)
            shutil.rmtree(root, ignore_errors=True)
        step.done(f"{archive.stat().st_size / 1e6:.0f} MB")
    return archive


def _import(archive: Path, suite: str, progress: Progress) -> None:
    import docker.errors

    with progress.step(f"Image {_ROOT_REPOSITORY}:{suite}"):
        client = _docker()
        try:
            client.api.import_image_from_file(str(archive), repository=_ROOT_REPOSITORY, tag=suite)
        except docker.errors.DockerException as error:
            raise LocalClusterError(f"importing {archive} into Docker failed: {error}") from error
        finally:
            client.close()


def ensure_stand_ins(layout: Layout, stand_ins: Iterable[StandIn], progress: Progress) -> None:
    """Have these stand-ins in the registry.

    An interpreter that was copied is not compared again: one that is installed or removed later changes no image.

    Raises:
        LocalClusterError: a download, a build or a push failed, or an interpreter to copy is missing.
    """
    missing = [s for s in stand_ins if not _is_current(layout, s.repository, s.tag, _inputs(s))]
    # Looked for before anything long begins.
    interpreters = {s.version: interpreter.require(s.version, s.name, layout.state) for s in missing if s.copied}
    for suite in dict.fromkeys(stand_in.suite for stand_in in missing):
        _import(_ensure_root_file_system(layout, suite, progress), suite, progress)
    for stand_in in missing:
        with (
            progress.step(f"Image {stand_in.name}") as step,
            tempfile.TemporaryDirectory(suffix=".partial", dir=layout.cache) as directory,
        ):
            files = {name: FILES / name for name in stand_in.files} | {"Dockerfile": FILES / stand_in.dockerfile}
            if stand_in.copied:
                files["interpreter.tar"] = Path(directory) / "interpreter.tar"
                interpreter.pack(interpreters[stand_in.version], files["interpreter.tar"])
            _build_and_push(
                layout, stand_in.repository, stand_in.tag, files, _inputs(stand_in), step, stand_in.arguments
            )
            step.done(f"in {registry.HOST}")
