"""The kind provider's flow, against programs that replay what `kind` and `docker` print.

The messages of `docker` were recorded with the client 28.2 and the engine 20.10. Those of `kind` are written after its
documentation and source: where these tests were made neither the program nor a node image could be had.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from airflow_deployer.errors import LocalClusterError
from airflow_deployer.local_cluster import kind
from airflow_deployer.progress import Silent

from . import replay

NODE = "airflow-control-plane"
REGISTRY = kind.REGISTRY
NO_CLUSTERS = {"err": "No kind clusters found.\n"}
NO_CONTAINER = {"out": "[]\n", "err": f"Error response from daemon: No such container: {REGISTRY}\n", "code": 1}
CREATED = {
    "err": f"""\
Creating cluster "{kind.NAME}" ...
 • Ensuring node image (kindest/node:v1.33.1) 🖼  ...
 ✓ Ensuring node image (kindest/node:v1.33.1) 🖼
 • Preparing nodes 📦   ...
 ✓ Preparing nodes 📦
 • Starting control-plane 🕹️  ...
 ✓ Starting control-plane 🕹️
Set kubectl context to "kind-{kind.NAME}"
"""
}
NODE_IMAGE_MISSING = {
    "err": f"""\
Creating cluster "{kind.NAME}" ...
 • Ensuring node image (kindest/node:v1.33.1) 🖼  ...
 ✗ Ensuring node image (kindest/node:v1.33.1) 🖼
ERROR: failed to create cluster: failed to pull image "kindest/node:v1.33.1": \
command "docker pull kindest/node:v1.33.1" failed with error: exit status 1
Command Output: Error response from daemon: Get "https://registry.example/v2/": dial tcp: lookup registry.example: \
no such host
""",
    "code": 1,
}
REGISTRY_IMAGE_MISSING = {
    "err": """\
Unable to find image 'registry:2' locally
docker: Error response from daemon: Get "https://registry.example/v2/": dial tcp: lookup registry.example: no such host

Run 'docker run --help' for more information
""",
    "code": 125,
}
PORT_TAKEN = {
    "err": """\
docker: Error response from daemon: driver failed programming external connectivity on endpoint yy (69b7c65814d5): \
Error starting userland proxy: listen tcp4 127.0.0.1:5000: bind: address already in use

Run 'docker run --help' for more information
""",
    "code": 125,
}
KUBECONFIG = """\
apiVersion: v1
kind: Config
clusters:
- cluster: {certificate-authority-data: Q0E=, server: 'https://127.0.0.1:41234'}
  name: kind-airflow
users:
- name: kind-airflow
  user: {client-certificate-data: Q0VSVA==, client-key-data: S0VZ}
contexts:
- context: {cluster: kind-airflow, user: kind-airflow}
  name: kind-airflow
