"""The node: the containerd that runs the pods, and the kubelet."""

from __future__ import annotations

import http.client
import json

from airflow_deployer.errors import LocalClusterError

from .api import SERVER
from .certificates import certificate_path, key_path
from .commands import read
from .images import PAUSE
from .kubeconfigs import write_kubeconfig
from .kubernetes_build import binary
from .layout import NODE_NAME, Layout
from .network import CNI_PROGRAMS, PodNetwork, resolver
from .processes import ProcessSpec, ProcessTable

_HEALTH_PORT = 10248
# Seconds that containerd may take to restore what ran before it was stopped.
_RESTORING = 60


def containerd_configuration(layout: Layout) -> str:
    """containerd's config.toml (version 2). A JSON string is a TOML string.

    `restrict_oom_score_adj`: without CAP_SYS_RESOURCE (a container, a restricted machine) no pod could start
    otherwise. Every socket and directory is ours, so that Docker's containerd is not disturbed.
    """
    cri = "io.containerd.grpc.v1.cri"

    def text(value: object) -> str:
        return json.dumps(str(value))

    return f"""version = 2
root = {text(layout.containerd)}
state = {text(layout.run / "containerd")}
oom_score = 0
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.aufs", \
"io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]

[grpc]
  address = {text(layout.containerd_socket)}

[ttrpc]
  address = {text(str(layout.containerd_socket) + ".ttrpc")}

[plugins."{cri}"]
  sandbox_image = {text(PAUSE)}
  restrict_oom_score_adj = true
  disable_apparmor = true
  netns_mounts_under_state_dir = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  [plugins."{cri}".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."{cri}".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
  [plugins."{cri}".cni]
    bin_dir = {text(CNI_PROGRAMS)}
    conf_dir = {text(layout.cni)}
  [plugins."{cri}".registry]
    config_path = {text(layout.certs_d)}
"""


def kubelet_configuration(layout: Layout, network: PodNetwork, resolv_conf: str, dns: list[str]) -> dict[str, object]:
    """KubeletConfiguration v1beta1.

    Pods of the default DNS policy get the machine's own name servers: there is no cluster DNS, and the list being set
    keeps the kubelet from warning about that at every pod. Thresholds for eviction are low: a developer's disk is
    often nearly full, and that must not evict the database. The node's status is looked at every 2 s instead of
    every 10 s, so that a restart is Ready sooner; it is still sent only when it changes.
    """
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": network.node,
        "healthzBindAddress": "127.0.0.1",
        "healthzPort": _HEALTH_PORT,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(certificate_path(layout, "ca"))},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(certificate_path(layout, "kubelet")),
        "tlsPrivateKeyFile": str(key_path(layout, "kubelet")),
        "cgroupDriver": "cgroupfs",
        "failSwapOn": False,
        "makeIPTablesUtilChains": False,
        "clusterDNS": dns,
        "clusterDomain": "cluster.local",
        "resolvConf": resolv_conf,
        "serializeImagePulls": False,
        "nodeStatusUpdateFrequency": "2s",
        "volumePluginDir": str(layout.volume_plugins),
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
        "oomScoreAdj": 0,
        "featureGates": {"DevicePlugins": False},
    }


def containerd_spec(layout: Layout) -> ProcessSpec:
    """The pods' containerd."""
    path = layout.configuration / "containerd.toml"
    path.write_text(containerd_configuration(layout))
    return ProcessSpec("containerd", ("/usr/bin/containerd", "--config", str(path)), inputs=(path,))


def kubelet_spec(layout: Layout, network: PodNetwork) -> ProcessSpec:
    """The kubelet (flags of 1.20)."""
    resolv_conf, dns = resolver()
    path = layout.configuration / "kubelet.json"
    # At most three name servers fit into a resolv.conf.
    path.write_text(json.dumps(kubelet_configuration(layout, network, str(resolv_conf), dns[:3]), indent=2))
    kubeconfig = write_kubeconfig(layout, "kubelet", SERVER)
    arguments = (
        str(binary(layout, "kubelet")),
        f"--config={path}",
        f"--kubeconfig={kubeconfig}",
        f"--root-dir={layout.kubelet}",
        f"--hostname-override={NODE_NAME}",
        f"--node-ip={network.node}",
        "--container-runtime=remote",
        f"--container-runtime-endpoint=unix://{layout.containerd_socket}",
    )
    return ProcessSpec("kubelet", arguments, inputs=(path, kubeconfig, certificate_path(layout, "kubelet")))


def _containerd_answers(layout: Layout) -> bool:
    if not layout.containerd_socket.exists():
        return False
    try:
        read(
            ["ctr", "--address", layout.containerd_socket, "--timeout", "2s", "version"],
            action="asking containerd",
            state=layout.state,
        )
    except LocalClusterError:
        return False
    return True


def kubelet_is_healthy() -> bool:
    """Whether the kubelet's health endpoint answers with 200."""
    connection = http.client.HTTPConnection("127.0.0.1", _HEALTH_PORT, timeout=5)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def ensure_node(layout: Layout, table: ProcessTable, network: PodNetwork) -> None:
    """Have containerd and the kubelet run and answer.

    Raises:
        LocalClusterError: one of them does not start.
    """
    layout.certs_d.mkdir(parents=True, exist_ok=True)
    started = table.ensure(containerd_spec(layout))
    if started:
        table.wait("containerd", lambda: _containerd_answers(layout), timeout=30)
    # containerd answers before it has restored the pods of its last life ("server is not initialized yet"): asked by
    # then, the kubelet ends. None of Debian's programs can ask whether it has.
    table.start_until_ready(
        kubelet_spec(layout, network), kubelet_is_healthy, timeout=60, restarting_for=_RESTORING if started else 0
    )
