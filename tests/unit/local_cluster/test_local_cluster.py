"""Which provider is meant, and which images."""

from __future__ import annotations

import pytest

from airflow_deployer import local_cluster
from airflow_deployer.errors import ConfigurationError, LocalClusterError
from airflow_deployer.local_cluster import kind
from airflow_deployer.local_cluster.native import cluster, packages


@pytest.mark.parametrize(
    ("native_exists", "no_kind", "no_native", "provider"),
    [
        (False, None, None, "kind"),
        (False, None, "it needs root", "kind"),
        (False, "there is no `kind` program", None, "native"),
        (True, None, None, "native"),
        (True, None, "it needs root", "native"),
    ],
)
def test_auto(
    monkeypatch: pytest.MonkeyPatch, native_exists: bool, no_kind: str | None, no_native: str | None, provider: str
) -> None:
    monkeypatch.setattr(cluster, "exists", lambda: native_exists)
    monkeypatch.setattr(kind, "unsupported", lambda: no_kind)
    monkeypatch.setattr(packages, "unsupported", lambda: no_native)
    assert local_cluster.choose("auto") == provider


def test_a_machine_that_can_have_neither_is_told_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "exists", lambda: False)
    monkeypatch.setattr(kind, "unsupported", lambda: "there is no `kind` program")
    monkeypatch.setattr(packages, "unsupported", lambda: "this machine is not Debian")
    with pytest.raises(LocalClusterError) as caught:
        local_cluster.choose("auto")
    assert caught.value.details == ("kind: there is no `kind` program", "native: this machine is not Debian")
    assert "kind" in caught.value.hint
    assert "Debian 12" in caught.value.hint


def test_a_provider_that_is_named_is_taken_at_its_word() -> None:
    assert local_cluster.choose("kind") == "kind"
    assert local_cluster.choose("native") == "native"


@pytest.mark.parametrize(
    ("versions", "names"),
    [
        ([], []),
        (["2.11.2"], ["python:3.11-slim-bookworm", "postgres:15"]),
        (["1.10.15"], ["python:3.8-slim-bookworm", "postgres:15"]),
        (["3.3.2", "2.9.0"], ["python:3.13-slim-trixie", "postgres:17", "python:3.11-slim-bookworm", "postgres:15"]),
    ],
)
def test_a_version_of_airflow_means_the_images_of_its_profile(versions: list[str], names: list[str]) -> None:
    assert local_cluster.public_images(versions) == names


@pytest.mark.parametrize("version", ["", "2", "2.11", "latest", "1.9.0", "2.11.2rc1"])
def test_what_is_no_version_that_can_be_deployed_is_refused_before_anything_is_done(version: str) -> None:
    with pytest.raises(ConfigurationError, match=f'Invalid --airflow: "{version}" is no release') as caught:
        local_cluster.public_images(["3.3.2", version])
    assert "--airflow 3." in caught.value.hint
