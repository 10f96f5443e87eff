"""Image references, the choice of a registry, logins, and what is said about a registry that is none."""

from __future__ import annotations

import base64
import json
import os
import socket
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from airflow_deployer.config import Images
from airflow_deployer.errors import RegistryError
from airflow_deployer.registry import (
    Credentials,
    LocalRegistryHosting,
    Reference,
    Registry,
    RegistryAddress,
    choose_registry,
    find_credentials,
    is_registry_host,
    parse_local_registry_hosting,
    public_image,
    pull_secret_data,
)

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("postgres", "docker.io/library/postgres"),
        ("postgres:17", "docker.io/library/postgres:17"),
        ("team/app:1", "docker.io/team/app:1"),
        ("index.docker.io/team/app", "docker.io/team/app"),
        ("localhost/app", "localhost/app"),
        ("localhost:5000/x:tag", "localhost:5000/x:tag"),
        (f"ghcr.io/a/b/c:1.0@{DIGEST}", f"ghcr.io/a/b/c:1.0@{DIGEST}"),
        ("[::1]:5000/x", "[::1]:5000/x"),
        ("127.0.0.1:5000/a__b/c-d.e", "127.0.0.1:5000/a__b/c-d.e"),
    ],
)
def test_references_are_read_as_docker_does(text: str, full: str) -> None:
    assert str(Reference.parse(text)) == full
    assert Reference.parse(full) == Reference.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A",
        "a b",
        "a:",
        "a/",
        "/a",
        "a@sha256:12",
        "a@",
        "http://a/b",
        "a:b:c",
        "a//b",
        "localhost:5000/X",
        ":5000/a",
    ],
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not an image"):
        Reference.parse(text)


@pytest.mark.parametrize(
    ("text", "valid"), [("a", True), ("a.b:5", True), ("a/b", False), ("a:b", False), ("-a", False)]
)
def test_registry_hosts(text: str, valid: bool) -> None:
    assert is_registry_host(text) is valid


@pytest.mark.parametrize(
    ("image", "mirror", "expected"),
    [
        ("postgres:17", None, "postgres:17"),
        ("postgres:17", "localhost:5000", "localhost:5000/library/postgres:17"),
        ("bitnami/postgresql:17", "ghcr.io/mirror", "ghcr.io/mirror/bitnami/postgresql:17"),
        ("quay.io/team/python:3", "localhost:5000", "quay.io/team/python:3"),
    ],
)
def test_a_mirror_stands_for_docker_hub_alone(image: str, mirror: str | None, expected: str) -> None:
    assert public_image(image, mirror) == expected


def test_local_registry_hosting_with_every_field() -> None:
    text = (
        'host: "localhost:5001"\nhostFromContainerRuntime: "registry:5000"\n'
        'hostFromClusterNetwork: "kind-registry:5000"\nhelp: "https://kind.sigs.k8s.io/docs/user/local-registry/"\n'
    )
    assert parse_local_registry_hosting(text) == LocalRegistryHosting(
        host="localhost:5001",
        host_from_container_runtime="registry:5000",
        host_from_cluster_network="kind-registry:5000",
        help="https://kind.sigs.k8s.io/docs/user/local-registry/",
    )


@pytest.mark.parametrize("text", ["", "[]", "a: [", "host: 5", "host: http://x", "hostFromContainerRuntime: a b"])
def test_local_registry_hosting_that_cannot_be_read(text: str) -> None:
    with pytest.raises(
        RegistryError, match="Cannot read the registry from the ConfigMap kube-public/local-registry-hosting"
    ):
        parse_local_registry_hosting(text)


HOSTING = LocalRegistryHosting(host="localhost:5001", host_from_container_runtime="registry:5000")


@pytest.mark.parametrize(
    ("images", "hosting", "push", "pull"),
    [
        (Images(), None, "localhost:5000", "localhost:5000"),
        (Images(), LocalRegistryHosting(), "localhost:5000", "localhost:5000"),
        (Images(), HOSTING, "localhost:5001", "registry:5000"),
        (Images(), LocalRegistryHosting(host="a:1"), "a:1", "a:1"),
        (Images(registry="ghcr.io"), HOSTING, "ghcr.io", "ghcr.io"),
        (Images(registry="localhost:5001"), HOSTING, "localhost:5001", "registry:5000"),
        (Images(registry="ghcr.io", registry_pull="proxy:1"), HOSTING, "ghcr.io", "proxy:1"),
        (Images(registry_pull="proxy:1"), HOSTING, "localhost:5001", "proxy:1"),
    ],
)
def test_the_registry_is_configured_announced_or_local(
    images: Images, hosting: LocalRegistryHosting | None, push: str, pull: str
) -> None:
    assert choose_registry(images, hosting) == RegistryAddress(push, pull)


@pytest.fixture
def docker_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    def write(config: object) -> None:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))

    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    write({})
    return write


