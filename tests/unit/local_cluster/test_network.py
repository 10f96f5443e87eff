"""The pod network's pure parts."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from airflow_deployer.errors import LocalClusterError
from airflow_deployer.local_cluster.native.layout import Layout
from airflow_deployer.local_cluster.native.network import (
    PodNetwork,
    choose_subnet,
    cni_configuration,
    forward_policy,
    nameservers,
)


def test_the_first_free_subnet_is_chosen() -> None:
    assert str(choose_subnet([])) == "10.244.0.0/24"
    assert str(choose_subnet(["192.0.2.0/24", "10.244.0.0/16"])) == "10.245.0.0/24"
    assert str(choose_subnet(["10.0.0.0/8"])) == "172.29.244.0/24"


def test_no_free_subnet_is_an_error() -> None:
    with pytest.raises(LocalClusterError, match=r"10\.244\.0\.0/24"):
        choose_subnet(["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"])


def test_cni_configuration() -> None:
    layout = Layout(state=Path("/state"))
    network = PodNetwork(ipaddress.IPv4Network("10.245.0.0/24"), 1400)
    assert network.node == "10.245.0.1"
    assert cni_configuration(layout, network) == {
        "cniVersion": "0.4.0",
        "name": "airflow-native",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "airflow0",
                "isGateway": True,
                "ipMasq": False,
                "hairpinMode": True,
                "mtu": 1400,
                "ipam": {
                    "type": "host-local",
                    "dataDir": "/state/addresses",
                    "ranges": [[{"subnet": "10.245.0.0/24"}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            }
        ],
    }


def test_name_servers_that_a_pod_can_reach() -> None:
    text = "# x\nsearch example\nnameserver 127.0.0.53\nnameserver ::1\nnameserver 192.0.2.1\nnameserver fe80::1%eth0\n"
    assert nameservers(text) == ["192.0.2.1", "fe80::1%eth0"]
    assert nameservers("nameserver\nnameserver nonsense\n") == []


def test_forward_policy() -> None:
    assert forward_policy("-P FORWARD DROP\n-A FORWARD -j X\n") == "DROP"
    assert forward_policy("") == "ACCEPT"
