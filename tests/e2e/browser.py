"""A headless Chromium for tests, from Debian's packages: installed when it is missing, never skipped."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.common.exceptions import ElementClickInterceptedException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.support import expected_conditions
from selenium.webdriver.support.wait import WebDriverWait

from tests.e2e.conftest import ARTIFACTS


@contextmanager
def chromium(profile: Path) -> Iterator[webdriver.Chrome]:
    """A browser with an empty profile that talks to this machine only."""
    _ensure_installed()
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1400,900",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_page_load_timeout(60)
    try:
        yield driver
    finally:
        driver.quit()


def log_in(browser: webdriver.Chrome, url: str, password: str) -> None:
    """Open a page of Airflow's, fill in the login form that comes instead, and wait until it is gone."""
    wait = WebDriverWait(browser, 60)
    browser.get(url)
    name = wait.until(expected_conditions.element_to_be_clickable((By.NAME, "username")))
    name.send_keys("admin")
    browser.find_element(By.NAME, "password").send_keys(password)
    browser.find_element(By.CSS_SELECTOR, "button[type=submit], input[type=submit]").click()
    wait.until(expected_conditions.staleness_of(name))


def open_dag(browser: webdriver.Chrome, dag_id: str, screenshots: str) -> None:
    """Go from the list of DAGs to the page of one; keep what both look like as `<screenshots>-dags.png`, `-dag.png`."""
    wait = WebDriverWait(browser, 60)
    wait.until(expected_conditions.visibility_of_element_located((By.LINK_TEXT, dag_id)))
    ARTIFACTS.mkdir(exist_ok=True)
    assert browser.save_screenshot(str(ARTIFACTS / f"{screenshots}-dags.png"))
    # The list is drawn anew as answers come in, and what was found a moment ago may be gone.
    patient = WebDriverWait(
        browser, 60, ignored_exceptions=(StaleElementReferenceException, ElementClickInterceptedException)
    )

    def clicked(driver: webdriver.Chrome) -> bool:
        driver.find_element(By.LINK_TEXT, dag_id).click()
        return True

    patient.until(clicked)
    wait.until(expected_conditions.url_matches(rf"/dags/{dag_id}\b|[?&]dag_id={dag_id}\b"))
    patient.until(
        expected_conditions.visibility_of_any_elements_located((By.XPATH, f"//*[contains(text(), '{dag_id}')]"))
    )
    assert browser.save_screenshot(str(ARTIFACTS / f"{screenshots}-dag.png"))


def _ensure_installed() -> None:
    if shutil.which("chromium") and shutil.which("chromedriver"):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.fail(
            "chromium and chromedriver are needed: install Debian's chromium and chromium-driver", pytrace=False
        )
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium", "chromium-driver"],
    ):
        subprocess.run(command, env=environment, check=True, capture_output=True)
