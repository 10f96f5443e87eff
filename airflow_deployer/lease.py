"""The lock on a Deployment: a Lease that names its holder and frees itself when the holder is gone.

Two `up` at once must not interleave. The lock is a `coordination.k8s.io/v1` Lease: held while its `renewTime` is
younger than its duration, by the API server's clock, so that a killed run blocks nobody for longer than that, and a
dead process on this same machine blocks nobody at all.
Source: https://kubernetes.io/docs/concepts/architecture/leases/.
"""

from __future__ import annotations

import datetime
import getpass
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from airflow_deployer.cluster import LEASE, ApiError, Cluster, Object
from airflow_deployer.errors import ClusterError, DeployerError

DURATION_SECONDS = 30
RENEW_SECONDS = 10.0


class LockedError(DeployerError):
    """Somebody else is working on the same Deployment at this moment."""


@contextmanager
def held(cluster: Cluster, namespace: str, name: str, *, labels: dict[str, str], doing: str) -> Iterator[None]:
    """Hold the Lease `name` for the time of the block, renewed in the background.

    Args:
        doing: the command that holds it, shown to whoever comes second (`up`, `down`).

    Raises:
        LockedError: another run holds it; the message says who, since when and doing what.
    """
    holder = f"{_user()}@{socket.gethostname()} {doing} pid={os.getpid()}/{_process_start(os.getpid())}"
    lease = _acquire(cluster, namespace, name, holder, labels)
    finished = threading.Event()
    renewer = threading.Thread(
        target=_renew, args=(cluster, namespace, name, holder, finished), name="lease", daemon=True
    )
    renewer.start()
    try:
        yield
    finally:
        finished.set()
        renewer.join(timeout=5)
        # A lease that could not be given back frees itself.
        with suppress(ClusterError):
            _release(cluster, namespace, lease["metadata"]["name"], holder)


def _acquire(cluster: Cluster, namespace: str, name: str, holder: str, labels: dict[str, str]) -> Object:
    for _ in range(5):
        existing = cluster.get(LEASE, namespace, name)
        now = _micro_time(cluster.server_time())
        spec = {
            "holderIdentity": holder,
            "leaseDurationSeconds": DURATION_SECONDS,
            "acquireTime": now,
            "renewTime": now,
        }
        try:
            if existing is None:
                body = {
                    "apiVersion": LEASE.api_version,
                    "kind": LEASE.kind,
                    "metadata": {"name": name, "namespace": namespace, "labels": labels},
                    "spec": spec,
                }
                return cluster.create(LEASE, namespace, body)
            refusal = refuse(existing.get("spec") or {}, cluster.server_time())
            if refusal:
                # `.dev` follows the name of the deployment that a `deployer dev` follows.
                deployment = name.removeprefix("airflow-deployer-").removesuffix(".dev")
                raise LockedError(
                    f"Cannot work on {deployment!r} in namespace {namespace!r}: {refusal}.",
                    hint="wait for it to end; a run that was killed frees the lock by itself "
                    f"{DURATION_SECONDS} s after its last sign of life",
                )
            existing["spec"] = spec
            return cluster.replace(LEASE, namespace, existing)
        except ApiError as error:
            if error.status != 409:  # 409: somebody wrote it between our read and our write; look again
                raise
    raise LockedError(
        f"Cannot lock {name!r} in namespace {namespace!r}: others keep taking it.", hint="run the command again"
    )


def refuse(spec: Object, now: float) -> str:
    """Say who holds a Lease with this `spec`, or return an empty string when it is free.

    Args:
        now: seconds since the epoch, by the API server's clock.
    """
    holder = str(spec.get("holderIdentity") or "")
    if not holder:
        return ""
    renewed = _seconds(str(spec.get("renewTime") or ""))
    if renewed is None or now - renewed > float(spec.get("leaseDurationSeconds") or DURATION_SECONDS):
        return ""
    if _holder_is_dead(holder):
        return ""
    who, _, rest = holder.partition(" ")
    doing = rest.partition(" pid=")[0] or "something"
    since = _seconds(str(spec.get("acquireTime") or ""))
    ago = f" since {max(0, round(now - since))} s" if since is not None else ""
    return f"{who} is running `deployer {doing}` on it{ago}"


def _holder_is_dead(holder: str) -> bool:
    """True when the holder was a process of this machine that has ended; anything else may be alive."""
    who, _, rest = holder.partition(" ")
    if who.partition("@")[2] != socket.gethostname() or " pid=" not in f" {rest}":
        return False
    pid, _, start = rest.rpartition("pid=")[2].partition("/")
    if not pid.isdigit() or not start:
        return False
    return _process_start(int(pid)) != start


def _process_start(pid: int) -> str:
    """The process' start time in clock ticks after boot (`/proc/PID/stat` field 22), so that a re-used id differs.

    Empty where there is no such process or no procfs.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(") ")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _renew(cluster: Cluster, namespace: str, name: str, holder: str, finished: threading.Event) -> None:
    while not finished.wait(RENEW_SECONDS):
        # A missed renewal is made up for by the next one; three in a row free the lock, as they should.
        with suppress(ClusterError):
            lease = cluster.get(LEASE, namespace, name)
            if lease is None or lease["spec"].get("holderIdentity") != holder:
                return
            lease["spec"]["renewTime"] = _micro_time(cluster.server_time())
            cluster.replace(LEASE, namespace, lease)


def _release(cluster: Cluster, namespace: str, name: str, holder: str) -> None:
    lease = cluster.get(LEASE, namespace, name)
    if lease is not None and lease["spec"].get("holderIdentity") == holder:
        lease["spec"]["holderIdentity"] = ""
        cluster.replace(LEASE, namespace, lease)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _micro_time(seconds: float) -> str:
    """Format a time as the API's MicroTime (RFC 3339 with six digits)."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _seconds(micro_time: str) -> float | None:
    try:
        return datetime.datetime.fromisoformat(micro_time.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return None
