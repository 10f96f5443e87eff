"""The commands on a Deployment as lists of steps: up, down, status, render, and the forward in the foreground.

Everything here composes; what a step does stands in the module of its name. Progress goes to a `Progress`, results
come back as `reports`.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from airflow_deployer import (
    airflow_settings,
    credentials,
    diagnosis,
    images,
    kube_context,
    lease,
    manifests,
    objects,
    preflight,
    rollout,
    verification,
)
from airflow_deployer.cluster import (
    CLAIM,
    CONFIG_MAP,
    EVENT,
    LEASE,
    NAMESPACE,
    POD,
    SECRET,
    SERVICE,
    STATEFUL_SET,
    ApiError,
    Cluster,
    Object,
)
from airflow_deployer.config import Settings
from airflow_deployer.content import ProjectContent, read_project
from airflow_deployer.errors import AirflowError, DeployerError, ForwardError
from airflow_deployer.images import Engine, ImagePlan
from airflow_deployer.kube_context import KubeContext
from airflow_deployer.manifests import Image, Names
from airflow_deployer.progress import Progress
from airflow_deployer.registry import (
    MIRROR_ANNOTATION,
    LocalRegistryHosting,
    Registry,
    RegistryAddress,
    choose_registry,
    parse_local_registry_hosting,
    public_image,
    pull_secret_data,
)
from airflow_deployer.reports import ContainerReport, DownReport, StatusReport, UpReport


@dataclass(frozen=True)
class Session:
    """A run's pinned context, its API server and the names of what it works on."""

    settings: Settings
    context: KubeContext
    cluster: Cluster
    names: Names

    @property
    def target(self) -> Any:
        """Where the forward leads."""
        from airflow_deployer.port_forward import Target

        return Target(
            context=self.context.name,
            namespace=self.names.namespace,
            name=self.names.name,
            port=airflow_settings.API_PORT,
            kubeconfig=self.context.kubeconfig,
        )


@dataclass
class _Found:
    """What the preflight learned."""

    registry: RegistryAddress
    mirror: str | None
    platform: str
    namespace_exists: bool
    live: Object | None


