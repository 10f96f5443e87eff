"""The diagnosis table: what Kubernetes reports, and the cause, the log and the grace that we make of it."""

from __future__ import annotations

from typing import Any

import pytest

from airflow_deployer import diagnosis
from airflow_deployer.diagnosis import NEVER, diagnose

Object = dict[str, Any]


def pod(
    *containers: Object,
    ready: bool = False,
    phase: str = "Running",
    conditions: list[Object] | None = None,
    **status: Any,
) -> Object:
    return {
        "metadata": {"name": "airflow-0", "uid": "u1"},
        "status": {
            "phase": phase,
            "conditions": conditions or [{"type": "Ready", "status": "True" if ready else "False"}],
            "containerStatuses": list(containers),
            **status,
        },
    }


def container(
    name: str, state: Object, *, last: Object | None = None, restarts: int = 0, ready: bool = False
) -> Object:
    return {
        "name": name,
        "image": f"registry/{name}:1",
        "state": state,
        "lastState": last or {},
        "restartCount": restarts,
        "ready": ready,
    }


def waiting(reason: str, message: str = "") -> Object:
    return {"waiting": {"reason": reason, "message": message}}


def terminated(code: int, reason: str = "Error") -> Object:
    return {"terminated": {"exitCode": code, "reason": reason}}


RUNNING: Object = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}


def event(reason: str, message: str, *, kind: str = "Pod", name: str = "airflow-0", uid: str = "u1") -> Object:
    return {
        "type": "Warning",
        "reason": reason,
        "message": message,
        "lastTimestamp": "2026-01-01T00:00:00Z",
        "involvedObject": {"kind": kind, "name": name, "uid": uid},
    }


def test_ready() -> None:
    assert diagnose(pod(container("airflow", RUNNING, ready=True), ready=True)).ready


def test_no_pod_yet() -> None:
    found = diagnose(None, stateful_set="airflow")
    assert found.fatal_after == NEVER
    assert "airflow has not created its pod" in found.summary


def test_a_policy_that_refuses_the_pod() -> None:
    refused = event("FailedCreate", "pods is forbidden: violates PodSecurity", kind="StatefulSet", name="airflow")
    found = diagnose(None, events=[refused], stateful_set="airflow")
    assert found.reason == "FailedCreate"
    assert "PodSecurity" in found.summary


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ('rpc error: code = NotFound desc = failed to resolve "r/x": not found', "ImageNotFound"),
        ("rpc error: pull access denied, repository does not exist", "ImageUnauthorized"),
        ("rpc error: unexpected status code 401 Unauthorized", "ImageUnauthorized"),
        ("rpc error: x509: certificate signed by unknown authority", "ImageUntrusted"),
        ("rpc error: http: server gave HTTP response to HTTPS client", "ImageUntrusted"),
        ("rpc error: dial tcp 10.0.0.1:5000: connect: connection refused", "ErrImagePull"),
    ],
)
def test_why_an_image_cannot_be_pulled(message: str, reason: str) -> None:
    found = diagnose(pod(container("airflow", waiting("ErrImagePull", message)), phase="Pending"))
    assert found.reason == reason
    assert "registry/airflow:1" in found.summary
    assert 0 < found.fatal_after < 30


def test_a_back_off_still_tells_the_cause_from_the_events() -> None:
    seen = event("Failed", 'Failed to pull image "r/x": rpc error: code = NotFound desc = not found')
    found = diagnose(pod(container("airflow", waiting("ImagePullBackOff", "Back-off pulling image"))), events=[seen])
    assert found.reason == "ImageNotFound"
    assert found.summary.endswith("for container airflow: not found")


def test_the_cause_of_a_failed_pull_is_not_buried_in_repetitions() -> None:
    digest = f"sha256:{'401' * 21}0"
    image = f"registry:5000/team/airflow@{digest}"
    message = (
        f'rpc error: code = Unknown desc = failed to pull and unpack image "{image}": failed to resolve reference '
        f'"{image}": failed to do request: Head "https://registry:5000/v2/team/airflow/manifests/{digest}": '
        "x509: certificate signed by unknown authority"
    )
    seen = event("Failed", f'Failed to pull image "{image}": {message}')
    found = diagnose(pod(container("airflow", waiting("ErrImagePull", message)), phase="Pending"), events=[seen])
    assert found.reason == "ImageUntrusted"  # and not "unauthorized": the 401 are digits of the digest
    cause = (
        'failed to do request: Head "https://registry:5000/v2/team/airflow/manifests/": '
        "x509: certificate signed by unknown authority"
    )
    assert found.summary.endswith(f"for container airflow: {cause}")
    assert found.events[-1].endswith(f": {cause}")


