"""What goes wrong in the cluster: the cause is told quickly and by name, nothing is lost, and `up` heals it."""

from __future__ import annotations

import fcntl
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from airflow_deployer import config, images
from airflow_deployer.base_context import find_lock
from airflow_deployer.cluster import CLAIM, LEASE, STATEFUL_SET, STORAGE_CLASS, Kind, Object
from airflow_deployer.content import read_project
from airflow_deployer.credentials import KEYS
from airflow_deployer.progress import Silent
from airflow_deployer.registry import Registry, RegistryAddress
from tests.e2e.conftest import DUMMY_DAG, Project, Result, eventually

pytestmark = pytest.mark.e2e

REGISTRY = "localhost:5000"
VOLUME = Kind("", "v1", "PersistentVolume", "persistentvolumes", namespaced=False)


def fails(project: Project, *words: str, within: float, arguments: tuple[str, ...] = ()) -> Result:
    """Run `up`, which must end in time with exit code 1 and one error that says `words`, and show no secret."""
    began = time.monotonic()
    result = project.deployer("up", *arguments)
    took = time.monotonic() - began
    assert result.code == 1, result
    assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1, result
    assert "next: " in result.stderr, result
    assert "Traceback" not in result.stderr, result
    for word in words:
        assert word in result.stderr, result
    assert took < within, f"told after {took:.0f} s\n{result}"
    if project.has("Secret"):
        for key in KEYS:
            assert project.secret(key) not in result.stdout + result.stderr
    return result


def new_content(project: Project) -> None:
    """Make the project one that no registry holds yet."""
    project.write("dags/dummy.py", DUMMY_DAG + f"\n# {secrets.token_hex(8)}\n")


# -- images -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken_base(project: Project) -> str:
    """A base image that passes the import check, and whose container prints a line and exits with code 3."""
    import docker

    settings = config.load(project.folder, config_file=None, env={}, overrides={"images.mirror": REGISTRY})
    address = RegistryAddress(REGISTRY, REGISTRY)
    engine = images.Engine()
    content, lock = read_project(project.folder, settings.project), find_lock(project.folder, settings)
    plan = images.plan_images(settings, content, lock, address, engine.platform)
    base = images.ensure_base_image(engine, Registry(REGISTRY), plan, Silent())
    name = f"{REGISTRY}/e2e/broken:{project.names.namespace}"
    dockerfile = f'FROM {base.pinned}\nCMD ["sh", "-c", "echo the sky is falling; exit 3"]\n'
    subprocess.run(["docker", "build", "-q", "-t", name, "-"], input=dockerfile.encode(), check=True, timeout=120)
    subprocess.run(["docker", "push", "-q", name], check=True, timeout=120)
    client = docker.from_env()
    client.images.remove(name)
    client.close()
    return name


def test_a_broken_image_is_told_and_healed(project: Project, broken_base: str) -> None:
    project.write("deployer.toml", f'[images]\nbase = "{broken_base}"\n')
    result = fails(
        project,
        "container airflow of airflow-0 crashes again and again",
        "exited with code 3",
        "previous log of airflow: the sky is falling",
        within=120,
    )
    print(result.stderr)
    stuck = project.pod()["metadata"]["uid"]
    claim = project.cluster.get(CLAIM, project.names.namespace, project.names.claim)
    password = project.secret("postgres-password")

    # Kubernetes leaves a pod that is stuck on a bad revision where it is; `up` does not.
    (project.folder / "deployer.toml").unlink()
    report = project.up()
    assert report["pod"] == "replaced"
    assert report["dags"] == 1
    assert project.pod()["metadata"]["uid"] != stuck
    after = project.cluster.get(CLAIM, project.names.namespace, project.names.claim)
    assert claim is not None
    assert after is not None
    assert after["metadata"]["uid"] == claim["metadata"]["uid"]
    assert project.secret("postgres-password") == password


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ('postgres = "localhost:5000/library/postgres:none"', ("localhost:5000/library/postgres:none", "not found")),
        ('registry = "localhost:5000"\nregistry_pull = "localhost:1"', ("localhost:1/", "connection refused")),
    ],
    ids=["no such image", "registry_pull that is not there"],
)
def test_an_image_that_cannot_be_pulled(project: Project, setting: str, words: tuple[str, ...]) -> None:
    project.write("deployer.toml", f"[images]\n{setting}\n")
    print(fails(project, "the node cannot pull", *words, "images.registry_pull", within=60).stderr)


