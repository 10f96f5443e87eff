"""Images in Docker Engine: the base image and the DAG image, built when the registry lacks them, checked and pushed.

docker-py drives the classic builder, so no Dockerfile here uses BuildKit's syntax. An image is found again by its tag,
an id of its inputs; it is deployed by digest. A DAG image gets its tag only after its DAGs were imported inside it, so
that what the registry holds under a tag has passed.
"""

from __future__ import annotations

import os
import platform as machine
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from airflow_deployer import project_requirements
from airflow_deployer.base_context import context_files, locked_versions
from airflow_deployer.content import CONTENT_TAG_LENGTH, File, ProjectContent, files_id, write_context
from airflow_deployer.errors import DockerError, GateError, RegistryError
from airflow_deployer.gate import GateReport, parse_report
from airflow_deployer.registry import Reference, Registry, RegistryAddress, public_image
from airflow_deployer.resolver import UV_VERSION

if TYPE_CHECKING:
    import docker
    from docker.models.containers import Container

    from airflow_deployer.config import Settings
    from airflow_deployer.progress import Progress, Step

CONTENT_ID_LABEL = "airflow-deployer.content-id"
"""Label of a DAG image: the id of the DAG content in it."""

UNCHECKED_SUFFIX = ".unchecked"
"""Behind the tag of an image that is pushed while its DAGs are still being checked."""

IMAGE_CONTENT = "/opt/airflow-deployer/content"
"""Where a DAG image holds the DAG content; the supervisor brings it to the volume."""

STABLE_SUFFIX = ".stable"
"""Behind the tag of an image that holds all but `dags/`; it is never pushed under that name."""

_DAGS_STEP = f"COPY dags {IMAGE_CONTENT}/dags\n"

IMPORT_CHECK = ("/opt/airflow/bin/python", "-m", "airflow_deployer_pod.import_check", f"{IMAGE_CONTENT}/dags")
AIRFLOW_USER = "50000:50000"
PING_TIMEOUT = 10.0
TRANSFER_TIMEOUT = 300.0
"""Seconds without a word from Docker Engine during a push (a build may be silent for longer)."""

_DETAIL_LINES = 15
_DETAIL_WIDTH = 72
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class BuildError(DockerError):
    """A build failed.

    Args:
        reason: the engine's word for it.
        log: the lines of the build.
    """

    def __init__(self, message: str, *, hint: str, reason: str, log: list[str]) -> None:
        super().__init__(message, hint=hint, details=log[-_DETAIL_LINES:])
        self.reason = reason
        self.log = log


@dataclass(frozen=True)
class ImageRef:
    """An image in a registry.

    Attributes:
        address: the registry, as this machine and as the nodes reach it.
        repository: its name there.
        tag: the tag it was found or pushed under.
        digest: `sha256:...` of its manifest.
    """

    address: RegistryAddress
    repository: str
    tag: str
    digest: str

    @property
    def deployed(self) -> str:
        """How the pod refers to it."""
        return f"{self.address.pull}/{self.repository}@{self.digest}"

    @property
    def pinned(self) -> str:
        """How Docker Engine on this machine refers to it."""
        return f"{self.address.push}/{self.repository}@{self.digest}"

    def __str__(self) -> str:
        return f"{self.address.push}/{self.repository}:{self.tag}"


@dataclass(frozen=True)
class ImagePlan:
    """Which images a deployment needs; made from files and settings alone.

    Attributes:
        address: the registry they go to.
        platform: the nodes', as in `linux/amd64`.
        base_repository: where the base image is.
        base_tag: its tag: an id of its inputs.
        base_arguments: the build arguments: `PARENT`, the image that it is built on, and `PROFILE`.
        base_files: its build context.
        airflow_version: Airflow's.
        lock: the locked packages in it; None where it is a ready-made one.
        dag_repository: where the DAG image is.
        dag_tag: its tag: the content id and an id of all its inputs.
        runtime_id: an id of its inputs without the DAG content.
        content: the project's files.
        ready_base: the ready-made base image of `images.base`; then nothing else about the base counts.
    """

    address: RegistryAddress
    platform: str
    base_repository: str
    base_tag: str
    base_arguments: Mapping[str, str]
    base_files: tuple[File, ...]
    airflow_version: str
    lock: Path | None
    dag_repository: str
    dag_tag: str
    runtime_id: str
    content: ProjectContent
    ready_base: ImageRef | None = None


