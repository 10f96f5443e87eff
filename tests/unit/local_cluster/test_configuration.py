"""What the native cluster's processes are told: arguments and configuration files."""

from __future__ import annotations

import importlib
import ipaddress
import json
import sys

import yaml

from airflow_deployer.local_cluster.native import control_plane, docker_engine, node, registry
from airflow_deployer.local_cluster.native.layout import Layout
from airflow_deployer.local_cluster.native.network import PodNetwork
from airflow_deployer.local_cluster.registry_hosting import make_config_map

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

NETWORK = PodNetwork(ipaddress.IPv4Network("10.244.0.0/24"), 1500)


def flags(argv: tuple[str, ...]) -> dict[str, str]:
    return dict(argument.removeprefix("--").split("=", 1) for argument in argv[1:])


def test_nothing_of_the_control_plane_listens_on_the_outside(layout: Layout) -> None:
    etcd = flags(control_plane.etcd_spec(layout).argv)
    assert etcd["client-cert-auth"] == etcd["peer-client-cert-auth"] == "true"
    for name in ("listen-client-urls", "listen-peer-urls"):
        assert etcd[name].startswith("https://127.0.0.1:")
    for spec in (
        control_plane.apiserver_spec(layout, NETWORK),
        control_plane.controller_manager_spec(layout),
        control_plane.scheduler_spec(layout),
    ):
        found = flags(spec.argv)
        assert found["bind-address"] == "127.0.0.1"
        assert found.get("insecure-port", found.get("port")) == "0"


def test_the_api_server_reaches_the_kubelet_by_address_and_checks_it(layout: Layout) -> None:
    found = flags(control_plane.apiserver_spec(layout, NETWORK).argv)
    assert found["kubelet-preferred-address-types"] == "InternalIP"
    assert found["kubelet-certificate-authority"] == str(layout.certificates / "ca.crt")
    assert found["authorization-mode"] == "Node,RBAC"
    assert found["endpoint-reconciler-type"] == "none"


def test_kubeconfigs_of_the_parts_name_files(layout: Layout) -> None:
    found = flags(control_plane.scheduler_spec(layout).argv)
    content = json.loads((layout.configuration / "scheduler.kubeconfig").read_text())
    assert found["kubeconfig"] == str(layout.configuration / "scheduler.kubeconfig")
    assert content["users"][0]["user"]["client-key"] == str(layout.certificates / "scheduler.key")


def test_containerd_keeps_everything_in_directories_of_its_own(layout: Layout) -> None:
    content = tomllib.loads(node.containerd_configuration(layout))
    cri = content["plugins"]["io.containerd.grpc.v1.cri"]
    assert content["root"] == str(layout.containerd)
    assert content["state"].startswith(str(layout.run))
    assert content["grpc"]["address"] == str(layout.containerd_socket)
    assert content["ttrpc"]["address"].startswith(str(layout.run))
    assert cri["netns_mounts_under_state_dir"] is True
    assert cri["restrict_oom_score_adj"] is True
    assert cri["sandbox_image"] == "localhost:5000/airflow-deployer/pause:1"
    assert cri["registry"]["config_path"] == str(layout.certs_d)
    assert cri["cni"] == {"bin_dir": "/usr/lib/cni", "conf_dir": str(layout.cni)}


def test_the_kubelet_listens_for_the_cluster_alone_and_asks_who_calls(layout: Layout) -> None:
    content = node.kubelet_configuration(layout, NETWORK, "/etc/resolv.conf", ["192.0.2.1"])
    assert content["address"] == "10.244.0.1"
    assert content["healthzBindAddress"] == "127.0.0.1"
    assert content["authentication"] == {
        "anonymous": {"enabled": False},
        "webhook": {"enabled": True},
        "x509": {"clientCAFile": str(layout.certificates / "ca.crt")},
    }
    assert content["clusterDNS"] == ["192.0.2.1"]
    assert content["cgroupDriver"] == "cgroupfs"


def test_docker_is_given_directories_of_its_own_and_the_default_socket(layout: Layout) -> None:
    content = docker_engine.configuration(layout, 1400)
    assert content["data-root"] == str(layout.docker)
    assert content["hosts"] == ["unix:///var/run/docker.sock"]
    assert content["mtu"] == 1400


def test_the_registry_listens_on_loopback(layout: Layout) -> None:
    content = yaml.safe_load(registry.configuration(layout))
    assert content["http"] == {"addr": "127.0.0.1:5000"}
    assert content["storage"]["filesystem"]["rootdirectory"] == str(layout.registry)


def test_the_cluster_tells_where_its_registry_is() -> None:
    config_map = make_config_map("localhost:5001", "localhost:5000")
    assert config_map["metadata"] == {"name": "local-registry-hosting", "namespace": "kube-public"}
    mirrored = make_config_map("localhost:5000", "localhost:5000", mirror="localhost:5000")
    assert mirrored["metadata"]["annotations"] == {"airflow-deployer/mirror": "localhost:5000"}
    hosting = yaml.safe_load(config_map["data"]["localRegistryHosting.v1"])
    assert hosting["host"] == "localhost:5001"
    assert hosting["hostFromContainerRuntime"] == "localhost:5000"
    assert hosting["help"].startswith("https://")
