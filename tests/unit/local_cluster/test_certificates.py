"""Certificates, made by the real openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path

from airflow_deployer.local_cluster.native.certificates import (
    Certificate,
    certificate_path,
    certificates,
    ensure_certificates,
    key_path,
)
from airflow_deployer.local_cluster.native.layout import Layout


def openssl(*arguments: str | Path) -> str:
    return subprocess.run(["openssl", *arguments], check=True, capture_output=True, text=True).stdout


def test_certificates_are_signed_by_the_ca_and_carry_names(layout: Layout) -> None:
    wanted = [
        Certificate("server", "kube-apiserver", addresses=("DNS:localhost", "IP:127.0.0.1")),
        Certificate("admin", "admin", "system:masters"),
    ]
    ensure_certificates(layout, wanted)
    for certificate in wanted:
        openssl("verify", "-CAfile", certificate_path(layout, "ca"), certificate_path(layout, certificate.name))
    subject = openssl("x509", "-noout", "-subject", "-nameopt", "RFC2253", "-in", certificate_path(layout, "admin"))
    assert subject.strip() == "subject=CN=admin,O=system:masters"
    names = openssl("x509", "-noout", "-ext", "subjectAltName", "-in", certificate_path(layout, "server"))
    assert "DNS:localhost, IP Address:127.0.0.1" in names
    assert layout.certificates.parent.stat().st_mode & 0o777 == 0o700
    for path in layout.certificates.iterdir():
        if path.suffix == ".key":
            assert path.stat().st_mode & 0o777 == 0o600
        assert path.suffix != ".new"


def test_what_is_right_stays_and_what_changed_is_made_again(layout: Layout) -> None:
    first = Certificate("one", "one", addresses=("IP:127.0.0.1",))
    second = Certificate("two", "two")
    ensure_certificates(layout, [first, second])
    before = {path.name: path.read_bytes() for path in layout.certificates.iterdir()}
    ensure_certificates(layout, [first, second])
    assert {path.name: path.read_bytes() for path in layout.certificates.iterdir()} == before
    key_path(layout, "two").unlink()
    ensure_certificates(layout, [Certificate("one", "one", addresses=("IP:192.0.2.1",)), second])
    after = {path.name: path.read_bytes() for path in layout.certificates.iterdir()}
    assert after["one.crt"] != before["one.crt"]
    assert after["two.crt"] != before["two.crt"]
    assert after["ca.crt"] == before["ca.crt"]
    assert after["service-accounts.key"] == before["service-accounts.key"]


def test_a_new_ca_renews_everything(layout: Layout) -> None:
    wanted = [Certificate("one", "one")]
    ensure_certificates(layout, wanted)
    (layout.certificates / "ca.key").unlink()
    ensure_certificates(layout, wanted)
    openssl("verify", "-CAfile", certificate_path(layout, "ca"), certificate_path(layout, "one"))


def test_the_clusters_certificates_name_who_kubernetes_expects() -> None:
    wanted = {c.name: c for c in certificates("node-1", "10.244.0.1", "10.96.0.1")}
    assert wanted["kubelet"].subject() == "/O=system:nodes/CN=system:node:node-1"
    assert wanted["kubelet"].addresses == ("DNS:node-1", "IP:10.244.0.1")
    assert wanted["scheduler"].subject() == "/CN=system:kube-scheduler"
    assert {"IP:127.0.0.1", "IP:10.96.0.1", "DNS:kubernetes.default.svc"} <= set(wanted["apiserver"].addresses)
