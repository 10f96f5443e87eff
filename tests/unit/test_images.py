"""Names of images, the generated Dockerfile, and what is said when there is no Docker Engine."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from airflow_deployer.base_context import find_lock
from airflow_deployer.config import Images, Settings
from airflow_deployer.content import ProjectContent, read_project
from airflow_deployer.errors import DockerError, RegistryError
from airflow_deployer.images import (
    Engine,
    ImagePlan,
    ImageRef,
    _build_error,
    _Layers,
    _Log,
    _push_error,
    runtime_dockerfile,
    stable_dockerfile,
)
from airflow_deployer.images import plan_images as plan_images_for
from airflow_deployer.registry import RegistryAddress

ADDRESS = RegistryAddress(push="localhost:5001", pull="registry:5000")


@pytest.fixture
def content(tmp_path: Path) -> ProjectContent:
    (tmp_path / "dags").mkdir()
    (tmp_path / "dags/a.py").write_text("")
    return read_project(tmp_path, Settings().project)


def plan(content: ProjectContent, images: Images | None = None, platform: str = "linux/amd64") -> ImagePlan:
    settings = msgspec.structs.replace(Settings(), images=images or Images())
    lock = find_lock(Path(), settings)
    return plan_images_for(settings, content, lock, ADDRESS, platform)


def test_the_pod_pulls_what_was_pushed_by_the_nodes_address_and_by_digest() -> None:
    image = ImageRef(ADDRESS, "airflow-deployer/shop", "tag", "sha256:ab")
    assert str(image) == "localhost:5001/airflow-deployer/shop:tag"
    assert image.pinned == "localhost:5001/airflow-deployer/shop@sha256:ab"
    assert image.deployed == "registry:5000/airflow-deployer/shop@sha256:ab"


def test_tags_change_with_their_inputs_alone(content: ProjectContent) -> None:
    first = plan(content)
    assert first == plan(content)
    assert first.dag_tag.startswith(content.content_id[:12])

    other_parent = plan(content, Images(parent="python:3.14-slim"))
    mirrored = plan(content, Images(mirror="localhost:5000"))
    other_platform = plan(content, platform="linux/arm64")
    plans = (first, other_parent, mirrored, other_platform)
    assert len({each.base_tag for each in plans}) == len({each.dag_tag for each in plans}) == 4
    assert mirrored.base_arguments["PARENT"] == "localhost:5000/library/python:3.13-slim-trixie"


def test_the_base_image_and_the_dag_image_do_not_share_a_repository(content: ProjectContent) -> None:
    assert (plan(content).base_repository, plan(content).dag_repository) == (
        "airflow-deployer/airflow-base",
        "airflow-deployer/airflow",
    )


def test_a_ready_made_base_image_is_used_by_its_digest(content: ProjectContent) -> None:
    digest = "sha256:" + "ab" * 32
    ready = plan(content, Images(base=f"ghcr.io/team/base@{digest}"))
    assert ready.ready_base and ready.ready_base.pinned == f"ghcr.io/team/base@{digest}"
    assert ready.base_files == ()
    assert ready.dag_tag != plan(content).dag_tag


def test_the_base_images_context_is_there(content: ProjectContent) -> None:
    paths = {file.path for file in plan(content).base_files}
    assert {"Dockerfile", "requirements.txt", "airflow_deployer_pod/supervisor.py"} <= paths
    assert not [path for path in paths if path.startswith("requirements/")], "another version's lock changes the tag"


def test_the_dockerfile_of_dags_alone(content: ProjectContent) -> None:
    assert stable_dockerfile("base", content) == runtime_dockerfile("base", content) == "FROM base\n"


def test_include_is_dag_content_and_does_not_change_the_runtime(content: ProjectContent) -> None:
    more = replace(content, dag_files=(*content.dag_files, replace(content.dag_files[0], path="include/a.sql")))
    assert plan(content).runtime_id == plan(more).runtime_id
    assert plan(content).dag_tag != plan(more).dag_tag
    with_plugin = replace(content, plugin_files=(replace(content.dag_files[0], path="plugins/p.py"),))
    assert plan(content).runtime_id != plan(with_plugin).runtime_id


def test_the_dockerfile_of_everything(content: ProjectContent) -> None:
    file = content.dag_files[0]
    everything = replace(
        content,
        dag_files=(file, replace(file, path="include/a.sql")),
        plugin_files=(replace(file, path="plugins/p.py"),),
        requirements=replace(file, path="requirements.txt"),
    )
    lines = stable_dockerfile("base", everything).splitlines()
    assert [line for line in lines if not line.startswith("RUN")] == [
        "FROM base",
        "USER 0:0",
        "COPY requirements.txt /tmp/requirements.txt",
        "USER 50000:50000",
        "COPY --chown=50000:50000 plugins /home/airflow/plugins",
        "COPY include /opt/airflow-deployer/content/include",
    ]


def test_the_builders_fragments_become_lines() -> None:
    log = _Log()
    assert list(log.add("Step 1/2 : FROM base\n ---> 12\nSte")) == ["Step 1/2 : FROM base"]
    assert list(log.add("p 2/2 : COPY\n\n\x1b[91moh no\n\x1b[0mRemoving intermediate container 12\n")) == [
        "Step 2/2 : COPY",
        "oh no",
    ]


def test_a_push_counts_layers_and_bytes() -> None:
    layers = _Layers()
    assert layers.add({"status": "The push refers to repository [x]"}) == ""
    assert layers.add({"status": "Preparing", "progressDetail": {}, "id": "a"}) == "0 of 1 layers"
    assert layers.add({"status": "Layer already exists", "progressDetail": {}, "id": "b"}) == "1 of 2 layers"
    line = {"status": "Pushing", "progressDetail": {"current": 5_000_000, "total": 20_000_000}, "id": "a"}
    assert layers.add(line) == "1 of 2 layers, 5 of 20 MB"
    assert layers.add({"status": "Pushed", "progressDetail": {}, "id": "a"}) == "2 of 2 layers, 5 of 20 MB"


@pytest.mark.parametrize(
    ("reason", "hint"),
    [
        ("manifest for python:3.13-slim-trixie not found: manifest unknown", "images.mirror"),
        ("Get https://registry-1.docker.io/v2/: dial tcp: lookup registry-1.docker.io: no such host", "images.mirror"),
        ("no space left on device", "docker info"),
    ],
)
def test_a_failed_build_says_what_to_do_and_shows_the_end_of_its_log(reason: str, hint: str) -> None:
    error = _build_error("localhost:5000/a:1", reason, [f"line {number}" for number in range(30)])
    assert hint in error.hint
    assert error.details == tuple(f"line {number}" for number in range(15, 30))


@pytest.mark.parametrize(
    ("reason", "hint"),
    [
        ("unauthorized: authentication required", "docker login reg:1"),
        ("no basic auth credentials", "docker login reg:1"),
        ("x509: certificate signed by unknown authority", "/etc/docker/certs.d/reg:1/ca.crt"),
        ("dial tcp 127.0.0.1:1: connect: connection refused", "cannot reach reg:1"),
    ],
)
def test_a_failed_push_says_what_to_do(reason: str, hint: str) -> None:
    error = _push_error("reg:1/a:1", reason)
    assert isinstance(error, RegistryError)
    assert hint in error.hint


@pytest.fixture
def docker_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    yield lambda address: monkeypatch.setenv("DOCKER_HOST", address)
    gc.collect()  # docker-py forgets to close a socket that could not be connected: here and not in another test


@pytest.mark.filterwarnings("ignore:unclosed <socket")
def test_there_is_no_engine(docker_host: Callable[[str], None], tmp_path: Path) -> None:
    docker_host(f"unix://{tmp_path}/none.sock")
    with pytest.raises(
        DockerError, match=r"Cannot reach Docker Engine at unix:.*: No such file or directory"
    ) as caught:
        Engine().connect()
    assert "unset DOCKER_HOST" in caught.value.hint


@pytest.mark.filterwarnings("ignore:unclosed <socket")
def test_the_engine_was_killed_and_left_its_socket(
    docker_host: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
    docker_host(f"unix://{os.path.relpath(tmp_path, '/')}/s")
    with pytest.raises(DockerError, match=r"Cannot reach Docker Engine .*: Connection refused"):
        Engine().connect()


def test_an_address_that_is_none(docker_host: Callable[[str], None]) -> None:
    docker_host("nonsense://x")
    with pytest.raises(DockerError, match="Cannot reach Docker Engine at nonsense://x"):
        Engine().connect()


def test_an_engine_that_may_not_be_used() -> None:
    """In a process of its own, without root's permission to use every socket."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        path = Path(folder) / "s"
        server.bind(str(path))
        server.listen()
        path.chmod(0o000)
        Path(folder).chmod(0o755)
        code = (
            "import os, docker\n"
            "from airflow_deployer.errors import DockerError\n"
            "from airflow_deployer.images import Engine\n"
            "if os.getuid() == 0:\n"
            "    os.setgroups([])\n"
            "    os.setresuid(65534, 65534, 65534)\n"
            "try:\n"
            "    Engine().connect()\n"
            "except DockerError as error:\n"
            "    print(error.message, error.hint)\n"
        )
        env = os.environ | {"DOCKER_HOST": f"unix://{path}", "DOCKER_CONFIG": folder}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert ": permission denied. Add yourself to its group" in done.stdout, done
