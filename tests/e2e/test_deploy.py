"""The main flow on the real cluster: up, up again, an edit, status, render, forward, down, purge."""

from __future__ import annotations

import base64
import json
import secrets
import signal
import subprocess
import sys
import urllib.request
from typing import Any

import pytest
import yaml

from airflow_deployer.cluster import CLAIM, LEASE, POD, SECRET, SERVICE, STATEFUL_SET
from tests.e2e import airflow_runs
from tests.e2e.conftest import Project, eventually

NEW_DAG = """
from airflow.sdk import DAG, task

with DAG("hello", schedule=None):
    @task
    def greet() -> str:
        return "hello"

    greet()
"""

# The beginning of a DAG file that Airflow comes to later than its components are healthy.
SLOW = "import time\ntime.sleep(8)\n"


def versions(project: Project) -> dict[str, str]:
    """The resource version of every object but the Lease: a write to any of them shows."""
    names, namespace = project.names, project.names.namespace
    wanted = (
        (STATEFUL_SET, names.name),
        (POD, names.pod),
        (SERVICE, names.name),
        (CLAIM, names.claim),
        (SECRET, names.secret),
    )
    found = {kind.kind: project.cluster.get(kind, namespace, name) for kind, name in wanted}
    return {kind: item["metadata"]["resourceVersion"] for kind, item in found.items() if item is not None}


