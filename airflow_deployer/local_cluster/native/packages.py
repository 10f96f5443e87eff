"""What comes from Debian's package archive: programs, and the source of Kubernetes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from airflow_deployer.errors import LocalClusterError
from airflow_deployer.progress import Progress, Step

from .commands import read, run, search_path
from .layout import Layout

# Package: a file of it, or a program on the PATH, whose presence says that it is installed or that another package
# stands for it (Docker's own `containerd.io` brings runc). Asking dpkg costs 0.1 s, this costs nothing.
REQUIRED = {
    "containerd": "/usr/bin/containerd",
    "runc": "runc",
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "docker-registry": "/usr/bin/docker-registry",
    "etcd-server": "/usr/bin/etcd",
    "debootstrap": "/usr/sbin/debootstrap",
    "iptables": "/usr/sbin/iptables",
    "iproute2": "/usr/sbin/ip",
    "mount": "/usr/bin/umount",
    "openssl": "/usr/bin/openssl",
    "gcc": "/usr/bin/gcc",
    "libc6-dev": "/usr/include/stdio.h",
}
DOCKER = {"docker.io": "/usr/sbin/dockerd"}
# Where the kernel has AppArmor switched on, Docker starts no container without the program that loads its profile.
DOCKER_UNDER_APPARMOR = {"apparmor": "/usr/sbin/apparmor_parser"}
_APPARMOR_SWITCH = Path("/sys/module/apparmor/parameters/enabled")
FOR_BUILDING = {"golang-1.19-go": "/usr/lib/go-1.19/bin/go", "dpkg-dev": "/usr/bin/dpkg-source"}
# The services that these packages would start at the next boot on a machine with systemd.
_SERVICES = {
    "docker.io": ("docker.service", "docker.socket"),
    "containerd": ("containerd.service",),
    "docker-registry": ("docker-registry.service",),
    "etcd-server": ("etcd.service",),
}
_SOURCES = Path("/etc/apt")
_POLICY = Path("/usr/sbin/policy-rc.d")
_POLICY_TEXT = (
    "#!/bin/sh\n# Put here by `deployer cluster up` while it installs packages; starts no service.\nexit 101\n"
)


@dataclass(frozen=True)
class Source:
    """One entry of the machine's package sources (sources.list(5)). `options` are deb822 fields such as Signed-By."""

    types: tuple[str, ...]
    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()

    def render(self) -> str:
        """The entry as a deb822 paragraph."""
        lines = [
            f"Types: {' '.join(self.types)}",
            f"URIs: {' '.join(self.uris)}",
            f"Suites: {' '.join(self.suites)}",
        ]
        if self.components:
            lines.append(f"Components: {' '.join(self.components)}")
        for name, value in self.options:
            # A value of several lines (an inline key) keeps them, each marked as a continuation.
            first, *rest = value.split("\n")
            lines.append(f"{name}: {first}".rstrip())
            lines += [f" {line or '.'}" for line in rest]
        return "\n".join(lines) + "\n"


def parse_deb822(text: str) -> list[Source]:
    """The enabled entries of a `.sources` file."""
    found = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in paragraph.splitlines():
            if line.startswith("#"):
                continue
            if line[:1] in (" ", "\t") and name:
                fields[name] += f"\n{line.strip()}"
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip()
                fields[name] = value.strip()
        by_name = {key.lower(): key for key in fields}
        if "uris" not in by_name or fields.get(by_name.get("enabled", ""), "yes").lower() == "no":
            continue

        def words(key: str, fields: dict[str, str] = fields, by_name: dict[str, str] = by_name) -> tuple[str, ...]:
            return tuple(fields.get(by_name.get(key, ""), "").split())

        plain = ("types", "uris", "suites", "components", "enabled")
        options = tuple((key, value) for key, value in fields.items() if key.lower() not in plain)
        found.append(Source(words("types"), words("uris"), words("suites"), words("components"), options))
    return found


_ONE_LINE = re.compile(r"^(deb|deb-src)\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s*(.*)$")
_ONE_LINE_OPTIONS = {"signed-by": "Signed-By", "trusted": "Trusted", "check-valid-until": "Check-Valid-Until"}


def parse_one_line(text: str) -> list[Source]:
    """The entries of a `.list` file. Of the options only those are kept that decide what is trusted."""
    found = []
    for line in text.splitlines():
        match = _ONE_LINE.match(line.partition("#")[0].strip())
        if match is None:
            continue
        kind, options, uri, suite, components = match.groups()
        pairs = (option.partition("=") for option in (options or "").split())
        kept = tuple((_ONE_LINE_OPTIONS[n.lower()], v) for n, _, v in pairs if n.lower() in _ONE_LINE_OPTIONS)
        found.append(Source((kind,), (uri,), (suite,), tuple(components.split()), kept))
    return found


def configured_sources(directory: Path = _SOURCES) -> list[Source]:
    """Every package source that the machine is configured with."""
    found: list[Source] = []
    for path in (directory / "sources.list", *sorted((directory / "sources.list.d").glob("*"))):
        if path.is_file() and path.suffix == ".sources":
            found += parse_deb822(path.read_text())
        elif path.is_file() and path.suffix == ".list":
            found += parse_one_line(path.read_text())
    return found


def codename(os_release: Path = Path("/etc/os-release")) -> str:
    """The release's name, such as `bookworm`; empty on a machine that is not Debian."""
    try:
        pairs = (line.partition("=") for line in os_release.read_text().splitlines())
    except OSError:
        return ""
    fields = {name: value.strip('"') for name, _, value in pairs}
    return fields.get("VERSION_CODENAME", "") if fields.get("ID") == "debian" else ""