# -- what the cluster cannot give -------------------------------------------------------------------------------------


@contextmanager
def _class_without_provisioner(project: Project) -> Iterator[str]:
    name = project.names.namespace
    body: Object = {
        "apiVersion": STORAGE_CLASS.api_version,
        "kind": STORAGE_CLASS.kind,
        "metadata": {"name": name},
        "provisioner": "example.com/nobody",
    }
    project.cluster.create(STORAGE_CLASS, None, body)
    try:
        yield name
    finally:
        project.cluster.delete(STORAGE_CLASS, None, name)


def test_a_claim_that_cannot_bind(project: Project) -> None:
    with _class_without_provisioner(project) as name:
        project.write("deployer.toml", f'[storage]\nclass = "{name}"\n')
        result = fails(
            project,
            "claim airflow-data is not bound",
            f"StorageClass {name}",
            "example.com/nobody",
            "storage.class",
            within=60,
        )
        print(result.stderr)


def test_a_pod_that_fits_on_no_node(project: Project) -> None:
    project.write("deployer.toml", '[resources.airflow.requests]\ncpu = "64"\n')
    result = fails(
        project,
        "pod airflow-0 cannot be scheduled",
        "Insufficient cpu",
        "resources.airflow.requests.cpu",
        within=60,
    )
    print(result.stderr)
    (project.folder / "deployer.toml").unlink()
    assert project.up("--no-port-forward")["dags"] == 1


def test_a_container_that_needs_more_memory_than_it_may_use(project: Project) -> None:
    project.write("deployer.toml", '[resources.airflow]\nrequests.memory = "32Mi"\nlimits.memory = "64Mi"\n')
    result = fails(
        project,
        "container airflow of airflow-0 was killed because it used more memory than its limit",
        "resources.airflow.limits.memory",
        within=120,
    )
    print(result.stderr)


def test_the_deadline_tells_what_was_waited_for(project: Project) -> None:
    project.write("deployer.toml", '[timeouts]\nready = "5s"\n')
    print(fails(project, "Airflow is not ready after 5 s; last seen: ", "airflow-", within=60).stderr)
    (project.folder / "deployer.toml").unlink()
    assert project.up("--no-port-forward")["dags"] == 1


# -- a Postgres that is still there ----------------------------------------------------------------------------------


def _volume(project: Project) -> Path:
    """The directory of the claim's volume on the node, which is this machine."""
    claim = project.cluster.get(CLAIM, project.names.namespace, project.names.claim)
    assert claim is not None
    volume = project.cluster.get(VOLUME, None, claim["spec"]["volumeName"])
    assert volume is not None
    source = volume["spec"].get("local") or volume["spec"]["hostPath"]
    return Path(source["path"])


def _postgres_says(project: Project, words: str) -> bool:
    lines = project.cluster.log(project.names.namespace, project.names.pod, "postgres", lines=50)
    return any(words in line for line in lines)


