"""Settings: sources and their order, and that every mistake is named with its place."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path

import pytest

from airflow_deployer import config_reference
from airflow_deployer.airflow_profiles import PROFILES
from airflow_deployer.config import OWN_SETTINGS, Duration, Settings, keys, load, parse_quantity
from airflow_deployer.errors import EXIT_USAGE, ConfigurationError

ROOT = Path(__file__).parents[2]


def load_text(
    folder: Path,
    text: str = "",
    *,
    pyproject: str = "",
    env: dict[str, str] | None = None,
    overrides: dict[str, object] | None = None,
) -> Settings:
    (folder / "deployer.toml").write_text(text)
    (folder / "pyproject.toml").write_text(pyproject)
    return load(folder, config_file=None, env=env or {}, overrides=overrides or {})


def mistake(folder: Path, text: str = "", **sources: object) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        load_text(folder, text, **sources)  # type: ignore[arg-type]
    assert caught.value.exit_code == EXIT_USAGE
    return caught.value


def test_a_folder_without_configuration_has_every_default(tmp_path: Path) -> None:
    assert load(tmp_path, config_file=None, env={}, overrides={}) == Settings()


def test_every_default_passes_its_own_check() -> None:
    for key in keys().values():
        if key.check is not None and key.default is not None:
            assert key.check(key.default) is None, key.name


def test_later_sources_win(tmp_path: Path) -> None:
    text = '[storage]\nsize = "1Gi"\nclass = "fast"\n[port_forward]\nport = 1\n'
    env = {"DEPLOYER_STORAGE_SIZE": "2Gi", "DEPLOYER_PORT_FORWARD_PORT": "2", "HOME": "/root"}
    settings = load_text(tmp_path, text, env=env, overrides={"port_forward.port": 3, "namespace": None})
    assert (settings.storage.class_, settings.storage.size, settings.port_forward.port) == ("fast", "2Gi", 3)
    assert settings.namespace is None


def test_pyproject_is_read_when_it_has_the_table(tmp_path: Path) -> None:
    pyproject = '[project]\nname = "x"\n[tool.airflow-deployer]\nname = "shop"\n'
    assert load_text(tmp_path, pyproject=pyproject).name == "shop"


def test_two_files_with_content_are_an_error(tmp_path: Path) -> None:
    error = mistake(tmp_path, 'name = "a"', pyproject='[tool.airflow-deployer]\nname = "b"')
    assert "deployer.toml" in error.message and "[tool.airflow-deployer]" in error.message


def test_an_explicit_file_replaces_the_others(tmp_path: Path) -> None:
    (tmp_path / "deployer.toml").write_text("not toml")
    other = tmp_path / "other.toml"
    other.write_text('name = "other"')
    assert load(tmp_path, config_file=other, env={}, overrides={}).name == "other"


def test_an_explicit_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no such file"):
        load(tmp_path, config_file=tmp_path / "missing.toml", env={}, overrides={})


def test_one_limit_leaves_the_other_defaults_alone(tmp_path: Path) -> None:
    airflow = load_text(tmp_path, '[resources.airflow.limits]\ncpu = "2"\n').resources.airflow
    assert (airflow.limits.cpu, airflow.limits.memory, airflow.requests.memory) == ("2", "3Gi", "1Gi")


def test_settings_of_several_sources_are_merged_and_defaults_stay_clean(tmp_path: Path) -> None:
    env = {"DEPLOYER_AIRFLOW_ENV": '{"B": "2"}'}
    assert load_text(tmp_path, '[airflow.env]\nA = "1"\n', env=env).airflow.env == {"A": "1", "B": "2"}
    assert load_text(tmp_path).airflow.env == {}


def test_airflow_settings_become_environment_variables(tmp_path: Path) -> None:
    text = '[airflow.settings.core]\nparallelism = 4\nunit_test_mode = true\n[airflow.env]\nREGION = "eu"\n'
    assert load_text(tmp_path, text).airflow.environment() == {
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__CORE__UNIT_TEST_MODE": "True",
        "REGION": "eu",
    }


def test_forking_is_on_until_it_is_turned_off(tmp_path: Path) -> None:
    assert load_text(tmp_path).airflow.environment() == {}
    airflow = load_text(tmp_path, "[airflow]\nfork_processes = false\n").airflow
    assert airflow.environment() == {"AIRFLOW_DEPLOYER_FORK": "0"}


def test_what_holds_the_pod_together_cannot_be_set() -> None:
    for profile in PROFILES:
        assert {re.sub("_CMD$", "", name) for name in (*profile.wiring, *profile.secret_files)} <= OWN_SETTINGS


@pytest.mark.parametrize("version", ["3.3.2", "2.11.2", "1.10.15"])
def test_the_version_decides_the_images(tmp_path: Path, version: str) -> None:
    settings = load_text(tmp_path, f'[airflow]\nversion = "{version}"\n')
    profile = settings.airflow.profile
    assert version.startswith(profile.series)
    assert settings.parent_image == profile.parent
    assert profile.python in profile.parent


@pytest.mark.parametrize("version", ["1.9.0", "2.0.0", "3.3", "3.3.2rc1", "latest", ""])
def test_a_version_that_cannot_be_is_refused(tmp_path: Path, version: str) -> None:
    with pytest.raises(ConfigurationError, match=r"is no release of Airflow that can be deployed.*2\.7\.0"):
        load_text(tmp_path, f'[airflow]\nversion = "{version}"\n')


def test_a_python_that_airflow_does_not_run_on_is_refused_with_those_it_does(tmp_path: Path) -> None:
    text = '[airflow]\nversion = "1.10.15"\n[images]\nparent = "localhost:5000/library/python:3.13-slim"\n'
    with pytest.raises(ConfigurationError, match=r"does not run on Python 3\.13 .*only on 3\.8"):
        load_text(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "env", "overrides"),
    [('context = "prod"', {}, {}), ("", {"DEPLOYER_CONTEXT": "prod"}, {}), ("", {}, {"context": "prod"})],
)
def test_a_context_from_any_source_is_on_purpose(
    tmp_path: Path, text: str, env: dict[str, str], overrides: dict[str, object]
) -> None:
    assert load_text(tmp_path, text, env=env, overrides=overrides).context_on_purpose
    assert not load_text(tmp_path).context_on_purpose


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('nmae = "x"', "Unknown key `nmae` in deployer.toml.", "Did you mean `name`?"),
        ('registry = "x:1"', "Unknown key `registry` in deployer.toml.", "Did you mean `images.registry`?"),
        ('[storage]\nsiez = "1Gi"', "Unknown key `storage.siez` in deployer.toml.", "Did you mean `storage.size`?"),
        ("[port-forward]\nport = 1", "Unknown key `port-forward` in deployer.toml.", "Did you mean `port_forward`?"),
        ("zzz = 1", "Unknown key `zzz` in deployer.toml.", "docs/configuration.md lists all keys."),
        ("name = 5", "Wrong type of `name` in deployer.toml: expected string, got integer.", ""),
        ("storage = 5", "Wrong type of `storage` in deployer.toml: expected table, got integer.", ""),
        (
            '[port_forward]\nport = "8080"',
            "Wrong type of `port_forward.port` in deployer.toml: expected integer, got string.",
            "",
        ),
        ("[airflow.env]\nA = 1", "Wrong type of `airflow.env.A` in deployer.toml: expected string, got integer.", ""),
        (
            "[airflow.settings]\ncore = 1",
            "Wrong type of `airflow.settings.core` in deployer.toml: expected table, got integer.",
            "",
        ),
        ("[port_forward]\nport = 0", "Invalid `port_forward.port` in deployer.toml: 0 is not a port", ""),
        ('name = "Shop"', 'Invalid `name` in deployer.toml: "Shop" is not a valid name', ""),
        ('name = "1shop"', "Invalid `name`", ""),
        (f'name = "{"a" * 41}"', "at most 40 characters", ""),
        ('name = "airflow-base"', "the name of the base image", ""),
        ('namespace = "a_b"', "not a valid Kubernetes namespace", ""),
        ('context = ""', "Invalid `context` in deployer.toml: it must not be empty", ""),
        ('[storage]\nsize = "5 GB"', '"5 GB" is not a Kubernetes quantity', ""),
        ('[storage]\nsize = "0"', "must be more than zero", ""),
        ('[timeouts]\nready = "5 minutes"', '"5 minutes" is not a duration', ""),
        ("[timeouts]\nready = 5", "a duration is a string", ""),
        ('[airflow]\nversion = "2.2.5"', '"2.2.5" is no release of Airflow that can be deployed', ""),
        ('[images]\nregistry = "http://x"', '"http://x" is not a registry', ""),
        ('[images]\nmirror = "localhost:5000/"', "is not a mirror", ""),
        ('[images]\nrepository = "Team"', '"Team" is not a repository', ""),
        ('[images]\nparent = "python:"', '"python:" is not an image', ""),
        ('[project]\ndags = "../dags"', "must be a path inside the project folder", ""),
        ('[project]\ndags = "."', "must be a path inside the project folder", ""),
        ('[resources.airflow.requests]\nmemory = "9Gi"', "9Gi is more than the limit 3Gi", ""),
        ('[airflow.settings.core]\nexecutor = "X"', "AIRFLOW__CORE__EXECUTOR is set by the deployer itself", ""),
        ('[airflow.env]\nAIRFLOW__CORE__FERNET_KEY_CMD = "X"', "is set by the deployer itself", ""),
        ('[airflow.env]\n"A-B" = "X"', '"A-B" is not the name of an environment variable', ""),
        (
            '[airflow.env]\nAIRFLOW__CORE__PARALLELISM = "1"\n[airflow.settings.core]\nparallelism = 2',
            "AIRFLOW__CORE__PARALLELISM is set twice",
            "",
        ),
        ("a = = 1", "deployer.toml, line 1, column 5: ", "Correct deployer.toml."),
        ('name = """a\nbc', "deployer.toml, line 2, column 3: ", "Correct deployer.toml."),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, message: str, hint: str) -> None:
    error = mistake(tmp_path, text)
    assert message in error.message
    assert hint in error.hint


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "deployer.toml").write_bytes(b'name = "a"\n# \xff\n')
    with pytest.raises(ConfigurationError, match=r"deployer.toml, line 2: it is not UTF-8 text"):
        load(tmp_path, config_file=None, env={}, overrides={})


