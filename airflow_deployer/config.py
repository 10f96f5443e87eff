"""What the user may set: every key with its type, default, meaning and check, and how the sources are merged.

Sources, later ones win: `deployer.toml` in the project (or `[tool.airflow-deployer]` in its `pyproject.toml`),
`DEPLOYER_*` environment variables, command line flags. Every key has a default, so a folder with only `dags/`
deploys. A mistake is a `ConfigurationError` that names where it stands. `docs/configuration.md` is generated from
this module by `config_reference`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from airflow_deployer.airflow_profiles import (
    DEFAULT_VERSION,
    PROFILES,
    Profile,
    find_profile,
    own_settings,
    unsupported,
)
from airflow_deployer.errors import ConfigurationError

CONFIG_FILE = "deployer.toml"
PYPROJECT_TABLE = "tool.airflow-deployer"
ENVIRONMENT_PREFIX = "DEPLOYER_"

MAX_NAME_LENGTH = 40
"""Characters of a deployment's name: leaves room in 63 for what is derived from it (`<name>-0`, revision hashes)."""

BASE_IMAGE_NAME = "airflow-base"
"""Last component of the base image's repository; the DAG image's is the deployment's name, so it cannot be this."""

OWN_SETTINGS = own_settings() | {
    "AIRFLOW__API__BASE_URL",
    "AIRFLOW__API__HOST",
    "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE",
    "AIRFLOW__CORE__SQL_ALCHEMY_CONN",
    "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_ASYNC",
    "AIRFLOW__WEBSERVER__BASE_URL",
    "AIRFLOW__WEBSERVER__WEB_SERVER_HOST",
    "AIRFLOW_CONFIG",
}
"""Environment variables of the `airflow` container that the pod itself depends on, so nobody else may set them."""

Scalar = str | int | float | bool
Check = Callable[[Any], str | None]
"""Says what is wrong with a value of the right type, or None."""

