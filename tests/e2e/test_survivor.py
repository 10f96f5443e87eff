"""A Postgres that outlives its pod: gone from the API by force, alive on the node; the lock on the volume holds.

Kubernetes' own warning on `--force` made true: the process that would end the old containers (containerd's shim) is
stopped, so the kubelet cannot, while the StatefulSet's next pod starts on the same volume.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from airflow_deployer.cluster import NODE
from airflow_deployer.kube_context import NATIVE_CONTEXT
from tests.e2e.conftest import Project, eventually

pytestmark = pytest.mark.e2e

# Prints the shim of a container, then the container's processes: whoever is in the container's cgroup.
_FIND = """
found=$(grep -l "$0" /proc/[0-9]*/cgroup 2>/dev/null | cut -d/ -f3)
for pid in $found; do
  while [ "$pid" -gt 1 ] && ! grep -q '^containerd-shim' "/proc/$pid/comm"; do
    pid=$(sed -n 's/^PPid:[^0-9]*//p' "/proc/$pid/status")
  done
  [ "$pid" -gt 1 ] && break
done
echo $pid $found
"""


class Node:
    """The one node's processes: this machine's, or those of kind's container."""

    def __init__(self, project: Project) -> None:
        names = [node["metadata"]["name"] for node in project.cluster.list_objects(NODE, None)["items"]]
        native = project.cluster.context.name == NATIVE_CONTEXT
        self._prefix = [] if native else ["docker", "exec", names[0]]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command there."""
        return subprocess.run([*self._prefix, *command], capture_output=True, text=True, timeout=30, check=False)

    def processes(self, container_id: str) -> tuple[int, list[int]]:
        """The shim of a container, and the container's processes."""
        shim, *pids = map(int, self.run("sh", "-c", _FIND, container_id).stdout.split())
        assert shim > 1
        return shim, pids

    def runs(self, pid: int) -> bool:
        """Whether the process is there and no zombie."""
        state = self.run("sed", "-n", r"s/^State:\s*\(.\).*/\1/p", f"/proc/{pid}/status").stdout.strip()
        return state not in ("", "Z", "X")

    @contextmanager
    def stopped(self, pid: int) -> Iterator[None]:
        """Keep a process stopped for the time of the block."""
        assert self.run("kill", "-STOP", str(pid)).returncode == 0
        try:
            yield
        finally:
            self.run("kill", "-CONT", str(pid))


def test_a_postgres_that_outlives_its_pod(project: Project) -> None:
    cluster, names = project.cluster, project.names
    project.up("--no-port-forward")
    before = project.pod()
    statuses = before["status"]["containerStatuses"]
    container = next(item for item in statuses if item["name"] == "postgres")["containerID"].rpartition("/")[2]
    node = Node(project)
    shim, pids = node.processes(container)
    old = pids[0]

    def log() -> str:
        return "\n".join(cluster.log(names.namespace, names.pod, "postgres", lines=100))

    with node.stopped(shim):
        _force_delete(project)
        eventually(
            lambda: project.has("pod") and project.pod()["metadata"]["uid"] != before["metadata"]["uid"],
            seconds=30,
            what="the StatefulSet makes its next pod while the old containers still run",
        )
        eventually(lambda: "another Postgres still holds the volume" in log(), seconds=60, what="the next one waits")
        assert node.runs(old), "the old Postgres was to survive"
        assert "database system" not in log(), log()
        assert "initdb" not in log(), log()
        # `up` meanwhile tells what it waits for and does not make it worse.
        project.write("deployer.toml", '[timeouts]\nready = "5s"\n')
        result = project.deployer("up", "--no-port-forward")
        assert result.code == 1, result
        assert "is not ready after 5 s" in result.stderr, result
        assert node.runs(old)
        assert "database system" not in log(), log()
    # The shim goes on, the kubelet ends the old containers, and the next Postgres has the volume to itself.
    eventually(lambda: not node.runs(old), seconds=90, what="the old Postgres ends")
    (project.folder / "deployer.toml").unlink()
    report = project.up("--no-port-forward")
    assert report["dags"] == 1
    assert "database system is ready to accept connections" in log(), log()
    assert "another Postgres still holds the volume" in log(), "the pod that had waited is the one that runs"


def _force_delete(project: Project) -> None:
    """What `kubectl delete pod --grace-period=0 --force` does."""
    from kubernetes import client
    from kubernetes.config import new_client_from_config

    api = new_client_from_config(context=project.cluster.context.name)  # type: ignore[no-untyped-call]
    core = client.CoreV1Api(api)
    core.delete_namespaced_pod(project.names.pod, project.names.namespace, grace_period_seconds=0)
