"""Asking Airflow itself whether it is well: its components, its DAGs, and what it could not import.

A pod that is ready says that processes answer. What counts is what Airflow says: every component healthy, and every
DAG that the import check saw parsed by this very pod.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from airflow_deployer.airflow_api import AirflowApi, Dag
from airflow_deployer.errors import AirflowError
from airflow_deployer.progress import Step
from airflow_deployer.reports import ImportErrorReport

_POLL_SECONDS = 0.3


@dataclass(frozen=True)
class Verified:
    """What Airflow said: component to health, the number of DAGs, and its import errors."""

    components: dict[str, str | None]
    dags: int
    import_errors: tuple[ImportErrorReport, ...]


def look(url: str, *, user: str, password: str) -> Verified:
    """Ask once.

    Raises:
        AirflowError: Airflow does not answer or refuses the login.
    """
    api = AirflowApi(url)
    api.login(user, password)
    return Verified(_components(api), len(api.dags()), _import_errors(api))


def verify(
    url: str,
    *,
    user: str,
    password: str,
    expected: frozenset[str] | None,
    since: str,
    timeout: float,
    step: Step,
) -> Verified:
    """Wait until every component is healthy and every expected DAG was parsed since the container started.

    Args:
        expected: the DAG ids that the import check saw; None when nothing new was deployed.
        since: when the `airflow` container started (RFC 3339, the node's clock).
        timeout: seconds.

    Raises:
        AirflowError: a component stays unhealthy, or a DAG is neither listed nor among the import errors.
    """
    deadline = time.monotonic() + timeout
    api = AirflowApi(url)
    api.login(user, password)
    while True:
        components = _components(api)
        sick = [name for name, state in components.items() if state != "healthy"]
        dags = api.dags()
        errors = _import_errors(api)
        missing = sorted((expected or frozenset()) - _parsed(dags, since)) if not errors else []
        if not sick and not missing:
            return Verified(components, len(dags), errors)
        waiting = f"{', '.join(sick)} to be healthy" if sick else f"{len(missing)} DAGs to be parsed: {missing[0]}"
        step.update(f"waiting for {waiting}")
        if time.monotonic() >= deadline:
            raise AirflowError(
                f"Airflow is up, but after {round(timeout)} s it still waits for {waiting}.",
                hint="deployer status; the log of container airflow says more",
            )
        time.sleep(_POLL_SECONDS)


def _components(api: AirflowApi) -> dict[str, str | None]:
    """Health by component; that the API server answers at all is the web component's own health."""
    return {"web": "healthy"} | {name: component.status for name, component in api.health().items()}


def _parsed(dags: list[Dag], since: str) -> frozenset[str]:
    """The ids of the DAGs that were parsed at or after `since`; both are RFC 3339 in UTC and compare to the second."""
    return frozenset(dag.dag_id for dag in dags if (dag.last_parsed_time or "")[:19] >= since[:19])


def _import_errors(api: AirflowApi) -> tuple[ImportErrorReport, ...]:
    return tuple(
        ImportErrorReport(file=error.filename, cause=(error.stack_trace.strip().splitlines() or [""])[-1])
        for error in api.import_errors()
    )
