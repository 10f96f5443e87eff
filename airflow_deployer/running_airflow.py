"""What verification, status and draining ask a running Airflow, and who can be asked in its series."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from airflow_deployer import credentials
from airflow_deployer.airflow_profiles import Profile, find_profile
from airflow_deployer.airflow_settings import HOME
from airflow_deployer.cluster import Object
from airflow_deployer.connection import Session, airflow_url

VERSION_LABEL = "app.kubernetes.io/version"

# The DAG folder is a link to the content that is live; some series name the link's target.
_DAG_FOLDER = re.compile(rf"{HOME}/(?:content/(?:current|[^/]+/[^/]+)/)?dags/")


@dataclass(frozen=True)
class Component:
    """The health of one of Airflow's components.

    `status` is "healthy", "unhealthy", or None where the component has never reported; `latest_heartbeat` is
    RFC 3339, None for the metadatabase, which has none.
    """

    status: str | None
    latest_heartbeat: str | None


@dataclass(frozen=True)
class ImportFailure:
    """A file that Airflow could not import: the file, relative to `dags/`, and Python's stack trace.

    `timestamp` is when it was last seen, RFC 3339 by the pod's clock.
    """

    filename: str
    stack_trace: str
    timestamp: str


@dataclass(frozen=True)
class Dag:
    """A DAG that is served.

    `last_parsed_time` is RFC 3339 by the pod's clock; `file` is relative to `dags/`, None where Airflow names none.
    """

    dag_id: str
    is_paused: bool
    last_parsed_time: str | None
    file: str | None


@dataclass(frozen=True)
class RunningTask:
    """A task instance in the state `running`; `map_index` is -1 for a task that is not mapped."""

    dag_id: str
    run_id: str
    task_id: str
    map_index: int

    def __str__(self) -> str:
        index = f"[{self.map_index}]" if self.map_index >= 0 else ""
        return f"{self.dag_id}.{self.task_id}{index} of {self.run_id}"


class RunningAirflow(Protocol):
    """An Airflow that runs. Every method raises `AirflowError` when it does not answer or refuses."""

    def health(self) -> dict[str, Component]:
        """Return the health of each component that the series has."""

    def dags(self) -> list[Dag]:
        """Return the DAGs that are served now, by id."""

    def import_errors(self) -> list[ImportFailure]:
        """Return what could not be imported."""

    def running_tasks(self) -> tuple[RunningTask, ...]:
        """Return the task instances that run now."""


def running_profile(session: Session, workload: Object | None) -> Profile:
    """The profile of what a pod or StatefulSet runs: another one than the settings' where `up` will change the version.

    Args:
        workload: the object, with the labels that `up` gave it.
    """
    labels = ((workload or {}).get("metadata") or {}).get("labels") or {}
    return find_profile(labels.get(VERSION_LABEL, "")) or session.settings.airflow.profile


@contextmanager
def asked(
    session: Session, profile: Profile, secret: dict[str, str], url: str | None = None
) -> Iterator[RunningAirflow]:
    """Have the Airflow in the pod answer, for the time of the block.

    Args:
        profile: of the Airflow that runs there.
        secret: the values of the generated Secret.
        url: a forward that runs; None for one of its own.

    Raises:
        AirflowError: it does not answer, or refuses the login.
        ForwardError: there is no way to it.
    """
    with airflow_url(session, url) as address:
        if profile.api is not None:
            from airflow_deployer.airflow_api import AirflowApi

            api = AirflowApi(address, profile)
            api.login(credentials.ADMIN_USER, secret[credentials.ADMIN_PASSWORD])
            yield api
        else:
            from airflow_deployer import pod_airflow

            with pod_airflow.opened(address, profile, session.context, session.names) as airflow:
                yield airflow


def dag_file(path: str) -> str:
    """Make a file's path in the pod relative to `dags/`; one that is relative already stays as it is."""
    return _DAG_FOLDER.sub("", path, count=1) if path.startswith("/") else path
