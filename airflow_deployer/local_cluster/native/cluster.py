"""Start, stop and state of the native cluster, each as a list of steps."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from airflow_deployer.errors import LocalClusterError
from airflow_deployer.progress import Progress

from .. import kubeconfig
from ..cluster_status import ClusterStatus, Part, State
from ..registry_hosting import make_config_map
from . import (
    commands,
    docker_engine,
    images,
    kubernetes_build,
    mounts,
    network,
    packages,
    provisioner,
    registry,
)
from .api import SERVER, Api, ApiError
from .certificates import certificate_path, certificates, ensure_certificates, key_path
from .control_plane import SERVICE_ADDRESS, ensure_control_plane
from .kubeconfigs import write_kubeconfig
from .layout import CONTEXT, NODE_NAME, Layout
from .node import ensure_node, kubelet_is_healthy
from .processes import ProcessSpec, ProcessTable, end, end_containers

_KUBERNETES_PROCESSES = ("provisioner", "kubelet", "kube-scheduler", "kube-controller-manager")
_STORE_PROCESSES = ("kube-apiserver", "etcd")
PROCESSES = (
    docker_engine.NAME,
    registry.NAME,
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "containerd",
    "kubelet",
    "provisioner",
)


def up(progress: Progress, *, stand_ins_for: Sequence[str] = (), layout: Layout | None = None) -> ClusterStatus:
    """Have the cluster run: whatever is missing is installed, built, started or repaired.

    Args:
        stand_ins_for: names of public images (`postgres:15`) that its registry must have, beside those that are in
            every cluster's.

    Raises:
        LocalClusterError: this machine cannot run it, or a step failed; the next `up` goes on from there.
    """
    layout = layout or Layout()
    stand_ins = images.wanted(stand_ins_for)
    _require_supported()
    with _alone(layout, progress):
        layout.ensure_directories()
        table = ProcessTable(layout)
        _clear_interrupted(layout, table)
        _ensure_packages(layout, progress)
        _ensure_ingredients(layout, table, stand_ins, progress)
        with progress.step("Kubernetes") as step:
            step.update("pod network and certificates")
            pod_network = network.pod_network(layout)
            network.ensure_network(layout, pod_network)
            ensure_certificates(layout, certificates(NODE_NAME, pod_network.node, SERVICE_ADDRESS))
            write_kubeconfig(layout, "admin", SERVER)
            step.update("control plane")
            ensure_control_plane(layout, table, pod_network)
            step.update("node")
            ensure_node(layout, table, pod_network)
            api = Api(layout)
            _ensure_objects(api)
            _ensure_provisioner(layout, table)
            step.update("waiting for the node to be Ready")
            _wait_for_node(api, table)
            _wait_for_default_account(api)
            step.done(f"{kubernetes_build.VERSION}, node {NODE_NAME}")
        path = kubeconfig.ensure_context(_context_entry(layout), os.environ)
        progress.info(f"Context {CONTEXT} is in {path}; images go to {registry.HOST}.")
        return status(layout)


def down(progress: Progress, *, purge: bool, layout: Layout | None = None) -> None:
    """End the cluster: its processes and pods, mounts, network devices and rules, nothing else.

    Volumes, etcd, images and the cache stay, and so does the context in the kubeconfig: the next `up` brings back the
    same cluster under the same name with the same keys. With `purge` all of that goes too.

    Raises:
        LocalClusterError: not root, or something could not be taken away.
    """
    layout = layout or Layout()
    if os.geteuid() != 0:
        raise LocalClusterError("stopping the native cluster failed: it needs root", hint="Run it with sudo.")
    if not layout.state.exists() and not layout.run.exists():
        if purge:
            kubeconfig.remove_context(CONTEXT, os.environ)
        progress.info("There is no native cluster on this machine.")
        return
    with _alone(layout, progress):
        layout.ensure_directories()
        table = ProcessTable(layout)
        _clear_interrupted(layout, table)
        with progress.step("Stopping Kubernetes") as step:
            for name in _KUBERNETES_PROCESSES:
                table.stop(name)
            step.update("ending the pods")
            _end_pods(layout, table)
            for name in ("containerd", *_STORE_PROCESSES):
                table.stop(name)
        with progress.step("Stopping the registry and Docker"):
            table.stop(registry.NAME)
            docker_engine.stop_docker(layout, table)
        with progress.step("Removing mounts and network devices"):
            end([pid for name in PROCESSES for pid in table.marked(name)], grace=2)
            for directory in (layout.state, layout.run):
                mounts.unmount_below(layout, directory)
            network.remove_network(layout)
            if docker_engine.server_version() is None:
                network.remove_docker_network(layout)
            shutil.rmtree(layout.run, ignore_errors=True)
        if purge:
            with progress.step("Removing state, volumes and cache"):
                _remove_traces(layout)
                shutil.rmtree(layout.state)
                with contextlib.suppress(OSError):
                    layout.state.parent.rmdir()
            kubeconfig.remove_context(CONTEXT, os.environ)


def exists(layout: Layout | None = None) -> bool:
    """Whether there is a native cluster on this machine, running or not, or one that an interrupted `up` began."""
    return (layout or Layout()).state.exists()


def status(layout: Layout | None = None) -> ClusterStatus:
    """What of the cluster runs. Changes nothing.

    Raises:
        LocalClusterError: there may be a cluster, but only root can see it.
    """
    layout = layout or Layout()
    if not layout.state.exists():
        return ClusterStatus("native", "absent", CONTEXT, kubernetes_build.VERSION, registry.HOST, NODE_NAME)
    if not _is_readable(layout):
        raise LocalClusterError(
            f"reading the native cluster's state failed: {layout.state} is root's alone", hint="Run it with sudo."
        )
    table = ProcessTable(layout)
    parts = tuple(_part(table, name) for name in PROCESSES)
    state: State
    if not any(part.pid for part in parts):
        state = "stopped" if layout.etcd.exists() else "absent"
    elif all(part.running for part in parts) and kubelet_is_healthy() and _node_is_ready(Api(layout)):
        state = "running"
    else:
        state = "degraded"
    return ClusterStatus("native", state, CONTEXT, kubernetes_build.VERSION, registry.HOST, NODE_NAME, parts)


def _is_readable(layout: Layout) -> bool:
    return os.access(layout.state, os.R_OK | os.X_OK)


def _part(table: ProcessTable, name: str) -> Part:
    pid = table.pid(name)
    if name == docker_engine.NAME and pid is None:
        # The machine's own Docker Engine will do.
        return Part(name, docker_engine.server_version() is not None)
    return Part(name, pid is not None, pid)


def _require_supported() -> None:
    reason = packages.unsupported()
    if reason is not None:
        raise LocalClusterError(
            f"starting the native cluster failed: {reason}",
            hint="Run it with sudo." if os.geteuid() != 0 else "Install Docker and kind, then run this again.",
        )


@contextlib.contextmanager
def _alone(layout: Layout, progress: Progress) -> Iterator[None]:
    """Hold the lock; a second `cluster up` waits for the first and then finds everything done."""
    layout.lock.parent.mkdir(parents=True, exist_ok=True)
    with layout.lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.info("Another `deployer cluster` is at work; waiting for it.")
            fcntl.flock(stream, fcntl.LOCK_EX)
        commands.allow()
        try:
            yield
        except BaseException:
            commands.stop_all()
            raise


def _clear_interrupted(layout: Layout, table: ProcessTable) -> None:
    """End builds and downloads that an interrupted run left behind, and remove their half-made directories."""
    end(table.marked(commands.COMMAND), grace=2)
    for path in layout.cache.glob("*.partial"):
        mounts.unmount_below(layout, path)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _ensure_packages(layout: Layout, progress: Progress) -> None:
    wanted = dict(packages.REQUIRED)
    if docker_engine.server_version() is None:
        wanted |= packages.DOCKER
        if packages.apparmor_is_on():
            wanted |= packages.DOCKER_UNDER_APPARMOR
    if not kubernetes_build.is_built(layout):
        wanted |= packages.FOR_BUILDING
    packages.ensure_packages(layout, packages.missing(wanted), progress)


def _ensure_ingredients(
    layout: Layout, table: ProcessTable, stand_ins: Sequence[images.StandIn], progress: Progress
) -> None:
    """Kubernetes' programs beside Docker, the registry and the images: one mostly computes, the other downloads."""

    def docker_and_images() -> None:
        with progress.step("Docker Engine") as step:
            version, ours = docker_engine.ensure_docker(layout, table)
            step.done(version if ours else f"{version}, the machine's own")
        with progress.step("Registry") as step:
            registry.ensure_registry(layout, table)
            step.done(registry.HOST)
        images.ensure_pause(layout, progress)
        images.ensure_stand_ins(layout, stand_ins, progress)

    _side_by_side(lambda: kubernetes_build.ensure_kubernetes(layout, progress), docker_and_images)


