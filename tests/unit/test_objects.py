"""When an object counts as unchanged, when a pod counts as stuck, and how a conflict is told."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from airflow_deployer import objects
from airflow_deployer.cluster import ApiError

LIVE: dict[str, Any] = {
    "metadata": {
        "name": "airflow",
        "resourceVersion": "7",
        "generation": 2,
        "managedFields": [{}],
        "labels": {"a": "b"},
    },
    "spec": {"replicas": 1},
    "status": {"readyReplicas": 1},
}


def test_what_the_server_keeps_is_no_difference() -> None:
    planned = copy.deepcopy(LIVE)
    planned["metadata"] |= {"resourceVersion": "8", "generation": 3, "managedFields": []}
    planned["status"] = {}
    assert objects.same(LIVE, planned)


@pytest.mark.parametrize("path", [("spec", "replicas"), ("metadata", "labels")])
def test_what_we_set_is_a_difference(path: tuple[str, str]) -> None:
    planned = copy.deepcopy(LIVE)
    planned[path[0]][path[1]] = None
    assert not objects.same(LIVE, planned)


@pytest.mark.parametrize(
    ("status", "stuck"),
    [
        ({"containerStatuses": [{"state": {"waiting": {"reason": "CrashLoopBackOff"}}}]}, True),
        ({"containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff"}}}]}, True),
        ({"containerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull"}}}]}, True),
        ({"containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]}, False),
        ({"containerStatuses": [{"state": {"running": {}}}]}, False),
        ({"phase": "Failed"}, True),
        ({}, False),
    ],
)
def test_a_pod_that_only_waits_out_a_back_off_is_stuck(status: dict[str, Any], stuck: bool) -> None:
    assert objects._stuck({"status": status}) is stuck


def test_a_conflict_names_the_manager_and_the_field() -> None:
    cause = {"field": ".spec.replicas", "message": 'conflict with "kubectl-scale" using apps/v1'}
    error = ApiError("conflict", status=409, reason="Conflict", body={"details": {"causes": [cause]}})
    told = objects._conflict("StatefulSet", "airflow", error)
    assert told.details == (".spec.replicas is held by kubectl-scale",)
    assert "--force-conflicts" in told.hint
