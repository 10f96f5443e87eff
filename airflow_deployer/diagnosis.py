"""Why a pod is not ready yet: a pure function of the pod, its claim, its StatefulSet and their events.

`diagnose` looks in the order in which a pod comes to life: is there a pod, is it scheduled, is its volume there, are
its images there, do its containers run (init containers first), do its probes pass. One table maps each reason that
Kubernetes gives to how long it may still heal by itself and to what the user can do about it.
Reasons are the kubelet's, the scheduler's and the volume controllers'
(https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/, field `status.containerStatuses[].state`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

Object = dict[str, Any]

_DIGEST = re.compile(r"@?sha256:[0-9a-f]{64}")
# containerd tells the cause of a failed pull at the end of a chain that names the image three times.
_REPEATED = re.compile(
    r"rpc error: code = \w+ desc = |(?:[Ff]ailed to pull image|failed to pull and unpack image|"
    r'failed to resolve reference) "[^"]*": '
)


@dataclass(frozen=True)
class Remedy:
    """What is known about a reason: seconds it may still heal by itself, and what to do when it does not."""

    grace: float
    hint: str


CRASHES_BEFORE_VERDICT = 2  # restarts: a container may lose a race once and come up at the second try
# Reasons of Normal events on a claim that is not at fault: its volume is made once its pod has a node.
_CLAIM_WAITS_FOR_POD = ("WaitForFirstConsumer", "WaitForPodScheduled")
NEVER = float("inf")  # waiting is all there is to do; the deadline ends it

_IMAGE = "check that the node can reach the registry and that images.registry_pull names it as the node sees it"
REMEDIES: dict[str, Remedy] = {
    "ErrImagePull": Remedy(15.0, _IMAGE),
    "ImagePullBackOff": Remedy(8.0, _IMAGE),
    "InvalidImageName": Remedy(0.0, "correct images.postgres, images.base or images.repository in deployer.toml"),
    "ErrImageNeverPull": Remedy(0.0, _IMAGE),
    "RegistryUnavailable": Remedy(15.0, _IMAGE),
    "ImageUnauthorized": Remedy(
        3.0, "docker login REGISTRY, then deployer up: it makes the pull secret; or name one in images.pull_secret"
    ),
    "ImageNotFound": Remedy(
        3.0, "check the image's name and tag, and that images.registry_pull names the same registry"
    ),
    "ImageUntrusted": Remedy(
        3.0, "give the registry's certificate authority to the container runtime of every node (certs.d/HOST/ca.crt)"
    ),
    "CreateContainerConfigError": Remedy(8.0, "deployer up   makes missing objects again"),
    "CreateContainerError": Remedy(8.0, "deployer status; kubectl describe pod says more"),
    "RunContainerError": Remedy(8.0, "deployer status; kubectl describe pod says more"),
    "CrashLoopBackOff": Remedy(0.0, "mend what the log says, then deployer up"),
    "OOMKilled": Remedy(
        30.0,
        "raise resources.CONTAINER.limits.memory in deployer.toml, or let fewer tasks run at once, then deployer up",
    ),
    "Crashed": Remedy(NEVER, ""),
    "Unschedulable": Remedy(
        15.0,
        "free room on the nodes, or lower what the pod asks for in deployer.toml (resources.airflow.requests.cpu and "
        ".memory, resources.postgres.requests), then deployer up",
    ),
    "UnboundClaim": Remedy(
        45.0, "kubectl get storageclass   shows what can provision volumes; storage.class chooses one"
    ),
    "ProvisioningFailed": Remedy(10.0, "storage.class in deployer.toml chooses another StorageClass"),
    "FailedMount": Remedy(45.0, "kubectl describe pod   shows which volume and why"),
    "FailedAttachVolume": Remedy(
        90.0, "the volume is still attached to another node; it frees itself, or see the node"
    ),
    "FailedCreate": Remedy(10.0, "the cluster's policy refuses the pod; the message names the rule"),
    "FailedCreatePodSandBox": Remedy(30.0, "the node's network or runtime is at fault: see its kubelet's log"),
    "Evicted": Remedy(5.0, "free disk or memory on the node, then deployer up"),
    "Probe": Remedy(NEVER, ""),
    "Terminating": Remedy(NEVER, ""),
    "Waiting": Remedy(NEVER, ""),
}


@dataclass(frozen=True)
class Diagnosis:
    """What keeps the pod from being ready.

    Attributes:
        reason: a key of `REMEDIES`; empty when the pod is ready.
        summary: one line for a person, with the object it is about.
        container: the container to read the log of, or empty.
        previous: whether the log of the container's previous run is the one that tells.
        fatal_after: seconds after which it will not heal by itself; infinity: never known.
        hint: what to do about it.
        events: the Warning events that bear on it, oldest first.
    """

    reason: str
    summary: str
    container: str = ""
    previous: bool = False
    fatal_after: float = NEVER
    hint: str = ""
    events: tuple[str, ...] = ()

    @property
    def ready(self) -> bool:
        """True when nothing is wrong and nothing is waited for."""
        return self.reason == ""


READY = Diagnosis("", "ready")


def diagnose(
    pod: Object | None,
    *,
    claim: Object | None = None,
    events: Sequence[Object] = (),
    stateful_set: str = "",
) -> Diagnosis:
    """Say why the pod is not ready, or `READY`.

    Args:
        pod: the Pod, or None while there is none.
        claim: the PersistentVolumeClaim that it mounts, if there is one.
        events: Events of the pod, the claim and the StatefulSet, in any order.
        stateful_set: the StatefulSet's name, for the wording.
    """
    ordered = sorted(events, key=event_time)
    warnings = [event for event in ordered if event.get("type") == "Warning"]
    if pod is None:
        return _no_pod(stateful_set, warnings)
    name = pod["metadata"]["name"]
    if pod["metadata"].get("deletionTimestamp"):
        return _make("Terminating", f"pod {name} is still stopping", warnings=())
    own = [event for event in warnings if _about(event, "Pod", pod["metadata"].get("uid"))]
    status = pod.get("status", {})
    if status.get("phase") == "Failed":
        reason = "Evicted" if status.get("reason") == "Evicted" else "Crashed"
        text = status.get("message") or status.get("reason") or "it failed"
        return _make(reason, f"pod {name} failed: {text}", warnings=own)
    return (
        _unbound_claim(claim, ordered)
        or _unschedulable(name, status, own)
        or _waiting_claim(claim)
        or _containers(name, pod, own)
        or _volumes(name, status, own)
        or _conditions(name, status, own)
    )


def _no_pod(stateful_set: str, warnings: Sequence[Object]) -> Diagnosis:
    for event in reversed(warnings):
        if event.get("reason") == "FailedCreate":
            return _make(
                "FailedCreate", f"StatefulSet {stateful_set} cannot create its pod: {_text(event)}", warnings=[event]
            )
    return _make("Waiting", f"StatefulSet {stateful_set} has not created its pod yet", warnings=())


def _unbound_claim(claim: Object | None, events: Sequence[Object]) -> Diagnosis | None:
    if claim is None or claim.get("status", {}).get("phase") != "Pending":
        return None
    name = claim["metadata"]["name"]
    storage_class = claim.get("spec", {}).get("storageClassName")
    about = f"claim {name} is not bound" + (f" (StorageClass {storage_class})" if storage_class else "")
    own = [event for event in events if _about(event, "PersistentVolumeClaim", claim["metadata"].get("uid"))]
    warnings = [event for event in own if event.get("type") == "Warning"]
    if warnings:
        return _make("ProvisioningFailed", f"{about}: {_text(warnings[-1])}", warnings=warnings)
    if own and own[-1].get("reason") in _CLAIM_WAITS_FOR_POD:
        return None
    # What the volume controller waits for (a provisioner that nobody runs, say) is an Event of type Normal.
    return _make("UnboundClaim", f"{about}: {_text(own[-1])}" if own else about, warnings=own)


def _waiting_claim(claim: Object | None) -> Diagnosis | None:
    """A claim whose volume is made only when the scheduler has chosen the pod's node (`WaitForFirstConsumer`)."""
    if claim is None or claim.get("status", {}).get("phase") != "Pending":
        return None
    return _make("Waiting", f"claim {claim['metadata']['name']} waits for its volume", warnings=())


