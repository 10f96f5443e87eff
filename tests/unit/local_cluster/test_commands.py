"""Running programs to their end."""

from __future__ import annotations

import threading
import time

import pytest

from airflow_deployer.errors import LocalClusterError
from airflow_deployer.local_cluster.native import commands
from airflow_deployer.local_cluster.native.layout import Layout
from airflow_deployer.local_cluster.native.processes import ProcessTable


class RecordedStep:
    """A step that remembers its live details."""

    def __init__(self) -> None:
        self.details: list[str] = []

    def update(self, detail: str) -> None:
        self.details.append(detail)

    def done(self, summary: str) -> None:
        self.details.append(summary)


def run(layout: Layout, script: str, timeout: float = 20) -> str:
    log = layout.logs / "test.log"
    return commands.run(["sh", "-c", script], action="trying", state=layout.state, log=log, timeout=timeout)


def test_output_is_returned_logged_and_shown(layout: Layout) -> None:
    step, log = RecordedStep(), layout.logs / "test.log"
    script = ["sh", "-c", "echo one; echo two >&2"]
    assert commands.run(script, action="trying", state=layout.state, log=log, step=step) == "one\ntwo\n"
    assert log.read_text().splitlines()[1:] == ["one", "two"]
    assert step.details == ["one", "two"]


def test_a_failure_says_what_failed_and_carries_the_last_lines(layout: Layout) -> None:
    with pytest.raises(LocalClusterError, match=r"^trying failed: sh ended with exit code 3$") as caught:
        run(layout, "seq 1 100; exit 3")
    assert caught.value.details[-1] == "100"
    assert len(caught.value.details) == 15
    assert "test.log" in caught.value.hint


def test_a_program_that_is_not_there(layout: Layout) -> None:
    with pytest.raises(LocalClusterError, match="cannot run no-such-program: No such file"):
        commands.read(["no-such-program"], action="trying", state=layout.state)
    with pytest.raises(LocalClusterError, match="cannot run no-such-program: No such file"):
        commands.run(["no-such-program"], action="trying", state=layout.state, log=layout.logs / "x")


def test_one_that_takes_too_long_is_ended_with_its_children(layout: Layout) -> None:
    with pytest.raises(LocalClusterError, match="did not end within 0 s"):
        run(layout, "sleep 300 & echo started; wait", timeout=0.3)
    assert ProcessTable(layout).marked(commands.COMMAND) == []


def test_stopping_ends_what_other_threads_run_and_starts_nothing_more(layout: Layout) -> None:
    failures: list[LocalClusterError] = []

    def work() -> None:
        try:
            run(layout, "sleep 300")
        except LocalClusterError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + 5
    while not ProcessTable(layout).marked(commands.COMMAND) and time.monotonic() < deadline:
        time.sleep(0.01)
    commands.stop_all()
    thread.join(timeout=5)
    assert len(failures) == 1
    with pytest.raises(LocalClusterError, match="interrupted"):
        run(layout, "true")
    commands.allow()
    assert run(layout, "true") == ""


def test_a_program_gets_what_it_needs_of_the_environment_and_no_secret(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUD_TOKEN", "secret")
    monkeypatch.setenv("https_proxy", "proxy:3128")
    monkeypatch.setenv("PATH", "/somewhere:/usr/bin")
    environ = commands.environment(layout.state, "part", {"EXTRA": "1"})
    assert "CLOUD_TOKEN" not in environ
    assert environ["https_proxy"] == "proxy:3128"
    assert environ["EXTRA"] == "1"
    assert environ["PATH"].startswith("/somewhere:/usr/bin:/usr/local/sbin:/usr/sbin")
    assert environ[commands.MARK] == f"{layout.state}:part"
