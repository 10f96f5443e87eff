"""The pod network: one bridge with the node's address on it, masquerading, and their removal.

The node's address is the bridge's, so it stays the same whatever happens to the machine's own interfaces, and nothing
of the cluster listens on the outside.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from airflow_deployer.errors import LocalClusterError

from .commands import read
from .layout import Layout

BRIDGE = "airflow0"
CNI_NETWORK = "airflow-native"
CNI_PROGRAMS = Path("/usr/lib/cni")
_CHAIN = "AIRFLOW-NATIVE"
_CANDIDATES = ("10.244.0.0/24", "10.245.0.0/24", "172.29.244.0/24", "192.168.244.0/24")
_DOCKER_CHAINS = ("DOCKER-USER", "DOCKER-ISOLATION-STAGE-1", "DOCKER-ISOLATION-STAGE-2", "DOCKER")


@dataclass(frozen=True)
class PodNetwork:
    """The pods' network. `node` is the bridge's address, which is the node's too."""

    subnet: ipaddress.IPv4Network
    mtu: int

    @property
    def node(self) -> str:
        """The first address of the subnet."""
        return str(next(self.subnet.hosts()))


def choose_subnet(taken: Iterable[str]) -> ipaddress.IPv4Network:
    """The first candidate that overlaps none of the networks that the machine routes to already.

    Raises:
        LocalClusterError: all are taken.
    """
    networks = [ipaddress.IPv4Network(network, strict=False) for network in taken]
    for candidate in map(ipaddress.IPv4Network, _CANDIDATES):
        if not any(candidate.overlaps(network) for network in networks):
            return candidate
    raise LocalClusterError(
        f"making the pod network failed: all of {', '.join(_CANDIDATES)} are in use on this machine",
        hint="See them with `ip route`.",
    )


def _record(layout: Layout) -> dict[str, str]:
    try:
        return dict(json.loads(layout.network_record.read_text()))
    except (OSError, ValueError):
        return {}


def _write_record(layout: Layout, record: dict[str, str]) -> None:
    layout.network_record.write_text(json.dumps(record))


def _ip(layout: Layout, *arguments: str) -> str:
    return read(["ip", *arguments], action=f"network set-up (ip {' '.join(arguments)})", state=layout.state)


def _iptables(layout: Layout, *arguments: str) -> str:
    return read(
        ["iptables", "-w", "10", *arguments],
        action=f"network set-up (iptables {' '.join(arguments)})",
        state=layout.state,
    )


def _try_iptables(layout: Layout, *arguments: str) -> bool:
    try:
        _iptables(layout, *arguments)
    except LocalClusterError:
        return False
    return True


def default_mtu(layout: Layout) -> int:
    """The MTU of the interface towards the default route; 1500 without one.

    A bridge with a larger one makes downloads in containers stall where path MTU discovery is filtered.
    """
    routes = json.loads(_ip(layout, "-json", "-4", "route", "show", "default") or "[]")
    if not routes:
        return 1500
    links = json.loads(_ip(layout, "-json", "link", "show", "dev", routes[0]["dev"]))
    return int(links[0]["mtu"])


def pod_network(layout: Layout) -> PodNetwork:
    """The pods' network: chosen once and kept, since etcd remembers addresses."""
    record = _record(layout)
    if "subnet" not in record:
        routes = json.loads(_ip(layout, "-json", "-4", "route", "show") or "[]")
        taken = [route["dst"] for route in routes if route["dst"] != "default" and route.get("dev") != BRIDGE]
        record["subnet"] = str(choose_subnet(taken))
        _write_record(layout, record)
    return PodNetwork(ipaddress.IPv4Network(record["subnet"]), default_mtu(layout))