def images() -> set[str]:
    """What Docker Engine holds."""
    done = subprocess.run(["docker", "images", "-aq", "--no-trunc"], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def page(port: int, path: str = "/api/v2/version") -> Any:
    """What answers through the forward."""
    with urllib.request.urlopen(f"http://localhost:{port}{path}", timeout=20) as answer:
        return json.load(answer)


@pytest.mark.e2e
def test_the_whole_life_of_a_deployment(project: Project) -> None:
    first = project.up()
    assert first["pod"] == "created"
    assert first["dags"] == 1
    assert first["import_errors"] == []
    assert page(project.port)["version"] == "3.3.2"

    # Nothing changed: nothing is written but the Lease, and nothing is built.
    before, held = versions(project), images()
    second = project.up()
    assert versions(project) == before
    assert images() == held
    assert second["changes"] == {}
    assert second["pod"] == "kept"
    assert second["image"] == first["image"]
    assert second["content_id"] == first["content_id"]

    # Status tells the same in words and as JSON, and no secret unless asked.
    password = project.secret("admin-password")
    status = project.deployer("status", "--output", "json")
    assert status.code == 0, status
    assert status.json["healthy"] is True
    assert set(status.json["components"].values()) == {"healthy"}
    assert status.json["content_id"] == first["content_id"]
    assert status.json["url"].endswith(f":{project.port}")
    assert password not in status.stdout + status.stderr
    assert password in project.deployer("status", "--show-password").stdout

    # Rendered manifests match what runs, and hold no secret.
    rendered = project.deployer("render")
    assert rendered.code == 0, rendered
    by_kind = {item["kind"]: item for item in yaml.safe_load_all(rendered.stdout)}
    assert by_kind["StatefulSet"]["spec"]["template"]["spec"]["containers"][1]["image"] == first["image"]
    assert set(by_kind["Secret"]["data"].values()) == {""}
    live = project.cluster.get(SECRET, project.names.namespace, project.names.secret)
    assert live is not None
    for value in live["data"].values():
        assert value not in rendered.stdout
        assert base64.b64decode(value).decode() not in rendered.stdout

    # An edited project goes into the running pod, and the same forward goes on answering.
    uid = project.pod()["metadata"]["uid"]
    project.write("dags/hello.py", NEW_DAG)
    third = project.up()
    assert (third["pod"], third["content"]) == ("kept", "switched")
    assert third["dags"] == 2
    assert third["content_id"] != first["content_id"]
    assert project.pod()["metadata"]["uid"] == uid
    assert page(project.port)["version"] == "3.3.2"
    api = project.api()
    airflow_runs.trigger(api, "hello", "one")
    assert airflow_runs.wait(api, "hello", "one") == "success"
    assert airflow_runs.result(api, "hello", "one", "greet") == "hello"

    # No output of any command showed a secret, but for the one that was asked to.
    told = "\n".join(entry for entry in project.history if "--show-password" not in entry)
    assert password not in told
    assert project.secret("postgres-password") not in told

    # Down keeps the volume and the Secret; purge asks first, and removes them.
    down = project.deployer("down", "--output", "json")
    assert down.code == 0, down
    assert not project.has("StatefulSet")
    assert not project.has("pod")
    assert project.has("claim")
    assert project.has("Secret")
    again = project.deployer("down", "--output", "json")
    assert again.code == 0, again
    assert again.json["removed"] == []
    refused = project.deployer("down", "--purge")
    assert refused.code == 2, refused
    assert "--yes" in refused.stderr
    assert project.has("claim")
    purged = project.deployer("down", "--purge", "--yes", "--output", "json")
    assert purged.code == 0, purged
    assert not project.has("claim")
    assert not project.has("Secret")
    assert project.cluster.get(LEASE, project.names.namespace, project.names.lease) is None
    assert project.deployer("status").code == 1


@pytest.mark.e2e
def test_output_to_a_pipe_ends_with_the_command(project: Project) -> None:
    piped = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m airflow_deployer up 2>&1 | cat"],
        cwd=project.folder,
        env=project.env,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert "healthy" in piped.stdout
    assert "\x1b[" not in piped.stdout
    assert page(project.port)["version"] == "3.3.2"

    # The forward in the background ends by itself when its StatefulSet is gone, even if nobody asks it to.
    project.cluster.delete(STATEFUL_SET, project.names.namespace, project.names.name)
    eventually(lambda: not _answers(project.port), seconds=60, what="the forward has ended")


def _answers(port: int) -> bool:
    try:
        page(port)
    except OSError:
        return False
    return True


@pytest.mark.e2e
def test_a_taken_port_is_found_before_the_build(project: Project) -> None:
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", project.port))
        other.listen()
        result = project.deployer("up")
    assert result.code == 1
    assert f"port {project.port}" in result.stderr
    assert "python" in result.stderr
    assert "--port" in result.stderr
    assert not project.has("StatefulSet")


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("version", "start"),
    [
        ("3.3.2", "from airflow.sdk import DAG, Variable\nnever = {'schedule': None}"),
        ("2.11.2", "from airflow.models import DAG, Variable\nnever = {'schedule': None}"),
        ("1.10.15", "from airflow.models import DAG, Variable\nnever = {'schedule_interval': None}"),
    ],
)
def test_a_variable_that_only_the_database_knows(project: Project, version: str, start: str) -> None:
    project.env["DEPLOYER_AIRFLOW_VERSION"] = version
    project.write("dags/dummy.py", f"{start}\ndummy = DAG('dummy', **never)\n")
    project.write(
        "dags/needs_variable.py", f"{SLOW}{start}\nteam = Variable.get('team')\nneeds = DAG('needs', **never)\n"
    )
    # Another text than ever before, so that the first image has to be built and the second one is in the registry.
    project.write("dags/new.py", f"TOKEN = '{secrets.token_hex(8)}'\n")
    for known in (False, True):
        result = project.deployer("up", "--output", "json")
        assert result.code == 1, result
        assert ("Import check" not in result.stderr) == known
        assert "needs_variable.py" in result.stderr
        assert "Airflow runs, but cannot import" in result.stderr
        if version != "1.10.15":  # which has no REST API
            assert project.api().version() == version
        report = result.json
        assert report["dags"] == 1
        assert [error["file"] for error in report["import_errors"]] == ["needs_variable.py"]
        assert report["airflow_version"] == version
        assert project.deployer("down", "--purge", "--yes").code == 0


@pytest.mark.e2e
def test_what_an_interrupted_up_has_started_is_verified_by_the_next(project: Project) -> None:
    start = "from airflow.sdk import DAG, Variable"
    project.write("dags/needs_variable.py", f"{SLOW}{start}\nteam = Variable.get('team')\nneeds = DAG('needs')\n")
    running = project.start("up")
    eventually(lambda: project.has("pod"), seconds=120, what="the pod is there")
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    assert running.returncode == 130
    result = project.deployer("up", "--output", "json")
    assert (result.code, result.json["pod"], result.json["dags"]) == (1, "kept", 1)
    assert [error["file"] for error in result.json["import_errors"]] == ["needs_variable.py"]
