"""The context guard: which names look local, how the kubeconfig is read, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from airflow_deployer import kube_context
from airflow_deployer.errors import ClusterError, ConfigurationError

KUBECONFIG = """
current-context: kind-dev
contexts:
- name: kind-dev
  context: {cluster: kind-dev, user: kind-dev}
- name: production
  context: {cluster: eu, user: me, namespace: airflow}
"""


@pytest.fixture
def kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "config"
    file.write_text(KUBECONFIG)
    monkeypatch.setenv("KUBECONFIG", str(file))
    return file


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("kind-dev", True),
        ("k3d-x", True),
        ("minikube", True),
        ("docker-desktop", True),
        ("rancher-desktop", True),
        ("orbstack", True),
        ("colima", True),
        ("colima-work", True),
        ("airflow-native", True),
        ("kind", False),
        ("my-kind-dev", False),
        ("gke_project_zone_minikube", False),
        ("localhost", False),
        ("kubernetes-admin@kubernetes", False),
    ],
)
def test_looks_local(name: str, local: bool) -> None:
    assert kube_context.looks_local(name) is local


def test_the_current_context_is_the_default(kubeconfig: Path) -> None:
    found = kube_context.resolve(None)
    assert (found.name, found.namespace, found.kubeconfig) == ("kind-dev", None, str(kubeconfig))


def test_a_named_context_brings_its_namespace(kubeconfig: Path) -> None:
    assert kube_context.resolve("production").namespace == "airflow"


def test_the_first_file_wins(kubeconfig: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.write_text("current-context: other\ncontexts:\n- name: other\n  context: {cluster: c}\n")
    monkeypatch.setenv("KUBECONFIG", f"{other}:{kubeconfig}:{tmp_path / 'missing'}")
    assert kube_context.resolve(None).name == "other"
    assert kube_context.resolve("production").cluster == "eu"


def test_an_unknown_context_comes_with_a_suggestion(kubeconfig: Path) -> None:
    with pytest.raises(ConfigurationError, match="Did you mean 'kind-dev'") as raised:
        kube_context.resolve("kind-dve")
    assert "production" in raised.value.hint


def test_no_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(ClusterError) as raised:
        kube_context.resolve(None)
    assert "deployer cluster up" in raised.value.hint


@pytest.mark.parametrize("content", ["a: [", "- just\n- a list\n"])
def test_a_broken_kubeconfig_is_named(kubeconfig: Path, content: str) -> None:
    kubeconfig.write_text(content)
    with pytest.raises(ClusterError, match=str(kubeconfig)):
        kube_context.resolve(None)


def test_no_current_context(kubeconfig: Path) -> None:
    kubeconfig.write_text("contexts:\n- name: a\n  context: {cluster: c}\n")
    with pytest.raises(ConfigurationError) as raised:
        kube_context.resolve(None)
    assert "--context: a" in raised.value.hint


def test_the_guard_wants_a_remote_context_named(kubeconfig: Path) -> None:
    remote = kube_context.resolve("production")
    with pytest.raises(ConfigurationError, match="does not look like a local cluster") as raised:
        kube_context.guard(remote, on_purpose=False)
    assert "--context production" in raised.value.hint
    kube_context.guard(remote, on_purpose=True)
    kube_context.guard(kube_context.resolve(None), on_purpose=False)
