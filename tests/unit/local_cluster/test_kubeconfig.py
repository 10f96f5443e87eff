"""Merging our context into a kubeconfig and taking it out again."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from airflow_deployer.errors import LocalClusterError
from airflow_deployer.local_cluster.kubeconfig import Entry, ensure_context, merge, paths, remove, remove_context

ENTRY = Entry("airflow-native", {"server": "https://127.0.0.1:6443"}, {"client-key-data": "a2V5"})
OTHER: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Config",
    "preferences": {"colors": True},
    "clusters": [{"name": "prod", "cluster": {"server": "https://prod.example", "insecure-skip-tls-verify": False}}],
    "users": [{"name": "prod", "user": {"token": "0123"}}],
    "contexts": [{"name": "prod", "context": {"cluster": "prod", "user": "prod", "namespace": "web"}}],
    "current-context": "prod",
}


def test_merging_into_nothing_makes_it_the_current_context() -> None:
    assert merge({}, ENTRY) == {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "airflow-native", "cluster": {"server": "https://127.0.0.1:6443"}}],
        "users": [{"name": "airflow-native", "user": {"client-key-data": "a2V5"}}],
        "contexts": [{"name": "airflow-native", "context": {"cluster": "airflow-native", "user": "airflow-native"}}],
        "current-context": "airflow-native",
    }


def test_merging_leaves_everything_else_alone() -> None:
    before = copy.deepcopy(OTHER)
    merged = merge(OTHER, ENTRY)
    assert before == OTHER
    assert merged["current-context"] == "prod"
    assert merged["preferences"] == {"colors": True}
    for key in ("clusters", "users", "contexts"):
        assert merged[key][0] == OTHER[key][0]
        assert [item["name"] for item in merged[key]] == ["prod", "airflow-native"]


def test_merging_again_replaces_in_place_and_keeps_the_chosen_namespace() -> None:
    document = merge(OTHER, ENTRY)
    document["contexts"][1]["context"]["namespace"] = "mine"
    merged = merge(document, Entry("airflow-native", {"server": "https://127.0.0.1:7443"}, {}))
    assert [item["name"] for item in merged["clusters"]] == ["prod", "airflow-native"]
    assert merged["clusters"][1]["cluster"] == {"server": "https://127.0.0.1:7443"}
    assert merged["contexts"][1]["context"]["namespace"] == "mine"


def test_removing_gives_back_what_was_there() -> None:
    assert remove(merge(OTHER, ENTRY), "airflow-native") == OTHER


def test_removing_the_current_context_chooses_no_other_one() -> None:
    left = remove(merge(OTHER | {"current-context": ""}, ENTRY), "airflow-native")
    assert left["current-context"] == ""


def test_null_lists_count_as_empty() -> None:
    merged = merge({"clusters": None, "users": None, "contexts": None}, ENTRY)
    assert [item["name"] for item in merged["clusters"]] == ["airflow-native"]


def test_paths_of_the_variable_and_of_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert paths({"KUBECONFIG": f"/a{os.pathsep}{os.pathsep}/b"}) == [Path("/a"), Path("/b")]
    assert paths({"KUBECONFIG": ""}) == [Path("/home/somebody/.kube/config")]


def test_a_new_file_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "home" / ".kube" / "config"
    assert ensure_context(ENTRY, {"KUBECONFIG": str(path)}) == path
    assert path.stat().st_mode & 0o777 == 0o600
    assert yaml.safe_load(path.read_text()) == merge({}, ENTRY)
    assert [p.name for p in path.parent.iterdir()] == ["config"]


def test_a_file_that_is_right_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "config"
    ensure_context(ENTRY, {"KUBECONFIG": str(path)})
    before = path.stat().st_ino
    ensure_context(ENTRY, {"KUBECONFIG": str(path)})
    assert path.stat().st_ino == before


def test_of_several_files_the_one_that_has_the_context_then_the_first_that_exists(tmp_path: Path) -> None:
    first, second, third = tmp_path / "1", tmp_path / "2", tmp_path / "3"
    environ = {"KUBECONFIG": os.pathsep.join(map(str, (first, second, third)))}
    second.write_text(yaml.safe_dump(OTHER | {"current-context": ""}))
    third.write_text(yaml.safe_dump(OTHER))
    assert ensure_context(ENTRY, environ) == second
    # The third file already says which context is the current one.
    assert not yaml.safe_load(second.read_text()).get("current-context")
    first.write_text("{}")
    assert ensure_context(ENTRY, environ) == second
    remove_context("airflow-native", environ)
    assert yaml.safe_load(third.read_text()) == OTHER
    assert "airflow-native" not in second.read_text()


def test_a_link_is_followed_and_its_target_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "real", tmp_path / "link"
    target.write_text(yaml.safe_dump(OTHER))
    link.symlink_to(target)
    ensure_context(ENTRY, {"KUBECONFIG": str(link)})
    assert link.is_symlink()
    assert "airflow-native" in target.read_text()


def test_dates_stay_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text("users:\n- name: x\n  user:\n    auth-provider: {config: {expiry: 2026-01-02T03:04:05Z}}\n")
    ensure_context(ENTRY, {"KUBECONFIG": str(path)})
    assert "2026-01-02T03:04:05Z" in path.read_text()


@pytest.mark.parametrize("text", ["a: [", "- a list"])
def test_a_file_that_is_no_kubeconfig_is_left_alone_and_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(LocalClusterError, match=str(path)) as caught:
        ensure_context(ENTRY, {"KUBECONFIG": str(path)})
    assert caught.value.hint
    assert path.read_text() == text


def test_removing_from_a_file_that_has_nothing_of_ours_does_not_write_it(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text("# a comment\ncurrent-context: prod\n")
    remove_context("airflow-native", {"KUBECONFIG": f"{path}{os.pathsep}{tmp_path / 'missing'}"})
    assert path.read_text() == "# a comment\ncurrent-context: prod\n"
    assert not (tmp_path / "missing").exists()