@dataclass(frozen=True)
class DagImage:
    """The DAG image in the registry, its DAGs imported once.

    Attributes:
        ref: where it is.
        report: what the import check found when it was built just now; None when the registry held it already.
    """

    ref: ImageRef
    report: GateReport | None


def plan_images(
    settings: Settings, content: ProjectContent, lock: Path | None, address: RegistryAddress, platform: str
) -> ImagePlan:
    """Name the images; asks a registry only for the digest of a ready-made base image.

    Args:
        settings: the settings.
        content: the project's files.
        lock: the locked packages of the Airflow version; None with `images.base` alone.
        address: the registry for the images.
        platform: the nodes', as in `linux/amd64`.

    Raises:
        RegistryError: `images.base` is not in its registry.
    """
    ready = _ready_base(settings) if settings.images.base else None
    base_files = context_files(lock) if lock else ()
    parent = public_image(settings.parent_image, settings.images.mirror)
    profile = settings.airflow.profile.pod_document()
    base_tag = files_id(base_files, parent, settings.airflow.version, profile, platform)[:CONTENT_TAG_LENGTH]
    # Not the digest of our own base image: built again from the same inputs it would differ, and mean nothing.
    base_identity = ready.pinned if ready else base_tag
    return ImagePlan(
        address=address,
        platform=platform,
        base_repository=settings.base_repository,
        base_tag=base_tag,
        base_arguments={"PARENT": parent, "PROFILE": profile},
        base_files=base_files,
        airflow_version=settings.airflow.version,
        lock=lock,
        dag_repository=settings.dag_repository,
        dag_tag=content.image_tag(stable_dockerfile(base_identity, content) + _DAGS_STEP, platform),
        runtime_id=content.runtime_id(runtime_dockerfile(base_identity, content), platform),
        content=content,
        ready_base=ready,
    )


def find_dag_image(registry: Registry, plan: ImagePlan) -> ImageRef | None:
    """The DAG image, if the registry holds it: then there is nothing to build or to check."""
    return _find(registry, plan.address, plan.dag_repository, plan.dag_tag)


def ensure_base_image(engine: Engine, registry: Registry, plan: ImagePlan, progress: Progress) -> ImageRef:
    """Have the base image in the registry: found, or built and pushed.

    Raises:
        DockerError: it could not be built.
        RegistryError: it could not be pushed.
    """
    if plan.ready_base:
        return plan.ready_base
    with progress.step("Base image") as step:
        found = _find(registry, plan.address, plan.base_repository, plan.base_tag)
        if found:
            step.done(f"{plan.base_tag} is in the registry")
            return found
        started = time.monotonic()
        name = f"{plan.address.push}/{plan.base_repository}:{plan.base_tag}"
        engine.build(
            name,
            plan.base_files,
            step,
            arguments=plan.base_arguments,
            labels={"org.opencontainers.image.title": "airflow-deployer base image"},
            platform=plan.platform,
        )
        built = time.monotonic()
        digest = engine.push(name, step) or _pushed_digest(registry, plan.base_repository, plan.base_tag)
        step.done(f"built in {built - started:.0f} s, pushed in {time.monotonic() - built:.0f} s")
        return ImageRef(plan.address, plan.base_repository, plan.base_tag, digest)