def cni_configuration(layout: Layout, network: PodNetwork) -> dict[str, object]:
    """The CNI network list. Masquerading is ours (`ensure_network`): one rule instead of a chain per pod."""
    return {
        "cniVersion": "0.4.0",
        "name": CNI_NETWORK,
        "plugins": [
            {
                "type": "bridge",
                "bridge": BRIDGE,
                "isGateway": True,
                "ipMasq": False,
                "hairpinMode": True,
                "mtu": network.mtu,
                "ipam": {
                    "type": "host-local",
                    "dataDir": str(layout.addresses),
                    "ranges": [[{"subnet": str(network.subnet)}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            }
        ],
    }


def nameservers(resolv_conf: str) -> list[str]:
    """The name servers of a resolv.conf that a pod can reach: loopback ones are the machine's alone."""
    found = []
    for line in resolv_conf.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            with contextlib.suppress(ValueError):
                if not ipaddress.ip_address(words[1].partition("%")[0]).is_loopback:
                    found.append(words[1])
    return found


def resolver() -> tuple[Path, list[str]]:
    """The resolv.conf for pods and its name servers: systemd-resolved's real list where the machine's is a loopback."""
    path = Path("/etc/resolv.conf")
    for candidate in (path, Path("/run/systemd/resolve/resolv.conf")):
        with contextlib.suppress(OSError):
            servers = nameservers(candidate.read_text())
            if servers:
                return candidate, servers
    return path, []


def _ensure_rule(layout: Layout, table: str, chain: str, *rule: str, insert: bool = False) -> None:
    if not _try_iptables(layout, "-t", table, "-C", chain, *rule):
        _iptables(layout, "-t", table, "-I" if insert else "-A", chain, *rule)


def ensure_network(layout: Layout, network: PodNetwork) -> None:
    """Have the bridge, forwarding and masquerading.

    The FORWARD rules come first in their chain: Docker sets the chain's policy to DROP.
    """
    links = {link["ifname"] for link in json.loads(_ip(layout, "-json", "link", "show"))}
    if BRIDGE not in links:
        _ip(layout, "link", "add", BRIDGE, "type", "bridge")
    _ip(layout, "link", "set", BRIDGE, "mtu", str(network.mtu), "up")
    _ip(layout, "addr", "replace", f"{network.node}/{network.subnet.prefixlen}", "dev", BRIDGE)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    for table in ("filter", "nat"):
        if not _try_iptables(layout, "-t", table, "-n", "-L", _CHAIN):
            _iptables(layout, "-t", table, "-N", _CHAIN)
    _ensure_rule(layout, "filter", _CHAIN, "-i", BRIDGE, "-j", "ACCEPT")
    _ensure_rule(layout, "filter", _CHAIN, "-o", BRIDGE, "-j", "ACCEPT")
    _ensure_rule(layout, "filter", "FORWARD", "-j", _CHAIN, insert=True)
    subnet = str(network.subnet)
    _ensure_rule(layout, "nat", _CHAIN, "-s", subnet, "!", "-d", subnet, "-j", "MASQUERADE")
    _ensure_rule(layout, "nat", "POSTROUTING", "-j", _CHAIN)
    layout.cni.mkdir(parents=True, exist_ok=True)
    (layout.cni / "10-airflow-native.conflist").write_text(json.dumps(cni_configuration(layout, network), indent=2))


def remove_network(layout: Layout) -> None:
    """Take away the bridge (the pods' ends go with their namespaces) and our rules."""
    for table, chain in (("filter", "FORWARD"), ("nat", "POSTROUTING")):
        while _try_iptables(layout, "-t", table, "-D", chain, "-j", _CHAIN):
            pass
        if _try_iptables(layout, "-t", table, "-F", _CHAIN):
            _try_iptables(layout, "-t", table, "-X", _CHAIN)
    _remove_link(layout, BRIDGE)


def _remove_link(layout: Layout, name: str) -> None:
    if Path("/sys/class/net", name).exists():
        _ip(layout, "link", "delete", name)


def forward_policy(rules: str) -> str:
    """The policy in the output of `iptables -S FORWARD`, whose first line is `-P FORWARD <policy>`."""
    words = rules.split()
    return words[2] if words[:2] == ["-P", "FORWARD"] else "ACCEPT"


def remember_forward_policy(layout: Layout) -> None:
    """Note the FORWARD chain's policy before our Docker Engine changes it to DROP."""
    record = _record(layout)
    if "forward_policy" not in record:
        record["forward_policy"] = forward_policy(_iptables(layout, "-S", "FORWARD"))
        _write_record(layout, record)


def remove_docker_network(layout: Layout) -> None:
    """Take away what our Docker Engine left: docker0, its chains, the FORWARD policy."""
    record = _record(layout)
    policy = record.pop("forward_policy", None)
    if policy is None:
        return
    for table in ("filter", "nat"):
        for rule in _iptables(layout, "-t", table, "-S").splitlines():
            words = rule.split()
            if words[:1] == ["-A"] and ("docker0" in words or any(chain in words for chain in _DOCKER_CHAINS)):
                _try_iptables(layout, "-t", table, "-D", *words[1:])
        for chain in _DOCKER_CHAINS:
            if _try_iptables(layout, "-t", table, "-F", chain):
                _try_iptables(layout, "-t", table, "-X", chain)
    _iptables(layout, "-P", "FORWARD", policy)
    _remove_link(layout, "docker0")
    _write_record(layout, record)
