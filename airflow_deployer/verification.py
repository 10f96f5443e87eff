"""Asking Airflow itself whether it is well: its components, its DAGs, and what it could not import.

A pod that is ready says that processes answer. What counts is what Airflow says: every component healthy, and every
DAG file parsed by this very pod, or listed with its import error.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from airflow_deployer.errors import AirflowError
from airflow_deployer.progress import Step
from airflow_deployer.reports import ImportErrorReport
from airflow_deployer.running_airflow import Dag, ImportFailure, RunningAirflow

_POLL_SECONDS = 0.3


@dataclass(frozen=True)
class Verified:
    """What Airflow said: component to health, the number of DAGs, and its import errors."""

    components: dict[str, str | None]
    dags: int
    import_errors: tuple[ImportErrorReport, ...]


def look(airflow: RunningAirflow) -> Verified:
    """Ask once.

    Raises:
        AirflowError: Airflow does not answer or refuses the login.
    """
    return Verified(_components(airflow), len(airflow.dags()), _reports(airflow.import_errors()))


def verify(
    airflow: RunningAirflow,
    *,
    expected: frozenset[str] | None,
    since: str,
    timeout: float,
    step: Step,
) -> Verified:
    """Wait until every component is healthy and every expected file was parsed since the container started.

    Args:
        expected: the DAG files, relative to `dags/`, that must show up; None when the pod was left as it was.
        since: when the `airflow` container started (RFC 3339, the node's clock).
        timeout: seconds without any progress.

    Raises:
        AirflowError: a component stays unhealthy, or a file shows up neither with its DAGs nor with its error.
    """
    deadline = time.monotonic() + timeout
    fewest = len(expected or ())
    while True:
        components = _components(airflow)
        sick = [name for name, state in components.items() if state != "healthy"]
        dags = airflow.dags()
        # An error of before the start tells nothing of the files as they are now.
        failures = [
            failure for failure in airflow.import_errors() if expected is None or _is_since(failure.timestamp, since)
        ]
        missing = sorted((expected or frozenset()) - _parsed(dags, since) - {failure.filename for failure in failures})
        if len(missing) < fewest:
            # A large project is parsed for minutes: the time is up when nothing comes any more.
            fewest, deadline = len(missing), time.monotonic() + timeout
        if not sick and not missing:
            return Verified(components, len(dags), _reports(failures))
        waiting = f"{', '.join(sick)} to be healthy" if sick else f"{len(missing)} files to be parsed: {missing[0]}"
        step.update(f"waiting for {waiting}")
        if time.monotonic() >= deadline:
            raise AirflowError(
                f"Airflow is up, but after {round(timeout)} s it still waits for {waiting}.",
                hint="deployer status; the log of container airflow says more",
            )
        time.sleep(_POLL_SECONDS)


def _components(airflow: RunningAirflow) -> dict[str, str | None]:
    """Health by component; that the web server answers at all is the web component's own health."""
    return {"web": "healthy"} | {name: component.status for name, component in airflow.health().items()}


def _parsed(dags: list[Dag], since: str) -> frozenset[str]:
    """The files whose DAGs were parsed at or after `since`."""
    return frozenset(dag.file or "" for dag in dags if _is_since(dag.last_parsed_time, since))


def _is_since(moment: str | None, since: str) -> bool:
    """Compare two RFC 3339 times in UTC to the second, which is all that Kubernetes tells."""
    return (moment or "")[:19] >= since[:19]


def _reports(failures: list[ImportFailure]) -> tuple[ImportErrorReport, ...]:
    return tuple(
        ImportErrorReport(file=failure.filename, cause=(failure.stack_trace.strip().splitlines() or [""])[-1])
        for failure in failures
    )
