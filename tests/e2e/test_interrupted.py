"""Ctrl-C where `up` waits for somebody else: it ends at once, leaves nothing running, and the next `up` finishes."""

from __future__ import annotations

import secrets
import signal
import socket
import subprocess
import time

import pytest

from airflow_deployer import config
from airflow_deployer.cluster import LEASE, NAMESPACE
from airflow_deployer.content import read_project
from airflow_deployer.images import CONTENT_ID_LABEL
from tests.e2e.conftest import DUMMY_DAG, Project, eventually

pytestmark = pytest.mark.e2e


def interrupt(project: Project, running: subprocess.Popen[str], within: float) -> str:
    """Press Ctrl-C; the command must end in time with 130, without a stack trace. Return what it said."""
    began = time.monotonic()
    running.send_signal(signal.SIGINT)
    try:
        output, errors = running.communicate(timeout=60)
    finally:
        running.kill()
    project.history.append(f"$ deployer up, interrupted\n{output}{errors}")
    assert running.returncode == 130, errors
    assert "Traceback" not in errors, errors
    assert output == ""
    assert time.monotonic() - began < within
    return errors


@pytest.mark.parametrize("delay", [0.05, 0.1, 0.2])
def test_while_it_starts(project: Project, delay: float) -> None:
    running = project.start("up")
    time.sleep(delay)
    interrupt(project, running, within=3)


def test_while_the_preflight_waits(project: Project) -> None:
    with socket.socket() as silent:  # a registry that takes the connection and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        project.env["DEPLOYER_IMAGES_REGISTRY"] = f"localhost:{silent.getsockname()[1]}"
        running = project.start("up")
        silent.settimeout(20)
        connection, _ = silent.accept()
        with connection:
            said = interrupt(project, running, within=3)
    assert "run `deployer up` again" in said
    assert project.cluster.get(NAMESPACE, None, project.names.namespace) is None


def test_while_the_image_is_pushed_and_checked(project: Project) -> None:
    import docker

    cluster, names = project.cluster, project.names
    project.write("dags/dummy.py", f"{DUMMY_DAG}\n# {secrets.token_hex(8)}\n")
    (project.folder / "include").mkdir()
    (project.folder / "include" / "noise").write_bytes(secrets.token_bytes(24_000_000))  # nothing to compress away
    settings = config.load(project.folder, config_file=None, env={}, overrides={})
    content_id = read_project(project.folder, settings.project).content_id
    client = docker.from_env()
    try:
        label = f"{CONTENT_ID_LABEL}={content_id}"
        running = project.start("up")
        eventually(lambda: client.containers.list(filters={"label": label}), seconds=60, what="the check's container")
        interrupt(project, running, within=15)
        assert client.containers.list(all=True, filters={"label": label}) == []
    finally:
        client.close()
    assert not project.has("Secret")
    assert not project.has("StatefulSet")
    lease = cluster.get(LEASE, names.namespace, names.lease)
    assert lease is not None
    assert not lease["spec"].get("holderIdentity")
    report = project.up()
    assert report["content_id"] == content_id
    assert report["dags"] == 1
