"""`deployer down`: remove what `up` made and wait until it is gone."""

from __future__ import annotations

from airflow_deployer import lease, manifests, rollout
from airflow_deployer.cluster import CLAIM, LEASE, NAMESPACE, POD, SECRET, SERVICE, STATEFUL_SET, ApiError, Object
from airflow_deployer.connection import Session
from airflow_deployer.manifests import Names
from airflow_deployer.progress import Progress
from airflow_deployer.reports import DownReport


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
            if stateful_set is not None:
                rollout.remove(cluster, STATEFUL_SET, stateful_set, timeout=timeouts.delete, step=step)
                removed.append(f"StatefulSet {names.name}")
            if pod is not None and _is_ours(pod, names):
                # The garbage collector would get to it; asking starts the graceful stop at once.
                rollout.remove(cluster, POD, pod, timeout=timeouts.delete + manifests.grace_seconds(pod), step=step)
                removed.append(f"pod {names.pod}")
        with progress.step("Service and registry login"):
            if cluster.delete(SERVICE, names.namespace, names.name):
                removed.append(f"Service {names.name}")
            if cluster.delete(SECRET, names.namespace, names.pull_secret):
                removed.append(f"Secret {names.pull_secret}")
        if purge:
            with progress.step("Volume and Secret") as step:
                claim = cluster.get(CLAIM, names.namespace, names.claim)
                if claim is not None:
                    rollout.remove(cluster, CLAIM, claim, timeout=timeouts.delete, step=step)
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
    for name in (names.lease, names.dev_lease):
        cluster.delete(LEASE, names.namespace, name)
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
