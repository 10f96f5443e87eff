"""What commands tell: the same facts as JSON and in words, and the password only when it was asked for."""

from __future__ import annotations

import dataclasses
import json

from airflow_deployer.reports import DownReport, ImportErrorReport, StatusReport, UpReport

STATUS = StatusReport(
    context="kind-dev",
    namespace="default",
    name="airflow",
    deployed=True,
    ready=True,
    components={"web": "healthy", "scheduler": "healthy"},
    login="admin",
)
UP = UpReport(
    context="kind-dev",
    namespace="default",
    name="airflow",
    image="localhost:5000/a@sha256:1",
    content_id="c" * 64,
    airflow_version="3.3.2",
    changes={"StatefulSet airflow": "changed"},
    content="with the pod",
    interrupted=(),
    pod="replaced",
    dags=1,
    import_errors=(),
    warnings=(),
    steps={"check": 0.4, "pod": 12.0},
    url="http://localhost:8080",
)


def test_a_status_is_healthy_when_everything_is() -> None:
    assert STATUS.healthy
    assert not dataclasses.replace(STATUS, ready=False).healthy
    assert not dataclasses.replace(STATUS, deployed=False).healthy
    assert not dataclasses.replace(STATUS, components={"scheduler": None}).healthy


def test_the_password_shows_only_when_asked_for() -> None:
    assert "password" not in STATUS.document()
    asked = dataclasses.replace(STATUS, password="hunter2")
    assert asked.document()["password"] == "hunter2"
    assert ("login", "admin / hunter2") in asked.lines()
    assert "hunter2" not in repr(asked)


def test_nothing_deployed_says_what_to_do() -> None:
    lines = dict(dataclasses.replace(STATUS, deployed=False).lines())
    assert "deployer up" in lines["state"]


def test_up_tells_what_changed_and_how_long_it_took() -> None:
    lines = dict(UP.lines())
    assert lines["changed"] == "StatefulSet airflow changed; pod replaced"
    assert lines["took"] == "12.4 s: check 0.4 s, pod 12.0 s"
    assert "1 DAG," in lines["Airflow"]
    json.dumps(UP.document())


def test_up_with_nothing_to_do_says_so() -> None:
    assert dict(dataclasses.replace(UP, changes={}, pod="kept").lines())["changed"] == "nothing"


def test_import_errors_are_listed() -> None:
    broken = dataclasses.replace(UP, import_errors=(ImportErrorReport("a.py", "KeyError: 'x'"),))
    assert dict(broken.lines())["errors"] == "a.py: KeyError: 'x'"


def test_down_tells_what_stays() -> None:
    report = DownReport("kind-dev", "default", "airflow", (), ("volume airflow-data",))
    lines = dict(report.lines())
    assert "nothing" in lines["removed"]
    assert "volume airflow-data" in lines["kept"]
