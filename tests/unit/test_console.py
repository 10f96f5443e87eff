"""What a pipe sees: one plain line for each step, signs of life of long ones, errors with the next step."""

from __future__ import annotations

import datetime
import json
import re
import time

import pytest

from airflow_deployer import console
from airflow_deployer.errors import DeployerError


def test_a_step_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    with console.Console().step("Objects") as step:
        step.update("Service airflow")
        step.done("unchanged")
    assert capsys.readouterr().err == "✓ Objects: unchanged (0.0 s)\n"


def test_a_failed_step_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no"), console.Console().step("Pod"):
        raise ValueError("no")
    assert capsys.readouterr().err == "x Pod: failed (0.0 s)\n"


def test_a_long_step_gives_signs_of_life_even_when_it_reports_nothing_new(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_SIGN_OF_LIFE_SECONDS", 0.5)
    with console.Console().step("Kubernetes") as step:
        step.update("compiling")
        time.sleep(1.6)
    assert "  Kubernetes: compiling (" in capsys.readouterr().err


def test_quiet_shows_warnings_and_errors_only(capsys: pytest.CaptureFixture[str]) -> None:
    shown = console.Console(quiet=True)
    with shown.step("Objects"):
        shown.info("hello")
    shown.warning("careful")
    shown.error(DeployerError("Cannot do it.", hint="deployer up", details=["because"]))
    assert capsys.readouterr().err == "warning: careful\nerror: Cannot do it.\n  because\nnext: deployer up\n"


def test_results_go_to_stdout_as_text_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    console.Console().result({"a": 1}, [("URL", "http://x"), ("errors", "one\ntwo")])
    assert capsys.readouterr().out == "URL     http://x\nerrors  one\n        two\n"
    console.Console(json_output=True).result({"a": 1}, [])
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_events_and_logs_have_the_time_and_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    shown = console.Console()
    shown.event("import_errors", "dags/a.py:1 NameError\ndags/b.py:2 KeyError", mark="x", details=["stays live"])
    shown.log("scheduler", "warning", "late")
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"^\d\d:\d\d:\d\d", "TIME", line) for line in lines] == [
        "TIME x dags/a.py:1 NameError",
        "           dags/b.py:2 KeyError",
        "           stays live",
        "TIME scheduler     late",
    ]


def test_events_and_logs_are_json_lines_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    shown = console.Console(json_output=True)
    shown.event("live", "live in 0.3 s", mark="✓", parsed=1)
    shown.log("scheduler", "warning", "late")
    event, log = map(json.loads, capsys.readouterr().out.splitlines())
    assert datetime.datetime.fromisoformat(event.pop("time")).tzinfo is not None
    assert event == {"event": "live", "message": "live in 0.3 s", "details": [], "parsed": 1}
    assert log["component"], log["text"] == ("scheduler", "late")


def test_quiet_leaves_out_logs_and_what_is_only_for_information(capsys: pytest.CaptureFixture[str]) -> None:
    shown = console.Console(quiet=True)
    shown.event("note", "by the way")
    shown.log("scheduler", "info", "hello")
    shown.event("live", "live", mark="✓")
    assert capsys.readouterr().out.endswith(" ✓ live\n")
