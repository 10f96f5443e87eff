"""Image references, and what a registry answers over HTTP: is it there, may we push, which digest has a tag."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import ssl
import warnings
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit, urlunsplit

from airflow_deployer.errors import RegistryError

if TYPE_CHECKING:
    import urllib3

    from airflow_deployer.config import Images

DOCKER_HUB = "docker.io"
DOCKER_HUB_ENDPOINT = "registry-1.docker.io"
DOCKER_HUB_LOGIN = "https://index.docker.io/v1/"
DEFAULT_REGISTRY = "localhost:5000"
MIRROR_ANNOTATION = "airflow-deployer/mirror"
"""On the ConfigMap local-registry-hosting: names a registry that holds the public images as well."""
USER_AGENT = "airflow-deployer"

_MANIFEST_TYPES = ", ".join(
    (
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.oci.image.index.v1+json",
    )
)

# distribution/reference: the grammar of image references.
_HOST_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_HOST = re.compile(rf"(?:{_HOST_LABEL}(?:\.{_HOST_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[\w][\w.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,}")


def is_registry_host(text: str) -> bool:
    """Whether `text` is `host` or `host:port` as it may stand in front of an image's name."""
    return _HOST.fullmatch(text) is not None


def is_repository(text: str) -> bool:
    """Whether `text` is a repository without a registry in front of it."""
    return _REPOSITORY.fullmatch(text) is not None


@dataclass(frozen=True)
class Reference:
    """A fully written image reference: `host/repository[:tag][@digest]`."""

    host: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a reference as Docker does: `postgres:17` is `docker.io/library/postgres:17`.

        Raises:
            ValueError: `text` is not an image reference.
        """
        rest, _, digest = text.partition("@")
        if ("@" in text) and not _DIGEST.fullmatch(digest):
            raise ValueError(f'"{text}" is not an image: its digest is not one')
        first, slash, remainder = rest.partition("/")
        # Docker's rule: without a dot, a port or `localhost`, the first component is part of the name.
        if slash and ("." in first or ":" in first or first == "localhost" or first != first.lower()):
            host, name = first, remainder
        else:
            host, name = DOCKER_HUB, rest
        name, colon, tag = name.partition(":")
        if host in ("index.docker.io", DOCKER_HUB):
            host = DOCKER_HUB
            name = name if "/" in name else f"library/{name}"
        if not is_registry_host(host) or not is_repository(name) or (colon and not _TAG.fullmatch(tag)):
            raise ValueError(f'"{text}" is not an image such as "postgres:17" or "localhost:5000/team/airflow:1.0"')
        return cls(host, name, tag or None, digest or None)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.host}/{self.repository}{tag}{digest}"


def public_image(image: str, mirror: str | None) -> str:
    """Where to take an image from: Docker Hub's come from `mirror` if there is one, all others stay as they are."""
    reference = Reference.parse(image)
    if mirror is None or reference.host != DOCKER_HUB:
        return image
    return str(replace(reference, host=mirror))


@dataclass(frozen=True)
class RegistryAddress:
    """One registry as two parties reach it: `push` from this machine, `pull` from the cluster's nodes."""

    push: str
    pull: str


@dataclass(frozen=True)
class LocalRegistryHosting:
    """What a local cluster says about its registry (KEP-1755, `localRegistryHosting.v1`).

    Attributes:
        host: how the developer's machine reaches it.
        host_from_container_runtime: how the nodes' container runtime reaches it; None means as `host`.
        host_from_cluster_network: how pods reach it; None means as `host`.
        help: where its documentation is.
    """

    host: str | None = None
    host_from_container_runtime: str | None = None
    host_from_cluster_network: str | None = None
    help: str | None = None


def parse_local_registry_hosting(text: str) -> LocalRegistryHosting:
    """Read the value of `localRegistryHosting.v1` in the ConfigMap `kube-public/local-registry-hosting`.

    Raises:
        RegistryError: it is not what KEP-1755 describes.
    """
    import yaml

    place = "the ConfigMap kube-public/local-registry-hosting"
    hint = "Set `images.registry`, or correct the ConfigMap."
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError:
        document = None
    if not isinstance(document, dict):
        raise RegistryError(
            f"Cannot read the registry from {place}: `localRegistryHosting.v1` is no YAML map.", hint=hint
        )
    values: dict[str, str | None] = {}
    for name in ("host", "hostFromContainerRuntime", "hostFromClusterNetwork"):
        value = document.get(name)
        if value is not None and not (isinstance(value, str) and is_registry_host(value)):
            raise RegistryError(f"Cannot read the registry from {place}: `{name}` is not host:port.", hint=hint)
        values[name] = value
    advice = document.get("help")
    return LocalRegistryHosting(
        host=values["host"],
        host_from_container_runtime=values["hostFromContainerRuntime"],
        host_from_cluster_network=values["hostFromClusterNetwork"],
        help=advice if isinstance(advice, str) else None,
    )


