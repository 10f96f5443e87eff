"""What `import_moves` says of Airflow's names, against Airflow itself: in the base image of each series."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from airflow_deployer_pod.import_moves import SERIES, THINGS

from airflow_deployer.airflow_profiles import PROFILES, Profile
from airflow_deployer.base_context import find_lock
from airflow_deployer.config import Airflow, Images, Settings
from airflow_deployer.content import read_project
from airflow_deployer.images import Engine, ensure_base_image, plan_images
from airflow_deployer.progress import Silent
from airflow_deployer.registry import Registry, choose_registry

pytestmark = pytest.mark.e2e

PROBE = Path(__file__).parent / "import_moves_probe.py"
# What the probe may see of a spelling: whether a package is there that only some images have is of no interest.
EXPECTED = {"+": "+", "d": "d", "-": "-q", "p": "+-q", "q": "d+-q"}


def base_image(engine: Engine, version: str, project: Path) -> str:
    """The name of the base image of a version, built if it is in no registry."""
    (project / "dags").mkdir()
    (project / "dags" / "dummy.py").write_text("# airflow dag\n")
    mirrored = Registry("localhost:5000").manifest_digest("library/python", "3.13-slim-trixie")
    settings = Settings(airflow=Airflow(version=version), images=Images(mirror="localhost:5000" if mirrored else None))
    plan = plan_images(
        settings,
        read_project(project, settings.project),
        find_lock(project, settings),
        choose_registry(settings.images, None),
        engine.platform,
    )
    return str(ensure_base_image(engine, Registry(plan.address.push), plan, Silent()))


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.locked)
def test_every_spelling_fares_as_the_table_says(profile: Profile, tmp_path: Path) -> None:
    engine = Engine()
    try:
        image = base_image(engine, profile.locked, tmp_path)
    finally:
        engine.close()
    run = subprocess.run(
        ["docker", "run", "--rm", "--interactive", "--network=none", "--entrypoint=python", image, "-", profile.series],
        input=PROBE.read_text(encoding="utf-8"),
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    seen = json.loads(run.stdout.splitlines()[-1])
    column = SERIES.index(profile.series)
    table = {spelling.text: spelling.states[column] for thing in THINGS for spelling in thing if spelling.text in seen}
    assert len(table) > 250
    wrong = {
        text: (state, seen[text])
        for text, state in table.items()
        # A package says nothing as it is imported.
        if seen[text] not in EXPECTED[state] and not (text.endswith(".*") and state == "d" and seen[text] == "+")
    }
    assert wrong == {}
