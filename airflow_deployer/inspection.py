"""`deployer status`: look at everything without changing anything."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from airflow_deployer import credentials, diagnosis, verification
from airflow_deployer.cluster import CLAIM, EVENT, POD, SECRET, STATEFUL_SET, Object
from airflow_deployer.config import Settings
from airflow_deployer.connection import Session, connect, deployed_image, live_content, running_forward
from airflow_deployer.errors import DeployerError
from airflow_deployer.manifests import Names
from airflow_deployer.reports import ContainerReport, StatusReport
from airflow_deployer.running_airflow import VERSION_LABEL, asked, running_profile


def status(settings: Settings, *, show_password: bool) -> StatusReport:
    """Look at everything without changing anything."""
    session = connect(settings)
    cluster, names = session.cluster, session.names
    reads: dict[str, Callable[[], Any]] = {
        "stateful_set": lambda: cluster.get(STATEFUL_SET, names.namespace, names.name),
        "pod": lambda: cluster.get(POD, names.namespace, names.pod),
        "claim": lambda: cluster.get(CLAIM, names.namespace, names.claim),
        "secret": lambda: cluster.get(SECRET, names.namespace, names.secret),
        "content": lambda: live_content(session),
    }
    with ThreadPoolExecutor(max_workers=len(reads)) as pool:
        futures = {name: pool.submit(read) for name, read in reads.items()}
    seen = {name: future.result() for name, future in futures.items()}
    where: dict[str, Any] = {
        "context": session.context.name,
        "namespace": names.namespace,
        "name": names.name,
        "volume": _volume(names, seen["claim"]),
    }
    if seen["stateful_set"] is None:
        return StatusReport(deployed=False, **where)
    image = deployed_image(seen["stateful_set"])
    profile = running_profile(session, seen["pod"] or seen["stateful_set"])
    found = diagnosis.diagnose(
        seen["pod"], claim=seen["claim"], events=_events(session, seen["pod"]), stateful_set=names.name
    )
    secret = credentials.decode((seen["secret"] or {}).get("data") or {})
    forward = running_forward(session)
    reported: dict[str, Any] = where | {
        "deployed": True,
        "ready": found.ready,
        "problem": found.summary if not found.ready else "",
        "image": image.reference if image else "",
        "content_id": image.content_id if image else "",
        "live_content_id": (seen["content"] or {}).get("live") or None,
        "content_scope": profile.content_scope,
        "airflow_version": seen["stateful_set"]["metadata"]["labels"].get(VERSION_LABEL, ""),
        "containers": _containers(seen["pod"]),
        "url": forward,
        "login": credentials.ADMIN_USER,
        "password": secret.get(credentials.ADMIN_PASSWORD) if show_password else None,
    }
    if found.ready and credentials.ADMIN_PASSWORD in secret:
        try:
            with asked(session, profile, secret, forward) as airflow:
                now = verification.look(airflow)
            reported |= {"components": now.components, "dags": now.dags, "import_errors": now.import_errors}
            sick = [name for name, state in now.components.items() if state != "healthy"]
            if sick:
                reported["problem"] = f"Airflow says that {', '.join(sick)} is not healthy"
        except DeployerError as error:
            reported |= {"ready": False, "problem": error.message}
    return StatusReport(**reported)


def _events(session: Session, pod: Object | None) -> list[Object]:
    if pod is not None and diagnosis.diagnose(pod).ready:
        return []
    items: list[Object] = session.cluster.list_objects(EVENT, session.names.namespace)["items"]
    names = {session.names.pod, session.names.claim, session.names.name}
    return [event for event in items if event.get("involvedObject", {}).get("name") in names]


def _containers(pod: Object | None) -> tuple[ContainerReport, ...]:
    reports = []
    for container in ((pod or {}).get("status") or {}).get("containerStatuses", []):
        state = container.get("state") or {}
        kind = next(iter(state), "waiting")
        reason = (state.get(kind) or {}).get("reason")
        text = reason or ("ready" if container.get("ready") else f"{kind}, not ready")
        reports.append(
            ContainerReport(
                name=container["name"],
                image=container["image"],
                ready=bool(container.get("ready")),
                restarts=int(container.get("restartCount", 0)),
                state=text,
            )
        )
    return tuple(reports)


def _volume(names: Names, claim: Object | None) -> str:
    if claim is None:
        return ""
    state = claim.get("status", {})
    size = (state.get("capacity") or claim["spec"]["resources"]["requests"]).get("storage", "?")
    storage_class = claim["spec"].get("storageClassName") or "no class"
    return f"{names.claim}, {size}, {str(state.get('phase', '')).lower()}, StorageClass {storage_class}"
