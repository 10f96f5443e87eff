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
from selenium.common.exceptions import WebDriverException
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
    browser.get(url)

    def sent(driver: webdriver.Chrome) -> bool:
        for name, text in (("username", "admin"), ("password", password)):
            field = driver.find_element(By.NAME, name)
            if field.get_attribute("value") != text:
                field.clear()
                field.send_keys(text)
        driver.find_element(By.CSS_SELECTOR, "button[type=submit], input[type=submit]").click()
        return True

    _wait(browser).until(sent)
    _wait(browser).until(expected_conditions.invisibility_of_element_located((By.NAME, "username")))


def open_dag(browser: webdriver.Chrome, dag_id: str, screenshots: str) -> None:
    """Go from the list of DAGs to the page of one; keep what both look like as `<screenshots>-dags.png`, `-dag.png`."""
    wait = _wait(browser)
    wait.until(expected_conditions.visibility_of_element_located((By.LINK_TEXT, dag_id)))
    ARTIFACTS.mkdir(exist_ok=True)
    assert browser.save_screenshot(str(ARTIFACTS / f"{screenshots}-dags.png"))

    def clicked(driver: webdriver.Chrome) -> bool:
        driver.find_element(By.LINK_TEXT, dag_id).click()
        return True

    wait.until(clicked)
    wait.until(expected_conditions.url_matches(rf"/dags/{dag_id}\b|[?&]dag_id={dag_id}\b"))
    wait.until(expected_conditions.visibility_of_any_elements_located((By.XPATH, f"//*[contains(text(), '{dag_id}')]")))
    assert browser.save_screenshot(str(ARTIFACTS / f"{screenshots}-dag.png"))


def _wait(browser: webdriver.Chrome) -> WebDriverWait[webdriver.Chrome]:
    """Patience with a page that is drawn anew as answers come in: what was found a moment ago may be gone.

    Chromium's driver does not always call that stale, but at times an inspector error of its own.
    """
    return WebDriverWait(browser, 60, ignored_exceptions=(WebDriverException,))


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
