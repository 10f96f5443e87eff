"""Airflow's pages in a real browser, through the forward: log in, see the DAG; the screenshots are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.browser import chromium, log_in, open_dag
from tests.e2e.conftest import Project


@pytest.mark.e2e
def test_a_person_logs_in_and_sees_the_dag(project: Project, tmp_path: Path) -> None:
    report = project.up()
    with chromium(tmp_path / "profile") as browser:
        log_in(browser, f"{report['url']}/dags", project.secret("admin-password"))
        open_dag(browser, "dummy", "airflow")
