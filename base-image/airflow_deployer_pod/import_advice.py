"""What to write instead of what moved between Airflow's series, for the files that an import check has looked at.

An import stops at the first name that is gone. This reads the same files' text, and of those that did not import also
the modules of the project that they would have imported next, and so names everything that stands in the way at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from airflow_deployer_pod.import_moves import Import, Reading, Series, Use, provider_package

if TYPE_CHECKING:
    from airflow_deployer_pod.import_check import Finding

# What Python can find the project's modules in, relative to the folder that holds `dags/` and `include/`.
_FOLDERS = ("", "dags/")
_PROVIDER = re.compile(r"No module named '(airflow\.providers\.[\w.]+)'")


class Moved(TypedDict):
    """A line that uses what moved, although the import does not fail for it.

    `gone`: a task will fail for it; otherwise it is deprecated. `advice`: what to write instead, or empty.
    """

    path: str
    line: int
    name: str
    gone: bool
    advice: str


@dataclass(frozen=True)
class Advice:
    """What to add to a check.

    Attributes:
        errors: the errors that there were, each with its `advice`, and those that would come next.
        moved: everything else that is concerned, by file and line.
    """

    errors: list[Finding]
    moved: list[Moved]


def advise(root: Path, imports: Mapping[str, Sequence[str]], errors: Sequence[Finding], series: str) -> Advice:
    """Look for what moved.

    Args:
        root: the folder that holds `dags/` and `include/`.
        imports: the DAG files that were imported, relative to it, each with the project's files that it has loaded.
        errors: what came of those that failed.
        series: Airflow's series, as `import_moves` names it.
    """
    texts = _Texts(root, Series(series))
    loaded = {path for paths in imports.values() for path in paths}
    broken = {error["dag_file"] for error in errors if error["kind"] == "import"}
    # What a broken file needs and nobody could load, with one of the DAG files that need it.
    unseen = {path: file for file in sorted(broken, reverse=True) for path in texts.needed(file) if path not in loaded}
    told: set[tuple[str, int, str]] = set()
    advised: list[Finding] = []
    for error in errors:
        use = _cause(error, texts.reading(error["path"]).uses)
        if use is not None:
            told.add((error["path"], use.line, use.move.name))
        answered = error.copy()
        answered["kind"] = "moved" if use is not None else error["kind"]
        answered["advice"] = use.move.advice if use is not None else _missing_provider(error)
        advised.append(answered)
    reached = {error["path"]: error["line"] or 0 for error in errors if error["kind"] == "import"}
    moved: list[Moved] = []
    for path in sorted({*imports, *loaded, *unseen}):
        for use in texts.reading(path).uses:
            if (path, use.line, use.move.name) in told:
                continue
            if use.move.gone and use.certain:
                # Where the import came past it, it is there after all.
                if path in unseen and use.line > reached.get(path, 0):
                    advised.append(_next_error(path, unseen[path], use))
            elif not use.handled:
                move = use.move
                moved.append(
                    {"path": path, "line": use.line, "name": move.name, "gone": move.gone, "advice": move.advice}
                )
    advised.sort(key=lambda error: (error["path"], error["line"] or 0, error["dag_file"]))
    return Advice(advised, moved)


def _cause(error: Finding, uses: Iterable[Use]) -> Use | None:
    """The use that an error is about: the one in its line, or whose argument its message names."""
    if error["kind"] != "import":
        return None
    uses = list(uses)
    # What is deprecated may lead to a package that is not installed.
    importing = error["exception"] in ("ImportError", "ModuleNotFoundError")
    for use in uses:
        if use.line == error["line"] and (use.move.gone or importing):
            return use
    for use in uses:
        argument = re.search(r"\((\w+)=\)$", use.move.name)
        if use.move.gone and argument and re.search(rf"\b{argument[1]}\b", error["message"]):
            return use
    return None


def _missing_provider(error: Finding) -> str:
    found = _PROVIDER.search(error["message"])
    package = provider_package(found[1]) if found else ""
    return f"{package} in requirements.txt" if package else ""


def _next_error(path: str, dag_file: str, use: Use) -> Finding:
    return {
        "path": path,
        "line": use.line,
        "dag_file": dag_file,
        "kind": "moved",
        "exception": "",
        "message": f"{use.move.name} is not in this Airflow",
        "traceback": [],
        "advice": use.move.advice,
    }


class _Texts:
    """The project's files, each read once."""

    def __init__(self, root: Path, series: Series) -> None:
        self._root = root
        self._series = series
        self._readings: dict[str, Reading] = {}
        self._thorough: dict[str, Reading] = {}

    def reading(self, path: str) -> Reading:
        """What a file uses."""
        if path not in self._readings:
            self._readings[path] = self._thorough.get(path) or self._series.read(self._bytes(path))
        return self._readings[path]

    def needed(self, path: str) -> set[str]:
        """A file, and the project's files that importing it imports, directly or through others."""
        found, waiting = {path}, [path]
        while waiting:
            importer = waiting.pop()
            if importer not in self._thorough:
                self._thorough[importer] = self._series.read_thoroughly(self._bytes(importer))
            for one in self._thorough[importer].imports:
                for module in self._files(importer, one):
                    if module not in found:
                        found.add(module)
                        waiting.append(module)
        return found

    def _files(self, importer: str, one: Import) -> Iterator[str]:
        """The files of the project that an import statement loads."""
        if one.level:
            # One dot is the folder of the file itself.
            folder = "/".join(importer.split("/")[: -one.level])
            bases = [f"{folder}/" if folder else ""]
        else:
            bases = list(_FOLDERS)
        inside = one.module.replace(".", "/")
        for base in bases:
            for name in (inside, *(f"{inside}/{name}" if inside else name for name in one.names)):
                for path in (f"{base}{name}.py", f"{base}{name}/__init__.py"):
                    if name and (self._root / path).is_file():
                        yield path

    def _bytes(self, path: str) -> bytes:
        try:
            return (self._root / path).read_bytes() if path.endswith(".py") else b""
        except OSError:
            return b""
