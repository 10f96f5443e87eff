"""What every command on a deployment begins with: the pinned context, its API server, and the names there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from airflow_deployer import airflow_settings, kube_context, manifests
from airflow_deployer.cluster import CONFIG_MAP, ApiError, Cluster, Object
from airflow_deployer.config import Settings
from airflow_deployer.errors import ConfigurationError
from airflow_deployer.kube_context import KubeContext
from airflow_deployer.manifests import Image, Names
from airflow_deployer.registry import MIRROR_ANNOTATION, LocalRegistryHosting, parse_local_registry_hosting


@dataclass(frozen=True)
class Session:
    """A run's pinned context, its API server and the names of what it works on."""

    settings: Settings
    context: KubeContext
    cluster: Cluster
    names: Names

    @property
    def target(self) -> Any:
        """Where the forward leads."""
        from airflow_deployer.port_forward import Target

        return Target(
            context=self.context.name,
            namespace=self.names.namespace,
            name=self.names.name,
            port=airflow_settings.API_PORT,
            kubeconfig=self.context.kubeconfig,
        )


def connect(settings: Settings) -> Session:
    """Choose the context, guard it, and load its credentials; nothing is asked of the API server yet."""
    context = kube_context.resolve(settings.context)
    kube_context.guard(context, on_purpose=settings.context_on_purpose)
    names = Names(settings.name, settings.namespace or context.namespace or "default")
    return Session(settings, context, Cluster(context), names)


def local_hosting(session: Session) -> tuple[LocalRegistryHosting | None, str | None]:
    """What the cluster announces of its registry (KEP-1755), trusted for local contexts only.

    The annotation says that the registry holds the public images as well, as our own cluster's does.
    """
    if not session.context.looks_local:
        return None, None
    try:
        announced = session.cluster.get(CONFIG_MAP, "kube-public", "local-registry-hosting")
    except ApiError:
        return None, None
    text = ((announced or {}).get("data") or {}).get("localRegistryHosting.v1")
    if announced is None or text is None:
        return None, None
    mirror = (announced["metadata"].get("annotations") or {}).get(MIRROR_ANNOTATION)
    return parse_local_registry_hosting(text), mirror


def require_hot(settings: Settings, doing: str) -> None:
    """Make sure that this Airflow takes DAG content while it runs.

    Args:
        doing: the command, as it follows "deployer" on the command line.

    Raises:
        ConfigurationError: it does not.
    """
    if not settings.airflow.profile.hot:
        raise ConfigurationError(
            f"deployer {doing} is not for Airflow {settings.airflow.version}, which takes no content while it runs.",
            hint="deployer up   brings every change, with a new pod",
        )


def deployed_image(live: Object | None) -> Image | None:
    """The DAG image that a StatefulSet names; None where there is none, or it is not of our making."""
    annotations = ((live or {}).get("metadata") or {}).get("annotations") or {}
    if live is None or not {manifests.CONTENT_ID, manifests.IMAGE_ID} <= set(annotations):
        return None
    template = live["spec"]["template"]
    airflow: Object = next((item for item in template["spec"]["containers"] if item["name"] == "airflow"), {})
    variables = {item["name"]: item.get("value", "") for item in airflow.get("env", [])}
    return Image(
        airflow.get("image", ""),
        annotations[manifests.CONTENT_ID],
        annotations[manifests.IMAGE_ID],
        (template["metadata"].get("annotations") or {}).get(manifests.RUNTIME_ID, ""),
        int(variables.get(manifests.DEPLOYED_AT) or 0),
    )


def live_content(session: Session) -> Object | None:
    """What the supervisor says of the DAG content, where the API server lets us ask it directly."""
    return session.cluster.pod_document(
        session.names.namespace, session.names.pod, manifests.PROBE_PORT, manifests.CONTENT_PATH
    )


def running_forward(session: Session) -> str | None:
    """The URL of the forward that runs in the background, if one does."""
    from airflow_deployer import background_forward

    state = background_forward.find(session.target)
    return state.url if state else None


@contextmanager
def airflow_url(session: Session, url: str | None) -> Iterator[str]:
    """The URL of a forward that runs, or of one for the time of the block."""
    if url is not None:
        yield url
        return
    from airflow_deployer.port_forward import forwarded

    with forwarded(session.target) as port:
        yield f"http://127.0.0.1:{port}"