def choose_registry(images: Images, hosting: LocalRegistryHosting | None) -> RegistryAddress:
    """The registry to use: the configured one, else the one that the cluster announces, else `localhost:5000`.

    Args:
        images: the `[images]` settings.
        hosting: what a local context's cluster announces; None for any other context.
    """
    announced = hosting.host if hosting else None
    push = images.registry or announced or DEFAULT_REGISTRY
    pull = hosting.host_from_container_runtime if hosting and push == announced else None
    return RegistryAddress(push=push, pull=images.registry_pull or pull or push)


@dataclass(frozen=True, repr=False)
class Credentials:
    """A login: user name and password, or an identity token (an OAuth refresh token) in place of both."""

    username: str
    password: str
    identity_token: str = ""


def find_credentials(host: str) -> Credentials | None:
    """The login for a registry in Docker's configuration (`DOCKER_CONFIG`) or its credential helpers.

    Raises:
        RegistryError: the configuration cannot be read, or a credential helper failed.
    """
    from docker import auth
    from docker.errors import DockerException

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a missing helper is told by the error below
            found = auth.resolve_authconfig(auth.load_config(), registry=host) or {}
    except (DockerException, ValueError) as error:
        missing = re.search(r"docker-credential-[\w.-]+ not installed", str(error.__cause__))
        reason = missing[0] if missing else "it cannot be read, or its credential helper failed"
        raise RegistryError(
            f"Cannot find the login for {host} in Docker's configuration: {reason}.", hint=f"docker login {host}"
        ) from None
    # docker-py writes the keys small when they come from the file, and with a capital when from a helper.
    values = {str(name).lower(): value or "" for name, value in found.items()}
    if not values.get("identitytoken") and not values.get("username"):
        return None
    return Credentials(values.get("username", ""), values.get("password", ""), values.get("identitytoken", ""))


def pull_secret_data(address: RegistryAddress) -> bytes | None:
    """The `.dockerconfigjson` of a pull secret with which nodes log in to the registry; None without a login.

    Raises:
        RegistryError: Docker's configuration cannot be read, or holds an identity token, which kubelets cannot use.
    """
    credentials = find_credentials(address.push)
    if credentials is None:
        return None
    if credentials.identity_token:
        raise RegistryError(
            f"Cannot make a pull secret for {address.push}: Docker holds an identity token, no use to Kubernetes.",
            hint="Set `images.pull_secret`, after: kubectl create secret docker-registry NAME",
        )
    login = _basic(credentials)
    entry = {"username": credentials.username, "password": credentials.password, "auth": login}
    host = DOCKER_HUB_LOGIN if address.pull == DOCKER_HUB else address.pull
    return json.dumps({"auths": {host: entry}}).encode()


