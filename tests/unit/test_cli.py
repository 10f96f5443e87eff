"""The command line: where options may stand, what help says, exit codes, and errors without tracebacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from airflow_deployer import __version__
from airflow_deployer.cli import hoist


def run(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "airflow_deployer", *arguments],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd), **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("given", "moved"),
    [
        (["up", "--context", "a"], ["--context", "a", "up"]),
        (["up", "--context=a", "-q"], ["--context=a", "-q", "up"]),
        (["status", "-o", "json", "-n", "x"], ["-o", "json", "-n", "x", "status"]),
        (["up", "--", "--verbose"], ["up", "--", "--verbose"]),
        (["up", "--context"], ["--context", "up"]),
        (["up", "--port", "9090"], ["up", "--port", "9090"]),
    ],
)
def test_global_options_may_stand_anywhere(given: list[str], moved: list[str]) -> None:
    assert hoist(given) == moved


def test_version(tmp_path: Path) -> None:
    assert run("--version", cwd=tmp_path).stdout == f"{__version__}\n"


@pytest.mark.parametrize(
    "command",
    [["up"], ["down"], ["port-forward"], ["status"], ["lock"], ["render"], ["cluster", "up"], ["cluster", "down"]],
)
def test_help_has_examples(command: list[str], tmp_path: Path) -> None:
    done = run(*command, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert f"deployer {' '.join(command)}" in done.stdout
    assert "Examples:" in done.stdout


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    """What costs start-up time is loaded by the command that needs it: counted as modules, not as seconds."""
    program = (
        "import sys; from airflow_deployer import cli\n"
        "heavy = {'kubernetes', 'docker', 'rich', 'aiohttp', 'msgspec', 'yaml', 'urllib3', 'requests', 'asyncio'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "[]\n"


def test_an_unknown_option_is_a_usage_error(tmp_path: Path) -> None:
    done = run("up", "--no-such-option", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_an_error_is_a_message_and_a_next_step(tmp_path: Path) -> None:
    done = run("up", cwd=tmp_path)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "dags/" in done.stderr
    assert "next: " in done.stderr
    assert "Traceback" not in done.stderr


def test_verbose_adds_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in run("up", "--verbose", cwd=tmp_path).stderr


@pytest.mark.parametrize("version", ["2.11", "latest"])
def test_a_local_cluster_for_an_airflow_that_does_not_exist(version: str, tmp_path: Path) -> None:
    done = run("cluster", "up", "--airflow", "3.3.2", "--airflow", version, cwd=tmp_path)
    assert done.returncode == 2
    assert f'error: Invalid --airflow: "{version}" is no release' in done.stderr
    assert "next: " in done.stderr
    assert "Traceback" not in done.stderr


def test_no_kubeconfig_points_to_the_local_cluster(tmp_path: Path) -> None:
    done = run("status", cwd=tmp_path, KUBECONFIG=str(tmp_path / "none"))
    assert done.returncode == 1
    assert "deployer cluster up" in done.stderr


def test_purge_without_a_terminal_wants_yes(tmp_path: Path) -> None:
    done = run("cluster", "down", "--purge", cwd=tmp_path)
    assert done.returncode == 2
    assert "--yes" in done.stderr