def _side_by_side(*works: Callable[[], None]) -> None:
    """Run all at once and wait for all; the first failure ends the others' programs and is raised."""
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)
            commands.stop_all()

    # Daemons: a thread that waits for the Docker Engine must not keep an interrupted command from ending.
    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and not failures:
        for thread in threads:
            thread.join(timeout=0.1)
    if failures:
        for thread in threads:
            thread.join(timeout=5)
        raise failures[0]


def _ensure_objects(api: Api) -> None:
    storage_class = provisioner.make_storage_class()
    config_map = make_config_map(registry.HOST, registry.HOST, mirror=registry.HOST)
    _retry(lambda: api.apply(f"/apis/storage.k8s.io/v1/storageclasses/{provisioner.STORAGE_CLASS}", storage_class))
    _retry(lambda: api.apply("/api/v1/namespaces/kube-public/configmaps/local-registry-hosting", config_map))


def _retry(work: Callable[[], Any], *, timeout: float = 20) -> None:
    """Repeat while the API server is still making its own namespaces and rules (404, 403) or restarts."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            work()
            return
        except ApiError as error:
            if error.status not in (0, 403, 404, 500, 503) or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _ensure_provisioner(layout: Layout, table: ProcessTable) -> None:
    module = f"{__package__}.provisioner"
    package_root = Path(__file__).resolve().parents[3]
    table.ensure(
        ProcessSpec(
            "provisioner",
            (sys.executable, "-m", module, str(layout.state)),
            environ={"PYTHONPATH": str(package_root), "PYTHONDONTWRITEBYTECODE": "1"},
            inputs=(Path(provisioner.__file__), certificate_path(layout, "provisioner")),
        )
    )


def _node_is_ready(api: Api, *, since: float = 0) -> bool:
    """Whether the node is Ready, as said after the time `since` (seconds since the epoch)."""
    try:
        node = api.call("GET", f"/api/v1/nodes/{NODE_NAME}")
    except ApiError:
        return False
    conditions = {condition["type"]: condition for condition in node["status"].get("conditions", [])}
    ready = conditions.get("Ready", {"status": "Unknown"})
    if ready["status"] != "True" or _seconds(ready["lastHeartbeatTime"]) < int(since):
        return False
    # The taint goes a moment after the condition; until then nothing is scheduled.
    return not any(taint["key"].startswith("node.kubernetes.io/") for taint in node["spec"].get("taints", []))


def _seconds(timestamp: str) -> float:
    """An API timestamp (RFC 3339, UTC) as seconds since the epoch."""
    return datetime.strptime(timestamp, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc).timestamp()


def _wait_for_node(api: Api, table: ProcessTable) -> None:
    """Wait until this kubelet, not the one before the last stop, has called its node Ready."""
    started = table.started("kubelet")
    table.wait("kubelet", lambda: _node_is_ready(api, since=started), timeout=90)


def _wait_for_default_account(api: Api) -> None:
    # Without it the first pod of a new cluster would be refused.
    _retry(lambda: api.call("GET", "/api/v1/namespaces/default/serviceaccounts/default"))


def _context_entry(layout: Layout) -> kubeconfig.Entry:
    def data(path: Path) -> str:
        return base64.b64encode(path.read_bytes()).decode()

    return kubeconfig.Entry(
        CONTEXT,
        cluster={"server": SERVER, "certificate-authority-data": data(certificate_path(layout, "ca"))},
        user={
            "client-certificate-data": data(certificate_path(layout, "admin")),
            "client-key-data": data(key_path(layout, "admin")),
        },
    )


def _end_pods(layout: Layout, table: ProcessTable) -> None:
    """End the processes in our containers, SIGTERM first, then containerd's shims, which outlive containerd."""
    end_containers(layout.containerd, grace=10)
    daemon = table.pid("containerd")
    end([pid for pid in table.marked("containerd") if pid != daemon], grace=1)


def _remove_traces(layout: Layout) -> None:
    """What lies in places that the programs give no choice about: the pods' logs, the record of network set-ups."""
    results = Path("/var/lib/cni/results")
    for path in results.glob(f"{network.CNI_NETWORK}-*-eth0"):
        container = path.name.removeprefix(f"{network.CNI_NETWORK}-").removesuffix("-eth0")
        path.unlink(missing_ok=True)
        (results / f"cni-loopback-{container}-lo").unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        for pod in (layout.kubelet / "pods").iterdir():
            for directory in Path("/var/log/pods").glob(f"*_{pod.name}"):
                shutil.rmtree(directory, ignore_errors=True)
        for link in Path("/var/log/containers").iterdir():
            if link.is_symlink() and not link.exists():
                link.unlink()