def _unschedulable(name: str, status: Object, own: Sequence[Object]) -> Diagnosis | None:
    for condition in status.get("conditions", []):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            text = condition.get("message") or condition.get("reason") or "no node fits"
            return _make("Unschedulable", f"pod {name} cannot be scheduled: {text}", warnings=own)
    return None


def _containers(name: str, pod: Object, own: Sequence[Object]) -> Diagnosis | None:
    status = pod.get("status", {})
    broken: Diagnosis | None = None
    for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
        found = _container(name, container, own)
        # A container that cannot start outranks one that merely waits: it is the cause, the other the consequence.
        if found and (broken is None or found.fatal_after < broken.fatal_after):
            broken = found
    return broken


def _container(pod: str, status: Object, own: Sequence[Object]) -> Diagnosis | None:
    container = status["name"]
    waiting = status.get("state", {}).get("waiting") or {}
    reason = waiting.get("reason") or ""
    last = status.get("lastState", {}).get("terminated") or {}
    ended = status.get("state", {}).get("terminated") or {}
    restarts = int(status.get("restartCount", 0))
    if reason in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"):
        return _image(status, reason, str(waiting.get("message") or ""), own)
    if "OOMKilled" in (last.get("reason"), ended.get("reason")) and not status.get("ready"):
        killed = _make(
            "OOMKilled",
            f"container {container} of {pod} was killed because it used more memory than its limit "
            f"({restarts} restarts)",
            container=container,
            previous=bool(last) and not ended,
            warnings=own,
        )
        return killed if restarts < CRASHES_BEFORE_VERDICT else replace(killed, fatal_after=0.0)
    if reason == "CrashLoopBackOff" and restarts < CRASHES_BEFORE_VERDICT:
        return _make(
            "Crashed",
            f"container {container} of {pod} {_how_it_ended(last)}; Kubernetes starts it again shortly",
            container=container,
            previous=True,
            warnings=own,
        )
    if reason == "CrashLoopBackOff":
        how = _how_it_ended(last)
        return _make(
            reason,
            f"container {container} of {pod} crashes again and again ({restarts} restarts): {how}",
            container=container,
            previous=True,
            warnings=own,
        )
    if reason in ("CreateContainerConfigError", "CreateContainerError", "RunContainerError"):
        return _make(
            reason,
            f"container {container} of {pod} cannot be started: {waiting.get('message') or reason}",
            container=container,
            warnings=own,
        )
    if ended and (ended.get("exitCode") or status.get("started") is False) and ended.get("reason") != "Completed":
        return _make(
            "Crashed",
            f"container {container} of {pod} {_how_it_ended(ended)}; Kubernetes starts it again",
            container=container,
            warnings=own,
        )
    return None


