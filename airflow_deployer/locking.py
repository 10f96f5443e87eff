"""`deployer lock`: resolve the packages of an Airflow version and write them down, pinned and hashed.

uv resolves (`uv pip compile`, https://docs.astral.sh/uv/pip/compile/), for the Python of the version's profile and for
Linux, with the pins of that profile and the packages of the release's own day. It takes the package index from its own
configuration and environment (`UV_DEFAULT_INDEX`); no address gets into the lock. `make lock` runs this module, which
makes the locks that come along.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path

from airflow_deployer.airflow_profiles import PROFILES, Profile, find_profile, is_newer_than_known
from airflow_deployer.base_context import SHIPPED_LOCKS, base_image_folder, locked_versions, project_lock
from airflow_deployer.config import Settings
from airflow_deployer.errors import ConfigurationError, DeployerError, RequirementsError
from airflow_deployer.progress import Progress, Silent, Step
from airflow_deployer.resolver import Failure, parse_failure, parse_yanked

_OTHER_INDEX = "Name an index that has it: UV_DEFAULT_INDEX=https://... deployer lock"
_LATER = timedelta(days=1)
"""Airflow's other packages may be uploaded after the first one of a release."""

_TIMEOUT = 300.0
"""Seconds that uv may take; it gives up an index that does not answer by itself, after its own."""


@dataclass(frozen=True)
class LockReport:
    """What `deployer lock` has done.

    Attributes:
        airflow_version: Airflow's.
        python: the Python that it was resolved for.
        file: the lock.
        packages: how many it holds.
        changed: whether the file is another one now than before.
    """

    airflow_version: str
    python: str
    file: str
    packages: int
    changed: bool

    def document(self) -> dict[str, object]:
        """It as JSON."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """It as names and values."""
        state = "written" if self.changed else "unchanged"
        return [
            ("lock", f"{self.file}, {state}"),
            ("airflow", f"{self.airflow_version}, {self.packages} packages, for Python {self.python}"),
        ]


def lock(project: Path, settings: Settings, progress: Progress) -> LockReport:
    """Write the lock of `airflow.version` into the project folder; packages stay at what an older lock holds.

    Raises:
        ConfigurationError: there is no such release, or it was yanked.
        RequirementsError: no set of packages fits.
        DeployerError: the index cannot be reached, or uv failed.
    """
    version, profile = settings.airflow.version, settings.airflow.profile
    if is_newer_than_known(version):
        progress.warning(f"Airflow {version} is newer than this release of the deployer knows")
    with progress.step("Lock") as step:
        report = _write_lock(project_lock(project, version), version, profile, f"deployer lock {version}", step)
        step.done(f"{report.packages} packages for Python {report.python}")
    return report


def lock_shipped() -> None:
    """Write the locks that come along, one for each profile."""
    for profile in PROFILES:
        file = base_image_folder() / SHIPPED_LOCKS / f"{profile.locked}.txt"
        with Silent().step("Lock") as step:
            _write_lock(file, profile.locked, profile, "make lock", step)


def requirements(version: str, profile: Profile) -> str:
    """What is resolved, as a requirements file: Airflow with its driver for Postgres, and the profile's pins."""
    return "\n".join((f"apache-airflow[postgres]=={version}", *profile.requirements, ""))


def _write_lock(file: Path, version: str, profile: Profile, command: str, step: Step) -> LockReport:
    step.update(f"asking for Airflow {version}")
    released = _check_release(file.parent, version, profile)
    step.update(f"resolving its packages for Python {profile.python}")
    before = _read(file)
    # In a folder of its own and by its final name, which uv's messages show; it keeps the versions that it finds there.
    with tempfile.TemporaryDirectory(prefix="deployer-lock-") as folder:
        made = Path(folder) / file.name
        if before is not None:
            made.write_bytes(before)
        options = ["--generate-hashes", "--custom-compile-command", command, "--quiet", "--output-file", str(made)]
        # What came later was never tried with it, and Airflow's own bounds let much in: 3.2.2 does not start with the
        # Pydantic of half a year later. The releases whose locks come along are tried with what their locks hold.
        if released and version != profile.locked:
            options += ["--exclude-newer", (released + _LATER).strftime("%Y-%m-%dT%H:%M:%SZ")]
        done = _compile(file.parent, profile.python, requirements(version, profile), *options)
        if done.returncode:
            raise _conflict(version, profile, _failure(version, done))
        # What it was resolved from came through a pipe, which is nothing to refer to.
        after = re.sub(rb"\n    # via -r -(?=\n)|\n    #   -r -(?=\n)", b"", made.read_bytes())
    if after != before:
        _replace(file, after)
    return LockReport(version, profile.python, str(file), len(locked_versions(file)), after != before)