def ensure_dag_image(
    engine: Engine,
    registry: Registry,
    plan: ImagePlan,
    base: ImageRef,
    settings: Settings,
    progress: Progress,
    check: Callable[[str], GateReport | None],
) -> DagImage:
    """Have the DAG image in the registry: found, or built, its DAGs imported while it is pushed, and tagged.

    Args:
        check: imports the DAGs, given the image's id; returns None where they were imported already.

    Raises:
        DockerError: it could not be built, or its check could not be run.
        RequirementsError: the packages of requirements.txt cannot be installed beside Airflow's.
        RegistryError: it could not be pushed.
        GateError: its DAGs do not import, share an id or hold a cycle; it then has no tag, and is checked again.
    """
    found = find_dag_image(registry, plan)
    if found:
        return DagImage(found, report=None)
    name = f"{plan.address.push}/{plan.dag_repository}:{plan.dag_tag}{UNCHECKED_SUFFIX}"
    with progress.step("DAG image") as step:
        below = _ensure_stable_image(engine, plan, base, step)
        image = engine.build(
            name,
            [file for file in plan.content.dag_files if not _is_included(file)],
            step,
            dockerfile=f"FROM {below}\n{_DAGS_STEP}",
            labels={
                CONTENT_ID_LABEL: plan.content.content_id,
                "org.opencontainers.image.title": f"Airflow deployment {settings.name}",
                "org.opencontainers.image.version": plan.dag_tag,
                "org.opencontainers.image.base.name": str(base),
                "org.opencontainers.image.base.digest": base.digest,
            },
            platform=plan.platform,
        )
        step.done(f"{len(plan.content.files)} files, content {plan.content.content_id[:CONTENT_TAG_LENGTH]}")
    with _Push(engine, name, progress) as push:
        report = check(image)
        if report is not None:
            report.raise_for_errors()
        digest = push.digest() or _pushed_digest(registry, plan.dag_repository, f"{plan.dag_tag}{UNCHECKED_SUFFIX}")
    registry.put_tag(plan.dag_repository, digest, plan.dag_tag)
    return DagImage(ImageRef(plan.address, plan.dag_repository, plan.dag_tag, digest), report)


def check_imports(engine: Engine, image: str, settings: Settings, progress: Progress) -> GateReport:
    """Import the DAGs of a built image inside it, in a container that can reach and change nothing.

    Args:
        engine: the engine that holds it.
        image: its id or name.
        settings: gives the environment of the DAGs and the time they may take.
        progress: where to report.

    Raises:
        GateError: the check took too long or ended without a report.
        DockerError: the container could not be run.
    """
    limit = settings.timeouts.import_check
    with progress.step("Import check") as step:
        output = engine.run(image, IMPORT_CHECK, settings.airflow.environment(), limit)
        if output.exit_code is None:
            raise GateError(
                f"The import of the DAGs did not end within {limit}.",
                hint="Look for work at the top level of a DAG file, or raise `timeouts.import_check`.",
                details=output.errors[-_DETAIL_LINES:],
            )
        report = parse_report(output.text, output.exit_code, output.errors[-_DETAIL_LINES:])
        step.done(report.summary)
    return report


def runtime_dockerfile(base: str, content: ProjectContent) -> str:
    """The beginning of a DAG image's Dockerfile: what is not DAG content.

    Args:
        base: the image that it is built on.
        content: says which parts there are to copy.
    """
    lines = [f"FROM {base}"]
    if content.requirements:
        # What is installed already is the constraint: the project's packages may not change Airflow's own. uv comes for
        # this step alone; the packages belong to root, so the running Airflow cannot change them.
        lines += [
            "USER 0:0",
            f"COPY requirements.txt {project_requirements.IMAGE_PATH}",
            'RUN pip="$(PATH=/usr/local/bin:/usr/bin:/bin command -v pip)"'
            ' && "$pip" install --quiet --no-cache-dir --disable-pip-version-check --target /tmp/uv'
            f" uv=={UV_VERSION}"
            " && /tmp/uv/bin/uv pip freeze --python /opt/airflow/bin/python > /tmp/constraints.txt"
            " && /tmp/uv/bin/uv pip install --python /opt/airflow/bin/python --no-cache --compile-bytecode"
            ' ${PIP_INDEX_URL:+--default-index "$PIP_INDEX_URL"}'
            f" --constraint /tmp/constraints.txt --requirement {project_requirements.IMAGE_PATH}"
            f" && rm -rf /tmp/uv /tmp/constraints.txt {project_requirements.IMAGE_PATH}",
            f"USER {AIRFLOW_USER}",
        ]
    if content.plugin_files:
        lines.append(f"COPY --chown={AIRFLOW_USER} plugins /home/airflow/plugins")
    return "\n".join(lines) + "\n"


