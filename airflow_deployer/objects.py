"""Brings the Kubernetes objects of a Deployment to what they should be, and touches none that already is.

Every function is an `ensure_*`: it looks, compares by a server-side dry run, and writes only a difference. Deleting
the database is never part of it.
"""

from __future__ import annotations

import copy
import re
from typing import Literal

from airflow_deployer import credentials, manifests, rollout
from airflow_deployer.cluster import (
    CONTROLLER_REVISION,
    FIELD_MANAGER,
    KINDS,
    NAMESPACE,
    SECRET,
    STATEFUL_SET,
    ApiError,
    Cluster,
    Object,
)
from airflow_deployer.errors import ClusterError
from airflow_deployer.manifests import Names
from airflow_deployer.progress import Step

Change = Literal["created", "changed", "unchanged", "recreated"]

_BY_THE_SERVER = ("managedFields", "resourceVersion", "generation", "creationTimestamp", "uid", "selfLink")


def ensure_namespace(cluster: Cluster, namespace: str) -> Change:
    """Create the namespace when it is missing."""
    try:
        cluster.create(NAMESPACE, None, manifests.make_namespace(namespace))
    except ApiError as error:
        if error.status == 409:
            return "unchanged"
        raise
    return "created"


def ensure_secret(cluster: Cluster, names: Names) -> tuple[Change, dict[str, str]]:
    """Create the Secret when it is missing; return its plain values. It is never changed."""
    existing = cluster.get(SECRET, names.namespace, names.secret)
    if existing is not None:
        return "unchanged", credentials.decode(existing["data"])
    values = credentials.new()
    try:
        cluster.create(SECRET, names.namespace, manifests.make_secret(names, values))
    except ApiError as error:
        if error.status != 409:
            raise
        created = cluster.get(SECRET, names.namespace, names.secret) or {}
        return "unchanged", credentials.decode(created["data"])
    return "created", values


def ensure(cluster: Cluster, names: Names, body: Object, *, step: Step, force: bool, timeout: float) -> Change:
    """Apply one object unless it already is what `body` says.

    A StatefulSet whose immutable field must change is deleted with its pod left running, and made again.

    Args:
        force: take over fields that another manager owns.
        timeout: seconds to wait for an orphaned StatefulSet to be gone.

    Raises:
        ClusterError: another manager holds a field (it is named), or the API server refuses a value.
    """
    kind = KINDS[body["kind"]]
    name = body["metadata"]["name"]
    live = cluster.get(kind, names.namespace, name)
    step.update(f"{kind.kind} {name}")
    try:
        planned = cluster.apply(kind, names.namespace, body, dry_run=True, force=force)
        if live is not None and same(live, planned):
            return "unchanged"
        cluster.apply(kind, names.namespace, body, force=force)
    except ApiError as error:
        if error.status == 409:
            raise _conflict(kind.kind, name, error) from error
        if error.status == 422 and kind is STATEFUL_SET and live is not None:
            step.update(f"StatefulSet {name}: an immutable field changes, making it again around its running pod")
            cluster.delete(kind, names.namespace, name, uid=live["metadata"]["uid"], orphan=True)
            rollout.wait_deleted(
                cluster, names.namespace, kind, name, uid=live["metadata"]["uid"], timeout=timeout, step=step
            )
            cluster.apply(kind, names.namespace, body, force=force)
            return "recreated"
        raise
    return "changed" if live is not None else "created"


def preview(cluster: Cluster, names: Names, body: Object, *, force: bool) -> Object:
    """What applying `body` would result in; nothing is changed.

    Raises:
        ClusterError: another manager holds a field that we set, named with its manager.
        ApiError: the API server would refuse it (422: an immutable field).
    """
    kind = KINDS[body["kind"]]
    try:
        return cluster.apply(kind, names.namespace, body, dry_run=True, force=force)
    except ApiError as error:
        if error.status == 409 and not force:
            raise _conflict(body["kind"], body["metadata"]["name"], error) from error
        raise


def takes_content(cluster: Cluster, names: Names, pod: Object, template: Object) -> bool:
    """Whether the running pod differs from a pod of `template` in nothing but the DAG content.

    What it was made from is kept by Kubernetes in a ControllerRevision, which the pod names in the label
    `controller-revision-hash`.
    """
    name = pod["metadata"].get("labels", {}).get("controller-revision-hash", "")
    revision = cluster.get(CONTROLLER_REVISION, names.namespace, name) if name else None
    if revision is None:
        return False
    return manifests.same_but_for_content(revision["data"]["spec"]["template"], template)


def same(live: Object, planned: Object) -> bool:
    """Tell whether a dry run would change anything but what the server itself keeps."""
    return _own_part(live) == _own_part(planned)


def _own_part(item: Object) -> Object:
    part = copy.deepcopy(item)
    part.pop("status", None)
    for key in _BY_THE_SERVER:
        part["metadata"].pop(key, None)
    return part


def _conflict(kind: str, name: str, error: ApiError) -> ClusterError:
    """Name the other managers and their fields, as the Status' causes tell them (reason FieldManagerConflict)."""
    causes = (error.body.get("details") or {}).get("causes") or []
    fields = []
    for cause in causes:
        manager = re.search(r'conflict with "([^"]+)"', str(cause.get("message", "")))
        fields.append(f"{cause.get('field', '?')} is held by {manager.group(1) if manager else 'another manager'}")
    return ClusterError(
        f"Cannot apply {kind} {name}: somebody else has changed what {FIELD_MANAGER} sets.",
        details=fields or [error.message],
        hint="undo that change, or take the fields over with: deployer up --force-conflicts",
    )


# A pull alternates between `ErrImagePull`, its last failure, and `ImagePullBackOff`, the wait for the next attempt.
_BACK_OFF_REASONS = frozenset({"CrashLoopBackOff", "ErrImagePull", "ImagePullBackOff", "InvalidImageName"})


def has_to_go(pod: Object, revision: str) -> bool:
    """Whether the pod must make way: it is of an older revision, or cannot come up by itself.

    Kubernetes sees to neither: with `OnDelete` it waits for us, and even a rolling update leaves a broken pod in place
    (kubernetes issue 67250).
    """
    stale = pod["metadata"].get("labels", {}).get("controller-revision-hash") != revision
    return stale or _stuck(pod)


def _stuck(pod: Object) -> bool:
    """True for a pod whose containers only wait out a growing back-off: a fresh one tries at once."""
    statuses = pod.get("status", {}).get("containerStatuses", [])
    reasons = {(status.get("state", {}).get("waiting") or {}).get("reason") for status in statuses}
    failed = pod.get("status", {}).get("phase") == "Failed"
    return failed or bool(reasons & _BACK_OFF_REASONS)