def archive_sources(sources: list[Source], release: str) -> list[Source]:
    """Those of `sources` that serve the release itself (its main suite, its updates, its security fixes)."""
    kept = []
    for source in sources:
        suites = tuple(s for s in source.suites if s == release or s.startswith((f"{release}-", f"{release}/")))
        if "deb" in source.types and suites and "main" in source.components:
            kept.append(replace(source, suites=suites))
    return kept


def source_entries(sources: list[Source], release: str) -> str:
    """The same places as sources of source packages: `deb-src` is off by default."""
    return "\n".join(
        replace(s, types=("deb-src",), components=("main",)).render() for s in archive_sources(sources, release)
    )


def debian_mirror() -> str | None:
    """The address of the machine's Debian archive, None when its sources name none that `debootstrap` understands."""
    release = codename()
    for source in archive_sources(configured_sources(), release):
        for uri in source.uris:
            if release in source.suites and uri.startswith(("http://", "https://")):
                return uri.rstrip("/")
    return None


def missing(packages: dict[str, str]) -> list[str]:
    """Those of the packages that are not installed."""
    # `which` takes a path as well; what is no program (a header) is looked for as a file.
    places = search_path()
    return [name for name, file in packages.items() if not (shutil.which(file, path=places) or Path(file).is_file())]


def apparmor_is_on() -> bool:
    """Whether the kernel enforces AppArmor profiles."""
    try:
        return _APPARMOR_SWITCH.read_text().startswith("Y")
    except OSError:
        return False


@contextmanager
def no_services() -> Iterator[None]:
    """Keep package scripts from starting services meanwhile (invoke-rc.d(8), policy-rc.d).

    A policy of the machine's own stays as it is: it decides the same way, or its owner wants those services.
    """
    if _POLICY.exists() and _POLICY.read_text(errors="replace") != _POLICY_TEXT:
        yield
        return
    _POLICY.write_text(_POLICY_TEXT)
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink(missing_ok=True)


def _apt(layout: Layout, arguments: list[str], *, action: str, step: Step, cwd: Path | None = None) -> str:
    return run(
        # Another apt (unattended upgrades) may hold the lock for a while.
        ["apt-get", "-o", "DPkg::Lock::Timeout=120", "-q", *arguments],
        action=action,
        state=layout.state,
        log=layout.logs / "packages.log",
        step=step,
        environ={"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"},
        cwd=cwd,
        hint=f"See whether `apt-get update` works on this machine; its output is in {layout.logs}/packages.log.",
    )


def ensure_packages(layout: Layout, names: list[str], progress: Progress) -> None:
    """Install packages that are missing, without starting any service.

    Raises:
        LocalClusterError: apt could not install them.
    """
    if not names:
        return
    with progress.step("Debian packages") as step, no_services():
        _apt(layout, ["update"], action="updating the package lists", step=step)
        # Never at the price of a package that somebody else installed.
        install = ["install", "-y", "--no-install-recommends", "--no-remove", *names]
        _apt(layout, install, action=f"installing {', '.join(names)}", step=step)
        # Where systemd runs, the packages' own services would take our ports after the next boot.
        if Path("/run/systemd/system").is_dir():
            for service in [service for name in names for service in _SERVICES.get(name, ())]:
                with suppress(LocalClusterError):
                    read(["systemctl", "disable", service], action=f"disabling {service}", state=layout.state)
        step.done(", ".join(names))


def download_source(layout: Layout, package: str, directory: Path, step: Step) -> Path:
    """Download a source package into `directory`; returns its `.dsc`.

    The machine's own sources stay as they are: apt gets a source list and a list directory of ours.

    Raises:
        LocalClusterError: no source is configured for this release, or the download failed.
    """
    entries = source_entries(configured_sources(), codename())
    if not entries:
        raise LocalClusterError(
            f"downloading the source of {package} failed: no package source for Debian {codename()} is configured",
            hint="Add one to /etc/apt/sources.list.d (sources.list(5)).",
        )
    parts = directory / "sources"
    lists = directory / "lists"
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    parts.mkdir(exist_ok=True)
    (parts / "source.sources").write_text(entries)
    options = [
        "-oDir::Etc::sourcelist=/dev/null",
        f"-oDir::Etc::sourceparts={parts}",
        f"-oDir::State::lists={lists}",
        "-oDir::Cache::pkgcache=",
        "-oDir::Cache::srcpkgcache=",
        # apt drops its rights for downloads, and its user may not enter our directory.
        "-oAPT::Sandbox::User=root",
    ]
    _apt(layout, [*options, "update"], action="reading the list of source packages", step=step)
    _apt(
        layout,
        [*options, "source", "--download-only", package],
        action=f"downloading the source of {package}",
        step=step,
        cwd=directory,
    )
    shutil.rmtree(lists)
    found = sorted(directory.glob(f"{package}_*.dsc"))
    if not found:
        raise LocalClusterError(f"downloading the source of {package} failed: apt-get left no .dsc file")
    return found[0]


def unsupported() -> str | None:
    """Why this machine cannot run the native cluster, None when it can."""
    if os.geteuid() != 0:
        return "it needs root"
    if shutil.which("apt-get") is None or not codename():
        return "this machine is not Debian"
    if codename() != "bookworm":
        return f"it needs Debian 12 (bookworm), whose source of Kubernetes is complete; this is {codename()}"
    return None