def stable_dockerfile(base: str, content: ProjectContent) -> str:
    """The Dockerfile of everything but `dags/`, which is what changes from edit to edit.

    DAG content is owned by root: the running Airflow has a copy of its own on the volume.
    """
    include = f"COPY include {IMAGE_CONTENT}/include\n" if any(map(_is_included, content.dag_files)) else ""
    return runtime_dockerfile(base, content) + include


def _ensure_stable_image(engine: Engine, plan: ImagePlan, base: ImageRef, step: Step) -> str:
    """Have the image below `dags/` in the engine; return its name.

    An image of its own, so that an edit of a DAG sends neither `include/` nor anything else to the engine again.
    """
    content = plan.content
    files = [*filter(_is_included, content.dag_files), *content.plugin_files]
    files += [content.requirements] if content.requirements else []
    if not files:
        return base.pinned
    dockerfile = stable_dockerfile(base.pinned, content)
    tag = files_id(files, dockerfile, plan.platform)[:CONTENT_TAG_LENGTH]
    name = f"{plan.address.push}/{plan.dag_repository}:{tag}{STABLE_SUFFIX}"
    if not engine.holds(name):
        try:
            engine.build(name, files, step, dockerfile=dockerfile, labels={}, platform=plan.platform)
        except BuildError as error:
            if project_requirements.IMAGE_PATH not in error.reason:
                raise
            locked = locked_versions(plan.lock) if plan.lock else {}
            raise project_requirements.make_error(error.log, plan.airflow_version, locked) from None
    return name


def _is_included(file: File) -> bool:
    return file.path.startswith("include/")


@dataclass(frozen=True)
class Output:
    """What a container wrote; `exit_code` is None when it was stopped because its time was up."""

    text: str
    errors: list[str]
    exit_code: int | None


