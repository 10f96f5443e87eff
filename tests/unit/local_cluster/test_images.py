"""The stand-in images' pure parts."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from airflow_deployer.airflow_profiles import PROFILES, Profile
from airflow_deployer.errors import LocalClusterError
from airflow_deployer.local_cluster.native import images


@pytest.mark.parametrize(
    ("environ", "pip_conf", "url"),
    [
        ({}, "", None),
        ({}, "[global]\nindex-url = https://index.example/simple\n", "https://index.example/simple"),
        ({"PIP_INDEX_URL": "http://env.example/simple"}, "index-url = https://x.example/", "http://env.example/simple"),
        ({}, "[global]\nextra-index-url = https://x.example/simple\n", None),
        ({"PIP_INDEX_URL": "file:///opt/simple"}, "", None),
        # A password would end in an image layer.
        ({"PIP_INDEX_URL": "https://user:secret@index.example/simple"}, "", None),
    ],
)
def test_index_url(environ: dict[str, str], pip_conf: str, url: str | None) -> None:
    assert images.index_url(environ, pip_conf) == url


def test_every_file_of_the_images_is_in_the_package() -> None:
    for stand_in in images.STAND_INS:
        for name in (stand_in.dockerfile, *stand_in.files):
            assert (images.FILES / name).is_file()


def test_without_a_wish_there_is_what_the_default_airflow_needs_and_nothing_else() -> None:
    newest = PROFILES[0]
    assert {s.name for s in images.wanted([])} == {f"library/{newest.parent}", f"library/{newest.postgres_image}"}


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.series)
def test_every_series_of_airflow_has_its_stand_ins(profile: Profile) -> None:
    wanted = images.wanted([profile.parent, profile.postgres_image])
    names = [stand_in.name for stand_in in wanted]
    assert f"library/{profile.parent}" in names
    assert f"library/{profile.postgres_image}" in names
    assert len(set(names)) == len(names)
    parent = next(stand_in for stand_in in wanted if stand_in.name == f"library/{profile.parent}")
    assert parent.version == profile.python


def test_the_name_of_a_stand_in_says_its_version_and_release() -> None:
    for stand_in in images.STAND_INS:
        if stand_in.repository == "library/python":
            assert stand_in.tag == f"{stand_in.version}-slim-{stand_in.suite}"
        else:
            assert stand_in.tag == stand_in.version


def test_images_of_one_dockerfile_have_inputs_of_their_own() -> None:
    assert len({images._inputs(stand_in) for stand_in in images.STAND_INS}) == len(images.STAND_INS)


def test_the_context_holds_the_files_executable(tmp_path: Path) -> None:
    (tmp_path / "entry").write_text("#!/bin/sh\n")
    with tarfile.open(fileobj=images._context({"docker-entrypoint.sh": tmp_path / "entry"})) as archive:
        member = archive.getmember("docker-entrypoint.sh")
        assert member.mode == 0o755
        assert member.size == 10


def test_what_docker_reports_becomes_live_detail_or_an_error(tmp_path: Path) -> None:
    class Step:
        details: list[str] = []  # noqa: RUF012

        def update(self, detail: str) -> None:
            self.details.append(detail)

        def done(self, summary: str) -> None: ...

    log = tmp_path / "log"
    messages = [
        {"stream": "Step 1/2 : FROM x\n"},
        {"status": "Pushing", "progress": "[=>"},
        {"aux": {"ID": "sha256:1"}},
    ]
    images._follow(messages, action="building x", step=Step(), log=log)
    assert Step.details == ["Step 1/2 : FROM x", "Pushing"]
    with pytest.raises(LocalClusterError, match="building x failed: no space left on device") as caught:
        images._follow([*messages, {"error": "no space left on device"}], action="building x", step=Step(), log=log)
    assert caught.value.details == ("Step 1/2 : FROM x", "Pushing")
