"""`deployer up` as a list of steps, and `deployer render`, which shows what it would apply.

Everything here composes; what a step does stands in the module of its name. Progress goes to a `Progress`, results
come back as `reports`.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_deployer import (
    airflow_profiles,
    credentials,
    database_image,
    diagnosis,
    draining,
    image_pull,
    images,
    lease,
    manifests,
    objects,
    pod_import_check,
    preflight,
    rollout,
    upgrades,
    verification,
)
from airflow_deployer.base_context import find_lock
from airflow_deployer.cluster import (
    CLAIM,
    POD,
    STATEFUL_SET,
    ApiError,
    Object,
)
from airflow_deployer.config import Settings
from airflow_deployer.connection import Session, connect, deployed_image, live_content, local_hosting
from airflow_deployer.content import ProjectContent, read_project
from airflow_deployer.errors import AirflowError, ForwardError
from airflow_deployer.gate import GateReport
from airflow_deployer.images import Engine, ImagePlan
from airflow_deployer.manifests import Image
from airflow_deployer.progress import Progress, Step
from airflow_deployer.registry import (
    Registry,
    RegistryAddress,
    choose_registry,
    public_image,
    pull_secret_data,
)
from airflow_deployer.reports import SyncReport, UpReport
from airflow_deployer.running_airflow import RunningTask, asked, running_profile
from airflow_deployer.upgrades import Upgrade

if TYPE_CHECKING:
    from airflow_deployer.content_sync import Live
    from airflow_deployer.hot_deploy import HotDeploy


_MIGRATION_SECONDS = 1800.0
_POD_SECONDS = 20.0


@dataclass
class _Found:
    """What the preflight learned.

    Attributes:
        live: the StatefulSet.
        claim: the volume claim.
        live_content: the content id that the pod serves; None when it cannot be asked.
    """

    registry: RegistryAddress
    mirror: str | None
    platform: str
    namespace_exists: bool
    live: Object | None
    claim: Object | None
    pod: Object | None = None
    live_content: str | None = None

    @property
    def data_version(self) -> str | None:
        return upgrades.data_version(self.claim, self.live, self.pod)


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


@dataclass(frozen=True)
class UpOptions:
    """How `up` goes about it.

    Attributes:
        forward: start the background forward at the end.
        check_port: make sure before the build that the local port is free.
        force_conflicts: take over fields that another manager has changed.
        replace: replace the pod even where only DAG content has changed.
        now: do not wait for running tasks where the pod is replaced.
        upgrade: the database may be migrated to a newer Airflow.
        restore: a backup whose database takes the place of the deployment's.
    """

    forward: bool = True
    check_port: bool = True
    force_conflicts: bool = False
    replace: bool = False
    now: bool = False
    upgrade: bool = False
    restore: Path | None = None


def up(project: Path, settings: Settings, progress: Progress, options: UpOptions) -> UpReport:
    """Take the project to a running, verified Airflow."""
    watch = _Stopwatch()
    if airflow_profiles.is_newer_than_known(settings.airflow.version):
        progress.warning(
            f"Airflow {settings.airflow.version} came after this release, which knows "
            f"{settings.airflow.profile.locked} best: it is deployed like that one"
        )
    with watch.lap("check"), progress.step("Preflight") as step:
        lock = find_lock(project, settings)
        content = read_project(project, settings.project)
        session = connect(settings)
        engine = images.Engine()
        found = _preflight(session, engine, check_port=options.check_port)
        _await_pod(session, found, step)
        upgrade = _planned_upgrade(session, found, options)
        plan, present = _plan(session, content, lock, found)
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
            if upgrade is not None and not options.upgrade:
                # Only now, so that a project that is about to move hears first what does not import any more.
                raise upgrades.announcement(upgrade, session.names, drain=str(settings.timeouts.drain))
            with watch.lap("objects"):
                bodies = _objects(session, published.image, found)
                changes, secret = _apply(session, bodies[:-1], found, progress, options)
                pod = _pod_that_takes_content(session, bodies[-1], found, options)
            switched: Live | None = None
            if pod is not None and hot is not None and not _is_deployed(published.image, found, hot):
                with watch.lap("content"):
                    switched = _switch(session, hot, published.image, pod, progress)
        rolled = "kept"
        interrupted: tuple[RunningTask, ...] = ()
        with _moved(session, upgrade, found, bodies[-1], secret, watch, progress, options):
            with watch.lap("objects"):
                changes |= _apply_stateful_set(session, bodies[-1], progress, options)
            if pod is None:
                with watch.lap("pod"):
                    pod, rolled, interrupted = _roll_out(session, changes, secret, upgrade, progress, options)
            with watch.lap("verify"):
                url = _ensure_forward(session) if options.forward else None
                fresh = rolled != "kept" or not _was_ready(found)
                verified = _verify(session, url, secret, pod, published, progress, fresh=fresh)
        if found.data_version not in (None, settings.airflow.version):
            _record_version(session, found, progress, options)
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


def _await_pod(session: Session, found: _Found, step: Step) -> None:
    """Where the database would be moved, look again for a pod that is just being made anew."""
    deadline = time.monotonic() + _POD_SECONDS
    while (
        found.pod is None
        and found.live is not None
        and found.data_version != session.settings.airflow.version
        and time.monotonic() < deadline
    ):
        step.update("waiting for the pod, which is being made anew")
        time.sleep(0.5)
        found.pod = session.cluster.get(POD, session.names.namespace, session.names.pod)


def _planned_upgrade(session: Session, found: _Found, options: UpOptions) -> Upgrade | None:
    """What moving the database to the wanted Airflow means; None where it stays, or is replaced by a backup.

    Raises:
        UpgradeError: it cannot be moved.
        BackupError: the backup does not fit.
    """
    wanted = session.settings.airflow.version
    if options.restore is not None:
        from airflow_deployer import backup_file, restore

        with backup_file.opened(options.restore) as made:
            restore.require_known_schema(made.manifest, wanted, None)
    upgrade = upgrades.plan(found.data_version, wanted, found.pod, restoring=options.restore is not None)
    if upgrade is not None and found.pod is None:
        raise upgrades.nothing_to_back_up(upgrade)
    return upgrade


@contextmanager
def _moved(
    session: Session,
    upgrade: Upgrade | None,
    found: _Found,
    stateful_set: Object,
    secret: dict[str, str],
    watch: _Stopwatch,
    progress: Progress,
    options: UpOptions,
) -> Iterator[None]:
    """Around the rollout of another Airflow: the database is backed up before, and whole afterwards.

    Raises:
        UpgradeError: a step after the backup failed; with the way back.
    """
    if upgrade is None or found.pod is None:
        yield
        return
    from airflow_deployer import upgrading

    if upgrade.begun:
        progress.info(f"going on with the upgrade, {upgrade}, whose backup was made before it was interrupted")
        with upgrades.with_way_back(upgrade, None):
            yield
        return
    file = upgrades.backup_name(session.names, upgrade)
    profile = running_profile(session, found.pod)
    with ExitStack() as stack:
        with watch.lap("backup"):
            with progress.step("Pull") as step:
                _pull_ahead(session, stateful_set, found.pod, step, progress)
            before = stack.enter_context(
                upgrading.stopped_and_backed_up(
                    session, file, lambda: asked(session, profile, secret), progress, now=options.now
                )
            )
        with upgrades.with_way_back(upgrade, file):
            yield
            with progress.step("History") as step:
                after = upgrading.count(session)
                upgrading.compare(before, after)
                step.done(f"{after}; before the upgrade {before}")


def _record_version(session: Session, found: _Found, progress: Progress, options: UpOptions) -> None:
    """Note on the volume claim whose its database is now."""
    claim = manifests.make_claim(
        session.names,
        session.settings,
        postgres_image=database_image.choose(session.settings, found.claim, found.live),
        airflow_version=session.settings.airflow.version,
    )
    with progress.step("Version") as step:
        _ensure(session, claim, step, options)
        step.done(f"the database is that of Airflow {session.settings.airflow.version}")


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


def _preflight(session: Session, engine: Engine, *, check_port: bool) -> _Found:
    cluster, names, settings = session.cluster, session.names, session.settings
    # Asked alone first: every other check would tell the same when the API server cannot be reached.
    cluster.version()

    def registry() -> tuple[RegistryAddress, str | None]:
        hosting, mirror = local_hosting(session)
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
        live_content=lambda: live_content(session),
        port=port,
    )
    # Before anything is built.
    database_image.choose(settings, found["storage"], found["live"])
    address, mirror = found["registry"]
    return _Found(
        registry=address,
        mirror=mirror,
        platform=found["platform"] or engine.platform,
        namespace_exists=found["namespace"],
        live=found["live"],
        claim=found["storage"],
        pod=found["pod"],
        live_content=(found["live_content"] or {}).get("live"),
    )


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


def _plan(
    session: Session, content: ProjectContent, lock: Path | None, found: _Found
) -> tuple[ImagePlan, Image | None]:
    """Name the images; return the DAG image too if it is deployed or in the registry already.

    Raises:
        RegistryError: it has to be built, and the registry refuses a push.
    """
    settings = _with_mirror(session.settings, found.mirror)
    plan = images.plan_images(settings, content, lock, found.registry, found.platform)
    deployed = deployed_image(found.live)
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
        or not session.settings.airflow.profile.hot
        or options.replace
        or options.restore is not None
        or annotations.get(manifests.RUNTIME_ID) != plan.runtime_id
        or not diagnosis.diagnose(pod).ready
    ):
        yield None
        return
    deployed = deployed_image(found.live)
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
        expected: the DAG files, relative to `dags/`, that Airflow must show; None where nothing was imported now.
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
    image = _new_image(session, plan, dag_image.ref.deployed, deployed_image(found.live))
    return _published(image, dag_image.report, progress)


def _published(image: Image, report: GateReport | None, progress: Progress) -> _Published:
    if report is None:
        return _Published(image)
    for warning in report.warnings:
        progress.warning(warning)
    return _Published(image, report.shown, tuple(report.warnings))


def _with_mirror(settings: Settings, mirror: str | None) -> Settings:
    import msgspec

    return msgspec.structs.replace(settings, images=msgspec.structs.replace(settings.images, mirror=mirror))


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
    if not session.settings.airflow.profile.hot or options.replace or options.restore is not None:
        return None
    if found.live is None or found.pod is None:
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


def _is_deployed(image: Image, found: _Found, hot: HotDeploy) -> bool:
    """Whether the pod was asked only because it could not be seen that there is nothing to do."""
    return hot.was_live and image == deployed_image(found.live)


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
    postgres_image = public_image(database_image.choose(settings, found.claim, found.live), found.mirror)
    bodies: list[Object] = []
    if pull_secret is None and (login := pull_secret_data(found.registry)) is not None:
        pull_secret = names.pull_secret
        bodies.append(manifests.make_pull_secret(names, base64.b64encode(login).decode()))
    bodies += [
        manifests.make_claim(
            names,
            settings,
            postgres_image=postgres_image,
            airflow_version=found.data_version or settings.airflow.version,
        ),
        manifests.make_service(names),
        manifests.make_stateful_set(names, settings, image, postgres_image=postgres_image, pull_secret=pull_secret),
    ]
    return bodies


def _roll_out(
    session: Session,
    changes: dict[str, str],
    secret: dict[str, str],
    upgrade: Upgrade | None,
    progress: Progress,
    options: UpOptions,
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
        if options.restore is not None:
            _restore(session, options.restore, step, progress)
        # A large history takes its time to migrate; the supervisor has a deadline of its own for that.
        timeout = max(float(timeouts.ready), _MIGRATION_SECONDS if upgrade else 0.0)
        pod = rollout.wait_ready(cluster, names, revision=revision, timeout=timeout, step=step)
        step.done(f"{names.pod} {outcome}" if outcome != "kept" else f"{names.pod} is ready")
    if interrupted:
        progress.warning(
            f"{len(interrupted)} running task(s) were cut off and start over: {', '.join(map(str, interrupted))}"
        )
    return pod, outcome, interrupted


def _restore(session: Session, file: Path, step: Step, progress: Progress) -> None:
    """Replace the database by that of a backup, in the new pod, whose Airflow may not even start with the old one."""
    from airflow_deployer import backup_file, restore, upgrading

    upgrading.wait_for_postgres(session, step)
    step.update("replacing the database")
    with backup_file.opened(file) as made:
        restore.replace(session, made, progress, now=True)


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
        # What is stopped may be of another series than what comes.
        profile = running_profile(session, pod)
        return draining.stop_pod(
            cluster,
            names,
            pod,
            ask=lambda: asked(session, profile, secret),
            now=options.now,
            step=step,
            progress=progress,
        )
    timeout = session.settings.timeouts.delete + manifests.grace_seconds(pod)
    rollout.remove(cluster, POD, pod, timeout=timeout, step=step)
    return ()


def _ensure_forward(session: Session) -> str:
    """Have the background forward; return its URL."""
    from airflow_deployer import background_forward

    return background_forward.ensure(session.target, port=session.settings.port_forward.port).url


def _verify(
    session: Session,
    url: str | None,
    secret: dict[str, str],
    pod: Object,
    published: _Published,
    progress: Progress,
    *,
    fresh: bool,
) -> verification.Verified:
    """Have Airflow say that it is well.

    Args:
        fresh: whether the pod has only just become ready, so that its Airflow may not have come to every file yet.
    """
    profile = running_profile(session, pod)
    with progress.step("Airflow") as step, asked(session, profile, secret, url) as airflow:
        expected = published.expected if fresh else None
        if fresh and expected is None:
            step.update("importing the DAGs, to know what to wait for")
            limit = session.settings.timeouts.import_check
            expected = pod_import_check.check_imports(session.context, session.names, profile, limit).shown
        verified = verification.verify(
            airflow,
            expected=expected,
            since=_started_at(pod),
            timeout=60.0,
            step=step,
        )
        step.done(f"{', '.join(verified.components)} healthy, {verified.dags} DAG{'s' * (verified.dags != 1)}")
    return verified


def _was_ready(found: _Found) -> bool:
    """Whether the pod served when the command began; the next run after an interrupted one may meet it starting."""
    return found.pod is not None and diagnosis.diagnose(found.pod).ready


def _started_at(pod: Object) -> str:
    """When the `airflow` container started, by the node's clock (RFC 3339)."""
    for status in pod["status"].get("containerStatuses", []):
        if status["name"] == "airflow":
            return str((status.get("state", {}).get("running") or {}).get("startedAt", ""))
    return ""


def render(project: Path, settings: Settings, progress: Progress) -> list[Object]:
    """Make the objects that `up` would apply, with blank secrets.

    The image has its digest where the registry holds it already; otherwise its tag stands in and a warning says so.
    """
    lock = find_lock(project, settings)
    content = read_project(project, settings.project)
    session = connect(settings)
    hosting, mirror = local_hosting(session)
    found = _Found(
        registry=choose_registry(settings.images, hosting),
        mirror=settings.images.mirror or mirror,
        platform=preflight.node_platform(session.cluster) or images.Engine().platform,
        namespace_exists=True,
        live=session.cluster.get(STATEFUL_SET, session.names.namespace, session.names.name),
        claim=session.cluster.get(CLAIM, session.names.namespace, session.names.claim),
    )
    plan = images.plan_images(_with_mirror(settings, found.mirror), content, lock, found.registry, found.platform)
    image = deployed_image(found.live)
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
