"""Kubernetes from Debian's source package: the four programs of a node and its control plane, built once and cached.

Debian 12 carries the complete source of 1.20.2 with its dependencies; the packages made of it hold only kubectl.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from airflow_deployer.errors import LocalClusterError
from airflow_deployer.progress import Progress, Step

from . import packages
from .commands import run
from .layout import Layout

VERSION = "v1.20.2"
PROGRAMS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet")
_GO = Path("/usr/lib/go-1.19/bin/go")
_ROOT = "k8s.io/kubernetes"
_OPENAPI_MARK = b"+k8s:openapi-gen="


def directory(layout: Layout) -> Path:
    """Where the finished programs are."""
    return layout.cache / f"kubernetes-{VERSION}"


def binary(layout: Layout, program: str) -> Path:
    """One of the finished programs."""
    return directory(layout) / program


def is_built(layout: Layout) -> bool:
    """Whether all programs are there. The directory appears as a whole or not at all."""
    return all(binary(layout, program).exists() for program in PROGRAMS)


def openapi_packages(source: Path) -> list[str]:
    """Import paths of the packages that ask for an OpenAPI definition, of a Kubernetes source tree.

    What lies below `staging/src` is imported through `vendor`, where it is linked.
    """
    found = set()
    for top, prefix in (("pkg", f"{_ROOT}/pkg"), ("staging/src/k8s.io", f"{_ROOT}/vendor/k8s.io")):
        for path in (source / top).rglob("*.go"):
            if _OPENAPI_MARK in path.read_bytes():
                relative = path.parent.relative_to(source / top)
                found.add(f"{prefix}/{relative.as_posix()}")
    return sorted(found)


def version_flags() -> str:
    """Linker flags: no debugging symbols, and the version that `kubectl version` shows."""
    package = f"{_ROOT}/vendor/k8s.io/component-base/version"
    major, minor = VERSION.removeprefix("v").split(".")[:2]
    values = {"gitVersion": VERSION, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    return " ".join(["-s -w", *(f"-X {package}.{name}={value}" for name, value in values.items())])


def _build(layout: Layout, work: Path, step: Step) -> Path:
    log = layout.logs / "kubernetes-build.log"
    source = work / "src" / _ROOT
    source.parent.mkdir(parents=True)
    step.update("downloading the source")
    description = packages.download_source(layout, "kubernetes", work, step)
    run(
        ["dpkg-source", "--no-check", "-x", description, source],
        action="unpacking the source of Kubernetes",
        state=layout.state,
        log=log,
        step=step,
    )
    # Modules off: the source has its dependencies in vendor/, in the layout of a GOPATH.
    environ = {
        "GOPATH": str(work),
        "GOCACHE": str(work / "cache"),
        # Temporary files go with the work directory, whatever ends the build.
        "GOTMPDIR": str(work),
        "GO111MODULE": "off",
        "CGO_ENABLED": "0",
        "GOFLAGS": "",
        "GOTOOLCHAIN": "local",
        "PATH": f"{_GO.parent}:{os.environ.get('PATH', '/usr/bin:/bin')}",
    }

    def go(*arguments: str | Path, action: str, program: str | Path = _GO) -> None:
        run(
            [program, *arguments],
            action=action,
            state=layout.state,
            log=log,
            environ=environ,
            cwd=source,
            timeout=3600,
        )

    step.update("compiling the OpenAPI generator")
    generator = work / "openapi-gen"
    go("build", "-o", generator, "./vendor/k8s.io/kube-openapi/cmd/openapi-gen", action="building openapi-gen")
    step.update("generating the OpenAPI definitions")
    go(
        *("-O", "zz_generated.openapi", "-h", "hack/boilerplate/boilerplate.generatego.txt"),
        *("-i", ",".join(openapi_packages(source)), "-p", f"{_ROOT}/pkg/generated/openapi"),
        *("-o", work / "src", "-r", work / "violations"),
        action="generating the OpenAPI definitions of Kubernetes",
        program=generator,
    )
    programs = work / "programs"
    programs.mkdir()
    step.update(f"compiling {', '.join(PROGRAMS)} (minutes)")
    # One call for all: they share most of their packages.
    targets = [f"./cmd/{program}" for program in PROGRAMS]
    go("build", "-ldflags", version_flags(), "-o", f"{programs}/", *targets, action="building Kubernetes")
    return programs


def ensure_kubernetes(layout: Layout, progress: Progress) -> None:
    """Have the four programs in the cache; about 5 minutes on 2 cores, once.

    Raises:
        LocalClusterError: the download or the build failed.
    """
    if is_built(layout):
        return
    with progress.step(f"Kubernetes {VERSION} from source") as step:
        work = Path(tempfile.mkdtemp(prefix="kubernetes-", suffix=".partial", dir=layout.cache))
        try:
            programs = _build(layout, work, step)
            shutil.rmtree(directory(layout), ignore_errors=True)
            try:
                programs.replace(directory(layout))
            except OSError as error:
                raise LocalClusterError(f"keeping the built Kubernetes failed: {error}") from error
        finally:
            with contextlib.suppress(OSError):
                shutil.rmtree(work)
        step.done("4 programs")