def test_a_held_volume_keeps_the_next_postgres_from_starting(project: Project) -> None:
    project.up("--no-port-forward")
    volume = _volume(project)
    assert project.deployer("down").code == 0
    with (volume / "postgres" / ".lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody else holds it after `down`
        running = project.start("up", "--no-port-forward", "--output", "json")
        try:
            eventually(
                lambda: _postgres_says(project, "waiting: another Postgres still holds the volume"),
                seconds=60,
                what="the new Postgres waits for the lock",
            )
            time.sleep(3)
            assert not _postgres_says(project, "database system is ready")
            assert not (volume / "postgres" / "data" / "postmaster.pid").exists()
            assert running.poll() is None
            fcntl.flock(lock, fcntl.LOCK_UN)
            output, errors = running.communicate(timeout=120)
        finally:
            running.kill()
            running.wait()
    assert running.returncode == 0, errors
    assert '"dags": 1' in output


# -- two runs at once, and runs that end early -----------------------------------------------------------------------


def _holder(project: Project) -> str:
    lease = project.cluster.get(LEASE, project.names.namespace, project.names.lease)
    return str(lease["spec"].get("holderIdentity") or "") if lease else ""


def test_two_runs_at_once_do_not_mix(project: Project) -> None:
    new_content(project)
    first = project.start("up", "--no-port-forward", "--output", "json")
    try:
        eventually(lambda: _holder(project), seconds=30, what="the first run holds the lock")
        second = fails(project, "is running `deployer up` on it", within=10, arguments=("--no-port-forward",))
        assert "in namespace" in second.stderr
        output, errors = first.communicate(timeout=180)
    finally:
        first.kill()
        first.wait()
    assert first.returncode == 0, errors
    assert '"dags": 1' in output
    assert _holder(project) == ""


def test_a_killed_run_blocks_nobody(project: Project) -> None:
    running = project.start("up", "--no-port-forward")
    try:
        eventually(lambda: project.has("StatefulSet"), seconds=60, what="the killed run has applied its objects")
    finally:
        running.kill()
        running.communicate()
    assert _holder(project) != ""
    assert project.up("--no-port-forward")["dags"] == 1


def test_ctrl_c_at_any_moment_leaves_what_the_next_run_finishes(project: Project) -> None:
    new_content(project)

    moments = {
        "at once": lambda: True,
        "images": lambda: _holder(project) != "",
        "objects": lambda: _holder(project) != "" and project.has("Secret"),
        "pod": lambda: _holder(project) != "" and project.has("pod"),
    }
    for moment, reached in moments.items():
        running = project.start("up", "--no-port-forward")
        try:
            eventually(reached, seconds=60, what=moment)
            running.send_signal(signal.SIGINT)
            output, errors = running.communicate(timeout=20)
        finally:
            running.kill()
            running.wait()
        project.history.append(f"$ deployer up, interrupted: {moment}\n{output}{errors}")
        assert running.returncode == 130, (moment, output, errors)
        assert "Traceback" not in errors, (moment, errors)
        assert _holder(project) == "", moment
    assert project.up("--no-port-forward")["dags"] == 1


# -- other hands on the objects ----------------------------------------------------------------------------------------


def test_a_field_that_somebody_else_has_changed(project: Project) -> None:
    from kubernetes import client
    from kubernetes.config import new_client_from_config

    project.up("--no-port-forward")
    api = client.AppsV1Api(new_client_from_config(context=project.cluster.context.name))  # type: ignore[no-untyped-call]
    api.patch_namespaced_stateful_set(
        project.names.name, project.names.namespace, {"spec": {"replicas": 0}}, field_manager="the-night-shift"
    )
    result = fails(
        project,
        "Cannot apply StatefulSet airflow: somebody else has changed",
        ".spec.replicas",
        "the-night-shift",
        "--force-conflicts",
        within=20,
        arguments=("--no-port-forward",),
    )
    print(result.stderr)
    live = project.cluster.get(STATEFUL_SET, project.names.namespace, project.names.name)
    assert live is not None
    assert live["spec"]["replicas"] == 0
    assert project.up("--no-port-forward", "--force-conflicts")["dags"] == 1
    assert project.up("--no-port-forward")["changes"] == {}


def test_an_immutable_field_is_changed_around_the_running_pod(project: Project) -> None:
    cluster, names = project.cluster, project.names
    project.up("--no-port-forward")
    pod = project.pod()["metadata"]["uid"]
    live = cluster.get(STATEFUL_SET, names.namespace, names.name)
    assert live is not None
    # The same StatefulSet as an earlier release might have made it, under another service name.
    earlier = {key: live[key] for key in ("apiVersion", "kind", "spec")} | {
        "metadata": {key: live["metadata"][key] for key in ("name", "namespace", "labels", "annotations")}
    }
    earlier["spec"]["serviceName"] = "airflow-earlier"
    cluster.delete(STATEFUL_SET, names.namespace, names.name, orphan=True)
    eventually(lambda: not project.has("StatefulSet"), seconds=30, what="the StatefulSet is gone")
    cluster.apply(STATEFUL_SET, names.namespace, earlier)

    report = project.up("--no-port-forward")
    assert report["changes"] == {"StatefulSet airflow": "recreated"}
    after = cluster.get(STATEFUL_SET, names.namespace, names.name)
    assert after is not None
    assert after["spec"]["serviceName"] == names.name
    assert project.pod()["metadata"]["uid"] == pod