current-context: kind-airflow
"""


def container(*, running: bool = True, networks: tuple[str, ...] = ("bridge", "kind")) -> dict[str, str]:
    """`docker inspect`, as far as it is read."""
    found = {"State": {"Running": running}, "NetworkSettings": {"Networks": {name: {} for name in networks}}}
    return {"out": json.dumps([found])}


RUNNING: dict[str, list[dict[str, Any]]] = {
    "docker version": [{"out": "20.10.24+dfsg1\n"}],
    f"docker inspect --type container {REGISTRY}": [container()],
    f"docker inspect --type container {NODE}": [container()],
    "kind get clusters": [{"out": "airflow\n"}],
    "kind get nodes --name airflow": [{"out": f"{NODE}\n"}],
    "kind get kubeconfig --name airflow": [{"out": KUBECONFIG}],
    f"docker exec --interactive {NODE}": [{}],
    f"docker exec --interactive {NODE} cat /kind/version": [{"out": "v1.33.1"}],
    f"docker exec --interactive {NODE} kubectl --kubeconfig=/etc/kubernetes/admin.conf get nodes": [{"out": "True"}],
}
FRESH = RUNNING | {
    f"docker inspect --type container {REGISTRY}": [NO_CONTAINER, container(networks=("bridge",)), container()],
    "docker run": [{"out": "0123456789abcdef\n"}],
    "docker network connect kind": [{}],
    "kind get clusters": [NO_CLUSTERS, {"out": "airflow\n"}],
    "kind create cluster": [CREATED],
}


class Programs:
    """The two programs and what was asked of them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        for name in ("kind", "docker"):
            program = directory / name
            source = Path(replay.__file__).read_text()
            program.write_text(f"#!{sys.executable} -IS\n{source}")
            program.chmod(0o755)

    def replay(self, table: dict[str, list[dict[str, Any]]]) -> None:
        (self._directory / "table.json").write_text(json.dumps(table))
        (self._directory / "calls.jsonl").write_text("")

    def calls(self, beginning: str = "") -> list[str]:
        lines = (self._directory / "calls.jsonl").read_text().splitlines()
        return [call for call in (json.loads(line)["call"] for line in lines) if call.startswith(beginning)]

    def stdin(self, beginning: str) -> str:
        lines = (self._directory / "calls.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        return str(next(entry["stdin"] for entry in found if entry["call"].startswith(beginning)))


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(sys, "platform", "linux")
    return Programs(directory)


def test_a_fresh_machine_gets_a_registry_and_a_cluster_wired_to_each_other(programs: Programs, tmp_path: Path) -> None:
    programs.replay(FRESH)
    status = kind.up(Silent())
    assert (status.state, status.context, status.registry) == ("running", "kind-airflow", "localhost:5000")
    assert (status.kubernetes_version, status.node) == ("v1.33.1", NODE)
    assert [(part.name, part.running) for part in status.parts] == [(NODE, True), (REGISTRY, True)]
    (started,) = programs.calls("docker run")
    assert "--publish 127.0.0.1:5000:5000 registry:2" in started
    configuration = yaml.safe_load(programs.stdin("kind create cluster"))
    assert configuration["apiVersion"] == "kind.x-k8s.io/v1alpha4"
    assert 'config_path = "/etc/containerd/certs.d"' in configuration["containerdConfigPatches"][0]
    hosts = f"docker exec --interactive {NODE} cp /dev/stdin /etc/containerd/certs.d/localhost:5000/hosts.toml"
    assert programs.stdin(hosts) == f'[host."http://{REGISTRY}:5000"]\n'
    assert programs.calls("docker network connect") == [f"docker network connect kind {REGISTRY}"]
    applied = f"docker exec --interactive {NODE} kubectl --kubeconfig=/etc/kubernetes/admin.conf apply"
    hosting = yaml.safe_load(programs.stdin(applied))["data"]["localRegistryHosting.v1"]
    assert yaml.safe_load(hosting)["host"] == "localhost:5000"
    written = yaml.safe_load((tmp_path / "kubeconfig").read_text())
    assert written["clusters"][0]["cluster"]["server"] == "https://127.0.0.1:41234"


def test_kind_itself_never_writes_the_users_kubeconfig(programs: Programs, tmp_path: Path) -> None:
    programs.replay(FRESH)
    (tmp_path / "kubeconfig").write_text("current-context: prod\n")
    kind.up(Silent())
    words = shlex.split(programs.calls("kind create cluster")[0])
    assert words[words.index("--kubeconfig") + 1] != str(tmp_path / "kubeconfig")
    assert yaml.safe_load((tmp_path / "kubeconfig").read_text())["current-context"] == "prod"


def test_one_that_runs_is_left_running(programs: Programs) -> None:
    programs.replay(RUNNING)
    assert kind.up(Silent()).state == "running"
    for beginning in ("docker run", "docker start", "docker network connect", "kind create", "kind delete"):
        assert programs.calls(beginning) == []


def test_one_that_was_stopped_is_started(programs: Programs) -> None:
    stopped = container(running=False)
    programs.replay(
        RUNNING
        | {
            f"docker inspect --type container {REGISTRY}": [stopped, container()],
            f"docker inspect --type container {NODE}": [stopped, container()],
            "docker start": [{}],
        }
    )
    assert kind.up(Silent()).state == "running"
    assert programs.calls("docker start") == [f"docker start {REGISTRY}", f"docker start {NODE}"]


def test_a_creation_that_was_interrupted_begins_anew(programs: Programs) -> None:
    programs.replay(
        RUNNING
        | {
            f"docker exec --interactive {NODE} test -e /kind/airflow-deployer-complete": [{"code": 1}],
            "kind delete cluster --name airflow": [{}],
            "kind create cluster": [CREATED],
        }
    )
    assert kind.up(Silent()).state == "running"
    assert len(programs.calls("kind delete cluster")) == len(programs.calls("kind create cluster")) == 1


def test_a_node_image_that_cannot_be_pulled_offers_native(programs: Programs) -> None:
    programs.replay(FRESH | {"kind create cluster": [NODE_IMAGE_MISSING]})
    with pytest.raises(
        LocalClusterError, match="creating the kind cluster failed: Docker cannot pull the image"
    ) as caught:
        kind.up(Silent())
    assert "deployer cluster up --provider native" in caught.value.hint
    assert any("kindest/node" in line for line in caught.value.details)


def test_a_registry_image_that_cannot_be_pulled_offers_native(programs: Programs) -> None:
    nothing = {f"docker inspect --type container {REGISTRY}": [NO_CONTAINER]}
    programs.replay(FRESH | nothing | {"docker run": [REGISTRY_IMAGE_MISSING]})
    with pytest.raises(LocalClusterError, match="starting the registry failed: Docker cannot pull") as caught:
        kind.up(Silent())
    assert "native" in caught.value.hint


def test_a_taken_port_is_named_and_the_failed_container_removed(programs: Programs) -> None:
    programs.replay(FRESH | {"docker run": [PORT_TAKEN], "docker rm": [{}]})
    with pytest.raises(LocalClusterError, match="something else has port 5000"):
        kind.up(Silent())
    assert programs.calls("docker rm") == [f"docker rm --force --volumes {REGISTRY}"]


def test_down_stops_and_keeps(programs: Programs, tmp_path: Path) -> None:
    programs.replay(RUNNING | {"docker stop": [{}]})
    kind.up(Silent())
    kind.down(Silent(), purge=False)
    assert programs.calls("docker stop") == [f"docker stop {NODE} {REGISTRY}"]
    assert "kind-airflow" in (tmp_path / "kubeconfig").read_text()


def test_purge_deletes_cluster_registry_and_context(programs: Programs, tmp_path: Path) -> None:
    programs.replay(RUNNING | {"kind delete cluster --name airflow": [{}], "docker rm": [{}]})
    kind.up(Silent())
    kind.down(Silent(), purge=True)
    assert programs.calls("kind delete") == ["kind delete cluster --name airflow"]
    assert programs.calls("docker rm") == [f"docker rm --force --volumes {REGISTRY}"]
    assert yaml.safe_load((tmp_path / "kubeconfig").read_text())["contexts"] == []


def test_purge_of_nothing_is_no_failure(programs: Programs) -> None:
    programs.replay(
        {
            "kind get clusters": [NO_CLUSTERS],
            "kind delete cluster --name airflow": [{}],
            f"docker inspect --type container {REGISTRY}": [NO_CONTAINER],
        }
    )
    kind.down(Silent(), purge=True)
    assert programs.calls("docker rm") == []


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ({}, "running"),
        ({"kind get clusters": [NO_CLUSTERS]}, "absent"),
        ({f"docker inspect --type container {REGISTRY}": [container(running=False)]}, "degraded"),
        ({f"docker inspect --type container {NODE}": [container(running=False)]}, "stopped"),
        (
            {
                f"docker exec --interactive {NODE} kubectl --kubeconfig=/etc/kubernetes/admin.conf get nodes": [
                    {"out": "False"}
                ]
            },
            "degraded",
        ),
    ],
)
def test_states(programs: Programs, change: dict[str, list[dict[str, Any]]], state: str) -> None:
    programs.replay(RUNNING | change)
    assert kind.status().state == state


def test_why_kind_cannot_be_used(programs: Programs, tmp_path: Path) -> None:
    programs.replay(RUNNING)
    assert kind.unsupported() is None
    refused = "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?\n"
    programs.replay({"docker version": [{"err": refused, "code": 1}]})
    assert "Is the docker daemon running" in (kind.unsupported() or "")
    (tmp_path / "bin" / "kind").unlink()
    assert kind.unsupported() == "there is no `kind` program"
    with pytest.raises(LocalClusterError, match="there is no `kind` program") as caught:
        kind.up(Silent())
    assert "native" in caught.value.hint


def test_on_macos_the_registry_has_another_port() -> None:
    assert kind.registry_port("darwin") == 5001
    assert kind.registry_port("linux") == 5000