class Engine:
    """Docker Engine, reached as the `docker` command would reach it (`DOCKER_HOST`, Docker contexts)."""

    def __init__(self) -> None:
        self._client: docker.DockerClient | None = None
        self._lock = threading.Lock()

    def connect(self) -> str:
        """Reach the engine and return its version; safe to repeat.

        Raises:
            DockerError: there is none, it does not answer, or it may not be used.
        """
        return str(self._connected().version()["Version"])

    @property
    def platform(self) -> str:
        """What it builds for when nothing else is asked, as in `linux/amd64`."""
        version = self._connected().version()
        return f"{version['Os']}/{version['Arch']}"

    def build(
        self,
        name: str,
        files: Iterable[File],
        step: Step,
        *,
        dockerfile: str | None = None,
        arguments: Mapping[str, str] | None = None,
        labels: Mapping[str, str],
        platform: str,
    ) -> str:
        """Build an image with the classic builder and return its id.

        Args:
            name: `host/repository:tag` that it gets.
            files: the build context.
            step: gets the build's steps as details.
            dockerfile: the text of the Dockerfile, if it is not among `files`.
            arguments: the build arguments.
            labels: the image's labels.
            platform: what to build for.

        Raises:
            DockerError: with the end of the build's log.
        """
        client, log, image = self._connected(), _Log(), ""
        with tempfile.TemporaryFile() as context, _translated(f"build {name}"):
            write_context(context, files, dockerfile)
            context.seek(0)
            lines = client.api.build(
                fileobj=context,
                custom_context=True,
                tag=name,
                rm=True,
                forcerm=True,
                decode=True,
                buildargs=dict(arguments or {}),
                labels=dict(labels),
                platform=platform if platform != self.platform else None,
            )
            for line in _lines(lines):
                if "error" in line:
                    raise _build_error(name, str(line["error"]), log.lines)
                image = line.get("aux", {}).get("ID", image)
                for text in log.add(str(line.get("stream", ""))):
                    if match := re.match(r"Step (\d+/\d+) : (.*)", text):
                        step.update(_shortened(f"{match[1]} {match[2]}"))
        return image

    def holds(self, name: str) -> bool:
        """Whether the engine holds an image of that name.

        Raises:
            DockerError: it cannot be asked.
        """
        from docker.errors import ImageNotFound

        with _translated(f"look for {name}"):
            try:
                self._connected().images.get(name)
            except ImageNotFound:
                return False
        return True

    def push(self, name: str, step: Step, cancelled: threading.Event | None = None) -> str | None:
        """Push an image and return its digest, if the engine tells it.

        Args:
            name: `host/repository:tag`.
            step: gets the number of layers and bytes as detail.
            cancelled: stops the push once it is set.

        Raises:
            RegistryError: the registry refused it or could not be reached.
        """
        client, layers, digest = self._connected(), _Layers(), None
        repository, _, tag = name.rpartition(":")
        with _translated(f"push {name}"):
            lines = client.api.push(repository, tag=tag, stream=True, decode=True)
            for line in _lines(lines):
                if cancelled is not None and cancelled.is_set():
                    break
                if "error" in line:
                    raise _push_error(name, str(line["error"]))
                digest = line.get("aux", {}).get("Digest", digest)
                if detail := layers.add(line):
                    step.update(detail)
        return digest

    def run(self, image: str, command: tuple[str, ...], environment: Mapping[str, str], limit: float) -> Output:
        """Run a command in a container without network, capabilities or a writable file system; it is always removed.

        Args:
            image: id or name of the image.
            command: program and arguments.
            environment: variables besides the image's.
            limit: seconds until it is killed.

        Raises:
            DockerError: the container could not be run.
        """
        client = self._connected()
        with _translated(f"run {image}"):
            container = client.containers.create(
                image,
                entrypoint=list(command),
                command=[],
                environment={"HOME": "/tmp", **environment},  # noqa: S108 - inside the container
                network_mode="none",
                cap_drop=["ALL"],
                security_opt=["no-new-privileges:true"],
                read_only=True,
                tmpfs={"/tmp": "rw,nosuid,nodev,size=1g,mode=1777"},  # noqa: S108 - inside the container
                labels={"airflow-deployer": "import-check"},
            )
            try:
                container.start()
                exit_code = _wait(container, limit)
                text = container.logs(stdout=True, stderr=False).decode(errors="replace")
                errors = container.logs(stdout=False, stderr=True).decode(errors="replace").splitlines()
            finally:
                container.remove(force=True, v=True)
        return Output(text, errors, exit_code)

    def close(self) -> None:
        """Let go of the connections; the engine can be used again."""
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _connected(self) -> docker.DockerClient:
        with self._lock:
            if self._client is None:
                self._client = _connect()
            return self._client