@dataclass
class _Stopwatch:
    """Seconds by step, in the order of the steps."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def lap(self, title: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[title] = self.seconds.get(title, 0.0) + time.monotonic() - began


def connect(settings: Settings) -> Session:
    """Choose the context, guard it, and load its credentials; nothing is asked of the API server yet."""
    context = kube_context.resolve(settings.context)
    kube_context.guard(context, on_purpose=settings.context_on_purpose)
    names = Names(settings.name, settings.namespace or context.namespace or "default")
    return Session(settings, context, Cluster(context), names)


def up(
    project: Path,
    settings: Settings,
    progress: Progress,
    *,
    forward: bool,
    check_port: bool,
    force_conflicts: bool,
) -> UpReport:
    """Take the project to a running, verified Airflow.

    Args:
        forward: start the background forward at the end.
        check_port: make sure before the build that the local port is free.
        force_conflicts: take over fields that another manager has changed.
    """
    watch = _Stopwatch()
    with watch.lap("check"), progress.step("Preflight") as step:
        content = read_project(project, settings.project)
        session = connect(settings)
        engine = images.Engine()
        found = _preflight(session, engine, check_port=check_port)
        plan, present = _plan(session, content, found)
        step.done(
            f"context {session.context.name}, namespace {session.names.namespace}, registry {found.registry.push}"
        )
    if not found.namespace_exists:
        objects.ensure_namespace(session.cluster, session.names.namespace)
    with lease.held(
        session.cluster, session.names.namespace, session.names.lease, labels=session.names.labels, doing="up"
    ):
        with watch.lap("images"):
            image, expected, warnings = _publish(session, engine, plan, present, progress)
        with watch.lap("objects"):
            changes, secret = _apply(session, image, found, progress, force=force_conflicts)
        with watch.lap("pod"):
            pod, rolled = _roll_out(session, changes, progress)
        with watch.lap("verify"):
            url = _ensure_forward(session) if forward else None
            verified = _verify(session, url, secret, pod, expected if rolled != "kept" else None, progress)
    return UpReport(
        context=session.context.name,
        namespace=session.names.namespace,
        name=session.names.name,
        image=image.reference,
        content_id=image.content_id,
        airflow_version=settings.airflow.version,
        changes={what: how for what, how in changes.items() if how != "unchanged"},
        pod=rolled,
        dags=verified.dags,
        import_errors=verified.import_errors,
        warnings=warnings,
        steps=watch.seconds,
        url=url,
    )


def complain_of_import_errors(report: UpReport) -> None:
    """Fail after a deployment whose DAGs Airflow itself cannot import.

    Raises:
        AirflowError: naming the files; the deployment stays as it is.
    """
    if report.import_errors:
        raise AirflowError(
            f"Airflow runs, but cannot import {len(report.import_errors)} DAG file(s).",
            details=[f"{error.file}: {error.cause}" for error in report.import_errors],
            hint=f"make what the file asks for (a Variable or Connection: {report.url or 'the web UI'}), "
            "or mend it and run deployer up",
        )


# -- the steps of up ------------------------------------------------------------------------------------------------


def _preflight(session: Session, engine: Engine, *, check_port: bool) -> _Found:
    cluster, names, settings = session.cluster, session.names, session.settings
    # Asked alone first: every other check would tell the same when the API server cannot be reached.
    cluster.version()

    def registry() -> tuple[RegistryAddress, str | None]:
        hosting, mirror = _local_hosting(session)
        address = choose_registry(settings.images, hosting)
        Registry(address.push).ping()
        return address, settings.images.mirror or mirror

    def port() -> None:
        if check_port:
            _check_port(session)

    found = preflight.concurrently(
        docker=engine.connect,
        registry=registry,
        permissions=lambda: preflight.check_permissions(cluster, names.namespace),
        namespace=lambda: preflight.check_namespace(cluster, names.namespace),
        storage=lambda: preflight.check_storage(cluster, names, settings),
        secret=lambda: preflight.check_secret(cluster, names),
        platform=lambda: preflight.node_platform(cluster),
        live=lambda: cluster.get(STATEFUL_SET, names.namespace, names.name),
        port=port,
    )
    address, mirror = found["registry"]
    return _Found(
        registry=address,
        mirror=mirror,
        platform=found["platform"] or engine.platform,
        namespace_exists=found["namespace"],
        live=found["live"],
    )


def _local_hosting(session: Session) -> tuple[LocalRegistryHosting | None, str | None]:
    """What the cluster announces of its registry (KEP-1755), trusted for local contexts only.

    The annotation says that the registry holds the public images as well, as our own cluster's does.
    """
    if not session.context.looks_local:
        return None, None
    try:
        announced = session.cluster.get(CONFIG_MAP, "kube-public", "local-registry-hosting")
    except ApiError:
        return None, None
    text = ((announced or {}).get("data") or {}).get("localRegistryHosting.v1")
    if announced is None or text is None:
        return None, None
    mirror = (announced["metadata"].get("annotations") or {}).get(MIRROR_ANNOTATION)
    return parse_local_registry_hosting(text), mirror


def _check_port(session: Session) -> None:
    """Make sure that the local port is free, or is our own forward's."""
    from airflow_deployer import background_forward

    port = session.settings.port_forward.port
    holder = background_forward.port_holder(session.target, port)
    if holder is not None:
        raise ForwardError(
            f"Cannot forward port {port}: it is taken by {holder}.",
            hint="end that, or choose another port: deployer up --port 8081, or none: deployer up --no-port-forward",
        )


def _plan(session: Session, content: ProjectContent, found: _Found) -> tuple[ImagePlan, Image | None]:
    """Name the images; return the DAG image too if it is deployed or in the registry already.

    Raises:
        RegistryError: it has to be built, and the registry refuses a push.
    """
    settings = _with_mirror(session.settings, found.mirror)
    plan = images.plan_images(settings, content, found.registry, found.platform)
    deployed = _deployed_image(found.live)
    prefix = f"{found.registry.pull}/{plan.dag_repository}@"
    if deployed and deployed.image_id == plan.dag_tag and deployed.reference.startswith(prefix):
        return plan, deployed
    registry = Registry(found.registry.push)
    existing = images.find_dag_image(registry, plan)
    if existing is not None:
        return plan, Image(existing.deployed, content_id=content.content_id, image_id=plan.dag_tag)
    # Only where something will be pushed: asking leaves a trace in some registries.
    registry.check_push(plan.dag_repository)
    return plan, None


