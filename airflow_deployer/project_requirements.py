"""What is said where the packages of the project's requirements.txt cannot be installed beside Airflow's own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from airflow_deployer.errors import RequirementsError
from airflow_deployer.resolver import Failure, Held, parse_failure

IMAGE_PATH = "/tmp/requirements.txt"  # noqa: S108 - a path in the image
"""Where requirements.txt is while the DAG image is built."""

_ACTION = "Cannot install the packages of requirements.txt"
_LAST_LINES = 15


def make_error(log: Sequence[str], version: str, locked: Mapping[str, str]) -> RequirementsError:
    """Explain a failed installation.

    Args:
        log: the output of the image's build, uv's among it.
        version: Airflow's.
        locked: the versions of Airflow's own packages, where they are known.
    """
    failure = parse_failure(line.replace(IMAGE_PATH, "requirements.txt") for line in log)
    if failure is None:
        return RequirementsError(f"{_ACTION}.", hint=_correct(), details=[*log[-_LAST_LINES:]])
    held = failure.held
    # Two wishes of the user's own that exclude each other look the same to the resolver.
    if held is not None and locked.get(held.name, held.version if not locked else "") == held.version:
        return RequirementsError(
            f"{_ACTION}: {held}, and Airflow {version} is locked with {held.name} {held.version}.", hint=_make_way(held)
        )
    if failure.missing:
        return RequirementsError(
            f"{_ACTION}: the package index has no {failure.missing}.", hint="Correct it in requirements.txt."
        )
    return RequirementsError(f"{_ACTION}: {failure.reason}.", hint=_advice(failure), details=list(failure.hints))


def _make_way(held: Held) -> str:
    if held.name == "apache-airflow" and not held.asker:
        return "Leave apache-airflow out of requirements.txt: `airflow.version` in deployer.toml chooses it."
    if not held.asker:
        return f"Ask for a version of {held.name} that {held.version} is one of, or leave it out of requirements.txt."
    name = re.split(r"[\[=<>!~]", held.asker)[0]
    return (
        f"Ask for a version of {name} that works with {held.name} {held.version}, "
        "or give it an environment of its own (PythonVirtualenvOperator)."
    )


def _advice(failure: Failure) -> str:
    if failure.unreachable:
        return "The build takes packages from there: try again when it answers."
    return _correct()


def _correct() -> str:
    return "Correct requirements.txt; the packages that Airflow needs keep their versions."