class _Push:
    """A push in a thread of its own; leaving the block by an error gives it up."""

    def __init__(self, engine: Engine, name: str, progress: Progress) -> None:
        self._cancelled = threading.Event()
        self._digest: str | None = None
        self._error: BaseException | None = None
        # A daemon: a push that is given up must not keep the command from ending.
        self._thread = threading.Thread(target=self._run, args=(engine, name, progress), daemon=True)

    def _run(self, engine: Engine, name: str, progress: Progress) -> None:
        try:
            with progress.step("Push") as step:
                self._digest = engine.push(name, step, self._cancelled)
        except BaseException as error:  # told to whoever waits
            self._error = error

    def __enter__(self) -> _Push:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._cancelled.set()

    def digest(self) -> str | None:
        """Wait for the end; the digest, if the engine told it."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._digest


class _Log:
    """Joins the builder's fragments to lines, keeps them, and drops the builder's own housekeeping and colours."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._rest = ""

    def add(self, fragment: str) -> Iterator[str]:
        *lines, self._rest = (self._rest + fragment).split("\n")
        for line in lines:
            text = _COLOURS.sub("", line).rstrip()
            if text and not text.startswith((" ---> ", "Removing intermediate container ")):
                self.lines.append(text)
                yield text


class _Layers:
    """Counts the layers and bytes of a push."""

    def __init__(self) -> None:
        self._sizes: dict[str, tuple[int, int]] = {}
        self._done: set[str] = set()
        self._seen: set[str] = set()

    def add(self, line: Mapping[str, Any]) -> str:
        """Take one line of the engine's answer; the new detail, or "" if it changes nothing."""
        layer, status = line.get("id"), str(line.get("status", ""))
        if not layer:
            return ""
        self._seen.add(layer)
        amounts = line.get("progressDetail") or {}
        if "total" in amounts:
            self._sizes[layer] = (amounts.get("current", 0), amounts["total"])
        if status in ("Pushed", "Layer already exists") or status.startswith("Mounted from"):
            self._done.add(layer)
        sent, total = (sum(column) for column in zip(*self._sizes.values(), strict=True)) if self._sizes else (0, 0)
        size = f", {min(sent, total) / 1e6:.0f} of {total / 1e6:.0f} MB" if total else ""
        return f"{len(self._done)} of {len(self._seen)} layers{size}"


def _ready_base(settings: Settings) -> ImageRef:
    name = public_image(str(settings.images.base), settings.images.mirror)
    reference = Reference.parse(name)
    tag = reference.tag or "latest"
    digest = reference.digest or Registry(reference.host).manifest_digest(reference.repository, tag)
    if digest is None:
        raise RegistryError(
            f"Cannot use the base image {name}: its registry does not hold it.", hint="Set `images.base`."
        )
    return ImageRef(RegistryAddress(reference.host, reference.host), reference.repository, tag, digest)


def _find(registry: Registry, address: RegistryAddress, repository: str, tag: str) -> ImageRef | None:
    digest = registry.manifest_digest(repository, tag)
    return ImageRef(address, repository, tag, digest) if digest else None


def _pushed_digest(registry: Registry, repository: str, tag: str) -> str:
    digest = registry.manifest_digest(repository, tag)
    if digest is None:
        raise RegistryError(f"Cannot find {registry.host}/{repository}:{tag} in the registry after it was pushed.")
    return digest


def _lines(stream: Generator[dict[str, Any], None, None] | Any) -> Iterator[dict[str, Any]]:
    """The engine's answer line by line; an interruption closes the connection, which ends the work behind it."""
    with closing(stream):
        yield from stream


def _wait(container: Container, limit: float) -> int | None:
    """The container's exit code, or None after it was killed because `limit` seconds had passed."""
    import requests

    try:
        return int(container.wait(timeout=limit)["StatusCode"])
    except requests.exceptions.RequestException as error:
        # docker-py lets both of these through when its read from the engine's socket takes too long.
        if not isinstance(error, (requests.exceptions.Timeout, requests.exceptions.ConnectionError)):
            raise
    with suppress(Exception):  # it may have ended just now
        container.kill()
    return None


def _shortened(text: str) -> str:
    return text if len(text) <= _DETAIL_WIDTH else f"{text[: _DETAIL_WIDTH - 1]}…"