class Registry:
    """One image registry, asked over HTTP (OCI distribution specification 1.1).

    Plain HTTP is spoken to loopback addresses alone, as Docker Engine does. Over TLS the same authorities are trusted
    as the Engine trusts: the system's, and `certs.d/<host>/*.crt` in Docker's configuration folders.
    """

    def __init__(self, host: str, *, certificate_folders: Sequence[Path] | None = None, timeout: float = 10.0) -> None:
        """Prepare to talk to `host` (`host` or `host:port`); nothing is sent yet.

        Args:
            host: the registry as it stands in front of an image's name.
            certificate_folders: where `<host>/*.crt` may be.
            timeout: seconds that a connection, and then an answer, may take.
        """
        self.host = host
        self.login_required = False
        """Whether the registry has asked for a login so far."""
        self._timeout = timeout
        self._certificate_folders = _certificate_folders() if certificate_folders is None else certificate_folders
        self._local = _is_loopback(host)
        self._scheme = ""
        self._authorization: dict[str, str] = {}
        self._credentials: Credentials | None = None
        self._credentials_known = False
        self._pools: dict[str | None, urllib3.PoolManager] = {}

    def ping(self) -> None:
        """Find out whether a registry answers and accepts our login, if it asks for one.

        Raises:
            RegistryError: nothing answers, it is not a registry, or it refuses the login.
        """
        answer = self._request("GET", "/v2/", scope="")
        if answer.status == 200 and _looks_like_registry(answer):
            return
        if answer.status in (401, 403) and "AirTunes" not in answer.headers.get("Server", ""):
            raise self._refused(answer, "log in to")
        raise self._not_a_registry(answer)

    def manifest_digest(self, repository: str, tag: str) -> str | None:
        """The digest (`sha256:...`) that `tag` stands for, or None when the registry does not hold it.

        Raises:
            RegistryError: the registry cannot be asked.
        """
        path = f"/v2/{repository}/manifests/{tag}"
        for method in ("HEAD", "GET"):
            answer = self._request(method, path, scope=f"repository:{repository}:pull", accept=_MANIFEST_TYPES)
            if answer.status == 404:
                return None
            if answer.status != 200:
                raise self._refused(answer, f"read {self.host}/{repository}:{tag} from")
            digest = answer.headers.get("Docker-Content-Digest")
            if digest:
                return digest
        # The header is optional (OCI distribution specification, "Pulling manifests").
        return f"sha256:{hashlib.sha256(answer.data).hexdigest()}"

    def check_push(self, repository: str) -> None:
        """Find out whether we may push, by beginning an upload and taking it back.

        Raises:
            RegistryError: the registry refuses it.
        """
        scope = f"repository:{repository}:pull,push"
        answer = self._request("POST", f"/v2/{repository}/blobs/uploads/", scope=scope)
        if answer.status not in (201, 202):
            raise self._refused(answer, f"push {repository} to")
        location = urlsplit(answer.headers.get("Location", ""))
        if location.path.startswith("/v2/"):
            # Whether this succeeds does not matter: a registry expires unfinished uploads by itself.
            path = urlunsplit(("", "", location.path, location.query, ""))
            self._request("DELETE", path, scope=f"repository:{repository}:delete")

    def put_tag(self, repository: str, digest: str, tag: str) -> None:
        """Let `tag` stand for the manifest that the registry holds as `digest`; safe to repeat.

        Raises:
            RegistryError: the registry lacks the manifest, or refuses the tag.
        """
        scope = f"repository:{repository}:pull,push"
        image = f"{self.host}/{repository}:{tag}"
        manifest = self._request("GET", f"/v2/{repository}/manifests/{digest}", scope=scope, accept=_MANIFEST_TYPES)
        if manifest.status != 200:
            raise self._refused(manifest, f"read {image} from")
        kind = manifest.headers.get("Content-Type", "")
        path = f"/v2/{repository}/manifests/{tag}"
        answer = self._request("PUT", path, scope=scope, content_type=kind, body=manifest.data)
        if answer.status != 201:
            raise self._refused(answer, f"tag {image} in")

    def _request(
        self, method: str, path: str, *, scope: str, accept: str = "", content_type: str = "", body: bytes | None = None
    ) -> urllib3.BaseHTTPResponse:
        """One request, with a login when it is asked for."""
        headers = {"User-Agent": USER_AGENT, "Accept": accept, "Content-Type": content_type}
        headers = {name: value for name, value in headers.items() if value}
        if scope in self._authorization:
            headers["Authorization"] = self._authorization[scope]
        answer = self._ask(method, path, headers, body)
        if answer.status == 401:
            self.login_required = True
            authorization = self._log_in(answer.headers.get("WWW-Authenticate", ""), scope)
            if authorization and authorization != headers.get("Authorization"):
                self._authorization[scope] = headers["Authorization"] = authorization
                answer = self._ask(method, path, headers, body)
        return answer

    def _log_in(self, challenge: str, scope: str) -> str | None:
        """The `Authorization` that answers a `WWW-Authenticate` header; None when there is no login to answer with."""
        if not self._credentials_known:
            self._credentials, self._credentials_known = find_credentials(self.host), True
        kind, _, rest = challenge.partition(" ")
        if kind.lower() == "basic":
            return f"Basic {_basic(self._credentials)}" if self._credentials else None
        parameters = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        if kind.lower() != "bearer" or "realm" not in parameters:
            return None
        token = self._fetch_token(parameters["realm"], parameters.get("service", ""), scope)
        return f"Bearer {token}" if token else None

    def _fetch_token(self, realm: str, service: str, scope: str) -> str | None:
        """A token from the registry's token server (distribution's "Token Authentication Specification")."""
        if not realm.startswith("https://") and not self._local:
            raise RegistryError(f"Cannot log in to the registry {self.host}: it wants the password sent without TLS.")
        fields = {"service": service} | ({"scope": scope} if scope else {})
        headers = {"User-Agent": USER_AGENT}
        login = self._credentials
        if login and login.identity_token:
            form = fields | {
                "grant_type": "refresh_token",
                "client_id": USER_AGENT,
                "refresh_token": login.identity_token,
            }
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            answer = self._send("POST", realm, headers, body=urlencode(form).encode())
        else:
            if login:
                headers["Authorization"] = f"Basic {_basic(login)}"
                fields["account"] = login.username
            separator = "&" if "?" in realm else "?"
            answer = self._send("GET", f"{realm}{separator}{urlencode(fields)}", headers)
        body = _json(answer) if answer.status == 200 else {}
        token = body.get("token") or body.get("access_token")
        return token if isinstance(token, str) else None

    def _ask(self, method: str, path: str, headers: dict[str, str], body: bytes | None) -> urllib3.BaseHTTPResponse:
        """Send to the registry itself; the first request finds out whether a loopback registry speaks TLS."""
        endpoint = DOCKER_HUB_ENDPOINT if self.host == DOCKER_HUB else self.host
        if not self._scheme and self._local:
            answer = self._send(method, f"http://{endpoint}{path}", headers, body)
            # What Go's and nginx' servers say to plain HTTP on a TLS port.
            if answer.status != 400 or not (method == "HEAD" or b"HTTPS" in answer.data):
                self._scheme = "http"
                return answer
        self._scheme = self._scheme or "https"
        return self._send(method, f"{self._scheme}://{endpoint}{path}", headers, body)

    def _send(
        self, method: str, url: str, headers: dict[str, str], body: bytes | None = None
    ) -> urllib3.BaseHTTPResponse:
        import urllib3

        # Redirects are followed (without the login when they lead to another host), nothing is tried again.
        retries = urllib3.Retry(connect=0, read=0, status=0, other=0, redirect=3)
        try:
            return self._pool(url).request(method, url, headers=headers, body=body, retries=retries)
        except urllib3.exceptions.HTTPError as error:
            raise self._unreachable(urlsplit(url).netloc, error) from None

    def _pool(self, url: str) -> urllib3.PoolManager:
        from urllib.request import getproxies, proxy_bypass

        import urllib3

        parts = urlsplit(url)
        proxy = None if self._local or proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)
        if proxy not in self._pools:
            timeout = urllib3.Timeout(connect=min(self._timeout, 5.0), read=self._timeout)
            context = _tls_context(self.host, self._certificate_folders)
            self._pools[proxy] = (
                urllib3.ProxyManager(proxy, timeout=timeout, ssl_context=context)
                if proxy
                else urllib3.PoolManager(timeout=timeout, ssl_context=context)
            )
        return self._pools[proxy]

    def _unreachable(self, host: str, error: Exception) -> RegistryError:
        causes = list(_causes(error))
        what = f"the registry {self.host}" + (f" (its address {host})" if host != self.host else "")
        hint = f"Check that {host} is right (`images.registry`) and reachable from here."
        for cause in causes:
            if isinstance(cause, ssl.SSLCertVerificationError):
                reason = f"its certificate is not trusted ({cause.verify_message.rstrip('.')})"
                folder = self._certificate_folders[0] / self.host
                return RegistryError(
                    f"Cannot talk to {what}: {reason}.",
                    hint=f"Put the certificate of its authority into {folder}/ca.crt, where Docker Engine looks, too.",
                )
            if isinstance(cause, ssl.SSLError):
                plain = cause.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG")
                reason = "it does not speak TLS" if plain else f"TLS failed ({cause.reason})"
                return RegistryError(
                    f"Cannot talk to {what}: {reason}.",
                    hint="Plain HTTP is for loopback addresses alone: give the registry a certificate."
                    if plain
                    else hint,
                )
            if isinstance(cause, ConnectionRefusedError):
                return RegistryError(
                    f"Cannot reach {what}: connection refused.",
                    hint="Start a local registry with: deployer cluster up" if self._local else hint,
                )
            if isinstance(cause, socket.gaierror):
                return RegistryError(f"Cannot reach {what}: no such host.", hint=hint)
            if isinstance(cause, TimeoutError):
                return RegistryError(f"Cannot reach {what}: no answer within {self._timeout:g} s.", hint=hint)
        last = causes[-1]
        reason = last.strerror if isinstance(last, OSError) and last.strerror else type(last).__name__
        return RegistryError(f"Cannot reach {what}: {reason}.", hint=hint)

    def _not_a_registry(self, answer: urllib3.BaseHTTPResponse) -> RegistryError:
        if "AirTunes" in answer.headers.get("Server", ""):
            return RegistryError(
                f"Cannot use {self.host} as registry: macOS' AirPlay receiver answers there.",
                hint="Turn the AirPlay receiver off, or set `images.registry` to a registry on another port.",
            )
        return RegistryError(
            f"Cannot use {self.host} as registry: what answers there (HTTP {answer.status}) is not one.",
            hint="Set `images.registry`, or start a local registry with: deployer cluster up",
        )

    def _refused(self, answer: urllib3.BaseHTTPResponse, action: str) -> RegistryError:
        hint = f"docker login {self.host}"
        if answer.status == 401:
            known = self._credentials is not None
            reason = "it refuses the login in Docker's configuration" if known else "it wants a login"
        elif answer.status == 403:
            reason = "this login is not allowed to" if self._credentials else "not allowed without a login"
        elif answer.status == 404:
            reason, hint = "it has no such repository", "Create it there, or set `images.repository`."
        elif answer.status == 405:
            reason, hint = "it is read-only", "Set `images.registry` to a registry that takes pushes."
        else:
            reason, hint = f"it answered HTTP {answer.status}", "Try again, or look into the registry's log."
        return RegistryError(
            f"Cannot {action} the registry {self.host}: {reason}.", hint=hint, details=_messages(answer)
        )


