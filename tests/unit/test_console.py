"""What a pipe sees: one plain line for each step, signs of life of long ones, errors with the next step."""

from __future__ import annotations

import json
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
