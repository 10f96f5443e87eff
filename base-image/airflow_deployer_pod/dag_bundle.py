"""The DAG bundle that serves the content on the volume: every run finishes on the version that it began with.

Configured as the only bundle, by the name `dags`. Its versions are those of `content_store`. Without a version it is
what is live, looked up by `initialize` and `refresh` and kept until the next one, so that nobody sees half a switch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from airflow.dag_processing.bundles import base
from airflow.dag_processing.bundles.base import BaseDagBundle

from airflow_deployer_pod.content_store import CONTENT_FOLDER, Store
from airflow_deployer_pod.import_root import use_root


class ContentBundle(BaseDagBundle):  # type: ignore[misc]
    """The DAG content of one version, or of the live one.

    Args:
        content: the folder of the content store.
        arguments: what Airflow gives every bundle: `name`, `version`, `refresh_interval`, `view_url_template`.
    """

    supports_versioning = True

    def __init__(self, *, content: str | Path = CONTENT_FOLDER, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.store = Store(Path(content))
        self._found: str | None = None

    def initialize(self) -> None:
        """Find the version, and have this process import the project's modules from it.

        Raises:
            RuntimeError: the version is not on the volume (any more), or the volume holds no content at all.
        """
        if self.version is None:
            self._resolve()
        elif not (self.store.root(self.version) / "dags").is_dir():
            raise RuntimeError(
                f"The version {self.version} of the DAG bundle {self.name!r}, which this run began with, is no longer "
                "on the volume. Clear the run with the option to run it on the latest version, or trigger a new run."
            )
        use_root(self.path.parent, self.store.folder)
        super().initialize()

    def refresh(self) -> None:
        """Follow a switch that has happened since.

        Raises:
            RuntimeError: this is one version of the bundle, which never changes.
        """
        if self.version is not None:
            raise RuntimeError(f"The version {self.version} of the DAG bundle {self.name!r} does not change.")
        self._resolve()
        use_root(self.path.parent, self.store.folder)

    def _resolve(self) -> None:
        found = self.store.live_version()
        if found is None:
            raise RuntimeError(f"There is no DAG content in {self.store.folder}. Run `deployer up` again.")
        self._found = found

    @property
    def path(self) -> Path:
        """The DAG folder of the version; before `initialize`, of what is live."""
        version = self.version or self._found or self.store.live_version()
        return self.store.root(version) / "dags" if version else self.store.current / "dags"

    def get_current_version(self) -> Any:
        """The version that `path` is in: its name, or where Airflow has a class for that, one of it."""
        version = self.version or self._found or self.store.live_version()
        bundle_version = getattr(base, "BundleVersion", None)
        return bundle_version(version=version) if version and bundle_version else version