@pytest.mark.parametrize(
    ("env", "message", "hint"),
    [
        ({"DEPLOYER_NAMESPCE": "x"}, "Unknown environment variable DEPLOYER_NAMESPCE.", "`DEPLOYER_NAMESPACE`"),
        ({"DEPLOYER_ZZZ": "x"}, "Unknown environment variable DEPLOYER_ZZZ.", "unset DEPLOYER_ZZZ"),
        ({"DEPLOYER_PORT_FORWARD_PORT": "x"}, "Wrong type of `DEPLOYER_PORT_FORWARD_PORT` in the environment", ""),
        ({"DEPLOYER_STORAGE_SIZE": "x"}, "Invalid `DEPLOYER_STORAGE_SIZE` in the environment", ""),
        ({"DEPLOYER_TIMEOUTS_READY": "x"}, "Invalid `DEPLOYER_TIMEOUTS_READY` in the environment", ""),
        ({"DEPLOYER_AIRFLOW_ENV": "secret"}, "Cannot read DEPLOYER_AIRFLOW_ENV: it must be a JSON object.", ""),
        ({"DEPLOYER_AIRFLOW_ENV": '{"A": 1}'}, "Wrong type of `DEPLOYER_AIRFLOW_ENV.A` in the environment", ""),
    ],
)
def test_a_mistake_in_the_environment_is_named(tmp_path: Path, env: dict[str, str], message: str, hint: str) -> None:
    error = mistake(tmp_path, env=env)
    assert message in error.message
    assert hint in error.hint


