"""Which DAG files a change of the content affects."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from airflow_deployer_pod.affected import Affected, _may_import, find_affected, may_hold_dags, module_name
from airflow_deployer_pod.content_store import DagFile, FileEntry

DAG = b"from airflow.sdk import DAG\n"
FILES = {
    "dags/a.py": DAG,
    "dags/b.py": DAG + b"from a import x\n",
    "dags/c.py": DAG + b"import other\n",
    "include/helper.py": b"x = 1\n",
    "dags/query.sql": b"select 1\n",
}


def one(*imports: str, dag_ids: tuple[str, ...] = ("d",), broken: bool = False) -> DagFile:
    return {"dag_ids": list(dag_ids), "imports": list(imports), "broken": broken}


KNOWN: Mapping[str, DagFile] = {"dags/a.py": one(), "dags/b.py": one("dags/a.py"), "dags/c.py": one()}
UNKNOWN: Mapping[str, DagFile] = {path: {"dag_ids": [], "imports": None, "broken": False} for path in KNOWN}


def entries(files: Mapping[str, bytes]) -> dict[str, FileEntry]:
    return {path: FileEntry(False, len(data), data.hex()) for path, data in files.items()}


def affected(new: Mapping[str, bytes], known: Mapping[str, DagFile] = KNOWN) -> Affected:
    return find_affected(entries(FILES), known, entries(new), lambda path: new[path])


def without(*paths: str) -> dict[str, bytes]:
    return {path: data for path, data in FILES.items() if path not in paths}


@pytest.mark.parametrize("known", [KNOWN, UNKNOWN])
def test_a_dag_file_affects_itself_and_who_imports_it(known: Mapping[str, DagFile]) -> None:
    assert affected(FILES, known) == Affected([], False, [])
    assert affected({**FILES, "dags/c.py": DAG + b"#"}, known) == Affected(["dags/c.py"], False, [])
    assert affected({**FILES, "dags/a.py": DAG + b"#"}, known) == Affected(["dags/a.py", "dags/b.py"], False, [])


@pytest.mark.parametrize("path", ["include/helper.py", "dags/query.sql", "dags/.airflowignore"])
def test_any_other_file_affects_all(path: str) -> None:
    assert affected({**FILES, path: b"new"}) == Affected(sorted(KNOWN), True, [])
    assert affected({**without(path), "dags/new.py": DAG}).files == (
        [*KNOWN, "dags/new.py"] if path in FILES else ["dags/new.py"]
    )


def test_a_new_dag_file_affects_itself_and_what_is_broken() -> None:
    new = {**FILES, "dags/new.py": DAG}
    assert affected(new) == Affected(["dags/new.py"], False, [])
    known = {**KNOWN, "dags/c.py": one(broken=True, dag_ids=())}
    assert affected(new, known) == Affected(["dags/c.py", "dags/new.py"], False, [])


def test_a_dag_file_that_goes_must_vanish() -> None:
    assert affected(without("dags/c.py")) == Affected([], False, ["dags/c.py"])
    assert affected(without("dags/a.py")) == Affected(["dags/b.py"], False, ["dags/a.py"])
    # Airflow's safe mode no longer takes it for one.
    assert affected({**FILES, "dags/c.py": b"x = 1\n"}) == Affected([], False, ["dags/c.py"])


def test_a_helper_that_begins_to_look_like_a_dag_file_may_be_imported_by_all() -> None:
    old = {**FILES, "dags/helper.py": b"x = 1\n"}
    new = {**FILES, "dags/helper.py": DAG}
    found = find_affected(entries(old), KNOWN, entries(new), lambda path: new[path])
    assert found == Affected(sorted([*KNOWN, "dags/helper.py"]), True, [])


def test_an_import_through_another_module_is_found_in_the_text() -> None:
    files = {**FILES, "include/between.py": b"import a\n", "dags/c.py": DAG + b"from include import between\n"}
    new = {**files, "dags/a.py": DAG + b"#"}
    found = find_affected(entries(files), UNKNOWN, entries(new), lambda path: new[path])
    assert found.files == ["dags/a.py", "dags/b.py", "dags/c.py"]


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("dags/a.py", b"Airflow DAG", True),
        ("dags/a.py", b"airflow asset", True),
        ("dags/a.py", b"airflow", False),
        ("dags/a.zip", b"PK", True),
        ("dags/a.txt", b"airflow dag", False),
        ("include/a.py", b"airflow dag", False),
    ],
)
def test_what_airflow_takes_for_a_dag_file(path: str, text: bytes, expected: bool) -> None:
    assert may_hold_dags(path, lambda _: text) is expected


@pytest.mark.parametrize(
    ("path", "name"), [("dags/a.py", "a"), ("include/shop/__init__.py", "shop"), ("dags/x.y.zip", "x")]
)
def test_a_module_is_named_after_its_file(path: str, name: str) -> None:
    assert module_name(path) == name


@pytest.mark.parametrize(
    ("text", "imports"),
    [
        (b"import orders", True),
        (b"from orders import x", True),
        (b"from include import (\n    a,\n    orders,\n)", True),
        (b"import include.orders as o", True),
        (b"description = 'orders of the day'", False),
        (b"import importlib\nimportlib.import_module('orders')", True),
        (b"def broken(:  # orders", True),
    ],
)
def test_only_who_imports_a_module_may_be_affected_by_it(text: bytes, imports: bool) -> None:
    assert _may_import(text, {"orders"}) is imports
