"""Which provider is meant."""

from __future__ import annotations

import pytest

from airflow_deployer import local_cluster
from airflow_deployer.errors import LocalClusterError
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
