"""The commands on a Deployment as lists of steps: up, down, sync, status, render, and the forward in the foreground.

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
from typing import TYPE_CHECKING, Any

from airflow_deployer import (
    airflow_settings,
    credentials,
    diagnosis,
    draining,
    image_pull,
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
from airflow_deployer.errors import AirflowError, DeployerError, ForwardError, RolloutError
from airflow_deployer.gate import GateReport
from airflow_deployer.images import Engine, ImagePlan
from airflow_deployer.kube_context import KubeContext
from airflow_deployer.manifests import Image, Names
from airflow_deployer.progress import Progress, Step
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
from airflow_deployer.reports import ContainerReport, DownReport, StatusReport, SyncReport, UpReport

if TYPE_CHECKING:
    from airflow_deployer.content_sync import Live
    from airflow_deployer.draining import RunningTask
    from airflow_deployer.hot_deploy import HotDeploy


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
    """What the preflight learned.

    Attributes:
        live: the StatefulSet.
        live_content: the content id that the pod serves; None when it cannot be asked.
    """

    registry: RegistryAddress
    mirror: str | None
    platform: str
    namespace_exists: bool
    live: Object | None
    pod: Object | None = None
    live_content: str | None = None


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


@dataclass(frozen=True)
class UpOptions:
    """How `up` goes about it.

    Attributes:
        forward: start the background forward at the end.
        check_port: make sure before the build that the local port is free.
        force_conflicts: take over fields that another manager has changed.
        replace: replace the pod even where only DAG content has changed.
        now: do not wait for running tasks where the pod is replaced.
    """

    forward: bool = True
    check_port: bool = True
    force_conflicts: bool = False
    replace: bool = False
    now: bool = False


def up(project: Path, settings: Settings, progress: Progress, options: UpOptions) -> UpReport:
    """Take the project to a running, verified Airflow."""
    watch = _Stopwatch()
    with watch.lap("check"), progress.step("Preflight") as step:
        content = read_project(project, settings.project)
        session = connect(settings)
        engine = images.Engine()
        found = _preflight(session, engine, check_port=options.check_port)
        plan, present = _plan(session, content, found)
        step.done(
            f"context {session.context.name}, namespace {session.names.namespace}, registry {found.registry.push}"
        )
    if not found.namespace_exists:
        objects.ensure_namespace(session.cluster, session.names.namespace)
    with lease.held(
        session.cluster, session.names.namespace, session.names.lease, labels=session.names.labels, doing="up"
    ):
        with _hot_deploy(session, plan, present, found, options) as hot:
            with watch.lap("images"):
                published = _publish(session, engine, plan, present, found, hot, progress)
            with watch.lap("objects"):
                bodies = _objects(session, published.image, found)
                changes, secret = _apply(session, bodies[:-1], found, progress, options)
                pod = _pod_that_takes_content(session, bodies[-1], found, options)
            switched: Live | None = None
            if pod is not None and hot is not None:
                with watch.lap("content"):
                    switched = _switch(session, hot, published.image, pod, progress)
            with watch.lap("objects"):
                changes |= _apply_stateful_set(session, bodies[-1], progress, options)
            rolled = "kept"
            interrupted: tuple[RunningTask, ...] = ()
            if pod is None:
                with watch.lap("pod"):
                    pod, rolled, interrupted = _roll_out(session, changes, secret, progress, options)
        with watch.lap("verify"):
            url = _ensure_forward(session) if options.forward else None
            expected = published.expected if rolled != "kept" else None
            verified = _verify(session, url, secret, pod, expected, progress)
    return UpReport(
        context=session.context.name,
        namespace=session.names.namespace,
        name=session.names.name,
        image=published.image.reference,
        content_id=published.image.content_id,
        airflow_version=settings.airflow.version,
        changes={what: how for what, how in changes.items() if how != "unchanged"},
        pod=rolled,
        content=_content_outcome(rolled, switched),
        interrupted=tuple(str(task) for task in interrupted),
        dags=verified.dags,
        import_errors=verified.import_errors,
        warnings=published.warnings,
        steps=watch.seconds,
        url=url,
    )


def complain_of_import_errors(report: UpReport | SyncReport) -> None:
    """Fail after a deployment whose DAGs Airflow itself cannot import.

    Raises:
        AirflowError: naming the files; the deployment stays as it is.
    """
    if report.import_errors:
        raise AirflowError(
            f"Airflow runs, but cannot import {len(report.import_errors)} DAG file(s).",
            details=[f"{error.file}: {error.cause}" for error in report.import_errors],
            hint="make what the file asks for (a Variable or Connection: in the web UI), "
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
        pod=lambda: cluster.get(POD, names.namespace, names.pod),
        live_content=lambda: _live_content(session),
        port=port,
    )
    address, mirror = found["registry"]
    return _Found(
        registry=address,
        mirror=mirror,
        platform=found["platform"] or engine.platform,
        namespace_exists=found["namespace"],
        live=found["live"],
        pod=found["pod"],
        live_content=(found["live_content"] or {}).get("live"),
    )


def _live_content(session: Session) -> Object | None:
    """What the supervisor says of the DAG content, where the API server lets us ask it directly."""
    return session.cluster.pod_document(
        session.names.namespace, session.names.pod, manifests.PROBE_PORT, manifests.CONTENT_PATH
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
        return plan, _new_image(session, plan, existing.deployed, deployed)
    # Only where something will be pushed: asking leaves a trace in some registries.
    registry.check_push(plan.dag_repository)
    return plan, None


def _new_image(session: Session, plan: ImagePlan, reference: str, deployed: Image | None) -> Image:
    """The image to deploy; one that is deployed keeps its time, a new one gets a later one."""
    if deployed is not None and deployed.reference == reference:
        deployed_at = deployed.deployed_at
    else:
        deployed_at = max(int(session.cluster.server_time()), (deployed.deployed_at if deployed else 0) + 1)
    return Image(reference, plan.content.content_id, plan.dag_tag, plan.runtime_id, deployed_at)


@contextmanager
def _hot_deploy(
    session: Session, plan: ImagePlan, present: Image | None, found: _Found, options: UpOptions
) -> Iterator[HotDeploy | None]:
    """Begin to bring the content into the running pod, where that may be all that there is to do."""
    pod = found.pod
    annotations = (pod or {}).get("metadata", {}).get("annotations") or {}
    if (
        pod is None
        or options.replace
        or annotations.get(manifests.RUNTIME_ID) != plan.runtime_id
        or not diagnosis.diagnose(pod).ready
    ):
        yield None
        return
    deployed = _deployed_image(found.live)
    if present is not None and present == deployed and found.live_content == plan.content.content_id:
        yield None
        return
    from airflow_deployer import hot_deploy

    with hot_deploy.begun(session.context, session.names, plan.content) as hot:
        yield hot


@dataclass(frozen=True)
class _Published:
    """The image in the registry.

    Attributes:
        expected: the DAG files, relative to `dags/`, that Airflow must show; None where nothing was imported.
    """

    image: Image
    expected: frozenset[str] | None = None
    warnings: tuple[str, ...] = ()


def _publish(
    session: Session,
    engine: Engine,
    plan: ImagePlan,
    present: Image | None,
    found: _Found,
    hot: HotDeploy | None,
    progress: Progress,
) -> _Published:
    """Have the images in the registry, and the DAGs imported: in the running pod where the content goes there."""

    def check(image: str) -> GateReport | None:
        if hot is None:
            return images.check_imports(engine, image, session.settings, progress)
        with progress.step("Import check") as step:
            report = hot.report(session.settings.timeouts.import_check)
            step.done(f"{report.summary}, in the pod" if report else "is live already")
        return report

    if present is not None:
        report = check("") if hot is not None else None
        if report is not None:
            report.raise_for_errors()
        return _published(present, report, progress)
    registry = Registry(plan.address.push)
    base = images.ensure_base_image(engine, registry, plan, progress)
    dag_image = images.ensure_dag_image(engine, registry, plan, base, session.settings, progress, check)
    image = _new_image(session, plan, dag_image.ref.deployed, _deployed_image(found.live))
    return _published(image, dag_image.report, progress)


def _published(image: Image, report: GateReport | None, progress: Progress) -> _Published:
    if report is None:
        return _Published(image)
    for warning in report.warnings:
        progress.warning(warning)
    files = {file.path for file in report.files if file.dag_ids} | {
        problem.dag_file for problem in report.needs_database
    }
    return _Published(image, frozenset(path.removeprefix("dags/") for path in files), tuple(report.warnings))


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
    template = live["spec"]["template"]
    airflow: Object = next((item for item in containers if item["name"] == "airflow"), {})
    variables = {item["name"]: item.get("value", "") for item in airflow.get("env", [])}
    return Image(
        reference,
        annotations[manifests.CONTENT_ID],
        annotations[manifests.IMAGE_ID],
        (template["metadata"].get("annotations") or {}).get(manifests.RUNTIME_ID, ""),
        int(variables.get(manifests.DEPLOYED_AT) or 0),
    )


def _apply(
    session: Session, bodies: list[Object], found: _Found, progress: Progress, options: UpOptions
) -> tuple[dict[str, str], dict[str, str]]:
    """Bring the objects around the pod to their state; return what happened to each, and the secret values."""
    cluster, names = session.cluster, session.names
    changes: dict[str, str] = {}
    with progress.step("Objects") as step:
        if not found.namespace_exists:
            changes[f"Namespace {names.namespace}"] = "created"
        changes[f"Secret {names.secret}"], secret = objects.ensure_secret(cluster, names)
        for body in bodies:
            changes[_named(body)] = _ensure(session, body, step, options)
        step.done(_told(changes))
    return changes, secret


def _apply_stateful_set(session: Session, body: Object, progress: Progress, options: UpOptions) -> dict[str, str]:
    """Record what is to run."""
    with progress.step("StatefulSet") as step:
        changes = {_named(body): _ensure(session, body, step, options)}
        step.done(_told(changes))
    return changes


def _ensure(session: Session, body: Object, step: Step, options: UpOptions) -> str:
    timeout = session.settings.timeouts.delete
    return objects.ensure(
        session.cluster, session.names, body, step=step, force=options.force_conflicts, timeout=timeout
    )


def _named(body: Object) -> str:
    return f"{body['kind']} {body['metadata']['name']}"


def _told(changes: dict[str, str]) -> str:
    return ", ".join(f"{what} {how}" for what, how in changes.items() if how != "unchanged") or "unchanged"


def _pod_that_takes_content(session: Session, stateful_set: Object, found: _Found, options: UpOptions) -> Object | None:
    """The ready pod, if the StatefulSet will describe it but for the DAG content; None: it has to be replaced."""
    cluster, names = session.cluster, session.names
    if options.replace or found.live is None or found.pod is None:
        return None
    pod = cluster.get(POD, names.namespace, names.pod)
    if pod is None or not diagnosis.diagnose(pod).ready:
        return None
    try:
        planned = objects.preview(cluster, names, stateful_set, force=options.force_conflicts)
    except ApiError as error:
        if error.status == 422:  # an immutable field: the StatefulSet will be made again
            return None
        raise
    fits = objects.takes_content(cluster, names, pod, planned["spec"]["template"])
    return pod if fits else None


def _switch(session: Session, hot: HotDeploy, image: Image, pod: Object, progress: Progress) -> Live:
    """Make the content live while the node pulls the image."""
    cluster, names, timeouts = session.cluster, session.names, session.settings.timeouts
    with progress.step("DAG content") as step, ThreadPoolExecutor(max_workers=1) as pool:
        pulling = pool.submit(image_pull.ensure_pulled, cluster, names, [image.reference], pod, timeout=timeouts.ready)
        live = hot.switch(image.deployed_at, timeout=timeouts.live)
        step.update("waiting for the node to pull the image")
        if warning := pulling.result():
            progress.warning(warning)
        step.done(f"live after {live.seconds:.1f} s, {live.parsed} file(s) parsed, nothing restarted")
    return live


def _content_outcome(rolled: str, switched: Live | None) -> str:
    if rolled != "kept":
        return "with the pod"
    return "unchanged" if switched is None else "switched"


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


def _roll_out(
    session: Session, changes: dict[str, str], secret: dict[str, str], progress: Progress, options: UpOptions
) -> tuple[Object, str, tuple[RunningTask, ...]]:
    """Have a ready pod of the newest revision.

    Returns:
        The pod; whether it was kept, replaced, started or created; and the tasks that were cut off.
    """
    cluster, names, timeouts = session.cluster, session.names, session.settings.timeouts
    interrupted: tuple[RunningTask, ...] = ()
    with progress.step("Pod") as step:
        live = cluster.get(STATEFUL_SET, names.namespace, names.name) or {}
        revision = rollout.wait_revision(
            cluster, names, generation=int(live["metadata"]["generation"]), timeout=timeouts.delete
        )
        pod = cluster.get(POD, names.namespace, names.pod)
        if changes.get(f"StatefulSet {names.name}") == "created":
            outcome = "created"
        elif pod is None or pod["metadata"].get("deletionTimestamp"):
            outcome = "started"
        elif options.replace or objects.has_to_go(pod, revision):
            _pull_ahead(session, live, pod, step, progress)
            interrupted = _stop(session, pod, secret, step, progress, options)
            outcome = "replaced"
        else:
            outcome = "kept"
        pod = rollout.wait_ready(cluster, names, revision=revision, timeout=timeouts.ready, step=step)
        step.done(f"{names.pod} {outcome}" if outcome != "kept" else f"{names.pod} is ready")
    if interrupted:
        progress.warning(
            f"{len(interrupted)} running task(s) were cut off and start over: {', '.join(map(str, interrupted))}"
        )
    return pod, outcome, interrupted


def _pull_ahead(session: Session, stateful_set: Object, pod: Object, step: Step, progress: Progress) -> None:
    """Have the node pull what the next pod needs while this one still serves.

    Raises:
        RolloutError: it cannot; the pod goes on.
    """
    held = {container["image"] for container in pod["spec"]["containers"]}
    wanted = {container["image"] for container in stateful_set["spec"]["template"]["spec"]["containers"]}
    if wanted <= held or not diagnosis.diagnose(pod).ready:
        return
    step.update("the node pulls the new image")
    timeout = session.settings.timeouts.ready
    if warning := image_pull.ensure_pulled(session.cluster, session.names, sorted(wanted - held), pod, timeout=timeout):
        progress.warning(warning)


def _stop(
    session: Session, pod: Object, secret: dict[str, str], step: Step, progress: Progress, options: UpOptions
) -> tuple[RunningTask, ...]:
    """Stop the pod; one whose Airflow does not run has nothing to be waited for."""
    cluster, names = session.cluster, session.names
    step.update(f"stopping pod {names.pod}")
    if diagnosis.diagnose(pod).ready:
        return draining.stop_pod(
            cluster,
            names,
            pod,
            target=session.target,
            login=(credentials.ADMIN_USER, secret[credentials.ADMIN_PASSWORD]),
            now=options.now,
            step=step,
            progress=progress,
        )
    uid = pod["metadata"]["uid"]
    cluster.delete(POD, names.namespace, names.pod, uid=uid)
    timeout = session.settings.timeouts.delete + manifests.grace_seconds(pod)
    rollout.wait_deleted(cluster, names.namespace, POD, names.pod, uid=uid, timeout=timeout, step=step)
    return ()


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
        step.done(f"{', '.join(verified.components)} healthy, {verified.dags} DAG{'s' * (verified.dags != 1)}")
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
                    timeout=timeouts.delete + manifests.grace_seconds(pod),
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


def sync(project: Path, settings: Settings, progress: Progress) -> SyncReport:
    """Bring the project's DAG content into the running pod, once; its image stays as it is.

    Raises:
        RolloutError: there is no ready pod.
        GateError: the DAGs do not import; what was live stays live.
        SyncError: the pod cannot take the content.
    """
    from airflow_deployer import content_sync

    content = read_project(project, settings.project)
    session = connect(settings)
    cluster, names = session.cluster, session.names
    pod = cluster.get(POD, names.namespace, names.pod)
    found = diagnosis.diagnose(pod, stateful_set=names.name)
    if pod is None or not found.ready:
        raise RolloutError(
            f"Cannot sync to {names.name} in namespace {names.namespace!r}: {found.summary.rstrip('.')}.",
            hint="deployer up   deploys it",
        )
    with lease.held(cluster, names.namespace, names.lease, labels=names.labels, doing="sync"):
        with progress.step("Sync") as step:
            result = content_sync.sync_once(session.context, names, content, on_event=step.update)
            step.done(f"live after {result.live_seconds:.2f} s" if result.changed else "nothing to do")
        deployed = _deployed_image(cluster.get(STATEFUL_SET, names.namespace, names.name))
    return SyncReport(
        context=session.context.name,
        namespace=names.namespace,
        name=names.name,
        content_id=result.live_id,
        changed=result.changed,
        seconds={
            "stage": result.stage_seconds,
            "check": result.check_seconds,
            "live": result.live_seconds,
        },
        parsed=result.parsed,
        import_errors=result.import_errors,
        in_image=deployed is not None and deployed.content_id == result.live_id,
    )


def status(settings: Settings, *, show_password: bool) -> StatusReport:
    """Look at everything without changing anything."""
    session = connect(settings)
    cluster, names = session.cluster, session.names
    reads: dict[str, Callable[[], Any]] = {
        "stateful_set": lambda: cluster.get(STATEFUL_SET, names.namespace, names.name),
        "pod": lambda: cluster.get(POD, names.namespace, names.pod),
        "claim": lambda: cluster.get(CLAIM, names.namespace, names.claim),
        "secret": lambda: cluster.get(SECRET, names.namespace, names.secret),
        "content": lambda: _live_content(session),
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
        "live_content_id": (seen["content"] or {}).get("live") or None,
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
        image = _new_image(session, plan, reference, image)
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