def _certificate_folders() -> tuple[Path, ...]:
    """Where Docker Engine, rootless Docker Engine and Docker Desktop look for a registry's certificates."""
    return (Path("/etc/docker/certs.d"), Path.home() / ".config/docker/certs.d", Path.home() / ".docker/certs.d")


def _tls_context(host: str, folders: Sequence[Path]) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for file in (path for folder in folders for path in sorted((folder / host).glob("*"))):
        try:
            if file.suffix == ".crt":
                context.load_verify_locations(file)
            elif file.suffix == ".cert":
                context.load_cert_chain(file, file.with_suffix(".key"))
        except OSError as error:  # ssl.SSLError is one
            raise RegistryError(f"Cannot read the certificate {file}: {error.strerror}.") from None
    return context


def _is_loopback(host: str) -> bool:
    """Docker Engine's rule: a name is local when it leads to a loopback address."""
    name = urlsplit(f"//{host}").hostname or ""
    try:
        addresses = [ip_address(name)]
    except ValueError:
        if name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            addresses = [ip_address(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
        except OSError:
            return False
    return all(address.is_loopback for address in addresses)


def _basic(credentials: Credentials) -> str:
    return b64encode(f"{credentials.username}:{credentials.password}".encode()).decode()


def _looks_like_registry(answer: urllib3.BaseHTTPResponse) -> bool:
    return "Docker-Distribution-Api-Version" in answer.headers or answer.data.strip() in (b"", b"{}")


def _json(answer: urllib3.BaseHTTPResponse) -> dict[str, Any]:
    try:
        document = json.loads(answer.data)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _messages(answer: urllib3.BaseHTTPResponse) -> list[str]:
    """What the registry says itself (OCI distribution specification, "Error Codes")."""
    errors = _json(answer).get("errors")
    return [
        str(error.get("message") or error.get("code"))
        for error in (errors if isinstance(errors, list) else [])
        if isinstance(error, dict)
    ]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from, outermost first."""
    while error is not None:
        yield error
        reason = getattr(error, "reason", None)
        error = reason if isinstance(reason, BaseException) else error.__cause__ or error.__context__