def _image(status: Object, reason: str, message: str, own: Sequence[Object]) -> Diagnosis:
    """Tell apart the causes that the runtime only writes into the message of a failed pull."""
    pulls = [event for event in own if event.get("reason") == "Failed" and "pull" in _text(event)]
    # Without the image's digest, whose digits may read like a status code.
    evidence = _DIGEST.sub("", " ".join([message, *(_text(event) for event in pulls[-2:])]))
    cause = next(
        (text for text in (message, *(_text(event) for event in reversed(pulls))) if "rpc error" in text), message
    )
    lowered = evidence.lower()
    if re.search(r"unauthorized|authorization failed|\b401\b|403 forbidden|denied", lowered):
        reason = "ImageUnauthorized"
    elif any(word in lowered for word in ("x509", "certificate", "server gave http response to https client")):
        reason = "ImageUntrusted"
    elif "not found" in lowered or "manifest unknown" in lowered:
        reason = "ImageNotFound"
    return _make(
        reason,
        f"the node cannot pull {status.get('image') or 'the image'} for container {status['name']}: "
        f"{_shorten(_end_of_chain(cause)) or reason}",
        warnings=pulls or own,
    )


def _volumes(name: str, status: Object, own: Sequence[Object]) -> Diagnosis | None:
    if any((container.get("state") or {}).get("running") for container in status.get("containerStatuses", [])):
        return None
    for event in reversed(own):
        reason = str(event.get("reason"))
        if reason in ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox"):
            return _make(reason, f"pod {name} cannot start: {_text(event)}", warnings=[event])
    return None


