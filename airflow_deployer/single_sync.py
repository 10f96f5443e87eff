"""`deployer sync`: one round of DAG content into the running pod."""

from __future__ import annotations

from pathlib import Path

from airflow_deployer import diagnosis, lease
from airflow_deployer.cluster import POD, STATEFUL_SET
from airflow_deployer.config import Settings
from airflow_deployer.connection import connect, deployed_image, require_hot
from airflow_deployer.content import read_project
from airflow_deployer.errors import RolloutError
from airflow_deployer.progress import Progress
from airflow_deployer.reports import SyncReport


def sync(project: Path, settings: Settings, progress: Progress) -> SyncReport:
    """Bring the project's DAG content into the running pod, once; its image stays as it is.

    Raises:
        ConfigurationError: this Airflow takes no content while it runs.
        RolloutError: there is no ready pod.
        GateError: the DAGs do not import; what was live stays live.
        SyncError: the pod cannot take the content.
    """
    from airflow_deployer import content_sync

    require_hot(settings, "sync")
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
        deployed = deployed_image(cluster.get(STATEFUL_SET, names.namespace, names.name))
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
