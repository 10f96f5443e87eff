"""An Airflow without a REST API: what is asked in its pod, and what becomes of the answers and of lost connections."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from airflow_deployer import pod_airflow, pod_exec
from airflow_deployer.airflow_profiles import AIRFLOW_1
from airflow_deployer.api_streams import ApiServer, RefusedError, UnavailableError
from airflow_deployer.errors import AirflowError, ClusterError
from airflow_deployer.kube_context import KubeContext
from airflow_deployer.manifests import Names
from airflow_deployer.pod_airflow import PodAirflow
from airflow_deployer.running_airflow import Dag, ImportFailure, RunningTask


class Pod:
    """A stand-in for the exec: each connection has its own answers, and an exception among them is its end."""

    def __init__(self) -> None:
        self.connections: list[list[dict[str, Any] | Exception]] = []
        self.asked: list[str] = []
        self.closed = 0

    async def start(self, *_: object) -> Exec:
        return Exec(self, self.connections.pop(0))


class Exec:
    def __init__(self, pod: Pod, answers: list[dict[str, Any] | Exception]) -> None:
        self._pod = pod
        self._answers = answers

    async def write(self, data: bytes) -> None:
        assert data.endswith(b"\n")
        self._pod.asked.append(data.decode().strip())

    async def read_line(self) -> bytes:
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return json.dumps(answer).encode()

    async def close(self) -> None:
        self._pod.closed += 1


@pytest.fixture
def pod(monkeypatch: pytest.MonkeyPatch) -> Pod:
    made = Pod()
    monkeypatch.setattr(pod_exec.PodExec, "start", made.start)
    return made


@pytest.fixture
def airflow(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> Iterator[PodAirflow]:
    async def load(_: ApiServer) -> None:
        pass

    monkeypatch.setattr(ApiServer, "load", load)
    context = KubeContext("local", "local", None, "kubeconfig")
    with pod_airflow.opened("http://127.0.0.1:1", AIRFLOW_1, context, Names("airflow", "team")) as made:
        yield made


def test_the_rows_become_what_every_series_tells(airflow: PodAirflow, pod: Pod) -> None:
    parsed = "2026-11-23T09:00:00.123456+00:00"
    pod.connections = [
        [
            {"rows": [["dummy", False, parsed, "/home/airflow/dags/dummy.py"], ["old", True, None, None]]},
            {"rows": [["/home/airflow/dags/broken.py", "Traceback:\nNameError: x", parsed]]},
            {"rows": [["dummy", "manual__1", "load"]]},
        ]
    ]
    assert airflow.dags() == [Dag("dummy", False, parsed, "dummy.py"), Dag("old", True, None, None)]
    assert airflow.import_errors() == [ImportFailure("broken.py", "Traceback:\nNameError: x", parsed)]
    assert airflow.running_tasks() == (RunningTask("dummy", "manual__1", "load", -1),)
    assert pod.asked == ["dags", "import_errors", "running_tasks"]


def test_a_lost_connection_is_made_again_once(airflow: PodAirflow, pod: Pod) -> None:
    pod.connections = [[UnavailableError("the stream broke")], [{"rows": []}]]
    assert airflow.dags() == []
    assert pod.closed == 1


def test_a_pod_that_is_away_is_an_error_with_its_cause(airflow: PodAirflow, pod: Pod) -> None:
    pod.connections = [[UnavailableError("the stream broke")], [UnavailableError("no such pod")]]
    with pytest.raises(AirflowError, match=r"Cannot list the running tasks: no such pod\."):
        airflow.running_tasks()


def test_what_the_database_says_and_missing_rights_are_told(airflow: PodAirflow, pod: Pod) -> None:
    pod.connections = [[{"error": "connection refused"}, RefusedError("may not exec")]]
    with pytest.raises(AirflowError, match=r"Cannot list the DAGs: Airflow's database: connection refused\."):
        airflow.dags()
    with pytest.raises(ClusterError, match="Cannot list the DAGs: may not exec"):
        airflow.dags()
