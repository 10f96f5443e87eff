"""An Airflow without a stable REST API: its web server tells its health, a module in its pod what the database says.

The other end is `base-image/airflow_deployer_pod/airflow_report.py`, which documents the frames that go over one exec.
"""

from __future__ import annotations

import asyncio
import json
import struct
from types import TracebackType
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

_LENGTH = struct.Struct(">I")
_LARGEST_ANSWER = 64 << 20
_ANSWER_SECONDS = 15.0


class PodAirflow(AirflowWeb):
    """A client of the Airflow in a pod, to be used by one thread at a time and as a context manager.

    Args:
        url: of its web server.
        profile: of the Airflow in the pod.
        context: where the pod is.
        names: its deployment.
    """

    def __init__(self, url: str, profile: Profile, context: KubeContext, names: Names) -> None:
        super().__init__(url, profile)
        self._context = context
        self._names = names
        self._loop = asyncio.new_event_loop()
        self._api: ApiServer | None = None
        self._exec: PodExec | None = None

    def __enter__(self) -> PodAirflow:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.run_until_complete(self._close())
        self._loop.close()

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
            try:
                answer = self._loop.run_until_complete(asyncio.wait_for(self._answer(question), _ANSWER_SECONDS))
            except (UnavailableError, asyncio.TimeoutError) as error:
                cause = str(error) or f"no answer within {_ANSWER_SECONDS:.0f} s"
                self._loop.run_until_complete(self._close())
            except RefusedError as error:
                raise ClusterError(
                    f"Cannot {doing}: {error}.",
                    hint="ask an administrator of the cluster for a Role with this verb and resource",
                ) from None
            else:
                if "error" in answer:
                    raise AirflowError(f"Cannot {doing}: Airflow's database: {answer['error']}.")
                rows: list[list[Any]] = answer["rows"]
                return rows
        raise AirflowError(
            f"Cannot {doing}: {cause}.", hint="deployer status   shows the state of the pod and its components"
        )

    async def _answer(self, question: str) -> dict[str, Any]:
        if self._exec is None:
            self._exec = await self._start()
        request = json.dumps({"ask": question}).encode()
        await self._exec.write(_LENGTH.pack(len(request)) + request)
        size = _LENGTH.unpack(await self._exec.read_exactly(_LENGTH.size))[0]
        if size > _LARGEST_ANSWER:
            raise AirflowError("What answers in the pod is not the reader of Airflow's database.")
        answer: dict[str, Any] = json.loads(await self._exec.read_exactly(size))
        return answer

    async def _start(self) -> PodExec:
        from airflow_deployer.api_streams import ApiServer
        from airflow_deployer.pod_exec import PodExec

        if self._api is None:
            self._api = ApiServer(self._context.name, self._context.kubeconfig)
            await self._api.load()
        return await PodExec.start(self._api, self._names.namespace, self._names.pod, "airflow", REPORT)

    async def _close(self) -> None:
        if self._exec is not None:
            await self._exec.close()
        if self._api is not None:
            await self._api.close()
        self._exec = self._api = None
