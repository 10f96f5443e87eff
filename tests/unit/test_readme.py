"""The README: it names only commands and options that exist, its configuration loads, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.core import TyperGroup

from airflow_deployer import cli
from airflow_deployer.config import load

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# In code spans and on lines of their own; a comment or a closing backtick ends the command.
COMMANDS = sorted(set(re.findall(r"(?:^|`)deployer ([^`#\n]+)", README, re.MULTILINE)))
TOML = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
LINKS = sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)", README)))


def options_of(command: Any) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_and_option_exists(line: str) -> None:
    command: Any = typer.main.get_command(cli.app)
    options = options_of(command)
    for word in line.split():
        if word.startswith("-"):
            assert word.partition("=")[0] in options, f"deployer {line}: no option {word}"
        elif isinstance(command, TyperGroup):
            assert word in command.commands, f"deployer {line}: no command {word}"
            command = command.commands[word]
            options |= options_of(command)


def test_the_commands_of_the_readme_are_all_there_are() -> None:
    root = typer.main.get_command(cli.app)
    assert isinstance(root, TyperGroup)
    for name, command in root.commands.items():
        members = [f"{name} {member}" for member in command.commands] if isinstance(command, TyperGroup) else [name]
        assert set(members) <= set(COMMANDS)


def test_the_configuration_loads_and_is_what_it_says(tmp_path: Path) -> None:
    assert len(TOML) == 1
    (tmp_path / "deployer.toml").write_text(TOML[0], encoding="utf-8")
    settings = load(tmp_path, config_file=None, env={}, overrides={})
    assert (settings.name, settings.namespace, settings.context) == ("shop", "data-team", "kind-airflow")
    assert settings.airflow.environment()["AIRFLOW__CORE__PARALLELISM"] == "4"


@pytest.mark.parametrize("link", LINKS)
def test_every_link_leads_to_a_file(link: str) -> None:
    assert (ROOT / link).exists()
