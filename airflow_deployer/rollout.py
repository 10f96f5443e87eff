"""Waiting for the pod: watches instead of sleeps, a live diagnosis, and a verdict within seconds of the cause.

Every wait has a deadline and ends with the last diagnosis it made. The watches run in daemon threads that feed one
queue; the loop that reads it is the only one that decides.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from airflow_deployer import diagnosis
from airflow_deployer.cluster import CLAIM, EVENT, POD, STATEFUL_SET, ApiError, Cluster, Kind, Object
from airflow_deployer.diagnosis import Diagnosis
from airflow_deployer.errors import ClusterError, RolloutError
from airflow_deployer.manifests import Names
from airflow_deployer.progress import Step

_WATCH_SECONDS = 20
_TICK_SECONDS = 0.5
_NUDGE_SECONDS = 1.0
_STOPPING = "airflow-deployer/stopping"
_LOG_LINES = 20

Clock = Callable[[], float]


@dataclass
class _View:
    """What the watches have told so far."""

    pod: Object | None = None
    claim: Object | None = None
    stateful_set: Object | None = None
    events: dict[str, Object] = field(default_factory=dict)
    listed: set[str] = field(default_factory=set)
    trouble: ClusterError | None = None

    def apply(self, kind: Kind, change: str, item: Object) -> None:
        gone = change == "DELETED"
        if kind is EVENT:
            if gone:
                self.events.pop(item["metadata"]["uid"], None)
            else:
                self.events[item["metadata"]["uid"]] = item
        elif kind is POD:
            self.pod = None if gone else item
        elif kind is CLAIM:
            self.claim = None if gone else item
        else:
            self.stateful_set = None if gone else item


class Watcher:
    """Watches single objects of a namespace, and its events, until it is closed."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._changes: queue.SimpleQueue[tuple[Kind, str, Object | ClusterError]] = queue.SimpleQueue()
        self._closed = threading.Event()
        self.view = _View()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        # The threads notice at their next change or time-out; they are daemons and hold nothing that matters.
        self._closed.set()

    def add(self, kind: Kind, name: str | None = None) -> None:
        """Watch the object `name`, or every object of the kind."""
        fields = f"metadata.name={name}" if name else ""
        threading.Thread(target=self._run, args=(kind, fields), name=f"watch {kind.plural}", daemon=True).start()

    def drain(self, seconds: float) -> None:
        """Take in what has changed, waiting at most `seconds` for the first change."""
        try:
            self._take(self._changes.get(timeout=seconds))
            while True:
                self._take(self._changes.get_nowait())
        except queue.Empty:
            return

    def _take(self, change: tuple[Kind, str, Object | ClusterError]) -> None:
        kind, what, item = change
        if isinstance(item, ClusterError):
            # An overloaded or restarting API server answers 429 and 5xx for a while; anything else stays wrong.
            if isinstance(item, ApiError) and item.status < 500 and item.status != 429:
                raise item
            self.view.trouble = item
            return
        self.view.trouble = None
        if what == "LISTED":
            if not item["items"]:
                self.view.apply(kind, "DELETED", {"metadata": {"uid": ""}})
            for listed in item["items"]:
                self.view.apply(kind, "ADDED", listed)
            self.view.listed.add(kind.kind)
            return
        self.view.apply(kind, what, item)

    def _run(self, kind: Kind, fields: str) -> None:
        pause = 0.1
        while not self._closed.is_set():
            try:
                listed = self._cluster.list_objects(kind, self._namespace, fields=fields)
                self._changes.put((kind, "LISTED", listed))
                version = str(listed["metadata"]["resourceVersion"])
                while not self._closed.is_set():
                    last = ""
                    for change, item in self._cluster.watch(
                        kind, self._namespace, fields=fields, resource_version=version, seconds=_WATCH_SECONDS
                    ):
                        if self._closed.is_set():
                            return
                        last = change
                        if change == "ERROR":
                            break
                        version = str(item["metadata"]["resourceVersion"])
                        self._changes.put((kind, change, item))
                    pause = 0.1
                    if last == "ERROR":  # the version is too old by now: list again
                        break
            except ClusterError as error:
                self._changes.put((kind, "FAILED", error))
                self._closed.wait(pause)
                pause = min(pause * 2, 5.0)