def _check_release(folder: Path, version: str, profile: Profile) -> datetime | None:
    """Make sure that there is this release of Airflow, and that it may be used.

    Returns:
        When it was uploaded, as the index says (https://peps.python.org/pep-0700/); None where it does not.

    Raises:
        ConfigurationError: it does not exist, or was yanked.
    """
    wanted = f"apache-airflow=={version}"
    done = _compile(folder, profile.python, wanted, "--no-deps", "--format", "pylock.toml")
    log = done.stderr.splitlines()
    if done.returncode:
        failure = _failure(version, done)
        if failure.missing == wanted:
            raise ConfigurationError(
                f"Cannot lock Airflow {version}: there is no such release.", hint=_nearest(folder, version, profile)
            )
        if failure.missing:
            raise DeployerError(
                f"Cannot lock Airflow {version}: the package index has no apache-airflow.", hint=_OTHER_INDEX
            )
        raise _conflict(version, profile, failure)
    yanked = parse_yanked(log, wanted)
    if yanked is not None:
        why = f": {yanked}" if yanked else "."
        raise ConfigurationError(
            f"Cannot lock Airflow {version}: this release was yanked{why}", hint=_nearest(folder, version, profile)
        )
    uploaded = re.search(r"upload-time = (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", done.stdout)
    return datetime.fromisoformat(uploaded[1]) if uploaded else None


def _nearest(folder: Path, version: str, profile: Profile) -> str:
    """The hint that names the releases before and after a version."""
    near = []
    for sign, resolution in (("<", "highest"), (">", "lowest")):
        options = ("--no-deps", "--no-header", "--no-annotate", "--quiet", "--resolution", resolution)
        done = _compile(folder, profile.python, f"apache-airflow{sign}{version}", *options)
        found = re.search(r"^apache-airflow==(\S+)", done.stdout, re.MULTILINE)
        if not done.returncode and found and find_profile(found[1]):
            near.append(found[1])
    if not near:
        return "Set `airflow.version` to a release of Airflow."
    return f"Set `airflow.version` to one that there is; nearest: {' and '.join(near)}."


def _conflict(version: str, profile: Profile, failure: Failure) -> RequirementsError:
    return RequirementsError(
        f"Cannot lock Airflow {version}: no packages fit together for Python {profile.python}: {failure.reason}.",
        hint=f"Choose another `airflow.version`; {profile.locked} comes with its lock.",
        details=list(failure.hints),
    )


def _failure(version: str, done: subprocess.CompletedProcess[str]) -> Failure:
    """Why uv failed, where it says so and it has to do with packages.

    Raises:
        DeployerError: it has not.
    """
    log = done.stderr.splitlines()
    failure = parse_failure(log)
    if failure is None:
        raise DeployerError(f"Cannot lock Airflow {version}: uv ended with {done.returncode}.", details=log[-15:])
    if failure.unreachable:
        raise DeployerError(
            f"Cannot lock Airflow {version}: the package index cannot be reached: {failure.reason}.", hint=_OTHER_INDEX
        )
    return failure


def _compile(folder: Path, python: str, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `uv pip compile` on a requirements file's text.

    Args:
        folder: where uv looks for its configuration, an index for example.
        python: the version of Python to resolve for.

    Raises:
        DeployerError: uv is not there, or takes too long.
    """
    import uv

    target = ("--python-version", python, "--python-platform", "linux")
    try:
        command = (uv.find_uv_bin(), "pip", "compile", "--no-python-downloads", "--color=never", *target, *options, "-")
        return subprocess.run(
            command, cwd=folder, input=text, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except FileNotFoundError:
        raise DeployerError(
            "Cannot run uv, which resolves packages: it is not installed.", hint="pip install uv"
        ) from None
    except subprocess.TimeoutExpired:
        raise DeployerError(f"Cannot lock: uv did not end within {_TIMEOUT:.0f} s.", hint=_OTHER_INDEX) from None


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigurationError(f"Cannot read {file}: {error.strerror}.") from None


def _replace(file: Path, content: bytes) -> None:
    """Write a file at once, or leave it as it was."""
    new = file.with_name(f".{file.name}.new")
    try:
        new.write_bytes(content)
        new.replace(file)
    except OSError as error:
        with suppress(OSError):
            new.unlink()
        raise ConfigurationError(f"Cannot write {file}: {error.strerror}.") from None


if __name__ == "__main__":
    lock_shipped()
