"""Dynamic volumes of the native cluster: a directory and a `local` PersistentVolume for every claim of our class.

The controller manager's own hostpath provisioner makes directories in /tmp that only root may write; a volume of
type `local` instead lets the kubelet apply `fsGroup`. Runs as a process of its own
(`python -m airflow_deployer.local_cluster.native.provisioner STATE_DIRECTORY`).

Binding waits for the first consumer, as in kind and with the usual cloud classes: what works here works there.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

from .api import Api, ApiError
from .layout import NODE_NAME, Layout

PROVISIONER = "airflow-deployer/local-directory"
STORAGE_CLASS = "standard"
_CLAIMS = "/api/v1/persistentvolumeclaims"
_VOLUMES = "/api/v1/persistentvolumes"
_WATCH_SECONDS = 240
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def make_storage_class() -> dict[str, Any]:
    """The cluster's default StorageClass."""
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {
            "name": STORAGE_CLASS,
            "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
        },
        "provisioner": PROVISIONER,
        "reclaimPolicy": "Delete",
        "volumeBindingMode": "WaitForFirstConsumer",
        "allowVolumeExpansion": True,
    }


def directory_name(claim: dict[str, Any]) -> str:
    """The directory of a claim's volume: readable for a person, unique by the claim's uid."""
    metadata = claim["metadata"]
    return f"{metadata['namespace']}_{metadata['name']}_{metadata['uid']}"


def needs_volume(claim: dict[str, Any]) -> bool:
    """Whether the volume controller has asked us for the claim's volume and the scheduler has chosen our node."""
    annotations = claim["metadata"].get("annotations", {})
    return (
        annotations.get("volume.beta.kubernetes.io/storage-provisioner") == PROVISIONER
        and annotations.get("volume.kubernetes.io/selected-node") == NODE_NAME
        and not claim["spec"].get("volumeName")
        and "deletionTimestamp" not in claim["metadata"]
    )


