"""Which content a task of Airflow 2 sees, and how long that stays."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from airflow_deployer_pod import content_store, folder_scheduler
from airflow_deployer_pod.content_store import ContentError, Store

from tests.unit.base_image.test_content_store import stage


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """Airflow's, with a store in `tmp_path` instead of the volume."""
    airflow, found = ModuleType("airflow"), ModuleType("airflow.settings")
    airflow.settings = found  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "airflow", airflow)
    monkeypatch.setitem(sys.modules, "airflow.settings", found)
    monkeypatch.setattr(folder_scheduler, "Store", lambda: Store(tmp_path))
    monkeypatch.setattr(folder_scheduler, "_held", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    return found


def switch(store: Store, text: str) -> str:
    """Make a version live; return its name."""
    for folder in (store.versions, store.manifests, store.staging):
        folder.mkdir(parents=True, exist_ok=True)
    new = stage(store, {"dags/a.py": text.encode()})
    new.switch()
    return new.manifest.version


def test_a_task_stays_on_the_version_that_was_live_at_its_start(settings: ModuleType, tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = switch(store, "1")
    folder_scheduler.use_live_version("scheduler")
    assert not hasattr(settings, "DAGS_FOLDER")
    folder_scheduler.use_live_version("task_run", dag_id="a")
    second = switch(store, "2")
    # What the task's own process, forked from this one, calls again.
    folder_scheduler.use_live_version("task_run", dag_id="a")
    root = store.root(first)
    assert f"{root}/dags" == settings.DAGS_FOLDER
    assert (sys.path[0], sys.path[-1]) == (str(root), f"{root}/dags")
    assert os.environ["PYTHONPATH"] == str(root)
    third = switch(store, "3")
    assert store.remove_unneeded([], kept=1) == [second]
    os.close(folder_scheduler._held.pop())
    assert store.remove_unneeded([], kept=1) == [first]
    assert store.live_version() == third


def test_no_content_is_said(tmp_path: Path) -> None:
    with pytest.raises(ContentError, match="no DAG content"):
        Store(tmp_path).hold_live()


def test_a_version_that_is_being_removed_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    old, live = switch(store, "1"), switch(store, "2")
    answers = iter([old, live, live])
    monkeypatch.setattr(store, "live_version", lambda: next(answers))
    (store.versions / old).rename(store.staging / "gone")
    version, descriptor = store.hold_live()
    assert version == live
    assert content_store._is_held(store.root(live))
    os.close(descriptor)
    assert not content_store._is_held(store.root(live))