def login(username: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{username}:{password}".encode()).decode()}


def test_a_login_comes_from_dockers_configuration(docker_config: Callable[[object], None]) -> None:
    docker_config({"auths": {"registry.test:5443": login("ada", "s3cret:with:colons")}})
    assert find_credentials("registry.test:5443") == Credentials("ada", "s3cret:with:colons")
    assert find_credentials("other.test") is None


def test_a_login_comes_from_a_credential_helper(
    docker_config: Callable[[object], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = tmp_path / "docker-credential-test"
    helper.write_text('#!/bin/sh\necho "{\\"Username\\": \\"ada\\", \\"Secret\\": \\"for $(cat)\\"}"\n')
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    docker_config({"credHelpers": {"registry.test": "test"}})
    assert find_credentials("registry.test") == Credentials("ada", "for registry.test")
    docker_config({"credsStore": "test"})
    assert find_credentials("any.test") == Credentials("ada", "for any.test")


@pytest.mark.parametrize(
    "config",
    [{"credsStore": "missing-helper"}, {"auths": {"registry.test": {"auth": "not base64"}}}, {"auths": {"a": 1}}],
)
def test_a_login_that_cannot_be_read_is_told(docker_config: Callable[[object], None], config: object) -> None:
    docker_config(config)
    with pytest.raises(
        RegistryError, match=r"Cannot find the login for registry.test in Docker's configuration"
    ) as caught:
        find_credentials("registry.test")
    assert caught.value.hint == "docker login registry.test"


def test_secrets_do_not_show_in_representations() -> None:
    assert "s3cret" not in repr(Credentials("ada", "s3cret", "s3cret"))


def test_the_pull_secret_is_for_the_host_that_nodes_use(docker_config: Callable[[object], None]) -> None:
    docker_config({"auths": {"push.test": login("ada", "pw"), "https://index.docker.io/v1/": login("hub", "pw")}})
    assert json.loads(pull_secret_data(RegistryAddress("push.test", "pull.test")) or b"") == {
        "auths": {"pull.test": {"username": "ada", "password": "pw", **login("ada", "pw")}}
    }
    hub = json.loads(pull_secret_data(RegistryAddress("docker.io", "docker.io")) or b"")
    assert hub["auths"]["https://index.docker.io/v1/"]["username"] == "hub"
    assert pull_secret_data(RegistryAddress("none.test", "none.test")) is None


def test_an_identity_token_makes_no_pull_secret(docker_config: Callable[[object], None]) -> None:
    docker_config({"auths": {"push.test": {"identitytoken": "s3cret"}}})
    with pytest.raises(RegistryError, match="identity token") as caught:
        pull_secret_data(RegistryAddress("push.test", "push.test"))
    assert "s3cret" not in caught.value.message + caught.value.hint


Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture
def serve(docker_config: Callable[[object], None]) -> Iterator[Callable[[Callable[[str, str], Answer]], str]]:
    """An HTTP server for what no real registry would answer."""
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Callable[[str, str], Answer]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline()
                if self.raw_requestline and self.parse_request():
                    status, headers, body = answer(self.command, self.path)
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(body)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(b"" if self.command == "HEAD" else body)
                self.close_connection = True

            def version_string(self) -> str:
                return "AirTunes/1" if self.path == "/v2/" and answer("", "") == AIRPLAY else "test"

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


AIRPLAY: Answer = (403, {}, b"")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, {"Content-Type": "text/html"}, b"<html>"), "what answers there (HTTP 200) is not one"),
        ((404, {}, b"no such page"), "what answers there (HTTP 404) is not one"),
        (AIRPLAY, "macOS' AirPlay receiver answers there"),
        ((401, {}, b""), "it wants a login"),
    ],
)
def test_what_answers_is_not_a_registry(
    serve: Callable[[Callable[[str, str], Answer]], str], answer: Answer, message: str
) -> None:
    with pytest.raises(RegistryError) as caught:
        Registry(serve(lambda method, path: answer)).ping()
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("status", "reason", "hint"),
    [
        (403, "not allowed without a login", "docker login"),
        (404, "it has no such repository", "images.repository"),
        (405, "it is read-only", "images.registry"),
        (503, "it answered HTTP 503", "Try again"),
    ],
)
def test_a_refused_push_says_why(
    serve: Callable[[Callable[[str, str], Answer]], str], status: int, reason: str, hint: str
) -> None:
    body = json.dumps({"errors": [{"code": "X", "message": "the registry's own words"}]}).encode()
    with pytest.raises(RegistryError, match=reason) as caught:
        Registry(serve(lambda method, path: (status, {}, body))).check_push("team/app")
    assert "Cannot push team/app to the registry 127.0.0.1:" in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.details == ("the registry's own words",)


def test_a_digest_that_the_registry_does_not_tell_is_computed(
    serve: Callable[[Callable[[str, str], Answer]], str],
) -> None:
    host = serve(lambda method, path: (200, {}, b"{}"))
    expected = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert Registry(host).manifest_digest("a", "1") == expected


def test_nothing_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"localhost:{free.getsockname()[1]}"
    with pytest.raises(RegistryError, match=f"Cannot reach the registry {host}: connection refused") as caught:
        Registry(host).ping()
    assert caught.value.hint == "Start a local registry with: deployer cluster up"


def test_nobody_answers() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(RegistryError, match=r"no answer within 0.2 s"),
    ):
        Registry(f"127.0.0.1:{silent.getsockname()[1]}", timeout=0.2).ping()


def test_no_such_host() -> None:
    with pytest.raises(RegistryError, match="no such host"):
        Registry("registry.invalid").ping()
