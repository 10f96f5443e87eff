"""The Kubernetes objects of a Deployment, made by pure functions: values in, plain dicts in the API's shape out.

Every field that server-side apply keeps is written in full and in the API's normal form (an explicit `protocol`, an
octal mode as a number), so that applying the same values twice changes nothing.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from airflow_deployer import __version__, airflow_settings, credentials, database_image
from airflow_deployer.airflow_profiles import environment
from airflow_deployer.config import Amounts, ContainerResources, Settings

Object = dict[str, Any]

MANAGED_BY = "airflow-deployer"
CONTENT_ID = "airflow-deployer/content-id"
IMAGE_ID = "airflow-deployer/image-id"
VERSION = "airflow-deployer/version"
AIRFLOW_VERSION = "airflow-deployer/airflow-version"
"""Annotation of the volume claim: the Airflow version that the database on it belongs to."""

RUNTIME_ID = "airflow-deployer/runtime-id"
"""Annotation of the pod template: the id of everything in the image that is not DAG content."""

# Of the container `airflow`; these and its image are all that a change of DAG content alone changes in the template.
IMAGE_CONTENT_ID = "AIRFLOW_DEPLOYER_CONTENT_ID"
DEPLOYED_AT = "AIRFLOW_DEPLOYER_DEPLOYED_AT"

AIRFLOW_UID = 50000
POSTGRES_UID = 999
API_PORT = airflow_settings.API_PORT
PROBE_PORT = 8081
CONTENT_PATH = "/content"
"""At the probe port: the supervisor's answer to what DAG content is live."""

# On top of `timeouts.drain`: for the API server's own stop and the database's last checkpoint.
_STOP_SECONDS = 60

RUN = "/run/airflow-deployer"
_VOLUME = "/var/lib/postgresql/volume"

# One lock on the volume, inherited by every backend: while any process of an earlier Postgres lives, even one whose pod
# was force-deleted, the next one waits instead of starting on the same data directory.
_POSTGRES = (
    f"exec 9>{_VOLUME}/.lock\n"
    "flock --nonblock 9 || { echo 'waiting: another Postgres still holds the volume'; flock 9; }\n"
    # Postgres refuses another major version's directory too, but nobody reads its words in the pod's status.
    'major=$(postgres --version | sed "s/[^0-9]*\\([0-9]*\\).*/\\1/")\n'
    'data=$(cat "$PGDATA/PG_VERSION" 2>/dev/null || echo "$major")\n'
    'if [ "${data%%.*}" != "$major" ]; then\n'
    '  echo "The volume holds data of PostgreSQL $data, which PostgreSQL $major cannot read; nothing was changed."'
    " | tee /dev/termination-log\n"
    "  exit 1\n"
    "fi\n"
    "exec docker-entrypoint.sh postgres -c listen_addresses=127.0.0.1\n"
)

# Both containers get SIGTERM in any order. The supervisor holds this lock for as long as it lives, so Postgres stays
# until Airflow has stopped, or has died in whatever way.
_POSTGRES_PRE_STOP = f"flock --timeout SECONDS {RUN}/supervisor.lock true; true"


@dataclass(frozen=True)
class Names:
    """What the objects of the Deployment `name` in `namespace` are called."""

    name: str
    namespace: str

    @property
    def pod(self) -> str:
        """The one pod of the StatefulSet."""
        return f"{self.name}-0"

    @property
    def claim(self) -> str:
        """The volume claim; one of its own, because a claim template could not grow."""
        return f"{self.name}-data"

    @property
    def secret(self) -> str:
        """The generated secrets."""
        return f"{self.name}-secrets"

    @property
    def pull_secret(self) -> str:
        """The registry login that we make."""
        return f"{self.name}-registry"

    @property
    def lease(self) -> str:
        """The lock."""
        return f"{MANAGED_BY}-{self.name}"

    @property
    def dev_lease(self) -> str:
        """The lock of `deployer dev`; with a dot, which no name of another deployment can have."""
        return f"{self.lease}.dev"

    @property
    def pull_pod(self) -> str:
        """The short-lived pod that has the node pull an image."""
        return f"{self.name}-image-pull"

    @property
    def labels(self) -> dict[str, str]:
        """The recommended labels (https://kubernetes.io/docs/concepts/overview/working-with-objects/common-labels/)."""
        return {
            "app.kubernetes.io/name": "airflow",
            "app.kubernetes.io/instance": self.name,
            "app.kubernetes.io/managed-by": MANAGED_BY,
        }

    @property
    def selector(self) -> dict[str, str]:
        """The labels that choose the pod; immutable in a StatefulSet."""
        return {"app.kubernetes.io/name": "airflow", "app.kubernetes.io/instance": self.name}


