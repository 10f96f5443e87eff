"""What a local cluster is at a moment: plain values that both providers report and JSON can carry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Provider = Literal["kind", "native"]
ProviderChoice = Literal["auto", "kind", "native"]
State = Literal["running", "degraded", "stopped", "absent"]


@dataclass(frozen=True)
class Part:
    """A process or container of the cluster.

    Args:
        name: the program's or the container's name.
        running: whether it runs.
        pid: its process id; None when it does not run or is a container.
    """

    name: str
    running: bool
    pid: int | None = None


@dataclass(frozen=True)
class ClusterStatus:
    """A local cluster.

    Args:
        provider: who runs it.
        state: `running` (everything works), `degraded` (some parts do not), `stopped` (kept, not running), `absent`.
        context: its context in the user's kubeconfig.
        kubernetes_version: such as `v1.20.2`; empty while it is not known.
        registry: where images are pushed to, `host:port`.
        node: name of the node; empty while it is not known.
        parts: its processes or containers.
    """

    provider: Provider
    state: State
    context: str
    kubernetes_version: str
    registry: str
    node: str
    parts: tuple[Part, ...] = ()