def make_volume(claim: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The PersistentVolume for a claim: bound to it from the start, and to our node."""
    metadata = claim["metadata"]
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {
            "name": f"pvc-{metadata['uid']}",
            "annotations": {"pv.kubernetes.io/provisioned-by": PROVISIONER},
        },
        "spec": {
            "capacity": {"storage": claim["spec"]["resources"]["requests"]["storage"]},
            "accessModes": claim["spec"]["accessModes"],
            "volumeMode": "Filesystem",
            "persistentVolumeReclaimPolicy": "Delete",
            "storageClassName": claim["spec"]["storageClassName"],
            "claimRef": {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "namespace": metadata["namespace"],
                "name": metadata["name"],
                "uid": metadata["uid"],
            },
            "local": {"path": str(directory)},
            "nodeAffinity": {
                "required": {
                    "nodeSelectorTerms": [
                        {
                            "matchExpressions": [
                                {"key": "kubernetes.io/hostname", "operator": "In", "values": [NODE_NAME]}
                            ]
                        }
                    ]
                }
            },
        },
    }


def is_ours(volume: dict[str, Any]) -> bool:
    """Whether we made the volume."""
    annotations = volume["metadata"].get("annotations", {})
    return bool(annotations.get("pv.kubernetes.io/provisioned-by") == PROVISIONER)


def is_discarded(volume: dict[str, Any]) -> bool:
    """Whether the volume's claim is gone and the volume is to go with it."""
    policy = volume["spec"].get("persistentVolumeReclaimPolicy")
    return is_ours(volume) and volume.get("status", {}).get("phase") == "Released" and policy == "Delete"


def quantity(text: str) -> int:
    """Bytes of a storage quantity such as `5Gi` (Kubernetes' resource.Quantity with the usual units)."""
    number = text.rstrip("KMGTkiePE") if not text[-1:].isdigit() else text
    unit = text[len(number) :]
    if unit not in _UNITS:
        raise ValueError(f"unknown unit in the quantity {text}")
    return int(float(number) * _UNITS[unit])


class Provisioner:
    """Brings volumes and directories in line with the claims, again and again."""

    def __init__(self, api: Api, volumes: Path) -> None:
        self._api = api
        self._volumes = volumes

    def reconcile(self) -> None:
        """One pass over all claims and volumes.

        Raises:
            ApiError: the API cannot be reached.
        """
        claims = self._api.call("GET", _CLAIMS)["items"]
        volumes = {volume["metadata"]["name"]: volume for volume in self._api.call("GET", _VOLUMES)["items"]}
        for claim in claims:
            with self._reporting(f"claim {claim['metadata']['namespace']}/{claim['metadata']['name']}"):
                if needs_volume(claim):
                    self._provide(claim)
                elif claim["spec"].get("volumeName") in volumes:
                    self._grow(claim, volumes[claim["spec"]["volumeName"]])
        for volume in volumes.values():
            if is_discarded(volume):
                with self._reporting(f"volume {volume['metadata']['name']}"):
                    self._discard(volume)

    @contextlib.contextmanager
    def _reporting(self, subject: str) -> Any:
        # One claim that cannot be served must not keep the others waiting.
        try:
            yield
        except ApiError as error:
            if error.status == 0:
                raise
            _say(f"{subject}: {error.message}")
        except (OSError, ValueError, KeyError) as error:
            _say(f"{subject}: {error!r}")

    def _provide(self, claim: dict[str, Any]) -> None:
        if claim["spec"].get("volumeMode", "Filesystem") != "Filesystem":
            raise ValueError("block volumes are not supported")
        directory = self._volumes / directory_name(claim)
        directory.mkdir(exist_ok=True)
        # Whoever the pod runs as may write; nobody else gets here, the state directory is root's alone.
        directory.chmod(0o777)
        try:
            self._api.call("POST", _VOLUMES, make_volume(claim, directory))
        except ApiError as error:
            if error.status != 409:
                raise
            return
        _say(f"made {directory.name}")

    def _grow(self, claim: dict[str, Any], volume: dict[str, Any]) -> None:
        # A directory has no size of its own: growing it is a matter of the records.
        wanted = claim["spec"]["resources"]["requests"]["storage"]
        if not is_ours(volume) or quantity(wanted) <= quantity(
            claim.get("status", {}).get("capacity", {}).get("storage", wanted)
        ):
            return
        merge = "application/merge-patch+json"
        metadata = claim["metadata"]
        path = f"/api/v1/namespaces/{metadata['namespace']}/persistentvolumeclaims/{metadata['name']}/status"
        capacity = {"capacity": {"storage": wanted}}
        self._api.call("PATCH", f"{_VOLUMES}/{volume['metadata']['name']}", {"spec": capacity}, content_type=merge)
        self._api.call("PATCH", path, {"status": {**capacity, "conditions": None}}, content_type=merge)
        _say(f"grew {volume['metadata']['name']} to {wanted}")

    def _discard(self, volume: dict[str, Any]) -> None:
        directory = Path(volume["spec"]["local"]["path"])
        if directory.parent == self._volumes and directory.exists():
            shutil.rmtree(directory)
        try:
            self._api.call("DELETE", f"{_VOLUMES}/{volume['metadata']['name']}")
        except ApiError as error:
            if error.status != 404:
                raise
        _say(f"removed {directory.name}")


def _say(message: str) -> None:
    sys.stdout.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {message}\n")
    sys.stdout.flush()


def _follow(api: Api, path: str, changed: threading.Event) -> None:
    while True:
        try:
            for _ in api.watch(path, seconds=_WATCH_SECONDS):
                changed.set()
        except ApiError as error:
            _say(error.message)
        # What changed between two watches is seen by the pass that this asks for.
        time.sleep(1)
        changed.set()


def main(state: Path) -> None:
    """Serve until ended."""
    layout = Layout(state=state)
    api = Api(layout, "provisioner")
    changed = threading.Event()
    changed.set()
    for path in (_CLAIMS, _VOLUMES):
        threading.Thread(target=_follow, args=(api, path, changed), daemon=True).start()
    provisioner = Provisioner(api, layout.volumes)
    while True:
        # The time-out repeats what failed, such as a directory that was still being written to.
        changed.wait(timeout=30)
        changed.clear()
        try:
            provisioner.reconcile()
        except ApiError as error:
            _say(error.message)
            time.sleep(1)
            changed.set()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