def wait_ready(
    cluster: Cluster,
    names: Names,
    *,
    revision: str,
    timeout: float,
    step: Step,
    clock: Clock = time.monotonic,
) -> Object:
    """Wait until the pod of `revision` is ready; return it.

    Args:
        revision: the StatefulSet's `status.updateRevision`, matched with the label `controller-revision-hash`.
        timeout: seconds.

    Raises:
        RolloutError: a cause that does not heal by itself, or the deadline; with events, log lines and a hint.
    """
    deadline = clock() + timeout
    began = cluster.server_time() - 2
    first_seen: dict[str, float] = {}
    with Watcher(cluster, names.namespace) as watcher:
        watcher.add(POD, names.pod)
        watcher.add(CLAIM, names.claim)
        watcher.add(EVENT)
        log_line = _LogLine(cluster, names, clock)
        while True:
            watcher.drain(_TICK_SECONDS)
            view = watcher.view
            now = clock()
            if not {POD.kind, CLAIM.kind} <= view.listed:
                found = Diagnosis("Waiting", "asking the API server")
            else:
                found = diagnosis.diagnose(
                    view.pod, claim=view.claim, events=_own_events(names, view, began), stateful_set=names.name
                )
            if found.ready and view.pod is not None and _revision(view.pod) == revision:
                return view.pod
            if view.trouble is not None:
                step.update("the API server does not answer")
            else:
                step.update(log_line.read(found) or found.summary)
            # A reason that comes and goes (a pull that fails, backs off and fails) keeps its first time.
            since = first_seen.setdefault(found.reason, now)
            if now - since >= found.fatal_after:
                raise failure(cluster, names, found, f"Airflow does not start: {found.summary.rstrip('.')}.")
            if now >= deadline:
                reached = (view.trouble.message if view.trouble is not None else found.summary).rstrip(".")
                raise failure(
                    cluster, names, found, f"Airflow is not ready after {round(timeout)} s; last seen: {reached}."
                )


def failure(cluster: Cluster, names: Names, found: Diagnosis, message: str) -> RolloutError:
    """Make the error of a failed wait: the cause, the events and the last lines of the log that tells."""
    details = [f"event: {event}" for event in found.events]
    if found.container:
        lines: list[str] = []
        which = "previous log" if found.previous else "log"
        try:
            lines = cluster.log(
                names.namespace, names.pod, found.container, previous=found.previous, lines=_LOG_LINES
            ) or cluster.log(names.namespace, names.pod, found.container, lines=_LOG_LINES)
        except ClusterError as error:
            details.append(f"its log cannot be read: {error.message}")
        details += [f"{which} of {found.container}: {line}" for line in lines]
    hint = found.hint or f"kubectl -n {names.namespace} logs {names.pod} -c airflow   shows what it does"
    return RolloutError(message, hint=hint, details=details)


class _LogLine:
    """The supervisor's latest line while Airflow starts: the best answer to "what is it doing?"."""

    def __init__(self, cluster: Cluster, names: Names, clock: Clock) -> None:
        self._cluster = cluster
        self._names = names
        self._clock = clock
        self._asked = float("-inf")
        self._line = ""

    def read(self, found: Diagnosis) -> str:
        if found.reason != "Probe" or found.container != "airflow":
            return ""
        if self._clock() - self._asked >= 1.0:
            self._asked = self._clock()
            try:
                lines = self._cluster.log(self._names.namespace, self._names.pod, "airflow", lines=40)
            except ClusterError:
                return self._line
            own = [line for line in lines if "[supervisor]" in line]
            if own:
                self._line = own[-1].partition("[supervisor]")[2].strip().partition(" ")[2]  # without the time
        return self._line


