"""Real registries: with and without a login, a token server, TLS, a read-only one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from airflow_deployer.errors import RegistryError
from airflow_deployer.registry import Registry, RegistryAddress, pull_secret_data
from tests.e2e.registries import (
    PASSWORD,
    USERNAME,
    docker_config,
    engine_address,
    make_authority,
    run_registry,
    run_token_server,
    trust,
)

pytestmark = pytest.mark.e2e


@pytest.fixture(autouse=True)
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No login but those that a test writes here."""
    folder = tmp_path / "docker-config"
    folder.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))
    return folder


def test_a_registry_without_a_login(tmp_path: Path) -> None:
    with run_registry(tmp_path / "registry") as running:
        registry = Registry(running.host)
        registry.ping()
        registry.check_push("team/app")
        assert registry.manifest_digest("team/app", "1") is None
        assert not registry.login_required
        assert running.uploads() == []


def test_a_login_and_tls_with_an_authority_of_ones_own(tmp_path: Path, no_login: Path) -> None:
    authority = make_authority()
    address = engine_address()
    with run_registry(tmp_path / "registry", address=address, authority=authority, login=True) as running:
        with pytest.raises(RegistryError, match="its certificate is not trusted") as caught:
            Registry(running.host).ping()
        assert f"/etc/docker/certs.d/{running.host}/ca.crt" in caught.value.hint

        trust(running.host, authority)
        with pytest.raises(RegistryError, match="it wants a login") as caught:
            Registry(running.host).ping()
        assert caught.value.hint == f"docker login {running.host}"

        docker_config(no_login, running.host, password="wrong-password")
        with pytest.raises(RegistryError, match="it refuses the login in Docker's configuration") as caught:
            Registry(running.host).ping()
        assert "wrong-password" not in str(vars(caught.value))

        docker_config(no_login, running.host)
        registry = Registry(running.host)
        registry.ping()
        registry.check_push("team/app")
        assert registry.login_required
        assert running.uploads() == []
        secret = json.loads(pull_secret_data(RegistryAddress(running.host, running.host)) or b"")
        assert secret["auths"][running.host]["username"] == USERNAME


def test_tls_on_loopback_is_found_out(tmp_path: Path) -> None:
    authority = make_authority()
    with run_registry(tmp_path / "registry", authority=authority) as running:
        with pytest.raises(RegistryError, match="its certificate is not trusted"):
            Registry(running.host).ping()
        trust(running.host, authority)
        assert Registry(running.host).manifest_digest("team/app", "1") is None
        Registry(running.host).ping()


def test_a_certificate_for_another_address(tmp_path: Path) -> None:
    authority = make_authority()
    with run_registry(tmp_path / "registry", authority=authority, certificate_for="192.0.2.1") as running:
        trust(running.host, authority)
        with pytest.raises(RegistryError, match="IP address mismatch") as caught:
            Registry(running.host).ping()
        assert "192.0.2.1" not in caught.value.hint


def test_plain_http_is_for_loopback_alone(tmp_path: Path) -> None:
    with (
        run_registry(tmp_path / "registry", address=engine_address()) as running,
        pytest.raises(RegistryError, match="it does not speak TLS"),
    ):
        Registry(running.host).ping()


def test_a_read_only_registry(tmp_path: Path) -> None:
    with run_registry(tmp_path / "registry", read_only=True) as running:
        registry = Registry(running.host)
        registry.ping()
        with pytest.raises(RegistryError, match=r"Cannot push team/app to the registry .*: it is read-only"):
            registry.check_push("team/app")


@pytest.mark.parametrize("identity_token", [False, True])
def test_a_token_server(tmp_path: Path, no_login: Path, identity_token: bool) -> None:
    authority = make_authority()
    with (
        run_token_server(authority) as (realm, scopes),
        run_registry(tmp_path / "registry", authority=authority, token_realm=realm) as running,
    ):
        with pytest.raises(RegistryError, match="it wants a login"):
            Registry(running.host).ping()

        docker_config(no_login, running.host)
        if identity_token:
            (no_login / "config.json").write_text(json.dumps({"auths": {running.host: {"identitytoken": PASSWORD}}}))
        registry = Registry(running.host)
        registry.ping()
        registry.check_push("team/app")
        assert registry.manifest_digest("team/app", "1") is None
        assert scopes == [f"repository:team/app:{actions}" for actions in ("pull,push", "delete", "pull")]
        assert running.uploads() == []