_UNITS = {"h": 3600, "m": 60, "s": 1}
_TOML_NAMES = {"str": "string", "int": "integer", "bool": "boolean", "object": "table"}
# apimachinery `resource.Quantity`: a signed number and a decimal exponent, decimal suffix or binary suffix.
_QUANTITY = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(Ki|Mi|Gi|Ti|Pi|Ei|[numkMGTPE]|[eE][+-]?\d+)?")
_BINARY_SUFFIXES = {f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTPE", start=1)}
_DECIMAL_SUFFIXES = {
    suffix: Decimal(1000) ** power
    for power, suffix in zip(range(-3, 7), ("n", "u", "m", "", "k", "M", "G", "T", "P", "E"), strict=True)
}


class Duration(float):
    """A length of time in seconds, written as `90s`, `5m` or `1h30m`."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: object) -> Duration:
        """Read the written form; raises `ValueError` with what is wrong."""
        if not isinstance(text, str):
            raise ValueError(f'a duration is a string such as "90s", "5m" or "1h", not {text!r}')
        parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
        if not text or parts is None:
            raise ValueError(f'"{text}" is not a duration such as "90s", "5m" or "1h"')
        seconds = sum(int(number or 0) * unit for number, unit in zip(parts.groups(), _UNITS.values(), strict=True))
        if seconds <= 0:
            raise ValueError(f'"{text}" is no time at all')
        return cls(seconds)

    def __str__(self) -> str:
        rest, text = int(self), ""
        for letter, unit in _UNITS.items():
            count, rest = divmod(rest, unit)
            text += f"{count}{letter}" if count else ""
        return text or "0s"


def parse_quantity(text: str) -> Decimal:
    """The value of a Kubernetes quantity ("250m" is 0.25, "1Gi" is 1073741824); raises `ValueError` if it is none."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f'"{text}" is not a Kubernetes quantity such as "500m", "2" or "5Gi"')
    number, suffix = Decimal(match[1]), match[2] or ""
    factor = _BINARY_SUFFIXES.get(suffix) or _DECIMAL_SUFFIXES.get(suffix)
    return number * (Decimal(f"1{suffix}") if factor is None else factor)


def _quantity(value: str) -> str | None:
    try:
        return None if parse_quantity(value) > 0 else f'"{value}" must be more than zero'
    except ValueError as error:
        return str(error)


def _service_name(value: str) -> str | None:
    if len(value) <= MAX_NAME_LENGTH and re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", value):
        return None
    return (
        f'"{value}" is not a valid name: it must begin with a letter, hold only a-z, 0-9 and "-", '
        f"end with a letter or digit and have at most {MAX_NAME_LENGTH} characters"
    )


def _label(value: str) -> str | None:
    if len(value) <= 63 and re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", value):
        return None
    return (
        f'"{value}" is not a valid Kubernetes namespace: only a-z, 0-9 and "-", '
        "a letter or digit at both ends, at most 63 characters"
    )


def _object_name(value: str) -> str | None:
    if len(value) <= 253 and re.fullmatch(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?", value):
        return None
    return (
        f'"{value}" is not a valid Kubernetes object name: only a-z, 0-9, "-" and ".", a letter or digit at both ends'
    )


def _port(value: int) -> str | None:
    return None if 1 <= value <= 65535 else f"{value} is not a port: it must be from 1 to 65535"


def _not_empty(value: str) -> str | None:
    return None if value.strip() else "it must not be empty"


def _relative_path(value: str) -> str | None:
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        return f'"{value}" must be a path inside the project folder, relative to it'
    return None


def _registry_host(value: str) -> str | None:
    from airflow_deployer.registry import is_registry_host

    if is_registry_host(value):
        return None
    return f'"{value}" is not a registry: write host or host:port, for example "localhost:5000" or "ghcr.io"'


def _mirror(value: str) -> str | None:
    from airflow_deployer.registry import is_registry_host, is_repository

    host, _, path = value.partition("/")
    if is_registry_host(host) and ("/" not in value or is_repository(path)):
        return None
    return f'"{value}" is not a mirror: write host or host/path, for example "localhost:5000"'


def _repository(value: str) -> str | None:
    from airflow_deployer.registry import is_repository

    return (
        None if is_repository(value) else f'"{value}" is not a repository such as "airflow-deployer" or "team/airflow"'
    )


def _image(value: str) -> str | None:
    from airflow_deployer.registry import Reference

    try:
        Reference.parse(value)
    except ValueError as error:
        return str(error)
    return None


def _environment_names(value: Mapping[str, str]) -> str | None:
    for name in value:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            return f'"{name}" is not the name of an environment variable'
        if reason := _own_setting(name):
            return reason
    return None


def _airflow_settings(value: Mapping[str, Mapping[str, Scalar]]) -> str | None:
    for section, options in value.items():
        for option in options:
            name = _airflow_variable(section, option)
            if not re.fullmatch(r"AIRFLOW__[A-Z0-9_]+__[A-Z0-9_]+", name):
                return f'"{section}.{option}" is not the name of an Airflow setting'
            if reason := _own_setting(name):
                return reason
    return None


def _own_setting(variable: str) -> str | None:
    if re.sub(r"_(CMD|SECRET)$", "", variable) in OWN_SETTINGS or variable in OWN_SETTINGS:
        return f"{variable} is set by the deployer itself; the pod depends on it"
    return None


def _airflow_variable(section: str, option: str) -> str:
    # Airflow's own rule (`AirflowConfigParser._env_var_name`).
    return f"AIRFLOW__{section.replace('.', '_').replace('-', '_').upper()}__{option.upper()}"


def _key(description: str, *, check: Check | None = None, flag: str = "") -> Meta:
    return Meta(description=description, extra={"check": check, "flag": flag})


class Airflow(Struct, frozen=True, forbid_unknown_fields=True):
    """Airflow itself."""

    version: Annotated[
        str,
        _key(
            "The Airflow version. Locked packages come along for "
            f"{', '.join(profile.locked for profile in PROFILES)}; for another one `deployer lock` makes them.",
            check=unsupported,
        ),
    ] = DEFAULT_VERSION
    settings: Annotated[
        dict[str, dict[str, Scalar]],
        _key(
            "Airflow's own settings, a table for each section: `[airflow.settings.core]` with `parallelism = 4` "
            "becomes `AIRFLOW__CORE__PARALLELISM=4`. What the pod depends on (executor, database, keys) is refused.",
            check=_airflow_settings,
        ),
    ] = {}
    env: Annotated[
        dict[str, str],
        _key(
            "Plain environment variables of the `airflow` container. They can be read by whoever can read the pod: "
            "not a place for secrets.",
            check=_environment_names,
        ),
    ] = {}

    fork_processes: Annotated[
        bool,
        _key(
            "Import Airflow once and fork its processes from there: a faster start, and some 90 MB less memory. With "
            "`false` each process is a program of its own, and staged DAG files are checked by a fresh one."
        ),
    ] = True

    @property
    def profile(self) -> Profile:
        """What the version decides."""
        profile = find_profile(self.version)
        if profile is None:  # `load` lets no such version through
            raise ConfigurationError(f"Invalid `airflow.version`: {unsupported(self.version)}.")
        return profile

    def environment(self) -> dict[str, str]:
        """These settings as the environment variables of the `airflow` container."""
        variables = {
            _airflow_variable(section, option): str(value)
            for section, options in self.settings.items()
            for option, value in options.items()
        }
        if not self.fork_processes:
            variables["AIRFLOW_DEPLOYER_FORK"] = "0"
        return variables | self.env


class Images(Struct, frozen=True, forbid_unknown_fields=True):
    """Where images come from and where they go."""

    registry: Annotated[
        str | None,
        _key(
            "The registry that images are pushed to, `host` or `host:port`. Unset: what the cluster announces "
            "(the ConfigMap `local-registry-hosting`, local contexts only), else `localhost:5000`.",
            check=_registry_host,
        ),
    ] = None
    registry_pull: Annotated[
        str | None,
        _key(
            "The same registry as the cluster's nodes reach it, where that differs from `images.registry`.",
            check=_registry_host,
        ),
    ] = None
    repository: Annotated[
        str,
        _key(
            f"Where images go in the registry: the base image to `<repository>/{BASE_IMAGE_NAME}`, the image with the "
            "DAGs to `<repository>/<name>`.",
            check=_repository,
        ),
    ] = "airflow-deployer"
    mirror: Annotated[
        str | None,
        _key(
            "Take Docker Hub's public images (`images.parent`, `images.postgres`) from this registry instead: with "
            "`localhost:5000`, `postgres:17` becomes `localhost:5000/library/postgres:17`. Images that name a registry "
            "of their own are left alone.",
            check=_mirror,
        ),
    ] = None
    parent: Annotated[
        str | None,
        _key(
            "The Python image that the base image is built on. Unset: by Airflow's version, "
            f"{', '.join(f'`{p.parent}` for {p.series}.x' for p in PROFILES)}.",
            check=_image,
        ),
    ] = None
    postgres: Annotated[
        str | None,
        _key(
            "The image of the database. Unset: of the major version that the volume's data has, for a new volume "
            f"by Airflow's version, {', '.join(f'`{p.postgres_image}` for {p.series}.x' for p in PROFILES)}.",
            check=_image,
        ),
    ] = None
    base: Annotated[
        str | None,
        _key("Use this ready-made base image, made from the same `base-image/`, and build none.", check=_image),
    ] = None
    pull_secret: Annotated[
        str | None,
        _key(
            "The name of an existing pull secret in the namespace. Unset: where the registry asks for a login, one is "
            "made from Docker's own credentials.",
            check=_object_name,
        ),
    ] = None


class Project(Struct, frozen=True, forbid_unknown_fields=True):
    """Where things are in the project folder."""

    dags: Annotated[str, _key("The folder with the DAGs; the only one that must exist.", check=_relative_path)] = "dags"
    include: Annotated[
        str, _key("The folder with files that DAGs read, next to them in the pod.", check=_relative_path)
    ] = "include"
    plugins: Annotated[str, _key("The folder with Airflow plugins.", check=_relative_path)] = "plugins"
    requirements: Annotated[
        str,
        _key(
            "Python packages that the DAGs need beyond Airflow's own, whose versions stay as they are.",
            check=_relative_path,
        ),
    ] = "requirements.txt"
    max_file_size: Annotated[
        str,
        _key(
            "The size that a single file may have at most. A larger one is refused: it would be in every image and "
            "cross the network with every change of it.",
            check=_quantity,
        ),
    ] = "100M"

    @property
    def max_file_bytes(self) -> int:
        """`max_file_size` in bytes."""
        return int(parse_quantity(self.max_file_size))


class Storage(Struct, frozen=True, forbid_unknown_fields=True):
    """The volume that holds the database and the task logs."""

    size: Annotated[str, _key("The size of the volume.", check=_quantity)] = "5Gi"
    class_: Annotated[
        str | None, _key("The StorageClass of the volume. Unset: the cluster's default one.", check=_object_name)
    ] = msgspec.field(default=None, name="class")


class PortForward(Struct, frozen=True, forbid_unknown_fields=True):
    """The way from this machine to Airflow's web interface."""

    port: Annotated[int, _key("The local port that Airflow answers on.", check=_port)] = 8080


class Amounts(Struct, frozen=True, forbid_unknown_fields=True):
    """Processor time and memory."""

    cpu: Annotated[str | None, _key("Processors, as a Kubernetes quantity.", check=_quantity)] = None
    memory: Annotated[str | None, _key("Bytes of memory, as a Kubernetes quantity.", check=_quantity)] = None


class ContainerResources(Struct, frozen=True, forbid_unknown_fields=True):
    """What one container asks for and may use."""

    requests: Amounts = Amounts()
    limits: Amounts = Amounts()


class Resources(Struct, frozen=True, forbid_unknown_fields=True):
    """What the two containers of the pod ask for (`requests`) and may use at most (`limits`)."""

    # At rest Airflow's processes were measured at 5 % of a processor and 590 MB, Postgres at 2 % and 40 MB. What is
    # asked for leaves room for a few tasks; a limit of processor time would make every start slower.
    airflow: ContainerResources = ContainerResources(
        requests=Amounts(cpu="100m", memory="1Gi"), limits=Amounts(memory="3Gi")
    )
    postgres: ContainerResources = ContainerResources(
        requests=Amounts(cpu="50m", memory="128Mi"), limits=Amounts(memory="512Mi")
    )


class Timeouts(Struct, frozen=True, forbid_unknown_fields=True):
    """How long a wait may last before it ends with an error."""

    ready: Annotated[Duration, _key("From the objects applied to a ready pod.")] = Duration(300)
    delete: Annotated[Duration, _key("For objects and pods to be gone.")] = Duration(120)
    import_check: Annotated[Duration, _key("For the import of all DAGs before they are deployed.")] = Duration(120)
    live: Annotated[Duration, _key("For Airflow to parse the next file after a switch of DAG content.")] = Duration(60)
    drain: Annotated[
        Duration, _key("For running tasks to end before their pod is replaced; then they are cut off and start over.")
    ] = Duration(60)


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that can be set, merged from all sources and checked."""

    name: Annotated[
        str,
        _key("The name of the deployment: of its StatefulSet, Service, volume claim and Secret.", check=_service_name),
    ] = "airflow"
    namespace: Annotated[
        str | None,
        _key(
            "The namespace, created when it is missing. Unset: the one of the context, else `default`.",
            check=_label,
            flag="--namespace",
        ),
    ] = None
    context: Annotated[
        str | None,
        _key(
            "The kubeconfig context. Unset: the current one, if it looks like a local cluster. A context that is named "
            "here, in the environment or by the flag is used whatever it looks like.",
            check=_not_empty,
            flag="--context",
        ),
    ] = None
    airflow: Airflow = Airflow()
    images: Images = Images()
    project: Project = Project()
    storage: Storage = Storage()
    port_forward: PortForward = PortForward()
    resources: Resources = Resources()
    timeouts: Timeouts = Timeouts()

    @property
    def context_on_purpose(self) -> bool:
        """Whether somebody named the context: there is no default that could have put it here."""
        return self.context is not None

    @property
    def parent_image(self) -> str:
        """The Python image that the base image is built on."""
        return self.images.parent or self.airflow.profile.parent

    @property
    def base_repository(self) -> str:
        """Repository of the base image, without a registry."""
        return f"{self.images.repository}/{BASE_IMAGE_NAME}"

    @property
    def dag_repository(self) -> str:
        """Repository of the image with the DAGs, without a registry."""
        return f"{self.images.repository}/{self.name}"


@dataclass(frozen=True)
class Key:
    """One thing that can be set.

    Attributes:
        name: the dotted key, as in `storage.size`.
        type: the Python type of its value.
        default: its value when no source names it.
        description: what it means, one or two sentences of Markdown.
        check: says what is wrong with a value of the right type.
        flag: the command line flag that sets it, or "".
    """

    name: str
    type: Any
    default: Any
    description: str
    check: Check | None
    flag: str

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return ENVIRONMENT_PREFIX + self.name.replace(".", "_").upper()


@lru_cache(maxsize=1)
def keys() -> dict[str, Key]:
    """Every key by its dotted name, in the order of their declaration."""
    return {key.name: key for key in _struct_keys(Settings(), "")}


def _struct_keys(defaults: Struct, prefix: str) -> Iterator[Key]:
    hints = get_type_hints(type(defaults), include_extras=True)
    for field in msgspec.structs.fields(defaults):
        name, default = prefix + field.encode_name, getattr(defaults, field.name)
        if isinstance(default, Struct):
            yield from _struct_keys(default, f"{name}.")
        else:
            value_type, meta = get_args(hints[field.name])
            yield Key(name, value_type, default, meta.description, **meta.extra)


def load(
    project: Path, *, config_file: Path | None, env: Mapping[str, str], overrides: Mapping[str, object]
) -> Settings:
    """Merge all sources into checked settings.

    Args:
        project: the folder that may hold `deployer.toml` or a `pyproject.toml` with `[tool.airflow-deployer]`.
        config_file: read this file instead (`--config`); it must exist.
        env: the environment; only `DEPLOYER_*` is looked at, and an empty variable counts as unset.
        overrides: dotted key to value, from flags; None counts as not given.

    Raises:
        ConfigurationError: unknown key, wrong type, impossible value or unreadable file, each with its place.
    """
    merged: dict[str, Any] = {}
    for key in keys().values():
        _merge(merged, _nested(key.name, key.default))
    for source in (_read_files(project, config_file), _read_environment(env), _read_overrides(overrides)):
        _merge(merged, source)
    settings = msgspec.convert(merged, Settings, dec_hook=_decode)
    _check_together(settings)
    return settings


def _read_files(project: Path, config_file: Path | None) -> dict[str, Any]:
    if config_file is not None:
        data = _read_toml(config_file, must_exist=True)
        if config_file.name == "pyproject.toml":
            data = _pyproject_table(data)
        return _checked(data, str(config_file))
    own = _read_toml(project / CONFIG_FILE)
    table = _pyproject_table(_read_toml(project / "pyproject.toml"))
    if own and table:
        raise ConfigurationError(
            f"Cannot choose a configuration: {CONFIG_FILE} and [{PYPROJECT_TABLE}] in pyproject.toml both have keys.",
            hint=f"Move everything into {CONFIG_FILE} and delete [{PYPROJECT_TABLE}].",
        )
    return _checked(own, CONFIG_FILE) if own else _checked(table, f"pyproject.toml [{PYPROJECT_TABLE}]")


def _pyproject_table(document: dict[str, Any]) -> dict[str, Any]:
    tool = document.get("tool", {})
    table = tool.get("airflow-deployer", {}) if isinstance(tool, dict) else {}
    if not isinstance(table, dict):
        raise ConfigurationError(f"Cannot read [{PYPROJECT_TABLE}] in pyproject.toml: it is not a table.")
    return table


def _read_toml(path: Path, *, must_exist: bool = False) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        if must_exist:
            raise ConfigurationError(f"Cannot read the configuration {path}: there is no such file.") from None
        return {}
    except OSError as error:
        raise ConfigurationError(f"Cannot read the configuration {path}: {error.strerror}.") from None
    try:
        document: dict[str, Any] = msgspec.toml.decode(content)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(f"Cannot read {path}, line {line}: it is not UTF-8 text.") from None
    except msgspec.DecodeError as error:
        # tomllib tells the place only inside its message, before Python 3.14.
        match = re.fullmatch(r"(.*?) \(at (?:line (\d+), column (\d+)|end of document)\)", str(error), re.DOTALL)
        text = content.decode(errors="replace").rstrip("\n").split("\n")
        reason, line_text, column = match.groups() if match else (str(error), None, None)
        place = f"line {line_text or len(text)}, column {column or len(text[-1]) + 1}"
        raise ConfigurationError(f"Cannot read {path}, {place}: {reason}.", hint=f"Correct {path.name}.") from None
    return document


def _checked(data: Mapping[str, Any], source: str, prefix: str = "") -> dict[str, Any]:
    """`data` again, or the first mistake in it; tables are checked key by key so that a mistake has a name."""
    checked: dict[str, Any] = {}
    for part, value in data.items():
        name = prefix + part
        if name in keys():
            checked[part] = _convert(keys()[name], value, source, name)
        elif not any(known.startswith(f"{name}.") for known in keys()):
            raise ConfigurationError(
                f"Unknown key `{name}` in {source}.",
                hint=_suggestion(name, _names(), "docs/configuration.md lists all keys."),
            )
        elif not isinstance(value, Mapping):
            raise ConfigurationError(f"Wrong type of `{name}` in {source}: expected table, got {_type_name(value)}.")
        else:
            checked[part] = _checked(value, source, f"{name}.")
    return checked


def _read_environment(env: Mapping[str, str]) -> dict[str, Any]:
    variables = {key.variable: key for key in keys().values()}
    result: dict[str, Any] = {}
    for variable, text in sorted(env.items()):
        if not variable.startswith(ENVIRONMENT_PREFIX) or not text:
            continue
        key = variables.get(variable)
        if key is None:
            raise ConfigurationError(
                f"Unknown environment variable {variable}.", hint=_suggestion(variable, variables, f"unset {variable}")
            )
        value: object = text
        if get_origin(key.type) is dict:
            try:
                value = msgspec.json.decode(text)
            except msgspec.DecodeError:
                raise ConfigurationError(f"Cannot read {variable}: it must be a JSON object.") from None
        _merge(result, _nested(key.name, _convert(key, value, "the environment", variable, strict=False)))
    return result


def _read_overrides(overrides: Mapping[str, object]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in overrides.items():
        if value is not None:
            key = keys()[name]
            converted = _convert(key, value, "the command line", key.flag or name, strict=False)
            _merge(result, _nested(name, converted))
    return result


def _convert(key: Key, value: object, source: str, place: str, *, strict: bool = True) -> Any:
    _check_type(key.type, value, source, place, strict=strict)
    if key.type is Duration:
        return value
    converted = msgspec.convert(value, key.type, strict=strict)
    if key.check is not None and converted is not None and (reason := key.check(converted)):
        raise ConfigurationError(f"Invalid `{place}` in {source}: {reason}.")
    return converted


def _check_type(expected: Any, value: object, source: str, place: str, *, strict: bool) -> None:
    if get_origin(expected) is dict and isinstance(value, Mapping):
        for part, item in value.items():
            _check_type(get_args(expected)[1], item, source, f"{place}.{part}", strict=strict)
        return
    try:
        msgspec.convert(value, expected, strict=strict, dec_hook=_decode)
    except msgspec.ValidationError as error:
        match = re.match(r"Expected `(.+?)`, got `(.+?)`", str(error))
        if match is None:  # a `Duration` says itself what is wrong with it
            raise ConfigurationError(f"Invalid `{place}` in {source}: {error}.") from None
        names = [_TOML_NAMES.get(name, name) for name in match[1].split(" | ") if name != "null"]
        raise ConfigurationError(
            f"Wrong type of `{place}` in {source}: expected {' or '.join(names)}, got {_type_name(value)}."
        ) from None


def _type_name(value: object) -> str:
    if isinstance(value, Mapping):
        return "table"
    if isinstance(value, list):
        return "array"
    return _TOML_NAMES.get(type(value).__name__, type(value).__name__)


def _decode(expected: type, value: object) -> object:
    if expected is Duration:
        return value if isinstance(value, Duration) else Duration.parse(value)
    raise NotImplementedError(expected)


def _names() -> list[str]:
    """All keys, and the tables that they are in."""
    return sorted({name.rsplit(".", depth)[0] for name in keys() for depth in range(name.count(".") + 1)})


def _suggestion(unknown: str, known: Collection[str], otherwise: str) -> str:
    close = difflib.get_close_matches(unknown, known, n=1, cutoff=0.75)
    if not close:
        # The right word in the wrong table: `registry` for `images.registry`.
        leaf = unknown.rpartition(".")[2]
        leaves = {name.rpartition(".")[2]: name for name in known}
        close = [leaves[match] for match in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.8)]
    return f"Did you mean `{close[0]}`?" if close else otherwise


def _merge(target: dict[str, Any], source: Mapping[str, Any]) -> None:
    for part, value in source.items():
        if isinstance(value, Mapping):
            _merge(target.setdefault(part, {}), value)
        else:
            target[part] = value


def _nested(name: str, value: object) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return cast("dict[str, Any]", value)


def _check_together(settings: Settings) -> None:
    """What no single key can show to be wrong."""
    profile = settings.airflow.profile
    # Other images than Python's own may say nothing of theirs: then the build tells.
    python = re.search(r"(?:^|/)python:(\d+\.\d+)", settings.parent_image)
    if python and python[1] not in profile.pythons:
        raise ConfigurationError(
            f"Airflow {settings.airflow.version} does not run on Python {python[1]} (`images.parent`), only on "
            f"{', '.join(profile.pythons)}.",
            hint=f'Leave `images.parent` out to get "{profile.parent}", or name an image of one of these.',
        )
    if settings.name == BASE_IMAGE_NAME:
        raise ConfigurationError(f'Invalid `name`: "{BASE_IMAGE_NAME}" is the name of the base image.')
    for container in ("airflow", "postgres"):
        resources: ContainerResources = getattr(settings.resources, container)
        for amount in ("cpu", "memory"):
            request, limit = getattr(resources.requests, amount), getattr(resources.limits, amount)
            if request and limit and parse_quantity(request) > parse_quantity(limit):
                raise ConfigurationError(
                    f"Invalid `resources.{container}.requests.{amount}`: {request} is more than the limit {limit}."
                )
    twice = settings.airflow.env.keys() & {
        _airflow_variable(section, option)
        for section, options in settings.airflow.settings.items()
        for option in options
    }
    if twice:
        raise ConfigurationError(f"{min(twice)} is set twice, in `airflow.env` and in `airflow.settings`.")
