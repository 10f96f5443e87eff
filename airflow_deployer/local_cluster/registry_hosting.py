"""The ConfigMap by which a cluster tells where its registry is (KEP-1755, `local-registry-hosting`)."""

from __future__ import annotations

import json
from typing import Any

from airflow_deployer.registry import MIRROR_ANNOTATION


def make_config_map(host: str, host_from_container_runtime: str, *, mirror: str | None = None) -> dict[str, Any]:
    """The ConfigMap of `kube-public`.

    Args:
        host: how a program on this machine names the registry.
        host_from_container_runtime: how the node's container runtime names it.
        mirror: the registry that holds the public images too, where the nodes can pull them from nowhere else.

    `hostFromClusterNetwork` stays away: the registry listens on loopback only, no pod can reach it.
    """
    hosting = {
        "host": host,
        "hostFromContainerRuntime": host_from_container_runtime,
        "help": "https://github.com/kubernetes/enhancements/tree/master/keps/sig-cluster-lifecycle/generic/1755-communicating-a-local-registry",
    }
    metadata: dict[str, Any] = {"name": "local-registry-hosting", "namespace": "kube-public"}
    if mirror is not None:
        metadata["annotations"] = {MIRROR_ANNOTATION: mirror}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "data": {"localRegistryHosting.v1": "".join(f"{key}: {json.dumps(value)}\n" for key, value in hosting.items())},
    }
