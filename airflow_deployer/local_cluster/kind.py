"""The kind provider: a cluster in Docker, and a registry container that its nodes pull from.

Follows kind's documented way to a local registry: containerd on the nodes reads `certs.d`, which sends
`localhost:<port>` to the registry container on the `kind` network, and a ConfigMap tells programs where it is.
Everything goes through the `kind` and `docker` programs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from airflow_deployer.errors import LocalClusterError
from airflow_deployer.progress import Progress, Step

from . import kubeconfig
from .cluster_status import ClusterStatus, Part, State
from .registry_hosting import make_config_map

NAME = "airflow"
CONTEXT = f"kind-{NAME}"
REGISTRY = "airflow-deployer-registry"
_NETWORK = "kind"
_REGISTRY_IMAGE = "registry:2"
# A node without it is what an interrupted `kind create cluster` left behind.
_COMPLETE = "/kind/airflow-deployer-complete"
_KUBECTL = ("kubectl", "--kubeconfig=/etc/kubernetes/admin.conf")
_NATIVE_HINT = (
    "Make the image available to Docker, or run `deployer cluster up --provider native` (Debian 12, as root), "
    "which needs no image registry."
)


def registry_port(platform: str) -> int:
    """The registry's port on this machine. On macOS 5000 belongs to AirPlay."""
    return 5001 if platform == "darwin" else 5000


def registry_host() -> str:
    """How this machine, and the nodes' containerd, name the registry."""
    return f"localhost:{registry_port(sys.platform)}"


def cluster_configuration() -> dict[str, Any]:
    """kind's Cluster configuration (`kind.x-k8s.io/v1alpha4`): containerd reads registry hosts from certs.d."""
    patch = '[plugins."io.containerd.grpc.v1.cri".registry]\n  config_path = "/etc/containerd/certs.d"'
    return {"kind": "Cluster", "apiVersion": "kind.x-k8s.io/v1alpha4", "containerdConfigPatches": [patch]}


def hosts_toml() -> str:
    """containerd's `hosts.toml` for the registry: inside a node, localhost is the node itself."""
    return f'[host."http://{REGISTRY}:5000"]\n'


def unsupported() -> str | None:
    """Why kind cannot be used here, None when it can."""
    for program in ("kind", "docker"):
        if shutil.which(program) is None:
            return f"there is no `{program}` program"
    try:
        _run("docker", "version", "--format", "{{.Server.Version}}", action="asking Docker", timeout=10)
    except LocalClusterError as error:
        return f"Docker does not answer: {' '.join(error.details) or error.message}"
    return None


def up(progress: Progress) -> ClusterStatus:
    """Have the cluster and its registry run.

    Raises:
        LocalClusterError: Docker or kind is missing, an image cannot be pulled, or a step failed.
    """
    reason = unsupported()
    if reason is not None:
        raise LocalClusterError(
            f"starting the kind cluster failed: {reason}",
            hint="Install and start Docker and kind, or run `deployer cluster up --provider native` (Debian 12, as "
            "root).",
        )
    with progress.step("Registry") as step:
        _ensure_registry(step)
        step.done(registry_host())
    with progress.step("Kind cluster") as step:
        nodes = _ensure_nodes(progress, step)
        step.update("wiring the registry")
        for node in nodes:
            _ensure_registry_on_node(node)
        _ensure_registry_on_network()
        step.update("waiting for the node to be Ready")
        control_plane = _control_plane(nodes)
        _wait_for_api(control_plane)
        hosting = json.dumps(make_config_map(registry_host(), registry_host()))
        _exec(control_plane, *_KUBECTL, "apply", "-f", "-", action="announcing the registry", stdin=hosting)
        _exec(control_plane, "touch", _COMPLETE, action="finishing the node")
        step.done(", ".join(nodes))
    path = kubeconfig.ensure_context(_context_entry(), os.environ)
    progress.info(f"Context {CONTEXT} is in {path}; images go to {registry_host()}.")
    return status()


