"""What must be true before anything is built or changed, checked concurrently and in well under a second.

Each check either returns what the run needs later (the registry to use, the node's platform) or raises the one error
that says what is wrong and what to do about it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from airflow_deployer.cluster import (
    CLAIM,
    CONTROLLER_REVISION,
    EVENT,
    LEASE,
    NAMESPACE,
    NODE,
    POD,
    SECRET,
    SERVICE,
    STATEFUL_SET,
    STORAGE_CLASS,
    ApiError,
    Cluster,
    Kind,
    Object,
)
from airflow_deployer.config import Settings, parse_quantity
from airflow_deployer.errors import ClusterError, ConfigurationError, DeployerError
from airflow_deployer.manifests import Names

_DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"

_UP_NEEDS: tuple[tuple[str, Kind, str], ...] = (
    *((verb, STATEFUL_SET, "") for verb in ("get", "list", "watch", "create", "patch", "delete")),
    *((verb, CLAIM, "") for verb in ("get", "list", "watch", "create", "patch")),
    *((verb, SERVICE, "") for verb in ("get", "create", "patch")),
    *((verb, SECRET, "") for verb in ("get", "create", "patch")),
    *((verb, POD, "") for verb in ("get", "list", "watch", "create", "delete")),
    ("create", POD, "exec"),
    ("get", POD, "exec"),
    ("get", CONTROLLER_REVISION, ""),
    ("get", POD, "log"),
    ("create", POD, "portforward"),
    ("get", POD, "portforward"),
    *((verb, EVENT, "") for verb in ("list", "watch")),
    *((verb, LEASE, "") for verb in ("get", "create", "update")),
)


def check_permissions(cluster: Cluster, namespace: str) -> None:
    """Make sure that this user may do all that `up` does.

    Raises:
        ClusterError: naming every verb and resource that is missing.
    """
    everything = Kind("*", "*", "*", "*")
    if cluster.can("*", everything, namespace):
        return
    with ThreadPoolExecutor(max_workers=8, thread_name_prefix="permissions") as pool:
        answers = list(pool.map(lambda need: cluster.can(need[0], need[1], namespace, need[2]), _UP_NEEDS))
    missing = [need for need, allowed in zip(_UP_NEEDS, answers, strict=True) if not allowed]
    if not missing:
        return
    by_resource: dict[str, list[str]] = {}
    for verb, kind, subresource in missing:
        resource = f"{kind.plural}/{subresource}" if subresource else kind.plural
        by_resource.setdefault(f"{resource}.{kind.group}" if kind.group else resource, []).append(verb)
    listed = "; ".join(f"{', '.join(verbs)} {resource}" for resource, verbs in by_resource.items())
    raise ClusterError(
        f"The user of context {cluster.context.name!r} may not do what a deployment to namespace {namespace!r} needs: "
        f"{listed}.",
        hint="ask an administrator of the cluster for a Role with these verbs and resources",
    )


def check_namespace(cluster: Cluster, namespace: str) -> bool:
    """Return whether the namespace exists; raise when it does not and may not be created, or is being deleted.

    Raises:
        ClusterError: it is being deleted, or it is missing and this user may not create it.
    """
    try:
        found = cluster.get(NAMESPACE, None, namespace)
    except ApiError as error:
        if error.status == 403:  # a user of one namespace may well not read the Namespace itself
            return True
        raise
    if found is None:
        if not cluster.can("create", NAMESPACE, None):
            raise ClusterError(
                f"The namespace {namespace!r} does not exist, and the user of context {cluster.context.name!r} may not "
                "create namespaces.",
                hint=f"ask an administrator of the cluster to create namespace {namespace}",
            )
        return False
    if found.get("status", {}).get("phase") == "Terminating":
        raise ClusterError(
            f"The namespace {namespace!r} is being deleted.", hint="wait until it is gone, or use --namespace"
        )
    return True


def check_storage(cluster: Cluster, names: Names, settings: Settings) -> Object | None:
    """Make sure that the claim can be provisioned or grown as asked; return the one that there is.

    Raises:
        ConfigurationError: the named StorageClass does not exist, or the size would shrink.
        ClusterError: no class is named and the cluster has no default one.
    """
    claim = cluster.get(CLAIM, names.namespace, names.claim)
    if claim is not None:
        _check_size(names, claim, settings)
        return claim
    try:
        classes: list[Object] = cluster.list_objects(STORAGE_CLASS, None)["items"]
    except ApiError as error:
        if error.status == 403:  # not ours to see: the wait will tell
            return None
        raise
    known = sorted(item["metadata"]["name"] for item in classes)
    wanted = settings.storage.class_
    if wanted is not None:
        if wanted not in known:
            raise ConfigurationError(
                f"The StorageClass {wanted!r} (storage.class) does not exist in context {cluster.context.name!r}.",
                hint=f"choose one of: {', '.join(known)}" if known else "the cluster has none: install a provisioner",
            )
        return None
    if not any(item["metadata"].get("annotations", {}).get(_DEFAULT_CLASS) == "true" for item in classes):
        raise ClusterError(
            f"The cluster of context {cluster.context.name!r} has no default StorageClass, so the volume of "
            f"{names.name!r} cannot be provisioned.",
            hint=f"set storage.class in deployer.toml to one of: {', '.join(known)}"
            if known
            else "install a volume provisioner, or use a local cluster: deployer cluster up",
        )
    return None


def _check_size(names: Names, claim: Object, settings: Settings) -> None:
    held = claim["spec"]["resources"]["requests"]["storage"]
    if parse_quantity(settings.storage.size) < parse_quantity(held):
        raise ConfigurationError(
            f"The volume {names.claim} holds {held}; storage.size {settings.storage.size} would shrink it, and volumes "
            "cannot shrink.",
            hint=f"set storage.size to {held} or more",
        )
    actual = claim["spec"].get("storageClassName")
    wanted = settings.storage.class_
    if wanted is not None and actual is not None and wanted != actual:
        raise ConfigurationError(
            f"The volume {names.claim} is of StorageClass {actual!r}; storage.class {wanted!r} would need a new one.",
            hint=f"set storage.class to {actual}, or start empty with: deployer down --purge",
        )


def check_secret(cluster: Cluster, names: Names) -> Object | None:
    """Return the Secret, or None when neither it nor the volume exists yet.

    Raises:
        ClusterError: the volume is there but the Secret that opens it is gone or incomplete.
    """
    from airflow_deployer import credentials

    secret = cluster.get(SECRET, names.namespace, names.secret)
    missing = sorted(set(credentials.KEYS) - set((secret or {}).get("data") or {}))
    if not missing:
        return secret
    if secret is None and cluster.get(CLAIM, names.namespace, names.claim) is None:
        return None
    what = (
        f"the Secret {names.secret} is gone"
        if secret is None
        else f"the Secret {names.secret} lacks {', '.join(missing)}"
    )
    raise ClusterError(
        f"The volume {names.claim} in namespace {names.namespace!r} is there, but {what}: a new one could neither "
        "log in to the database nor read the stored connections. Nothing was changed.",
        hint=f"put the Secret back from your copy (kubectl -n {names.namespace} apply -f ...), or give the data up: "
        "deployer down --purge",
    )


def node_platform(cluster: Cluster) -> str | None:
    """The nodes' platform such as `linux/amd64`, or None when it cannot be seen or differs between nodes.

    Source: `status.nodeInfo` of a Node.
    """
    try:
        nodes = cluster.list_objects(NODE, None, limit=20)["items"]
    except ApiError:
        return None
    platforms = {
        f"{info['operatingSystem']}/{info['architecture']}"
        for info in (node.get("status", {}).get("nodeInfo") or {} for node in nodes)
        if info.get("architecture")
    }
    return platforms.pop() if len(platforms) == 1 else None


def first_error(failures: Sequence[BaseException]) -> DeployerError | None:
    """Of several failed checks, the one to tell: what the user asked for wrongly comes before what is not there."""
    known: list[DeployerError] = [failure for failure in failures if isinstance(failure, DeployerError)]
    known.sort(key=lambda failure: -failure.exit_code)
    return known[0] if known else None


def concurrently(**checks: Callable[[], Any]) -> dict[str, Any]:
    """Run every check in a thread of its own; return their results by name.

    Raises:
        DeployerError: the first failure by importance, once all checks have ended.
    """
    futures: dict[str, Future[Any]] = {name: Future() for name in checks}
    for name, check in checks.items():
        # Daemons, unlike a pool's threads: Ctrl-C must not wait for a registry that does not answer.
        threading.Thread(target=_settle, args=(futures[name], check), name=f"check {name}", daemon=True).start()
    failures = [failure for future in futures.values() if (failure := future.exception()) is not None]
    unexpected = [failure for failure in failures if not isinstance(failure, DeployerError)]
    if unexpected:
        raise unexpected[0]
    told = first_error(failures)
    if told is not None:
        raise told
    return {name: future.result() for name, future in futures.items()}


def _settle(future: Future[Any], check: Callable[[], Any]) -> None:
    try:
        future.set_result(check())
    except BaseException as error:  # told to whoever waits
        future.set_exception(error)
