"""Airflow's pages in a real browser, through the forward: log in, see the DAG; the screenshots are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support import expected_conditions
from selenium.webdriver.support.wait import WebDriverWait

from tests.e2e.browser import chromium
from tests.e2e.conftest import ARTIFACTS, Project


@pytest.mark.e2e
def test_a_person_logs_in_and_sees_the_dag(project: Project, tmp_path: Path) -> None:
    report = project.up()
    ARTIFACTS.mkdir(exist_ok=True)
    with chromium(tmp_path / "profile") as browser:
        wait = WebDriverWait(browser, 60)
        browser.get(f"{report['url']}/dags")
        name = wait.until(expected_conditions.element_to_be_clickable((By.NAME, "username")))
        name.send_keys("admin")
        browser.find_element(By.NAME, "password").send_keys(project.secret("admin-password"))
        browser.find_element(By.CSS_SELECTOR, "button[type=submit]").click()
        wait.until(expected_conditions.visibility_of_element_located((By.LINK_TEXT, "dummy")))
        assert browser.save_screenshot(str(ARTIFACTS / "airflow-dags.png"))
        browser.find_element(By.LINK_TEXT, "dummy").click()
        wait.until(expected_conditions.url_contains("/dags/dummy"))
        wait.until(expected_conditions.visibility_of_element_located((By.XPATH, "//*[text()='dummy']")))
        assert browser.save_screenshot(str(ARTIFACTS / "airflow-dag.png"))