def down(progress: Progress, *, purge: bool) -> None:
    """Stop the cluster and its registry; with `purge` delete them, their volumes and the context.

    Raises:
        LocalClusterError: kind or Docker refuses.
    """
    containers = [name for name in (*_nodes(), REGISTRY) if _inspect(name) is not None]
    if purge:
        with progress.step("Deleting the kind cluster"):
            _run("kind", "delete", "cluster", "--name", NAME, action="deleting the kind cluster", timeout=120)
            if REGISTRY in containers:
                _run("docker", "rm", "--force", "--volumes", REGISTRY, action="deleting the registry")
        kubeconfig.remove_context(CONTEXT, os.environ)
        return
    if not containers:
        progress.info("There is no kind cluster of ours.")
        return
    with progress.step("Stopping the kind cluster"):
        _run("docker", "stop", *containers, action="stopping the kind cluster", timeout=120)


def status() -> ClusterStatus:
    """What of the cluster runs. Changes nothing.

    Raises:
        LocalClusterError: kind or Docker does not answer.
    """
    nodes = _nodes()
    parts = tuple(Part(name, _is_running(_inspect(name))) for name in (*nodes, REGISTRY))
    version = ""
    state: State
    if not nodes:
        state = "absent"
    elif all(part.running for part in parts):
        try:
            version = _exec(_control_plane(nodes), "cat", "/kind/version", action="asking the node").strip()
            state = "running" if _is_ready(_control_plane(nodes)) else "degraded"
        except LocalClusterError:
            state = "degraded"
    else:
        state = "degraded" if any(part.running for part in parts[: len(nodes)]) else "stopped"
    node = _control_plane(nodes) if nodes else ""
    return ClusterStatus("kind", state, CONTEXT, version, registry_host(), node, parts)