def _publish(
    session: Session, engine: Engine, plan: ImagePlan, present: Image | None, progress: Progress
) -> tuple[Image, frozenset[str] | None, tuple[str, ...]]:
    """Have the images in the registry; return the DAG image, the DAG files that Airflow must show, and warnings."""
    if present is not None:
        return present, None, ()
    registry = Registry(plan.address.push)
    base = images.ensure_base_image(engine, registry, plan, progress)
    dag_image = images.ensure_dag_image(engine, registry, plan, base, session.settings, progress)
    image = Image(dag_image.ref.deployed, content_id=plan.content.content_id, image_id=plan.dag_tag)
    report = dag_image.report
    if report is None:
        return image, None, ()
    for warning in report.warnings:
        progress.warning(warning)
    files = {file.path for file in report.files if file.dag_ids} | {
        problem.dag_file for problem in report.needs_database
    }
    return image, frozenset(path.removeprefix("dags/") for path in files), tuple(report.warnings)


def _with_mirror(settings: Settings, mirror: str | None) -> Settings:
    import msgspec

    return msgspec.structs.replace(settings, images=msgspec.structs.replace(settings.images, mirror=mirror))


def _deployed_image(live: Object | None) -> Image | None:
    if live is None:
        return None
    annotations = live["metadata"].get("annotations") or {}
    containers = live["spec"]["template"]["spec"]["containers"]
    reference = next((item["image"] for item in containers if item["name"] == "airflow"), "")
    if not {manifests.CONTENT_ID, manifests.IMAGE_ID} <= set(annotations):
        return None
    return Image(reference, annotations[manifests.CONTENT_ID], annotations[manifests.IMAGE_ID])


