"""An Airflow without a stable REST API: its web server tells its health, a module in its pod what the database says.

The other end is `base-image/airflow_deployer_pod/airflow_report.py`, which documents the lines that go over one exec.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, TimeoutError
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from airflow_deployer.airflow_profiles import Profile
from airflow_deployer.airflow_web import AirflowWeb
from airflow_deployer.errors import AirflowError, ClusterError
from airflow_deployer.kube_context import KubeContext
from airflow_deployer.manifests import Names
from airflow_deployer.running_airflow import Dag, ImportFailure, RunningTask, dag_file

if TYPE_CHECKING:
    from airflow_deployer.api_streams import ApiServer
    from airflow_deployer.pod_exec import PodExec

# Isolated: nothing but the installation itself is on its path.
REPORT = ("/opt/airflow/bin/python", "-I", "-m", "airflow_deployer_pod.airflow_report")

_ANSWER_SECONDS = 15.0


class PodAirflow(AirflowWeb):
    """A client of the Airflow in a pod, to be used by one thread at a time; made by `opened`."""

    def __init__(
        self, url: str, profile: Profile, names: Names, api: ApiServer, submit: Callable[..., Future[Any]]
    ) -> None:
        super().__init__(url, profile)
        self._names = names
        self._api = api
        self._submit = submit
        self._exec: PodExec | None = None

    def dags(self) -> list[Dag]:
        """Return the DAGs that are served now, by id."""
        return [
            Dag(dag_id, is_paused, parsed, None if file is None else dag_file(file))
            for dag_id, is_paused, parsed, file in self._ask("dags", doing="list the DAGs")
        ]

    def import_errors(self) -> list[ImportFailure]:
        """Return what the scheduler could not import."""
        return [
            ImportFailure(dag_file(file), stack_trace, seen or "")
            for file, stack_trace, seen in self._ask("import_errors", doing="list the import errors")
        ]

    def running_tasks(self) -> tuple[RunningTask, ...]:
        """Return the task instances that run now."""
        return tuple(
            RunningTask(dag_id, run_id, task_id, -1)
            for dag_id, run_id, task_id in self._ask("running_tasks", doing="list the running tasks")
        )

    def _ask(self, question: str, *, doing: str) -> list[list[Any]]:
        """Have a question answered, in a second attempt by a new exec: the first one's container may be gone."""
        from airflow_deployer.api_streams import RefusedError, UnavailableError

        cause = ""
        for _ in range(2):
            answering = self._submit(self._answer(question))
            try:
                answer = answering.result(_ANSWER_SECONDS)
            except RefusedError as error:
                raise ClusterError(
                    f"Cannot {doing}: {error}.",
                    hint="ask an administrator of the cluster for a Role with this verb and resource",
                ) from None
            except (UnavailableError, TimeoutError) as error:
                answering.cancel()
                cause = str(error) or f"no answer within {_ANSWER_SECONDS:.0f} s"
                self.close()
            else:
                if "error" in answer:
                    raise AirflowError(f"Cannot {doing}: Airflow's database: {answer['error']}.")
                rows: list[list[Any]] = answer["rows"]
                return rows
        raise AirflowError(
            f"Cannot {doing}: {cause}.", hint="deployer status   shows the state of the pod and its components"
        )

    async def _answer(self, question: str) -> dict[str, Any]:
        from airflow_deployer.pod_exec import PodExec

        if self._exec is None:
            self._exec = await PodExec.start(self._api, self._names.namespace, self._names.pod, "airflow", REPORT)
        await self._exec.write(question.encode() + b"\n")
        answer: dict[str, Any] = json.loads(await self._exec.read_line())
        return answer

    def close(self) -> None:
        """End what runs in the pod."""
        if self._exec is not None:
            with suppress(Exception):
                self._submit(self._exec.close()).result(5.0)
            self._exec = None


@contextmanager
def opened(url: str, profile: Profile, context: KubeContext, names: Names) -> Iterator[PodAirflow]:
    """Have a client for the time of the block.

    Args:
        url: of the Airflow's web server.
        profile: of the Airflow in the pod.
        context: where the pod is.
        names: its deployment.

    Raises:
        ClusterError: the kubeconfig or its context cannot be used.
    """
    from airflow_deployer.api_streams import in_background

    with in_background(context.name, context.kubeconfig) as (api, submit):
        airflow = PodAirflow(url, profile, names, api, submit)
        try:
            yield airflow
        finally:
            airflow.close()
