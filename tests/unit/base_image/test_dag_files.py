"""Which files are listed as DAG files, and how often they are looked at."""

from __future__ import annotations

from pathlib import Path

from airflow_deployer_pod.content_store import FileEntry, Manifest
from airflow_deployer_pod.dag_files import DagFiles


def manifest(root: Path, files: dict[str, str]) -> Manifest:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return Manifest("0" * 64, {path: FileEntry(False, len(text), text) for path, text in files.items()})


def test_only_what_has_changed_is_looked_at_again(tmp_path: Path) -> None:
    looked_at: list[str] = []

    def might_contain_dag(path: str) -> bool:
        looked_at.append(Path(path).name)
        return "dag" in Path(path).read_text()

    files = {
        "dags/a.py": "dag",
        "dags/b.py": "helper",
        "dags/team/c.py": "dag",
        "dags/d.sql": "dag",
        "include/e.py": "dag",
    }
    found = DagFiles(might_contain_dag)
    assert found.find(manifest(tmp_path, files), tmp_path) == ["a.py", "team/c.py"]
    assert looked_at == ["a.py", "b.py", "c.py"]
    looked_at.clear()
    assert found.find(manifest(tmp_path, {**files, "dags/b.py": "a dag"}), tmp_path) == ["a.py", "b.py", "team/c.py"]
    assert looked_at == ["b.py"]


def test_a_list_of_ignored_files_is_left_to_airflow(tmp_path: Path) -> None:
    files = manifest(tmp_path, {"dags/a.py": "dag", "dags/team/.airflowignore": "x"})
    assert DagFiles(lambda path: True).find(files, tmp_path) is None
