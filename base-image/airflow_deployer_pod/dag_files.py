"""Which files of a version Airflow takes for DAG files, looked up again only where a file has changed."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

from airflow_deployer_pod.content_store import Manifest


class DagFiles:
    """Lists the DAG files of one version after the other.

    Args:
        might_contain_dag: Airflow's look at one file, by its path (its safe mode, where that is on).
    """

    def __init__(self, might_contain_dag: Callable[[str], bool]) -> None:
        self._might_contain_dag = might_contain_dag
        self._known: dict[tuple[str, str], bool] = {}

    def find(self, manifest: Manifest, root: Path) -> list[str] | None:
        """The paths of its DAG files below `dags/`; None where only Airflow can tell, because of an `.airflowignore`.

        Args:
            manifest: the version's.
            root: its folder.
        """
        if any(path.endswith("/.airflowignore") for path in manifest.files):
            return None
        known, self._known = self._known, {}
        for path, entry in manifest.files.items():
            if path.startswith("dags/"):
                key = (path, entry.sha256)
                self._known[key] = known[key] if key in known else self._is_dag_file(root / path)
        return [path[len("dags/") :] for (path, _), found in self._known.items() if found]

    def _is_dag_file(self, file: Path) -> bool:
        is_module = file.suffix == ".py" or zipfile.is_zipfile(file)
        return is_module and self._might_contain_dag(str(file))