def test_a_mistake_on_the_command_line_names_the_flag(tmp_path: Path) -> None:
    assert "Invalid `--namespace` in the command line" in mistake(tmp_path, overrides={"namespace": "A"}).message


def test_values_of_the_pods_environment_are_never_shown(tmp_path: Path) -> None:
    for text in ('[airflow.env]\n"A-B" = "s3cret"', '[airflow.env]\nA = ["s3cret"]'):
        error = mistake(tmp_path, text)
        assert "s3cret" not in error.message + error.hint


def test_an_empty_variable_counts_as_unset(tmp_path: Path) -> None:
    assert load_text(tmp_path, env={"DEPLOYER_NAMESPACE": "", "DEPLOYER_UNKNOWN": ""}).namespace is None


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("5m", 300), ("1h", 3600), ("1h30m", 5400)])
def test_durations_are_seconds_and_write_themselves(text: str, seconds: int) -> None:
    assert float(Duration.parse(text)) == seconds
    assert float(Duration.parse(str(Duration.parse(text)))) == seconds


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("250m", "0.25"),
        ("1Gi", "1073741824"),
        ("2", "2"),
        ("1.5k", "1500"),
        ("1e3", "1000"),
        (".5", "0.5"),
        ("1E", "1E18"),
    ],
)
def test_quantities(text: str, value: str) -> None:
    assert parse_quantity(text) == Decimal(value)


def test_the_reference_is_current() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == config_reference.render(), (
        "run: python -m airflow_deployer.config_reference > docs/configuration.md"
    )


def test_the_reference_has_every_key() -> None:
    page = config_reference.render()
    assert all(f"### `{name}`" in page and f"`{key.variable}`" in page for name, key in keys().items())
