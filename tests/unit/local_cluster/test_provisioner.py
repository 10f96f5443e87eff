"""The volume provisioner's decisions, and its pass over claims and volumes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from airflow_deployer.local_cluster.native.api import ApiError
from airflow_deployer.local_cluster.native.provisioner import (
    PROVISIONER,
    Provisioner,
    is_discarded,
    make_storage_class,
    make_volume,
    needs_volume,
    quantity,
)

CLAIM: dict[str, Any] = {
    "metadata": {
        "namespace": "default",
        "name": "airflow-data",
        "uid": "1234",
        "annotations": {
            "volume.beta.kubernetes.io/storage-provisioner": PROVISIONER,
            "volume.kubernetes.io/selected-node": "airflow-native",
        },
    },
    "spec": {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "5Gi"}},
        "storageClassName": "standard",
        "volumeMode": "Filesystem",
    },
    "status": {"phase": "Pending"},
}


def bound_claim(requested: str, capacity: str) -> dict[str, Any]:
    claim = copy.deepcopy(CLAIM)
    claim["spec"]["volumeName"] = "pvc-1234"
    claim["spec"]["resources"]["requests"]["storage"] = requested
    claim["status"] = {"phase": "Bound", "capacity": {"storage": capacity}}
    return claim


class ApiAnswers:
    """Stands for the API: two collections, what was sent to it, and statuses to refuse with."""

    def __init__(self, claims: list[dict[str, Any]], volumes: list[dict[str, Any]], refuse: dict[str, int]) -> None:
        self.collections = {
            "/api/v1/persistentvolumeclaims": claims,
            "/api/v1/persistentvolumes": volumes,
        }
        self.refuse = refuse
        self.sent: list[tuple[str, str, Any]] = []

    def call(self, method: str, path: str, body: Any = None, *, content_type: str = "") -> dict[str, Any]:
        if method == "GET":
            return {"items": self.collections[path]}
        if method in self.refuse:
            raise ApiError(f"{method} {path} failed", self.refuse[method])
        self.sent.append((method, path, body))
        return {}


def reconcile(
    volumes_directory: Path,
    claims: list[dict[str, Any]] | None = None,
    volumes: list[dict[str, Any]] | None = None,
    refuse: dict[str, int] | None = None,
) -> list[tuple[str, str, Any]]:
    api = ApiAnswers(claims or [], volumes or [], refuse or {})
    Provisioner(api, volumes_directory).reconcile()  # type: ignore[arg-type]
    return api.sent


def test_the_storage_class_is_the_default_and_grows() -> None:
    storage_class = make_storage_class()
    assert storage_class["metadata"]["annotations"] == {"storageclass.kubernetes.io/is-default-class": "true"}
    assert storage_class["provisioner"] == PROVISIONER
    assert storage_class["allowVolumeExpansion"] is True
    assert storage_class["reclaimPolicy"] == "Delete"


def test_make_volume() -> None:
    assert make_volume(CLAIM, Path("/v/x")) == {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": "pvc-1234", "annotations": {"pv.kubernetes.io/provisioned-by": PROVISIONER}},
        "spec": {
            "capacity": {"storage": "5Gi"},
            "accessModes": ["ReadWriteOnce"],
            "volumeMode": "Filesystem",
            "persistentVolumeReclaimPolicy": "Delete",
            "storageClassName": "standard",
            "claimRef": {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "namespace": "default",
                "name": "airflow-data",
                "uid": "1234",
            },
            "local": {"path": "/v/x"},
            "nodeAffinity": {
                "required": {
                    "nodeSelectorTerms": [
                        {
                            "matchExpressions": [
                                {"key": "kubernetes.io/hostname", "operator": "In", "values": ["airflow-native"]}
                            ]
                        }
                    ]
                }
            },
        },
    }


def test_only_a_claim_of_ours_with_a_chosen_node_needs_a_volume() -> None:
    assert needs_volume(CLAIM)
    for change in (
        {"metadata": {**CLAIM["metadata"], "annotations": {}}},
        {"metadata": {**CLAIM["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}},
        {"spec": {**CLAIM["spec"], "volumeName": "pvc-1"}},
    ):
        assert not needs_volume(CLAIM | change)
    unscheduled = copy.deepcopy(CLAIM)
    del unscheduled["metadata"]["annotations"]["volume.kubernetes.io/selected-node"]
    assert not needs_volume(unscheduled)


def test_only_a_released_volume_of_ours_under_delete_is_discarded() -> None:
    volume = make_volume(CLAIM, Path("/v/x")) | {"status": {"phase": "Released"}}
    assert is_discarded(volume)
    assert not is_discarded(volume | {"status": {"phase": "Bound"}})
    kept = copy.deepcopy(volume)
    kept["spec"]["persistentVolumeReclaimPolicy"] = "Retain"
    assert not is_discarded(kept)
    foreign = copy.deepcopy(volume)
    foreign["metadata"]["annotations"] = {}
    assert not is_discarded(foreign)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5Gi", 5 * 2**30),
        ("1.5Gi", 3 * 2**29),
        ("500M", 500_000_000),
        ("1024", 1024),
        ("2k", 2000),
        ("1e3", 1000),
        ("1Ti", 2**40),
    ],
)
def test_quantity(text: str, size: int) -> None:
    assert quantity(text) == size


@pytest.mark.parametrize("text", ["5Xi", "Gi", ""])
def test_a_quantity_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        quantity(text)


def test_a_claim_gets_a_directory_that_any_pod_may_write_and_a_volume(tmp_path: Path) -> None:
    sent = reconcile(tmp_path, claims=[CLAIM])
    directory = tmp_path / "default_airflow-data_1234"
    assert directory.stat().st_mode & 0o777 == 0o777
    assert sent == [("POST", "/api/v1/persistentvolumes", make_volume(CLAIM, directory))]


def test_a_volume_that_is_there_already_is_no_failure(tmp_path: Path) -> None:
    assert reconcile(tmp_path, claims=[CLAIM], refuse={"POST": 409}) == []


def test_one_claim_that_is_refused_does_not_keep_the_next_from_its_volume(tmp_path: Path) -> None:
    block = copy.deepcopy(CLAIM)
    block["spec"]["volumeMode"] = "Block"
    block["metadata"]["uid"] = "5678"
    assert len(reconcile(tmp_path, claims=[block, CLAIM])) == 1


def test_an_unreachable_api_ends_the_pass(tmp_path: Path) -> None:
    with pytest.raises(ApiError):
        reconcile(tmp_path, claims=[CLAIM], refuse={"POST": 0})


def test_a_claim_that_asks_for_more_gets_it(tmp_path: Path) -> None:
    volume = make_volume(CLAIM, tmp_path / "x")
    assert reconcile(tmp_path, claims=[bound_claim("5Gi", "5Gi")], volumes=[volume]) == []
    sent = reconcile(tmp_path, claims=[bound_claim("8Gi", "5Gi")], volumes=[volume])
    assert [(method, path.rsplit("/", 1)[1]) for method, path, _ in sent] == [
        ("PATCH", "pvc-1234"),
        ("PATCH", "status"),
    ]
    assert sent[0][2] == {"spec": {"capacity": {"storage": "8Gi"}}}
    assert sent[1][2]["status"]["capacity"] == {"storage": "8Gi"}


def test_a_released_volume_goes_with_its_data(tmp_path: Path) -> None:
    directory = tmp_path / "default_airflow-data_1234"
    (directory / "postgres").mkdir(parents=True)
    volume = make_volume(CLAIM, directory) | {"status": {"phase": "Released"}}
    assert reconcile(tmp_path, volumes=[volume]) == [("DELETE", "/api/v1/persistentvolumes/pvc-1234", None)]
    assert not directory.exists()


def test_a_directory_that_is_not_below_ours_is_never_removed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    volume = make_volume(CLAIM, elsewhere) | {"status": {"phase": "Released"}}
    reconcile(tmp_path / "volumes", volumes=[volume])
    assert elsewhere.exists()
