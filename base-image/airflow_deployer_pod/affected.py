"""Which DAG files have to be parsed again when the content changes from one version to another.

A changed DAG file affects itself and every DAG file that imports it; any other file of the project that changes (a
helper, a template, `.airflowignore`) affects every DAG file, because nobody can know who reads it. What a DAG file
imports is known from its last import check. Where it is not (the content of a fresh image), a DAG file counts as an
importer when its text imports the module, directly or through other modules of the project whose text does.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from airflow_deployer_pod.content_store import DagFile, FileEntry

ReadFile = Callable[[str], bytes]
"""Returns the bytes of a file of the new version, by its path."""


@dataclass(frozen=True)
class Affected:
    """What a change means for Airflow.

    Attributes:
        files: the DAG files to parse, sorted; Airflow itself may still leave one out that `.airflowignore` names.
        everything: whether these are all DAG files, so that whoever can ask Airflow should list them afresh.
        removed: what was a DAG file and is none any more, sorted.
    """

    files: list[str]
    everything: bool
    removed: list[str]


def find_affected(
    old: Mapping[str, FileEntry], known: Mapping[str, DagFile], new: Mapping[str, FileEntry], read: ReadFile
) -> Affected:
    """Compare two versions.

    Args:
        old: the files of the version that Airflow has parsed.
        known: its DAG files.
        new: the files of the version to come.
        read: reads one of `new`.
    """
    changed = {path for path, entry in new.items() if old.get(path) != entry}
    gone = {path for path in old if path not in new}
    dag_files = {path for path in changed if may_hold_dags(path, read)}
    removed = {path for path in known if path in gone or (path in changed and path not in dag_files)}
    # A helper that begins to look like a DAG file may still be one that others import.
    others = {path for path in changed - dag_files if path not in known}
    others |= {path for path in changed & dag_files if path in old and path not in known}
    others |= gone - removed
    if others:
        kept = {path for path in known if path in new and path not in removed}
        return Affected(sorted(kept | dag_files), True, sorted(removed))
    files = dag_files | _importers(changed | gone, known, new, read)
    if any(path not in old for path in dag_files):
        # What a broken file could not import may just have come.
        files |= {path for path, one in known.items() if one["broken"]}
    return Affected(sorted(path for path in files if path in new and path not in removed), False, sorted(removed))


def may_hold_dags(path: str, read: ReadFile) -> bool:
    """Whether Airflow takes a file for one that defines DAGs, as its safe mode looks at it.

    The rule is that of `might_contain_dag_via_default_heuristic` in `airflow/utils/file.py` of Airflow 3.3.
    """
    if not path.startswith("dags/"):
        return False
    if path.endswith(".zip"):
        return True
    if not path.endswith(".py"):
        return False
    text = read(path).lower()
    return b"airflow" in text and (b"dag" in text or b"asset" in text)


def _importers(
    changed: set[str], known: Mapping[str, DagFile], new: Mapping[str, FileEntry], read: ReadFile
) -> set[str]:
    """The DAG files that import one of the changed files."""
    found: set[str] = set()
    unknown: set[str] = set()
    for path, one in known.items():
        imports = one["imports"]
        if imports is None:
            unknown.add(path)
        elif not changed.isdisjoint(imports):
            found.add(path)
    if not unknown:
        return found
    # Any module of the project can be the one in between.
    modules = unknown | {path for path in new if path.endswith(".py") and path not in known}
    texts = {path: read(path) for path in modules if path in new}
    names = {module_name(path) for path in changed}
    reached: set[str] = set()
    while names:
        pattern = re.compile(rb"\b(?:" + b"|".join(re.escape(name.encode()) for name in sorted(names)) + rb")\b")
        more = {
            path
            for path, text in texts.items()
            if path not in reached and path not in changed and pattern.search(text) and _may_import(text, names)
        }
        reached |= more
        names = {module_name(path) for path in more}
    return found | (reached & unknown)


def _may_import(text: bytes, names: set[str]) -> bool:
    """Whether a module's text imports one of these names; yes where that cannot be told."""
    if b"importlib" in text or b"__import__" in text:
        return True
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return True
    for node in ast.walk(tree):
        parts: list[str] = []
        if isinstance(node, ast.Import):
            parts = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        if not names.isdisjoint(parts):
            return True
    return False


def module_name(path: str) -> str:
    """The last part of the name under which a file is imported: that of its folder for an `__init__.py`."""
    folder, _, name = path.rpartition("/")
    stem = name.partition(".")[0]
    return folder.rpartition("/")[2] if stem == "__init__" else stem