def wait_revision(cluster: Cluster, names: Names, *, generation: int, timeout: float) -> str:
    """Wait until the StatefulSet controller has seen `generation`; return its `status.updateRevision`.

    Raises:
        RolloutError: the controller did not react in time.
    """
    deadline = time.monotonic() + timeout
    with Watcher(cluster, names.namespace) as watcher:
        watcher.add(STATEFUL_SET, names.name)
        while time.monotonic() < deadline:
            watcher.drain(_TICK_SECONDS)
            status = (watcher.view.stateful_set or {}).get("status", {})
            if int(status.get("observedGeneration", 0)) >= generation and status.get("updateRevision"):
                return str(status["updateRevision"])
    raise RolloutError(
        f"The StatefulSet {names.name} is not being worked on: its controller has not seen the change after "
        f"{round(timeout)} s.",
        hint="see whether the cluster's kube-controller-manager runs",
    )


def remove(cluster: Cluster, kind: Kind, item: Object, *, timeout: float, step: Step) -> None:
    """Delete this very object and wait until it is gone.

    Raises:
        RolloutError: it is still there at the deadline.
    """
    metadata = item["metadata"]
    namespace, name, uid = metadata["namespace"], metadata["name"], metadata["uid"]
    cluster.delete(kind, namespace, name, uid=uid)
    wait_deleted(cluster, namespace, kind, name, uid=uid, timeout=timeout, step=step)


def wait_deleted(
    cluster: Cluster, namespace: str, kind: Kind, name: str, *, uid: str | None, timeout: float, step: Step
) -> None:
    """Wait until the object is gone, or is another one than `uid`.

    Raises:
        RolloutError: it is still there at the deadline; the message names what holds it.
    """
    deadline = time.monotonic() + timeout
    nudge_at = time.monotonic() if kind is POD and uid else float("inf")
    with Watcher(cluster, namespace) as watcher:
        watcher.add(kind, name)
        while time.monotonic() < deadline:
            watcher.drain(_TICK_SECONDS)
            view = watcher.view
            if (now := time.monotonic()) >= nudge_at:
                # A kubelet whose last look at a stopped pod came too early looks again after ten seconds, or as soon as
                # the pod changes: a pod whose processes have ended after one second would be gone after ten.
                nudged = cluster.annotate(kind, namespace, name, {_STOPPING: f"{now:.1f}"}, uid=str(uid))
                nudge_at = now + _NUDGE_SECONDS if nudged else float("inf")
            item = {POD.kind: view.pod, CLAIM.kind: view.claim, STATEFUL_SET.kind: view.stateful_set}[kind.kind]
            if kind.kind in view.listed and (item is None or (uid and item["metadata"]["uid"] != uid)):
                return
            step.update(f"waiting for {kind.kind} {name} to be gone")
    held = (item or {}).get("metadata", {}).get("finalizers") or []
    raise RolloutError(
        f"{kind.kind} {name} is still there after {round(timeout)} s"
        + (f", held by {', '.join(held)}" if held else "")
        + ".",
        hint=f"kubectl -n {namespace} describe {kind.kind.lower()} {name}   shows what it waits for",
    )


def _own_events(names: Names, view: _View, began: float) -> list[Object]:
    """The events of our objects; of the StatefulSet's only those of this wait, since it outlives many pods."""
    own = []
    for event in view.events.values():
        involved = event.get("involvedObject", {})
        kind, name = involved.get("kind"), involved.get("name")
        if (kind, name) in (("Pod", names.pod), ("PersistentVolumeClaim", names.claim)) or (
            (kind, name) == ("StatefulSet", names.name) and diagnosis.event_time(event) >= _rfc3339(began)
        ):
            own.append(event)
    return own


def _rfc3339(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _revision(pod: Object) -> str:
    return str(pod["metadata"].get("labels", {}).get("controller-revision-hash", ""))