def _conditions(name: str, status: Object, own: Sequence[Object]) -> Diagnosis:
    conditions = {condition.get("type"): condition for condition in status.get("conditions", [])}
    if conditions.get("Ready", {}).get("status") == "True":
        return READY
    for container in status.get("containerStatuses", []):
        if container.get("ready"):
            continue
        state = container.get("state", {})
        if state.get("running"):
            probes = [event for event in own if event.get("reason") == "Unhealthy"]
            what = f": {_shorten(_text(probes[-1]))}" if probes else ""
            return _make(
                "Probe",
                f"container {container['name']} of {name} runs but is not ready{what}",
                container=container["name"],
                warnings=probes,
            )
        waiting = state.get("waiting", {}).get("reason") or "starting"
        return _make("Waiting", f"container {container['name']} of {name}: {waiting}", warnings=())
    return _make("Waiting", f"pod {name} is {str(status.get('phase') or 'pending').lower()}", warnings=())


def _make(
    reason: str, summary: str, *, container: str = "", previous: bool = False, warnings: Iterable[Object]
) -> Diagnosis:
    remedy = REMEDIES[reason]
    return Diagnosis(
        reason=reason,
        summary=summary,
        container=container,
        previous=previous,
        fatal_after=remedy.grace,
        hint=remedy.hint.replace("CONTAINER", container or "airflow"),
        events=tuple(describe_event(event) for event in list(warnings)[-5:]),
    )


def _how_it_ended(terminated: Object) -> str:
    if terminated.get("signal"):
        return f"ended by signal {terminated['signal']}"
    if "exitCode" in terminated:
        return f"exited with code {terminated['exitCode']}"
    return "ended"


def describe_event(event: Object) -> str:
    """One line of an Event: reason, object, message, and how often it was seen."""
    involved = event.get("involvedObject", {})
    count = int(event.get("count") or 1)
    times = f" (x{count})" if count > 1 else ""
    kind = str(involved.get("kind", "")).lower()
    return (
        f"{event.get('reason')} {kind}/{involved.get('name', '')}: {_shorten(_end_of_chain(_text(event)), 300)}{times}"
    )


def event_time(event: Object) -> str:
    """The moment an Event was last seen, as a sortable RFC 3339 text."""
    return str(event.get("lastTimestamp") or event.get("eventTime") or event.get("firstTimestamp") or "")


def _about(event: Object, kind: str, uid: str | None) -> bool:
    involved = event.get("involvedObject", {})
    return involved.get("kind") == kind and (uid is None or involved.get("uid") in (None, uid))


def _text(event: Object) -> str:
    return " ".join(str(event.get("message") or event.get("reason") or "").split())


def _end_of_chain(text: str) -> str:
    """The cause of a failed pull without what leads to it."""
    return _DIGEST.sub("", _REPEATED.sub("", text))


def _shorten(text: str, length: int = 240) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= length else flat[: length - 1] + "…"
