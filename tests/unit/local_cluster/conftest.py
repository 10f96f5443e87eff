"""A native cluster's layout below a temporary directory, with its processes ended after the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from airflow_deployer.local_cluster.native import commands
from airflow_deployer.local_cluster.native.layout import Layout
from airflow_deployer.local_cluster.native.processes import ProcessTable, end


@pytest.fixture
def layout(tmp_path: Path) -> Iterator[Layout]:
    layout = Layout(state=tmp_path / "state", run=tmp_path / "run")
    layout.ensure_directories()
    commands.allow()
    yield layout
    end(ProcessTable(layout).marked(), grace=0)
