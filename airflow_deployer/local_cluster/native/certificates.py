"""The cluster's certificates, made by the `openssl` program: one CA, and one key pair for each who must prove a name.

Keys are on the P-256 curve: made in milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .commands import run
from .layout import Layout

_DAYS = "3650"
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


@dataclass(frozen=True)
class Certificate:
    """One to be issued by the cluster's CA.

    Args:
        name: stem of its files.
        common_name: the user name that Kubernetes takes from it.
        organization: the group that Kubernetes takes from it.
        addresses: its subject alternative names, as openssl writes them (`DNS:localhost`, `IP:127.0.0.1`).
    """

    name: str
    common_name: str
    organization: str = ""
    addresses: tuple[str, ...] = ()

    def subject(self) -> str:
        """The subject as openssl takes it."""
        organization = f"/O={self.organization}" if self.organization else ""
        return f"{organization}/CN={self.common_name}"


def certificates(node_name: str, node_address: str, service_address: str) -> list[Certificate]:
    """All of the cluster's certificates."""
    local = ("DNS:localhost", "IP:127.0.0.1")
    service = tuple(f"DNS:{n}" for n in ("kubernetes", "kubernetes.default", "kubernetes.default.svc"))
    return [
        Certificate("etcd", "etcd", addresses=local),
        Certificate("apiserver", "kube-apiserver", addresses=(*local, *service, f"IP:{service_address}")),
        Certificate("apiserver-client", "kube-apiserver", "system:masters"),
        Certificate("admin", "airflow-native-admin", "system:masters"),
        Certificate("controller-manager", "system:kube-controller-manager"),
        Certificate("scheduler", "system:kube-scheduler"),
        Certificate("provisioner", "airflow-deployer-provisioner", "system:masters"),
        Certificate("kubelet", f"system:node:{node_name}", "system:nodes", (f"DNS:{node_name}", f"IP:{node_address}")),
    ]


def certificate_path(layout: Layout, name: str) -> Path:
    """Where a certificate is."""
    return layout.certificates / f"{name}.crt"


def key_path(layout: Layout, name: str) -> Path:
    """Where its key is, readable by its owner alone."""
    return layout.certificates / f"{name}.key"


def _openssl(layout: Layout, *arguments: str | Path) -> None:
    log = layout.logs / "certificates.log"
    run(["openssl", *arguments], action="making a certificate", state=layout.state, log=log, timeout=60)


def _install(layout: Layout, names: Sequence[str], note: str, stem: str) -> None:
    # The note comes last: what an interrupted run left without it is made again.
    for name in names:
        path = layout.certificates / f"{name}.new"
        path.chmod(0o600)
        path.replace(layout.certificates / name)
    (layout.certificates / f"{stem}.json").write_text(note)


def _is_current(layout: Layout, stem: str, note: str, names: Sequence[str]) -> bool:
    try:
        same = (layout.certificates / f"{stem}.json").read_text() == note
    except OSError:
        return False
    return same and all((layout.certificates / name).exists() for name in names)


def ensure_certificates(layout: Layout, wanted: Sequence[Certificate]) -> None:
    """Have the CA, the service-account key pair and the wanted certificates; what is there and right stays.

    Raises:
        LocalClusterError: openssl failed.
    """
    ca = ("ca.crt", "ca.key")
    if not _is_current(layout, "ca", "{}", ca):
        _openssl(
            layout, "req", "-x509", *_NEW_KEY, "-days", _DAYS, "-subj", "/CN=airflow-native-ca",
            "-addext", "basicConstraints=critical,CA:true", "-addext", "keyUsage=critical,keyCertSign,cRLSign",
            "-keyout", layout.certificates / "ca.key.new", "-out", layout.certificates / "ca.crt.new",
        )  # fmt: skip
        _install(layout, ca, "{}", "ca")
    accounts = ("service-accounts.key", "service-accounts.pub")
    if not _is_current(layout, "service-accounts", "{}", accounts):
        key = layout.certificates / "service-accounts.key.new"
        _openssl(layout, "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", key)
        _openssl(layout, "pkey", "-in", key, "-pubout", "-out", layout.certificates / "service-accounts.pub.new")
        _install(layout, accounts, "{}", "service-accounts")
    ca_certificate = (layout.certificates / "ca.crt").read_text()
    for certificate in wanted:
        files = (f"{certificate.name}.crt", f"{certificate.name}.key")
        note = json.dumps({"certificate": asdict(certificate), "ca": ca_certificate})
        if _is_current(layout, certificate.name, note, files):
            continue
        extensions = ["-addext", "basicConstraints=CA:false", "-addext", "extendedKeyUsage=serverAuth,clientAuth"]
        if certificate.addresses:
            extensions += ["-addext", f"subjectAltName={','.join(certificate.addresses)}"]
        _openssl(
            layout, "req", "-x509", "-CA", layout.certificates / "ca.crt", "-CAkey", layout.certificates / "ca.key",
            *_NEW_KEY, "-days", _DAYS, "-subj", certificate.subject(), *extensions,
            "-keyout", layout.certificates / f"{files[1]}.new", "-out", layout.certificates / f"{files[0]}.new",
        )  # fmt: skip
        _install(layout, files, note, certificate.name)
