"""Having the node pull images ahead: neither a restart in the night nor a pod's replacement should wait for a registry.

A short-lived pod on the node in question does it, since Kubernetes has no other way to ask for a pull.
"""

from __future__ import annotations

import time

from airflow_deployer import diagnosis, rollout
from airflow_deployer.cluster import POD, ApiError, Cluster, Object
from airflow_deployer.errors import RolloutError
from airflow_deployer.manifests import Names, make_pull_pod


def ensure_pulled(cluster: Cluster, names: Names, images: list[str], pod: Object, *, timeout: float) -> str:
    """Have the node of `pod` hold images; return a warning where the cluster does not allow it, else nothing.

    Args:
        images: references as the node pulls them.
        pod: the deployment's running pod; gives the node and the registry login.
        timeout: seconds.

    Raises:
        RolloutError: the node cannot pull it; with the cause.
    """
    body = make_pull_pod(
        names, images, node=pod["spec"]["nodeName"], pull_secrets=pod["spec"].get("imagePullSecrets") or []
    )
    try:
        uid = _create(cluster, names, body)
    except ApiError as error:
        if error.status not in (403, 409, 422):
            raise
        return f"the image was not pulled ahead, so a new pod has to wait for the registry: {error.message}"
    try:
        _wait_pulled(cluster, names, uid, timeout)
    finally:
        cluster.delete(POD, names.namespace, names.pull_pod, uid=uid, grace_seconds=0)
    return ""


def _create(cluster: Cluster, names: Names, body: Object) -> str:
    try:
        made = cluster.create(POD, names.namespace, body)
    except ApiError as error:
        if error.status != 409:
            raise
        # Left behind by a run that was interrupted.
        cluster.delete(POD, names.namespace, names.pull_pod, grace_seconds=0)
        made = cluster.create(POD, names.namespace, body)
    return str(made["metadata"]["uid"])


def _wait_pulled(cluster: Cluster, names: Names, uid: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    first_seen: dict[str, float] = {}
    cause = "the pod that pulls it does not start"
    with rollout.Watcher(cluster, names.namespace) as watcher:
        watcher.add(POD, names.pull_pod)
        while (now := time.monotonic()) < deadline:
            watcher.drain(0.5)
            seen = watcher.view.pod
            if seen is None or seen["metadata"]["uid"] != uid:
                continue
            states = [status.get("state", {}) for status in seen.get("status", {}).get("containerStatuses", [])]
            if states and all("running" in state or "terminated" in state for state in states):
                return
            found = diagnosis.diagnose(seen)
            cause = found.summary
            if now - first_seen.setdefault(found.reason, now) >= found.fatal_after:
                break
    raise RolloutError(
        f"The new image cannot be pulled ahead: {cause}. The pod goes on as it was.",
        hint="check that the node can reach the registry, then deployer up",
    )
