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
# Who moves a project wants the whole list.
_SHOWN_MOVED = 200
_SHOWN_MOVES = 10
_SHOWN_PLACES = 3


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
        kind: `syntax`, `import`, `cycle`, `timeout` or `crash`; `moved` for what moved in Airflow.
        exception: the name of the exception's class.
        message: the exception's message.
        traceback: its last lines, the project's own frames at the end.
        advice: what to write instead of what moved between Airflow's series; empty where nothing did.
    """

    path: str
    line: int | None
    dag_file: str
    kind: str
    exception: str
    message: str
    traceback: tuple[str, ...]
    advice: str = ""

    @property
    def cause(self) -> str:
        """What went wrong, and what to write instead."""
        cause = f"{self.exception}: {self.message}" if self.exception else self.message
        return f"{cause}{_instead(self.advice)}"

    def __str__(self) -> str:
        cause = self.cause
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
class Moved:
    """A line that uses what moved between Airflow's series, and imports nevertheless.

    Attributes:
        path: the file, relative to the project's image folder.
        line: its line there, from 1.
        name: a dotted name, an argument as in `DAG(schedule_interval=)`, or a key of the context as in `{{ ds }}`.
        gone: whether a task will fail for it; otherwise it is deprecated.
        advice: what to write instead, or empty.
    """

    path: str
    line: int
    name: str
    gone: bool
    advice: str


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
        moved: what imports today, but is deprecated or will fail in a task.
    """

    airflow: str
    seconds: float
    files: tuple[ImportedFile, ...]
    errors: tuple[ImportProblem, ...]
    needs_database: tuple[ImportProblem, ...]
    duplicates: tuple[Duplicate, ...]
    skipped: tuple[str, ...]
    moved: tuple[Moved, ...] = ()

    @property
    def dag_ids(self) -> list[str]:
        """The ids of all DAGs, sorted."""
        return sorted({dag_id for file in self.files for dag_id in file.dag_ids})

    @property
    def shown(self) -> frozenset[str]:
        """The files, relative to `dags/`, that leave a trace in Airflow: with their DAGs, or with an import error."""
        failed = {problem.dag_file for problem in (*self.errors, *self.needs_database)}
        files = failed | {file.path for file in self.files if file.dag_ids}
        return frozenset(path.removeprefix("dags/") for path in files)

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
        return [*warnings, *self.move_warnings]

    @property
    def move_warnings(self) -> list[str]:
        """A line, with its places, for each thing that moved and still imports; first what tasks will fail for."""
        places: dict[tuple[str, bool, str], list[str]] = {}
        for moved in self.moved:
            places.setdefault((moved.name, moved.gone, moved.advice), []).append(_place(moved.path, moved.line))
        lines = []
        for (name, gone, advice), where in sorted(places.items(), key=lambda item: (not item[0][1], item[0][0])):
            state = f"is not in Airflow {self.airflow}, a task will fail" if gone else "is deprecated"
            more = f" and {len(where) - _SHOWN_PLACES} more" if len(where) > _SHOWN_PLACES else ""
            lines.append(f"{name} {state}{_instead(advice)} ({'; '.join(where[:_SHOWN_PLACES])}{more})")
        rest = len(lines) - _SHOWN_MOVES
        return [*lines[:_SHOWN_MOVES], *([f"... and {rest} more of what moved in Airflow"] if rest > 0 else [])]

    def raise_for_errors(self) -> None:
        """Stop the deploy if there is a reason.

        Raises:
            GateError: with file, line and cause of each.
        """
        findings = [*map(str, self.errors), *map(str, self.duplicates)]
        if not findings:
            return
        count = "an error" if len(findings) == 1 else f"{len(findings)} errors"
        shown = _SHOWN_MOVED if self._written_for_another else _SHOWN_ERRORS
        more = [f"... and {len(findings) - shown} more"] if len(findings) > shown else []
        besides = ["Besides:", *self.move_warnings] if self._written_for_another and self.moved else []
        raise GateError(
            "\n".join((f"Nothing was deployed, the DAGs have {count}:", *findings[:shown], *more, *besides)),
            hint=self.hint or "Correct it, then run the command again.",
            details=self.errors[0].traceback if len(findings) == 1 and self.errors else (),
        )

    @property
    def hint(self) -> str:
        """What to do about the errors, where that is more than to correct them; else empty."""
        return next(self._hints(), "")

    @property
    def _written_for_another(self) -> bool:
        return any(error.kind == "moved" for error in self.errors)

    def _hints(self) -> Iterator[str]:
        if self._written_for_another:
            yield f"They were written for another Airflow than {self.airflow}; docs/moving.md lists what moved."
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


def _instead(advice: str) -> str:
    return f"; instead: {advice}" if advice else ""


def _place(path: str, line: int | None) -> str:
    return path if line is None else f"{path}, line {line}"