def _apply(
    session: Session, image: Image, found: _Found, progress: Progress, *, force: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Bring the objects to their state; return what happened to each, and the secret values."""
    cluster, names, settings = session.cluster, session.names, session.settings
    with progress.step("Objects") as step:
        changes: dict[str, str] = {}
        if not found.namespace_exists:
            changes[f"Namespace {names.namespace}"] = "created"
        changes[f"Secret {names.secret}"], secret = objects.ensure_secret(cluster, names)
        for body in _objects(session, image, found):
            what = f"{body['kind']} {body['metadata']['name']}"
            changes[what] = objects.ensure(
                cluster, names, body, step=step, force=force, timeout=settings.timeouts.delete
            )
        different = [f"{what} {how}" for what, how in changes.items() if how != "unchanged"]
        step.done(", ".join(different) or "unchanged")
    return changes, secret


def _objects(session: Session, image: Image, found: _Found) -> list[Object]:
    """Every object but the generated Secret, in the order of their making."""
    names, settings = session.names, session.settings
    pull_secret = settings.images.pull_secret
    bodies: list[Object] = []
    if pull_secret is None and (login := pull_secret_data(found.registry)) is not None:
        pull_secret = names.pull_secret
        bodies.append(manifests.make_pull_secret(names, base64.b64encode(login).decode()))
    bodies += [
        manifests.make_claim(names, settings),
        manifests.make_service(names),
        manifests.make_stateful_set(
            names,
            settings,
            image,
            postgres_image=public_image(settings.images.postgres, found.mirror),
            pull_secret=pull_secret,
        ),
    ]
    return bodies


def _roll_out(session: Session, changes: dict[str, str], progress: Progress) -> tuple[Object, str]:
    """Have a ready pod of the newest revision; return it, and whether it was kept, replaced or created."""
    cluster, names, timeouts = session.cluster, session.names, session.settings.timeouts
    with progress.step("Pod") as step:
        live = cluster.get(STATEFUL_SET, names.namespace, names.name) or {}
        revision = rollout.wait_revision(
            cluster, names, generation=int(live["metadata"]["generation"]), timeout=timeouts.delete
        )
        before = objects.ensure_pod_of_revision(
            cluster, names, revision, step=step, timeout=timeouts.delete + manifests.GRACE_SECONDS
        )
        pod = rollout.wait_ready(cluster, names, revision=revision, timeout=timeouts.ready, step=step)
        created = before != "replaced" and changes.get(f"StatefulSet {names.name}") == "created"
        outcome = "created" if created else "started" if before == "awaited" else before
        step.done(f"{names.pod} {outcome}" if outcome != "kept" else f"{names.pod} is ready")
    return pod, outcome


def _ensure_forward(session: Session) -> str:
    """Have the background forward; return its URL."""
    from airflow_deployer import background_forward

    return background_forward.ensure(session.target, port=session.settings.port_forward.port).url


@contextmanager
def _airflow_url(session: Session, url: str | None) -> Iterator[str]:
    """The URL of a forward that runs, or of one for the time of the block."""
    if url is not None:
        yield url
        return
    from airflow_deployer.port_forward import forwarded

    with forwarded(session.target) as port:
        yield f"http://127.0.0.1:{port}"


def _verify(
    session: Session,
    url: str | None,
    secret: dict[str, str],
    pod: Object,
    expected: frozenset[str] | None,
    progress: Progress,
) -> verification.Verified:
    with progress.step("Airflow") as step, _airflow_url(session, url) as address:
        verified = verification.verify(
            address,
            user=credentials.ADMIN_USER,
            password=secret[credentials.ADMIN_PASSWORD],
            expected=expected,
            since=_started_at(pod),
            timeout=60.0,
            step=step,
        )
        step.done(f"{', '.join(verified.components)} healthy, {verified.dags} DAGs")
    return verified


def _started_at(pod: Object) -> str:
    """When the `airflow` container started, by the node's clock (RFC 3339)."""
    for status in pod["status"].get("containerStatuses", []):
        if status["name"] == "airflow":
            return str((status.get("state", {}).get("running") or {}).get("startedAt", ""))
    return ""


# -- the other commands ---------------------------------------------------------------------------------------------


def down(session: Session, progress: Progress, *, purge: bool) -> DownReport:
    """Remove what `up` made and wait until it is gone; the volume and the Secret only with `purge`."""
    from airflow_deployer import background_forward

    cluster, names, timeouts = session.cluster, session.names, session.settings.timeouts
    removed: list[str] = []
    cluster.version()
    if not _namespace_there(session):
        return DownReport(session.context.name, names.namespace, names.name, (), ())
    with lease.held(cluster, names.namespace, names.lease, labels=names.labels, doing="down"):
        if background_forward.stop(session.target):
            removed.append("port-forward")
        with progress.step("StatefulSet and pod") as step:
            pod = cluster.get(POD, names.namespace, names.pod)
            stateful_set = cluster.get(STATEFUL_SET, names.namespace, names.name)
            if cluster.delete(STATEFUL_SET, names.namespace, names.name):
                removed.append(f"StatefulSet {names.name}")
            if stateful_set is not None:
                rollout.wait_deleted(
                    cluster,
                    names.namespace,
                    STATEFUL_SET,
                    names.name,
                    uid=stateful_set["metadata"]["uid"],
                    timeout=timeouts.delete,
                    step=step,
                )
            if pod is not None and _is_ours(pod, names):
                # The garbage collector would get to it; asking starts the graceful stop at once.
                cluster.delete(POD, names.namespace, names.pod, uid=pod["metadata"]["uid"])
                rollout.wait_deleted(
                    cluster,
                    names.namespace,
                    POD,
                    names.pod,
                    uid=pod["metadata"]["uid"],
                    timeout=timeouts.delete + manifests.GRACE_SECONDS,
                    step=step,
                )
                removed.append(f"pod {names.pod}")
        with progress.step("Service and registry login"):
            if cluster.delete(SERVICE, names.namespace, names.name):
                removed.append(f"Service {names.name}")
            if cluster.delete(SECRET, names.namespace, names.pull_secret):
                removed.append(f"Secret {names.pull_secret}")
        if purge:
            with progress.step("Volume and Secret") as step:
                claim = cluster.get(CLAIM, names.namespace, names.claim)
                if claim is not None and cluster.delete(CLAIM, names.namespace, names.claim):
                    rollout.wait_deleted(
                        cluster,
                        names.namespace,
                        CLAIM,
                        names.claim,
                        uid=claim["metadata"]["uid"],
                        timeout=timeouts.delete,
                        step=step,
                    )
                    removed.append(f"volume {names.claim}")
                # Last: as long as the volume is there, it is the only key to it.
                if cluster.delete(SECRET, names.namespace, names.secret):
                    removed.append(f"Secret {names.secret}")
        kept = [
            what
            for what, kind, name in (("volume", CLAIM, names.claim), ("Secret", SECRET, names.secret))
            if cluster.get(kind, names.namespace, name) is not None
            for what in [f"{what} {name}"]
        ]
    cluster.delete(LEASE, names.namespace, names.lease)
    return DownReport(session.context.name, names.namespace, names.name, tuple(removed), tuple(kept))


def _namespace_there(session: Session) -> bool:
    try:
        return session.cluster.get(NAMESPACE, None, session.names.namespace) is not None
    except ApiError as error:
        if error.status == 403:
            return True
        raise


def _is_ours(pod: Object, names: Names) -> bool:
    labels = pod["metadata"].get("labels") or {}
    return all(labels.get(key) == value for key, value in names.selector.items())


def status(settings: Settings, *, show_password: bool) -> StatusReport:
    """Look at everything without changing anything."""
    session = connect(settings)
    cluster, names = session.cluster, session.names
    reads: dict[str, Callable[[], Any]] = {
        "stateful_set": lambda: cluster.get(STATEFUL_SET, names.namespace, names.name),
        "pod": lambda: cluster.get(POD, names.namespace, names.pod),
        "claim": lambda: cluster.get(CLAIM, names.namespace, names.claim),
        "secret": lambda: cluster.get(SECRET, names.namespace, names.secret),
    }
    with ThreadPoolExecutor(max_workers=len(reads)) as pool:
        futures = {name: pool.submit(read) for name, read in reads.items()}
    seen = {name: future.result() for name, future in futures.items()}
    where: dict[str, Any] = {
        "context": session.context.name,
        "namespace": names.namespace,
        "name": names.name,
        "volume": _volume(names, seen["claim"]),
    }
    if seen["stateful_set"] is None:
        return StatusReport(deployed=False, **where)
    image = _deployed_image(seen["stateful_set"])
    found = diagnosis.diagnose(
        seen["pod"], claim=seen["claim"], events=_events(session, seen["pod"]), stateful_set=names.name
    )
    secret = credentials.decode((seen["secret"] or {}).get("data") or {})
    forward = _running_forward(session)
    reported: dict[str, Any] = where | {
        "deployed": True,
        "ready": found.ready,
        "problem": found.summary if not found.ready else "",
        "image": image.reference if image else "",
        "content_id": image.content_id if image else "",
        "airflow_version": seen["stateful_set"]["metadata"]["labels"].get("app.kubernetes.io/version", ""),
        "containers": _containers(seen["pod"]),
        "url": forward,
        "login": credentials.ADMIN_USER,
        "password": secret.get(credentials.ADMIN_PASSWORD) if show_password else None,
    }
    if found.ready and credentials.ADMIN_PASSWORD in secret:
        try:
            with _airflow_url(session, forward) as address:
                now = verification.look(
                    address, user=credentials.ADMIN_USER, password=secret[credentials.ADMIN_PASSWORD]
                )
            reported |= {"components": now.components, "dags": now.dags, "import_errors": now.import_errors}
            sick = [name for name, state in now.components.items() if state != "healthy"]
            if sick:
                reported["problem"] = f"Airflow says that {', '.join(sick)} is not healthy"
        except DeployerError as error:
            reported |= {"ready": False, "problem": error.message}
    return StatusReport(**reported)


def _events(session: Session, pod: Object | None) -> list[Object]:
    if pod is not None and diagnosis.diagnose(pod).ready:
        return []
    items: list[Object] = session.cluster.list_objects(EVENT, session.names.namespace)["items"]
    names = {session.names.pod, session.names.claim, session.names.name}
    return [event for event in items if event.get("involvedObject", {}).get("name") in names]


def _containers(pod: Object | None) -> tuple[ContainerReport, ...]:
    reports = []
    for container in ((pod or {}).get("status") or {}).get("containerStatuses", []):
        state = container.get("state") or {}
        kind = next(iter(state), "waiting")
        reason = (state.get(kind) or {}).get("reason")
        text = reason or ("ready" if container.get("ready") else f"{kind}, not ready")
        reports.append(
            ContainerReport(
                name=container["name"],
                image=container["image"],
                ready=bool(container.get("ready")),
                restarts=int(container.get("restartCount", 0)),
                state=text,
            )
        )
    return tuple(reports)


def _volume(names: Names, claim: Object | None) -> str:
    if claim is None:
        return ""
    state = claim.get("status", {})
    size = (state.get("capacity") or claim["spec"]["resources"]["requests"]).get("storage", "?")
    storage_class = claim["spec"].get("storageClassName") or "no class"
    return f"{names.claim}, {size}, {str(state.get('phase', '')).lower()}, StorageClass {storage_class}"


def _running_forward(session: Session) -> str | None:
    from airflow_deployer import background_forward

    state = background_forward.find(session.target)
    return state.url if state else None


def render(project: Path, settings: Settings, progress: Progress) -> list[Object]:
    """Make the objects that `up` would apply, with blank secrets.

    The image has its digest where the registry holds it already; otherwise its tag stands in and a warning says so.
    """
    content = read_project(project, settings.project)
    session = connect(settings)
    hosting, mirror = _local_hosting(session)
    found = _Found(
        registry=choose_registry(settings.images, hosting),
        mirror=settings.images.mirror or mirror,
        platform=preflight.node_platform(session.cluster) or images.Engine().platform,
        namespace_exists=True,
        live=session.cluster.get(STATEFUL_SET, session.names.namespace, session.names.name),
    )
    plan = images.plan_images(_with_mirror(settings, found.mirror), content, found.registry, found.platform)
    image = _deployed_image(found.live)
    if image is None or image.image_id != plan.dag_tag:
        existing = images.find_dag_image(Registry(found.registry.push), plan)
        reference = existing.deployed if existing else f"{found.registry.pull}/{plan.dag_repository}:{plan.dag_tag}"
        if existing is None:
            progress.warning(f"{reference} is not built yet: `up` will refer to it by digest")
        image = Image(reference, content_id=content.content_id, image_id=plan.dag_tag)
    secret = manifests.make_secret(session.names, dict.fromkeys(credentials.KEYS, ""))
    bodies = [manifests.make_namespace(session.names.namespace), secret, *_objects(session, image, found)]
    for body in bodies:
        if body["kind"] == "Secret":
            body["data"] = dict.fromkeys(body["data"], "")
    return bodies


def forward_in_foreground(settings: Settings, progress: Progress) -> None:
    """Hold the forward in this process until Ctrl-C; an own one in the background is replaced by it."""
    import asyncio

    from airflow_deployer import background_forward, port_forward

    session = connect(settings)
    background_forward.stop(session.target)
    port = settings.port_forward.port

    async def hold() -> None:
        await port_forward.serve(
            session.target,
            port=port,
            on_ready=lambda local: progress.info(
                f"forwarding http://localhost:{local} to {session.target}; Ctrl-C ends it"
            ),
            stop=asyncio.Event(),
            log=progress.info,
        )

    asyncio.run(hold())


def stop_forward(settings: Settings) -> bool:
    """End the forward in the background; False when none was running."""
    from airflow_deployer import background_forward

    return background_forward.stop(connect(settings).target)
