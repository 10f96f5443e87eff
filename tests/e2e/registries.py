"""Real registries for tests: `docker-registry` with a login, a token server, TLS by our own authority, read-only."""

from __future__ import annotations

import base64
import datetime
import http.client
import ipaddress
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID

USERNAME, PASSWORD = "ada", "s3cret-password"
# bcrypt of PASSWORD, the only hash that docker-registry knows; its cost is the lowest on purpose.
HTPASSWD = f"{USERNAME}:$2b$05$abcdefghijklmnopqrstuuUXKlvQTwfK/kphhjbeRlh5zvpJx1LLu\n"
DOCKER_CERTIFICATES = Path("/etc/docker/certs.d")


@dataclass(frozen=True)
class Authority:
    """A certificate authority of our own."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        """Its certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)


@dataclass(frozen=True)
class RunningRegistry:
    """A registry that answers.

    Attributes:
        host: `host:port`.
        folder: where its configuration and certificates are.
        storage: where it keeps images.
    """

    host: str
    folder: Path
    storage: Path

    def uploads(self) -> list[Path]:
        """Unfinished uploads (of one that was taken back, docker-registry leaves an empty folder)."""
        return list(self.storage.glob("docker/registry/v2/repositories/**/_uploads/*/startedat"))


def make_authority() -> Authority:
    """Make an authority that is valid for a day."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "airflow-deployer tests")])
    builder = _certificate(name, name, key.public_key())
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return Authority(builder.sign(key, hashes.SHA256()), key)


def engine_address() -> str:
    """An address of this machine that is not loopback, where Docker Engine insists on TLS: its own bridge."""
    import docker

    client = docker.from_env()
    try:
        bridge = client.networks.get("bridge").attrs["IPAM"]["Config"][0]
        # An engine that has never been restarted does not tell the gateway; it is the subnet's first address.
        return str(bridge.get("Gateway") or next(ipaddress.ip_network(bridge["Subnet"]).hosts()))
    finally:
        client.close()


def trust(host: str, authority: Authority) -> None:
    """Let Docker Engine (and us) trust the authority for one registry."""
    folder = DOCKER_CERTIFICATES / host
    folder.mkdir(parents=True)
    (folder / "ca.crt").write_bytes(authority.pem)


def docker_config(folder: Path, host: str, username: str = USERNAME, password: str = PASSWORD) -> Path:
    """A folder for `DOCKER_CONFIG` with one login."""
    folder.mkdir(parents=True, exist_ok=True)
    auth = base64.b64encode(f"{username}:{password}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return folder


@contextmanager
def run_registry(
    folder: Path,
    *,
    address: str = "127.0.0.1",
    authority: Authority | None = None,
    certificate_for: str = "",
    login: bool = False,
    token_realm: str = "",
    read_only: bool = False,
) -> Iterator[RunningRegistry]:
    """Run `docker-registry` until the block ends; what was put into `certs.d` for it goes, too.

    Args:
        folder: a new folder for all its files.
        address: what it listens on.
        authority: signs its certificate; None speaks plain HTTP.
        certificate_for: the address in its certificate, if not its own.
        login: ask for `USERNAME` and `PASSWORD`.
        token_realm: URL of a token server (`run_token_server`), whose authority must be `authority`.
        read_only: take no pushes.
    """
    folder.mkdir(parents=True)
    storage = folder / "storage"
    port = _free_port(address)
    config: dict[str, object] = {
        "version": "0.1",
        "log": {"level": "warn"},
        "storage": {"filesystem": {"rootdirectory": str(storage)}, "delete": {"enabled": True}},
        "http": {"addr": f"{address}:{port}"},
    }
    if read_only:
        config["storage"] = {
            "filesystem": {"rootdirectory": str(storage)},
            "maintenance": {"readonly": {"enabled": True}},
        }
    if authority is not None:
        (folder / "ca.pem").write_bytes(authority.pem)
        if not token_realm:
            tls = _write_certificate(folder, authority, certificate_for or address)
            config["http"] = {"addr": f"{address}:{port}", "tls": tls}
    if login:
        (folder / "htpasswd").write_text(HTPASSWD)
        config["auth"] = {"htpasswd": {"realm": "tests", "path": str(folder / "htpasswd")}}
    if token_realm:
        config["auth"] = {
            "token": {
                "realm": token_realm,
                "service": "registry.test",
                "issuer": "issuer.test",
                "rootcertbundle": str(folder / "ca.pem"),
            }
        }
    (folder / "config.yml").write_text(json.dumps(config))  # JSON is YAML
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(folder / "config.yml")], stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    try:
        _wait_for(address, port, process, folder / "log")
        yield RunningRegistry(f"{address}:{port}", folder, storage)
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(DOCKER_CERTIFICATES / f"{address}:{port}", ignore_errors=True)


@contextmanager
def run_token_server(authority: Authority) -> Iterator[tuple[str, list[str]]]:
    """A token server (distribution's "Token Authentication Specification"): its URL, and the scopes it was asked for.

    No Debian package holds one, so this is ours; the registry behind it is real and checks its tokens.
    """
    scopes: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            login = base64.b64encode(f"{USERNAME}:{PASSWORD}".encode()).decode()
            allowed = self.headers.get("Authorization") == f"Basic {login}"
            self._answer(query.get("scope", []), allowed)

        def do_POST(self) -> None:
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            allowed = form["grant_type"] == ["refresh_token"] and form["refresh_token"] == [PASSWORD]
            self._answer(form.get("scope", []), allowed)

        def _answer(self, asked: list[str], allowed: bool) -> None:
            scopes.extend(asked)
            body = json.dumps({"token": _token(authority, asked)} if allowed else {"details": "no"}).encode()
            self.send_response(http.client.OK if allowed else http.client.UNAUTHORIZED)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/token", scopes
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _token(authority: Authority, scopes: list[str]) -> str:
    now = int(time.time())
    access = []
    for scope in scopes:
        kind, name, actions = scope.split(":")
        access.append({"type": kind, "name": name, "actions": actions.split(",")})
    chain = base64.b64encode(authority.certificate.public_bytes(serialization.Encoding.DER)).decode()
    header = {"typ": "JWT", "alg": "ES256", "x5c": [chain]}
    claims = {
        "iss": "issuer.test",
        "sub": USERNAME,
        "aud": "registry.test",
        "exp": now + 300,
        "nbf": now - 10,
        "iat": now,
        "jti": str(now),
        "access": access,
    }
    signed = b".".join(_encoded(json.dumps(part).encode()) for part in (header, claims))
    r, s = decode_dss_signature(authority.key.sign(signed, ec.ECDSA(hashes.SHA256())))
    return (signed + b"." + _encoded(r.to_bytes(32, "big") + s.to_bytes(32, "big"))).decode()


def _encoded(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
    )


def _write_certificate(folder: Path, authority: Authority, address: str) -> dict[str, str]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "registry")])
    builder = _certificate(name, authority.certificate.subject, key.public_key()).add_extension(
        x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False
    )
    certificate = builder.sign(authority.key, hashes.SHA256())
    (folder / "tls.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "tls.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return {"certificate": str(folder / "tls.crt"), "key": str(folder / "tls.key")}


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def _wait_for(address: str, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection((address, port), timeout=1).close()
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