@dataclass(frozen=True)
class Image:
    """The DAG image as the pod names it, and what is in it.

    Attributes:
        reference: `registry/repository@sha256:...` as the node pulls it.
        content_id: the id of the DAG content.
        image_id: the id of everything that the image was built from.
        runtime_id: the id of everything in it that is not DAG content; the pod is replaced when it changes.
        deployed_at: seconds since the epoch by the API server's clock when `up` deployed it; it grows, so that the
            pod can tell a newer image from a restart with an older one.
    """

    reference: str
    content_id: str
    image_id: str
    runtime_id: str = ""
    deployed_at: int = 0


def grace_seconds(pod: Object) -> int:
    """How long the pod may take to stop (`spec.terminationGracePeriodSeconds`)."""
    return int(pod["spec"].get("terminationGracePeriodSeconds") or 30)


def make_namespace(namespace: str) -> Object:
    """The Namespace; created when missing, never changed and never deleted."""
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": namespace, "labels": {"app.kubernetes.io/managed-by": MANAGED_BY}},
    }


def make_secret(names: Names, values: dict[str, str]) -> Object:
    """The Secret with the generated values; create-only.

    Args:
        values: plain text by key, as `credentials.new` makes them.
    """
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": _metadata(names, names.secret),
        "type": "Opaque",
        "data": credentials.encode(values),
    }


def make_pull_secret(names: Names, docker_config_json: str) -> Object:
    """The login to the registry, as kubelets read it.

    Args:
        docker_config_json: base64 of a Docker `config.json` with one registry.
    """
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": _metadata(names, names.pull_secret),
        "type": "kubernetes.io/dockerconfigjson",
        "data": {".dockerconfigjson": docker_config_json},
    }


def make_claim(names: Names, settings: Settings, *, postgres_image: str, airflow_version: str) -> Object:
    """The volume claim that holds the database and the task logs.

    Args:
        postgres_image: the database's image, whose major version the data has.
        airflow_version: the Airflow version that the database belongs to.
    """
    metadata = _metadata(names, names.claim)
    metadata["annotations"] = {AIRFLOW_VERSION: airflow_version}
    if (major := database_image.major_version(postgres_image)) is not None:
        metadata["annotations"][database_image.POSTGRES_MAJOR] = str(major)
    spec: Object = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": settings.storage.size}},
    }
    if settings.storage.class_ is not None:
        spec["storageClassName"] = settings.storage.class_
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": metadata,
        "spec": spec,
    }


