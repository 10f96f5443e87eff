"""The stand-in images' pure parts."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

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