def _run(program: str, *arguments: str, action: str, stdin: str | None = None, timeout: float = 60) -> str:
    """Run a program and return its standard output."""
    try:
        done = subprocess.run(
            [program, *arguments], input=stdin or "", capture_output=True, text=True, timeout=timeout, check=False
        )
    except OSError as error:
        raise LocalClusterError(
            f"{action} failed: cannot run {program}: {error.strerror}", hint="Install Docker and kind."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise LocalClusterError(
            f"{action} failed: {program} did not end within {timeout:.0f} s", hint="See `docker ps --all`."
        ) from error
    if done.returncode != 0:
        raise _failure(action, program, done.returncode, (done.stderr or done.stdout).strip().splitlines())
    return done.stdout


def _follow(argv: Sequence[str], *, action: str, stdin: str, step: Step) -> None:
    """Run a long program with its last line as live detail."""
    lines: list[str] = []
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdin is not None and process.stdout is not None  # noqa: S101 - narrows the types
        try:
            process.stdin.write(stdin)
            process.stdin.close()
        except BrokenPipeError:
            # It ended without reading; its own message says why.
            pass
        for line in process.stdout:
            if line.strip():
                lines.append(line.strip())
                step.update(line.strip())
    if process.returncode != 0:
        raise _failure(action, argv[0], process.returncode, lines)


def _failure(action: str, program: str, exit_code: int, lines: list[str]) -> LocalClusterError:
    """The error for a program that failed: an image that cannot be pulled is its own case."""
    text = "\n".join(lines)
    if "port is already allocated" in text or "address already in use" in text:
        return LocalClusterError(
            f"{action} failed: something else has port {registry_port(sys.platform)}",
            hint="Stop it (see `docker ps`), then run `deployer cluster up` again.",
            details=lines[-8:],
        )
    # kind says the first, `docker run` the second; the latter also when the pull works and something else fails.
    if "failed to pull image" in text or ("Unable to find image" in text and "Status: Downloaded" not in text):
        return LocalClusterError(
            f"{action} failed: Docker cannot pull the image", hint=_NATIVE_HINT, details=lines[-8:]
        )
    return LocalClusterError(
        f"{action} failed: {program} ended with exit code {exit_code}",
        hint="See `docker ps --all`; `deployer cluster down --purge` begins anew.",
        details=lines[-8:],
    )


def _exec(node: str, *arguments: str, action: str, stdin: str | None = None) -> str:
    return _run("docker", "exec", "--interactive", node, *arguments, action=action, stdin=stdin)


def _inspect(container: str) -> dict[str, Any] | None:
    """A container as Docker describes it (`GET /containers/{id}/json`), None when there is none."""
    try:
        found = json.loads(_run("docker", "inspect", "--type", "container", container, action="asking Docker"))
    except LocalClusterError as error:
        if any("no such" in line.lower() for line in error.details):
            return None
        raise
    return dict(found[0])


def _is_running(container: dict[str, Any] | None) -> bool:
    return container is not None and bool(container["State"]["Running"])


def _nodes() -> list[str]:
    if shutil.which("kind") is None:
        return []
    if NAME not in _run("kind", "get", "clusters", action="listing kind clusters").split():
        return []
    return sorted(_run("kind", "get", "nodes", "--name", NAME, action="listing kind nodes").split())


def _control_plane(nodes: Sequence[str]) -> str:
    return next((node for node in nodes if node.endswith("control-plane")), nodes[0])


def _ensure_registry(step: Step) -> None:
    container = _inspect(REGISTRY)
    if container is None:
        step.update(f"starting {_REGISTRY_IMAGE}")
        publish = f"127.0.0.1:{registry_port(sys.platform)}:5000"
        try:
            _run(
                *("docker", "run", "--detach", "--restart=always", "--name", REGISTRY, "--publish", publish),
                _REGISTRY_IMAGE,
                action="starting the registry",
                timeout=300,
            )
        except LocalClusterError:
            # Docker keeps the container that could not start; the next run must begin anew.
            if _inspect(REGISTRY) is not None:
                _run("docker", "rm", "--force", "--volumes", REGISTRY, action="removing the failed registry")
            raise
    elif not _is_running(container):
        _run("docker", "start", REGISTRY, action="starting the registry")


def _ensure_nodes(progress: Progress, step: Step) -> list[str]:
    nodes = _nodes()
    stopped = [node for node in nodes if not _is_running(_inspect(node))]
    if stopped:
        step.update("starting the nodes")
        _run("docker", "start", *stopped, action="starting the kind cluster", timeout=120)
    if nodes and not _is_complete(_control_plane(nodes)):
        progress.warning("An earlier creation of the kind cluster was interrupted; it is made anew.")
        _run("kind", "delete", "cluster", "--name", NAME, action="deleting the unfinished cluster", timeout=120)
        nodes = []
    if not nodes:
        with tempfile.TemporaryDirectory() as directory:
            # A kubeconfig of its own: kind would change the user's current context.
            _follow(
                [
                    *("kind", "create", "cluster", "--name", NAME, "--config", "-", "--wait", "120s"),
                    *("--kubeconfig", str(Path(directory) / "kubeconfig")),
                ],
                action="creating the kind cluster",
                stdin=json.dumps(cluster_configuration()),
                step=step,
            )
        nodes = _nodes()
    return nodes


def _is_complete(node: str) -> bool:
    try:
        _exec(node, "test", "-e", _COMPLETE, action="asking the node")
    except LocalClusterError:
        return False
    return True


def _ensure_registry_on_node(node: str) -> None:
    directory = f"/etc/containerd/certs.d/{registry_host()}"
    _exec(node, "mkdir", "-p", directory, action="wiring the registry")
    # containerd reads the file at every pull: no restart.
    _exec(node, "cp", "/dev/stdin", f"{directory}/hosts.toml", action="wiring the registry", stdin=hosts_toml())


def _ensure_registry_on_network() -> None:
    container = _inspect(REGISTRY)
    if container is not None and _NETWORK not in container["NetworkSettings"]["Networks"]:
        _run("docker", "network", "connect", _NETWORK, REGISTRY, action="connecting the registry to the cluster")


def _is_ready(control_plane: str) -> bool:
    path = "{.items[*].status.conditions[?(@.type=='Ready')].status}"
    try:
        found = _exec(
            control_plane, *_KUBECTL, "get", "nodes", "-o", f"jsonpath={path}", action="asking the API server"
        )
    except LocalClusterError:
        return False
    return set(found.split()) == {"True"}


def _wait_for_api(control_plane: str, *, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not _is_ready(control_plane):
        if time.monotonic() > deadline:
            raise LocalClusterError(
                f"starting the kind cluster failed: its node is not Ready after {timeout:.0f} s",
                hint="See `kind export logs --name airflow`; `deployer cluster down --purge` begins anew.",
            )
        time.sleep(0.5)


def _context_entry() -> kubeconfig.Entry:
    import yaml

    document = yaml.safe_load(_run("kind", "get", "kubeconfig", "--name", NAME, action="reading the kubeconfig"))
    return kubeconfig.Entry(CONTEXT, document["clusters"][0]["cluster"], document["users"][0]["user"])