@contextmanager
def _translated(action: str) -> Iterator[None]:
    """Turn what docker-py raises into a `DockerError`."""
    import requests
    from docker.errors import APIError, DockerException

    try:
        yield
    except APIError as error:
        _raise_api_error(action, str(error.explanation or error))
    except (DockerException, requests.exceptions.RequestException) as error:
        raise DockerError(f"Cannot {action}: {_reason(error)}.", hint="docker info") from None


def _raise_api_error(action: str, reason: str) -> NoReturn:
    if re.search(r"buildkit|legacy builder|classic builder", reason, re.IGNORECASE):
        raise DockerError(
            f"Cannot {action}: this engine has only BuildKit, and no classic builder: {reason.rstrip('.')}.",
            hint="Point DOCKER_HOST to an engine that has it (deployer cluster up starts one on Debian).",
        ) from None
    raise DockerError(f"Cannot {action}: {reason.rstrip('.')}.", hint="docker info") from None


def _build_error(name: str, reason: str, log: list[str]) -> BuildError:
    hint = "docker info"
    if re.search(r"manifest|pull access denied|no such host|dial tcp|TLS handshake|connection refused", reason):
        hint = "Set `images.mirror` to a registry that holds the public images, or `images.parent` to another image."
    return BuildError(f"Cannot build {name}: {reason.rstrip('.')}.", hint=hint, reason=reason, log=log)


def _push_error(name: str, reason: str) -> RegistryError:
    host = name.partition("/")[0]
    hint = "Look into the registry's log."
    if re.search(r"unauthorized|authentication|no basic auth|denied|forbidden", reason, re.IGNORECASE):
        hint = f"docker login {host}"
    elif "x509" in reason:
        hint = (
            f"Put the certificate of its authority into /etc/docker/certs.d/{host}/ca.crt on Docker Engine's machine."
        )
    elif re.search(r"connection refused|no such host|timeout", reason):
        hint = f"Docker Engine cannot reach {host}: is the registry running? (deployer cluster up starts a local one)"
    return RegistryError(f"Cannot push {name}: {reason.rstrip('.')}.", hint=hint)


def _connect() -> docker.DockerClient:
    import docker
    from docker.errors import DockerException

    try:
        client = docker.from_env(version="auto", timeout=int(PING_TIMEOUT))
    except (DockerException, OSError, ValueError) as error:
        raise _no_engine(error) from None
    client.api.timeout = int(TRANSFER_TIMEOUT)
    return client


def _no_engine(error: Exception) -> DockerError:
    address = os.environ.get("DOCKER_HOST", "")
    where = f" at {address} (DOCKER_HOST)" if address else ""
    reason = _reason(error)
    if "Permission denied" in reason:
        return DockerError(
            f"Cannot use Docker Engine{where}: permission denied.",
            hint="Add yourself to its group, then log in again: sudo usermod -aG docker $USER",
        )
    if address:
        hint = "Start that engine, or: unset DOCKER_HOST"
    elif machine.system() != "Linux":
        hint = "Start Docker Desktop (or install it)."
    elif shutil.which("dockerd"):
        hint = "Start it: sudo systemctl start docker (on Debian also, without systemd: deployer cluster up)"
    else:
        hint = "Install it: sudo apt-get install docker.io, or on Debian everything at once: deployer cluster up"
    return DockerError(f"Cannot reach Docker Engine{where}: {reason}.", hint=hint)


def _reason(error: BaseException) -> str:
    """The innermost cause: what docker-py wraps around it says little."""
    seen: BaseException | None = error
    while seen is not None:
        for candidate in (seen, *(item for item in seen.args if isinstance(item, BaseException))):
            if isinstance(candidate, OSError) and candidate.strerror:
                return candidate.strerror
        seen = seen.__cause__ or seen.__context__
    text = str(error).partition("\n")[0]
    match = re.search(r"(?:FileNotFoundError|PermissionError|ConnectionRefusedError)\(\d+, '([^']+)'\)", text)
    return match[1] if match else text.rstrip(".")