def test_a_first_crash_may_heal() -> None:
    crashed = container("airflow", waiting("CrashLoopBackOff"), last=terminated(1), restarts=1)
    assert diagnose(pod(crashed)).fatal_after == NEVER


def test_a_crash_loop_points_at_the_previous_log() -> None:
    crashed = container("airflow", waiting("CrashLoopBackOff"), last=terminated(3), restarts=2)
    found = diagnose(pod(container("postgres", RUNNING, ready=True), crashed))
    assert (found.reason, found.container, found.previous) == ("CrashLoopBackOff", "airflow", True)
    assert "exited with code 3" in found.summary
    assert found.fatal_after == 0


def test_out_of_memory_names_the_setting() -> None:
    killed = container("airflow", waiting("CrashLoopBackOff"), last=terminated(137, "OOMKilled"), restarts=1)
    found = diagnose(pod(killed))
    assert found.reason == "OOMKilled"
    assert "resources.airflow" in found.hint


def test_an_unbound_claim_comes_before_the_unscheduled_pod() -> None:
    claim = {
        "metadata": {"name": "airflow-data", "uid": "c1"},
        "spec": {"storageClassName": "fast"},
        "status": {"phase": "Pending"},
    }
    failed = event("ProvisioningFailed", "no such disk", kind="PersistentVolumeClaim", name="airflow-data", uid="c1")
    unscheduled = pod(
        phase="Pending",
        conditions=[{"type": "PodScheduled", "status": "False", "message": "unbound immediate PersistentVolumeClaims"}],
    )
    assert diagnose(unscheduled, claim=claim).reason == "UnboundClaim"
    found = diagnose(unscheduled, claim=claim, events=[failed])
    assert found.reason == "ProvisioningFailed"
    assert "StorageClass fast" in found.summary
    assert "no such disk" in found.summary


def test_unschedulable_tells_the_schedulers_words() -> None:
    found = diagnose(
        pod(
            phase="Pending",
            conditions=[{"type": "PodScheduled", "status": "False", "message": "0/1 nodes: 1 Insufficient memory."}],
        )
    )
    assert found.reason == "Unschedulable"
    assert "Insufficient memory" in found.summary


def test_the_container_that_cannot_start_outranks_the_one_that_waits() -> None:
    found = diagnose(
        pod(
            container("airflow", terminated(1)),
            container("postgres", waiting("ImagePullBackOff", "not found")),
        )
    )
    assert found.container == ""
    assert "postgres" in found.summary


def test_a_failing_probe_is_waited_for() -> None:
    unhealthy = event("Unhealthy", "Readiness probe failed: HTTP probe failed with statuscode: 503")
    found = diagnose(pod(container("airflow", RUNNING)), events=[unhealthy])
    assert (found.reason, found.container, found.fatal_after) == ("Probe", "airflow", NEVER)
    assert "503" in found.summary


def test_a_volume_that_does_not_mount() -> None:
    found = diagnose(
        pod(container("airflow", waiting("ContainerCreating")), phase="Pending"),
        events=[event("FailedMount", "no such device")],
    )
    assert found.reason == "FailedMount"


def test_events_of_an_earlier_pod_do_not_count() -> None:
    old = event("FailedMount", "no such device", uid="before")
    found = diagnose(pod(container("airflow", waiting("ContainerCreating")), phase="Pending"), events=[old])
    assert found.reason == "Waiting"


def test_a_pod_that_stops_is_only_waited_for() -> None:
    stopping = pod(container("airflow", RUNNING))
    stopping["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert diagnose(stopping).reason == "Terminating"


def test_an_evicted_pod() -> None:
    found = diagnose(pod(phase="Failed", reason="Evicted", message="The node was low on resource: ephemeral-storage."))
    assert found.reason == "Evicted"
    assert "ephemeral-storage" in found.summary


def test_every_reason_that_ends_a_wait_says_what_to_do() -> None:
    assert all(remedy.hint for remedy in diagnosis.REMEDIES.values() if remedy.grace != NEVER)


def test_a_claim_that_waits_for_its_pod_is_not_to_blame() -> None:
    claim = {"metadata": {"name": "airflow-data", "uid": "c1"}, "spec": {}, "status": {"phase": "Pending"}}
    waits = event("WaitForFirstConsumer", "waiting", kind="PersistentVolumeClaim", name="airflow-data", uid="c1")
    homeless = pod(
        phase="Pending",
        conditions=[{"type": "PodScheduled", "status": "False", "message": "0/1 nodes: 1 Insufficient cpu."}],
    )
    found = diagnose(homeless, claim=claim, events=[waits | {"type": "Normal"}])
    assert found.reason == "Unschedulable"
    assert "Insufficient cpu" in found.summary
