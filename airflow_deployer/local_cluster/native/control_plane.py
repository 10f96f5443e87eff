"""etcd and the Kubernetes control plane: arguments of kube-apiserver, kube-controller-manager and kube-scheduler.

Flags are those of Kubernetes 1.20 and etcd 3.4. Everything listens on 127.0.0.1 and asks for a client certificate.
"""

from __future__ import annotations

import socket
from pathlib import Path

from .api import API_PORT, SERVER, Api
from .certificates import certificate_path, key_path
from .kubeconfigs import write_kubeconfig
from .kubernetes_build import binary
from .layout import Layout
from .network import PodNetwork
from .processes import ProcessSpec, ProcessTable

SERVICE_RANGE = "10.96.0.0/16"
SERVICE_ADDRESS = "10.96.0.1"
_ETCD_PORT = 12379
_ETCD = f"https://127.0.0.1:{_ETCD_PORT}"
_ETCD_PEER = "https://127.0.0.1:12380"
_ISSUER = "https://kubernetes.default.svc"


def _flags(flags: dict[str, str | Path | int]) -> tuple[str, ...]:
    return tuple(f"--{name}={value}" for name, value in flags.items())


def etcd_spec(layout: Layout) -> ProcessSpec:
    """The store. Without fsync it is quick; after a power failure the cluster may have to be made anew."""
    certificate, key, ca = certificate_path(layout, "etcd"), key_path(layout, "etcd"), certificate_path(layout, "ca")
    flags: dict[str, str | Path | int] = {
        "name": "airflow-native",
        "data-dir": layout.etcd,
        "listen-client-urls": _ETCD,
        "advertise-client-urls": _ETCD,
        "listen-peer-urls": _ETCD_PEER,
        "initial-advertise-peer-urls": _ETCD_PEER,
        "initial-cluster": f"airflow-native={_ETCD_PEER}",
        "cert-file": certificate,
        "key-file": key,
        "trusted-ca-file": ca,
        "client-cert-auth": "true",
        "peer-cert-file": certificate,
        "peer-key-file": key,
        "peer-trusted-ca-file": ca,
        "peer-client-cert-auth": "true",
        "unsafe-no-fsync": "true",
        "logger": "zap",
        "log-level": "warn",
    }
    return ProcessSpec("etcd", ("/usr/bin/etcd", *_flags(flags)), inputs=(certificate, ca))


def apiserver_spec(layout: Layout, network: PodNetwork) -> ProcessSpec:
    """The API server. It reaches the kubelet by address: the node's name resolves nowhere."""
    ca = certificate_path(layout, "ca")
    flags: dict[str, str | Path | int] = {
        "bind-address": "127.0.0.1",
        "secure-port": API_PORT,
        "insecure-port": 0,
        "advertise-address": network.node,
        "endpoint-reconciler-type": "none",
        "etcd-servers": _ETCD,
        "etcd-cafile": ca,
        "etcd-certfile": certificate_path(layout, "apiserver-client"),
        "etcd-keyfile": key_path(layout, "apiserver-client"),
        "tls-cert-file": certificate_path(layout, "apiserver"),
        "tls-private-key-file": key_path(layout, "apiserver"),
        "client-ca-file": ca,
        "kubelet-certificate-authority": ca,
        "kubelet-client-certificate": certificate_path(layout, "apiserver-client"),
        "kubelet-client-key": key_path(layout, "apiserver-client"),
        "kubelet-preferred-address-types": "InternalIP",
        "service-cluster-ip-range": SERVICE_RANGE,
        "service-account-issuer": _ISSUER,
        "service-account-signing-key-file": key_path(layout, "service-accounts"),
        "service-account-key-file": layout.certificates / "service-accounts.pub",
        "authorization-mode": "Node,RBAC",
        "enable-admission-plugins": "NodeRestriction",
        "allow-privileged": "true",
        "profiling": "false",
    }
    program = str(binary(layout, "kube-apiserver"))
    inputs = (ca, certificate_path(layout, "apiserver"), layout.certificates / "service-accounts.pub")
    return ProcessSpec("kube-apiserver", (program, *_flags(flags)), inputs=inputs)


def controller_manager_spec(layout: Layout) -> ProcessSpec:
    """The controllers. There is one of each, so electing a leader would only cost seconds at the start."""
    kubeconfig = write_kubeconfig(layout, "controller-manager", SERVER)
    flags: dict[str, str | Path | int] = {
        "kubeconfig": kubeconfig,
        "authentication-kubeconfig": kubeconfig,
        "authorization-kubeconfig": kubeconfig,
        "bind-address": "127.0.0.1",
        "port": 0,
        "leader-elect": "false",
        "flex-volume-plugin-dir": layout.volume_plugins,
        "use-service-account-credentials": "true",
        "service-account-private-key-file": key_path(layout, "service-accounts"),
        "root-ca-file": certificate_path(layout, "ca"),
        "cluster-signing-cert-file": certificate_path(layout, "ca"),
        "cluster-signing-key-file": key_path(layout, "ca"),
        "profiling": "false",
    }
    program = str(binary(layout, "kube-controller-manager"))
    inputs = (kubeconfig, certificate_path(layout, "controller-manager"))
    return ProcessSpec("kube-controller-manager", (program, *_flags(flags)), inputs=inputs)


def scheduler_spec(layout: Layout) -> ProcessSpec:
    """The scheduler, without leader election for the same reason."""
    kubeconfig = write_kubeconfig(layout, "scheduler", SERVER)
    flags: dict[str, str | Path | int] = {
        "kubeconfig": kubeconfig,
        "authentication-kubeconfig": kubeconfig,
        "authorization-kubeconfig": kubeconfig,
        "bind-address": "127.0.0.1",
        "port": 0,
        "leader-elect": "false",
        "profiling": "false",
    }
    program = str(binary(layout, "kube-scheduler"))
    return ProcessSpec(
        "kube-scheduler", (program, *_flags(flags)), inputs=(kubeconfig, certificate_path(layout, "scheduler"))
    )


def _etcd_listens() -> bool:
    try:
        socket.create_connection(("127.0.0.1", _ETCD_PORT), timeout=1).close()
    except OSError:
        return False
    return True


def ensure_control_plane(layout: Layout, table: ProcessTable, network: PodNetwork) -> None:
    """Have etcd and the API server answer, and start the controllers and the scheduler.

    Raises:
        LocalClusterError: one of them does not start.
    """
    layout.etcd.mkdir(exist_ok=True)
    layout.etcd.chmod(0o700)
    table.ensure(etcd_spec(layout))
    table.ensure(apiserver_spec(layout, network))
    # Both start at once; a store that does not must not look like a failure of the API server.
    hint = (
        "After a power failure its data may be damaged: `deployer cluster down --purge`, then up, makes a new cluster."
    )
    table.wait("etcd", _etcd_listens, timeout=30, hint=hint)
    table.wait("kube-apiserver", Api(layout).is_ready, timeout=60)
    table.ensure(controller_manager_spec(layout))
    table.ensure(scheduler_spec(layout))