def make_service(names: Names) -> Object:
    """The headless Service that governs the StatefulSet and names Airflow inside the cluster."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(names, names.name),
        "spec": {
            "clusterIP": "None",
            "selector": names.selector,
            "ports": [{"name": "http", "port": API_PORT, "protocol": "TCP", "targetPort": "http"}],
        },
    }


def make_stateful_set(
    names: Names, settings: Settings, image: Image, *, postgres_image: str, pull_secret: str | None
) -> Object:
    """The StatefulSet of one pod with two containers.

    Args:
        postgres_image: the reference of the database's image as the node pulls it.
        pull_secret: the name of the registry login to use, if one is needed.
    """
    drain = int(settings.timeouts.drain)
    pod_spec: Object = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": drain + _STOP_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "fsGroup": AIRFLOW_UID,
            # Walking a large volume at every start would be slow, and would open Postgres' files to the group.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            _postgres(postgres_image, settings.resources.postgres, wait=drain + _STOP_SECONDS - 20),
            _airflow(image, settings),
        ],
        "volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": names.claim}},
            {"name": "run", "emptyDir": {}},
            {"name": "postgres-run", "emptyDir": {}},
            {"name": "postgres-tmp", "emptyDir": {}},
            _secret_volume("airflow-secrets", names.secret, credentials.AIRFLOW_KEYS),
            _secret_volume("postgres-secrets", names.secret, credentials.POSTGRES_KEYS),
        ],
    }
    if pull_secret is not None:
        pod_spec["imagePullSecrets"] = [{"name": pull_secret}]
    metadata = _metadata(names, names.name)
    metadata["labels"]["app.kubernetes.io/version"] = settings.airflow.version
    metadata["annotations"] = {CONTENT_ID: image.content_id, IMAGE_ID: image.image_id, VERSION: __version__}
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": metadata,
        "spec": {
            "replicas": 1,
            "serviceName": names.name,
            "selector": {"matchLabels": names.selector},
            # We decide when the pod is replaced: Kubernetes neither waits for running tasks nor replaces a broken pod.
            "updateStrategy": {"type": "OnDelete"},
            "template": {
                "metadata": {
                    "labels": names.labels | {"app.kubernetes.io/version": settings.airflow.version},
                    "annotations": {
                        "kubectl.kubernetes.io/default-container": "airflow",
                        RUNTIME_ID: image.runtime_id,
                    },
                },
                "spec": pod_spec,
            },
        },
    }


def make_pull_pod(names: Names, images: list[str], *, node: str, pull_secrets: list[Object]) -> Object:
    """A pod that does nothing but need the images, on that node.

    Args:
        node: its name; the scheduler is not asked.
        pull_secrets: `spec.imagePullSecrets` of the deployment's pod.
    """
    labels = names.labels | {"app.kubernetes.io/name": "image-pull"}
    spec: Object = {
        "nodeName": node,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "restartPolicy": "Never",
        "activeDeadlineSeconds": 600,
        "terminationGracePeriodSeconds": 0,
        "tolerations": [{"operator": "Exists"}],
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": f"pull-{number}",
                "image": image,
                "imagePullPolicy": "IfNotPresent",
                "command": ["true"],
                "securityContext": _restricted(AIRFLOW_UID),
                "resources": {
                    "requests": {"cpu": "1m", "memory": "16Mi"},
                    "limits": {"cpu": "1", "memory": "64Mi"},
                },
            }
            for number, image in enumerate(images)
        ],
    }
    if pull_secrets:
        spec["imagePullSecrets"] = pull_secrets
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": names.pull_pod, "namespace": names.namespace, "labels": labels},
        "spec": spec,
    }


def same_but_for_content(one: Object, other: Object) -> bool:
    """Whether two pod templates differ in nothing but the DAG content: what a running pod can take in."""
    return _without_content(one) == _without_content(other)


def _without_content(template: Object) -> Object:
    stripped = copy.deepcopy(template)
    # A ControllerRevision holds the template as a patch.
    stripped.pop("$patch", None)
    for container in stripped["spec"]["containers"]:
        if container["name"] == "airflow":
            container.pop("image", None)
            container["env"] = [
                item for item in container.get("env", []) if item["name"] not in (IMAGE_CONTENT_ID, DEPLOYED_AT)
            ]
    return stripped


def _postgres(image: str, resources: ContainerResources, *, wait: int) -> Object:
    pre_stop = _POSTGRES_PRE_STOP.replace("SECONDS", str(wait))
    data = f"{_VOLUME}/data"
    ready = ["pg_isready", "--quiet", "--host=127.0.0.1", f"--username={credentials.POSTGRES_USER}"]
    container = {
        "name": "postgres",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["bash", "-c", _POSTGRES],
        "env": _env(
            {
                "POSTGRES_USER": credentials.POSTGRES_USER,
                "POSTGRES_DB": credentials.POSTGRES_DATABASE,
                "POSTGRES_PASSWORD_FILE": f"{airflow_settings.SECRETS}/{credentials.POSTGRES_PASSWORD}",
                "POSTGRES_INITDB_ARGS": "--data-checksums --auth-host=scram-sha-256",
                "PGDATA": data,
            }
        ),
        "lifecycle": {"preStop": {"exec": {"command": ["bash", "-c", pre_stop]}}},
        "readinessProbe": {
            "exec": {"command": ready},
            "periodSeconds": 10,
            "timeoutSeconds": 5,
            "failureThreshold": 3,
            "successThreshold": 1,
        },
        "securityContext": _restricted(POSTGRES_UID) | {"readOnlyRootFilesystem": True},
        "volumeMounts": [
            {"name": "data", "mountPath": _VOLUME, "subPath": "postgres"},
            {"name": "run", "mountPath": RUN},
            {"name": "postgres-run", "mountPath": "/var/run/postgresql"},
            {"name": "postgres-tmp", "mountPath": "/tmp"},  # noqa: S108 - a mount of its own, not the host's
            {"name": "postgres-secrets", "mountPath": airflow_settings.SECRETS, "readOnly": True},
        ],
    }
    return container | _resources(resources)


def _airflow(image: Image, settings: Settings) -> Object:
    variables = environment(settings.airflow.profile, settings.airflow.environment()) | {
        "AIRFLOW_DEPLOYER_STOP_SECONDS": str(int(settings.timeouts.drain)),
        IMAGE_CONTENT_ID: image.content_id,
        DEPLOYED_AT: str(image.deployed_at),
    }
    container = {
        "name": "airflow",
        "image": image.reference,
        "imagePullPolicy": "IfNotPresent",
        "env": _env(variables),
        "ports": [
            {"name": "http", "containerPort": API_PORT, "protocol": "TCP"},
            {"name": "probes", "containerPort": PROBE_PORT, "protocol": "TCP"},
        ],
        "readinessProbe": _probe("/readyz", period=1, failures=5),
        # Lenient: a restart interrupts tasks, so it must be the last resort.
        "livenessProbe": _probe("/livez", period=10, failures=6, timeout=8),
        "securityContext": _restricted(AIRFLOW_UID),
        "volumeMounts": [
            {"name": "data", "mountPath": f"{airflow_settings.HOME}/logs", "subPath": "logs"},
            {"name": "data", "mountPath": f"{airflow_settings.HOME}/content", "subPath": "content"},
            {"name": "run", "mountPath": RUN},
            {"name": "airflow-secrets", "mountPath": airflow_settings.SECRETS, "readOnly": True},
        ],
    }
    return container | _resources(settings.resources.airflow)


def _probe(path: str, *, period: int, failures: int, timeout: int = 5) -> Object:
    return {
        "httpGet": {"path": path, "port": "probes", "scheme": "HTTP"},
        "periodSeconds": period,
        "timeoutSeconds": timeout,
        "failureThreshold": failures,
        "successThreshold": 1,
    }


def _restricted(user: int) -> Object:
    """What the Pod Security Standard `restricted` asks of a container."""
    return {
        "runAsUser": user,
        "runAsGroup": user,
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }


def _secret_volume(name: str, secret: str, keys: tuple[str, ...]) -> Object:
    return {
        "name": name,
        "secret": {
            "secretName": secret,
            "defaultMode": 0o440,
            "items": [{"key": key, "path": key} for key in keys],
        },
    }


def _resources(resources: ContainerResources) -> Object:
    amounts = {"requests": _amounts(resources.requests), "limits": _amounts(resources.limits)}
    return {"resources": {kind: values for kind, values in amounts.items() if values}}


def _amounts(amounts: Amounts) -> dict[str, str]:
    values = {"cpu": amounts.cpu, "memory": amounts.memory}
    return {name: value for name, value in values.items() if value is not None}


def _env(variables: dict[str, str]) -> list[Object]:
    return [{"name": name, "value": value} for name, value in sorted(variables.items())]


def _metadata(names: Names, name: str) -> Object:
    return {"name": name, "namespace": names.namespace, "labels": names.labels}
