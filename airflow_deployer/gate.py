"""What the import check in the image found in the DAGs, and whether it stops us.

`base-image/airflow_deployer_pod/import_check.py` documents its output.

Pure: text in, `GateReport` out. An import error, a cycle or an id that two DAGs share stops the deploy; what only the
deployment's own database can answer is a warning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from airflow_deployer.errors import GateError

_SHOWN_ERRORS = 20


@dataclass(frozen=True)
class ImportedFile:
    """A DAG file and what came out of it; a broken one has no `dag_ids`. `seconds`: how long its import took."""

    path: str
    dag_ids: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class ImportProblem:
    """What went wrong while a DAG file was imported.

    Attributes:
        path: the file it happened in, relative to the project's image folder (`dags/orders.py`, `include/shop.py`).
        line: its line there, from 1; None when there is none to name.
        dag_file: the DAG file that was being imported.
        kind: `syntax`, `import`, `cycle`, `timeout` or `crash`.
        exception: the name of the exception's class.
        message: the exception's message.
        traceback: its last lines, the project's own frames at the end.
    """

    path: str
    line: int | None
    dag_file: str
    kind: str
    exception: str
    message: str
    traceback: tuple[str, ...]

    def __str__(self) -> str:
        cause = f"{self.exception}: {self.message}" if self.exception else self.message
        importing = f" (while importing {self.dag_file})" if self.dag_file != self.path else ""
        return f"{_place(self.path, self.line)}: {cause}{importing}"


@dataclass(frozen=True)
class Place:
    """A line of a DAG file."""

    path: str
    line: int | None


@dataclass(frozen=True)
class Duplicate:
    """One id that several DAGs have: Airflow would show one of them, at random."""

    dag_id: str
    places: tuple[Place, ...]

    def __str__(self) -> str:
        where = " and ".join(_place(place.path, place.line) for place in self.places)
        return f'{len(self.places)} DAGs have the id "{self.dag_id}": {where}'


@dataclass(frozen=True)
class GateReport:
    """All that the import check found.

    Attributes:
        airflow: the version of Airflow that imported the DAGs.
        seconds: how long it took.
        files: what was imported.
        errors: what stops the deploy.
        needs_database: what asked for a Variable, a Connection or a table, and only the deployment can answer.
        duplicates: ids that several DAGs share.
        skipped: Python files that Airflow takes for something else, because they lack the words "airflow" and "dag".
    """

    airflow: str
    seconds: float
    files: tuple[ImportedFile, ...]
    errors: tuple[ImportProblem, ...]
    needs_database: tuple[ImportProblem, ...]
    duplicates: tuple[Duplicate, ...]
    skipped: tuple[str, ...]

    @property
    def dag_ids(self) -> list[str]:
        """The ids of all DAGs, sorted."""
        return sorted({dag_id for file in self.files for dag_id in file.dag_ids})

    @property
    def summary(self) -> str:
        """One line for a person."""
        dags, files = len(self.dag_ids), len(self.files)
        return f"{dags} DAG{'s' * (dags != 1)} in {files} file{'s' * (files != 1)}"

    @property
    def warnings(self) -> list[str]:
        """What is worth knowing but stops nothing."""
        warnings = [f"{problem} - Airflow will be asked once it runs" for problem in self.needs_database]
        if not self.dag_ids and not self.needs_database:
            skipped = (
                f"; skipped for lack of the words airflow and dag: {', '.join(self.skipped)}" if self.skipped else ""
            )
            warnings.append(f"No DAG was found{skipped}")
        return warnings

    def raise_for_errors(self) -> None:
        """Stop the deploy if there is a reason.

        Raises:
            GateError: with file, line and cause of each.
        """
        findings = [*map(str, self.errors), *map(str, self.duplicates)]
        if not findings:
            return
        count = "an error" if len(findings) == 1 else f"{len(findings)} errors"
        more = [f"... and {len(findings) - _SHOWN_ERRORS} more"] if len(findings) > _SHOWN_ERRORS else []
        raise GateError(
            "\n".join((f"Nothing was deployed, the DAGs have {count}:", *findings[:_SHOWN_ERRORS], *more)),
            hint=self.hint or "Correct it, then run the command again.",
            details=self.errors[0].traceback if len(findings) == 1 and self.errors else (),
        )

    @property
    def hint(self) -> str:
        """What to do about the errors, where that is more than to correct them; else empty."""
        return next(self._hints(), "")

    def _hints(self) -> Iterator[str]:
        for error in self.errors:
            if error.exception == "ModuleNotFoundError":
                yield "A package that the base image lacks goes into requirements.txt, your own modules into dags/."
            if error.kind == "timeout":
                yield "Move slow work from the top level of the DAG file into its tasks."
        if self.duplicates:
            yield "Give each DAG an id of its own."


def parse_report(output: str, exit_code: int, errors: list[str]) -> GateReport:
    """Read the import check's output.

    Args:
        output: its standard output.
        exit_code: its exit code.
        errors: the end of its standard error.

    Raises:
        GateError: the check itself failed.
    """
    import msgspec

    if exit_code == 0:
        try:
            return msgspec.json.decode(output, type=GateReport)
        except msgspec.DecodeError as error:
            reason = f"its report cannot be read ({error})"
    else:
        reason = "it was killed, probably for lack of memory" if exit_code == 137 else f"exit code {exit_code}"
    raise GateError(f"The import check of the DAGs failed: {reason}.", details=errors)


def _place(path: str, line: int | None) -> str:
    return path if line is None else f"{path}, line {line}"
