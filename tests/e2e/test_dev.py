"""`deployer dev` on the real cluster: saves, mistakes, a pod and an API server that go away, a second one, the end."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from airflow_deployer.cluster import POD
from tests.e2e.bad_network import Proxy
from tests.e2e.conftest import Project

pytestmark = pytest.mark.e2e

DAG = """
from airflow.sdk import DAG, task

with DAG("{dag_id}", schedule=None, description="{text}"):

    @task
    def speak() -> None:
        print("says {text}")

    speak()
"""

Event = dict[str, Any]


class Dev:
    """A `deployer dev --output json` that runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.events: list[Event] = []
        self.stderr = ""
        self._seen = 0
        self._threads = [threading.Thread(target=read, daemon=True) for read in (self._read, self._read_stderr)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            for line in stream:
                self.events.append(json.loads(line))

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            self.stderr = stream.read()

    def next(self, kind: str, seconds: float, matches: Callable[[Event], bool] = lambda event: True) -> Event:
        """Wait for the next event of that kind."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            while self._seen < len(self.events):
                event = self.events[self._seen]
                self._seen += 1
                if event["event"] == kind and matches(event):
                    return event
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        pytest.fail(f"no {kind} within {seconds} s: {self}")

    def until(self, kind: str, seconds: float, matches: Callable[[Event], bool], *, since: int) -> None:
        """Wait until there was such an event since the one of that number; its order among the others is open."""
        deadline = time.monotonic() + seconds
        while not any(event["event"] == kind and matches(event) for event in self.events[since:]):
            if time.monotonic() > deadline:
                pytest.fail(f"no {kind} within {seconds} s: {self}")
            time.sleep(0.02)

    def end(self) -> int:
        """Press Ctrl-C; return the exit code."""
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(30)
        for thread in self._threads:
            thread.join(5)
        return code

    def __str__(self) -> str:
        told = [event for event in self.events if event["event"] != "log"]
        return "\n".join([*map(json.dumps, told), f"exit code {self.process.poll()}", self.stderr])


@contextmanager
def dev(project: Project, *arguments: str) -> Iterator[Dev]:
    """Start it, and wait until it watches."""
    running = Dev(project.start("dev", "--output", "json", *arguments))
    try:
        running.next("watching", 300)
        yield running
    finally:
        if running.process.poll() is None:
            running.end()
        project.history.append(f"$ deployer dev {' '.join(arguments)}\n{running}\n")


def write_dag(project: Project, dag_id: str, text: str) -> Path:
    return project.write(f"dags/{dag_id}.py", DAG.format(dag_id=dag_id, text=text))


def description(project: Project, dag_id: str) -> str | None:
    api = project.api()
    found = api.request("GET", f"{api.rest.path}/dags/{dag_id}", doing="read the DAG", missing_ok=True)
    return None if found is None else str(found["description"])


def identity(project: Project) -> tuple[str, list[int]]:
    """The pod's UID and its containers' restarts."""
    pod = project.pod()
    return pod["metadata"]["uid"], [status["restartCount"] for status in pod["status"]["containerStatuses"]]


def test_a_session_of_saves_and_mistakes(project: Project) -> None:
    write_dag(project, "orders", "one")
    with dev(project) as running:
        before = identity(project)
        good = write_dag(project, "orders", "two").read_text(encoding="utf-8")
        assert running.next("live", 10)["changed"] == ["dags/orders.py"]
        assert description(project, "orders") == "two"

        write_dag(project, "sales", "new")
        assert running.next("live", 10)["changed"] == ["dags/sales.py added"]
        assert description(project, "sales") == "new"

        project.write("dags/orders.py", good + "\nprint(undefined)\n")
        wrong = running.next("import_errors", 10)
        line = len(good.splitlines()) + 2
        assert wrong["errors"][0] | {"file": "dags/orders.py", "line": line} == wrong["errors"][0]
        assert wrong["message"] == f"dags/orders.py:{line} NameError: name 'undefined' is not defined"
        assert description(project, "orders") == "two"

        write_dag(project, "orders", "three")
        assert running.next("live", 10)["cleared"] is True
        assert description(project, "orders") == "three"

        for broken in ("circle", "nowhere"):
            link = project.folder / "dags/link.py"
            link.symlink_to("link.py" if broken == "circle" else "missing.py")
            assert "dags/link.py: it is a symbolic link" in running.next("project_error", 10)["message"]
            link.unlink()
        (project.folder / "dags/sales.py").rename(project.folder / "dags/mit leerzeichen und ü.py")
        assert running.next("live", 10)["changed"] == ["dags/mit leerzeichen und ü.py added", "dags/sales.py removed"]
        assert identity(project) == before

        second = project.deployer("dev")
        assert second.code == 1, second
        assert "is running `deployer dev` on it since" in second.stderr

        project.write("plugins/hello.py", "GREETING = 'hello'\n")
        assert running.next("needs_replacement", 10)["changed"] == ["plugins/hello.py"]
        (project.folder / "plugins/hello.py").unlink()
        running.next("needs_nothing", 10)

        assert running.end() == 0, running
        end = running.next("end", 1)
        assert end["permanent"] is False
        assert "deployer up   makes it permanent" in end["message"]
        assert identity(project) == before
    assert description(project, "orders") == "three"
    assert project.up()["pod"] == "kept"
    with dev(project) as running:
        assert running.end() == 0, running
        assert running.next("end", 1)["permanent"] is True


def test_it_goes_on_when_the_pod_is_deleted_under_it(project: Project) -> None:
    write_dag(project, "orders", "one")
    with dev(project) as running:
        write_dag(project, "orders", "two")
        running.next("live", 10)
        uid = project.pod()["metadata"]["uid"]
        assert project.cluster.delete(POD, project.names.namespace, project.names.pod, grace_seconds=1)
        running.next("away", 60)
        since = len(running.events)
        write_dag(project, "orders", "three")
        running.next("back", 120)
        running.next("live", 120)
        assert project.pod()["metadata"]["uid"] != uid
        assert running.events[-1]["event"] != "end"
        running.until("log", 60, lambda event: event["component"] == "supervisor", since=since)
        write_dag(project, "orders", "four")
        running.next("live", 60)
        assert description(project, "orders") == "four"


def test_a_task_is_run_again_after_each_save(project: Project) -> None:
    write_dag(project, "orders", "one")
    with dev(project, "--run", "orders.speak") as running:
        assert "orders was paused" in running.next("unpaused", 60)["message"]
        running.next("log", 120, lambda event: event["component"] == "speak" and event["text"] == "says one")
        assert running.next("run_ended", 60)["state"] == "success"
        project.write("dags/orders.py", DAG.format(dag_id="orders", text="two") + "\nimport nothing_like_it\n")
        running.next("import_errors", 10)
        write_dag(project, "orders", "three")
        running.next("live", 10)
        running.next("log", 120, lambda event: event["component"] == "speak" and event["text"] == "says three")
        assert running.next("run_ended", 60)["state"] == "success"
        assert running.end() == 0, running


def test_a_dag_that_hangs_is_named_and_its_correction_need_not_wait(project: Project) -> None:
    good = write_dag(project, "orders", "one").read_text(encoding="utf-8")
    with dev(project) as running:
        hanging = good + "\nimport time\n\ntime.sleep(600)\n"
        project.write("dags/orders.py", hanging)
        running.next("slow", 10)
        write_dag(project, "orders", "two")
        running.next("overtaken", 10)
        running.next("live", 10)
        assert description(project, "orders") == "two"
        project.write("dags/orders.py", hanging)
        wrong = running.next("import_errors", 60)
        assert wrong["errors"][0]["file"] == "dags/orders.py"
        assert wrong["errors"][0]["line"] == len(hanging.splitlines())
        write_dag(project, "orders", "three")
        assert running.next("live", 10)["cleared"] is True


def test_it_goes_on_when_the_api_server_is_away_or_the_laptop_slept(project: Project, proxy: Proxy) -> None:
    write_dag(project, "orders", "one")
    with dev(project) as running:
        proxy.refusing = True
        proxy.cut()
        running.next("away", 30)
        write_dag(project, "orders", "two")
        time.sleep(2)
        proxy.refusing = False
        running.next("back", 30)
        running.next("live", 30)

        proxy.sleep()
        write_dag(project, "orders", "three")
        running.next("away", 30)
        running.next("back", 30)
        running.next("live", 30)
        proxy.refusing = False
        write_dag(project, "orders", "four")
        running.next("live", 10)
    assert description(project, "orders") == "four"


def test_a_project_whose_dags_go_away_for_a_while(project: Project) -> None:
    write_dag(project, "orders", "one")
    with dev(project) as running:
        shutil.move(project.folder / "dags", project.folder / "elsewhere")
        assert "it has no folder dags/" in running.next("project_error", 10)["message"]
        assert description(project, "orders") == "one"
        shutil.move(project.folder / "elsewhere", project.folder / "dags")
        write_dag(project, "orders", "two")
        running.next("live", 20)
        for number in range(60):
            write_dag(project, f"many_{number}", "x")
        assert running.next("live", 60)["parsed"] >= 1
        large = project.folder / "include/large.bin"
        large.parent.mkdir()
        with large.open("wb") as stream:
            stream.truncate(500_000_000)
        assert "500 MB, and `project.max_file_size` allows 100 MB" in running.next("project_error", 10)["message"]
        large.unlink()
