"""The part of the profile that is about DAG content, from the table of all series into the pod."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from airflow_deployer_pod.parsing import Parsing, load

from airflow_deployer import airflow_profiles


@pytest.mark.parametrize("profile", airflow_profiles.PROFILES, ids=lambda profile: str(profile.series))
def test_the_pod_reads_what_the_table_says(tmp_path: Path, profile: airflow_profiles.Profile) -> None:
    file = tmp_path / "profile.json"
    file.write_text(profile.pod_document(), encoding="utf-8")
    assert dataclasses.asdict(Parsing.read(file)) == {"series": profile.series, **dataclasses.asdict(profile.parsing)}


def test_a_name_may_lead_to_a_method() -> None:
    assert load("pathlib:Path.joinpath") is Path.joinpath
    with pytest.raises(AttributeError):
        load("pathlib:Way")
