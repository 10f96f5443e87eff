"""The import check in a pod that was just started, of what is live there: which files its Airflow has to show.

An image that the registry holds has passed its check in an earlier run, of which nothing is kept; and Airflow leaves no
trace of a file without a DAG that could be waited for.
"""

from __future__ import annotations

from concurrent.futures import TimeoutError
from typing import TYPE_CHECKING

from airflow_deployer.airflow_profiles import Profile
from airflow_deployer.errors import AirflowError, ClusterError, SyncError
from airflow_deployer.gate import GateReport, parse_report
from airflow_deployer.images import IMPORT_CHECK
from airflow_deployer.kube_context import KubeContext
from airflow_deployer.manifests import Names

if TYPE_CHECKING:
    from airflow_deployer.api_streams import ApiServer

_ASKING = "Airflow is up, but which DAG files it has to show cannot be told"
_HINT = "deployer status; the log of container airflow says more"


def check_imports(context: KubeContext, names: Names, profile: Profile, timeout: float) -> GateReport:
    """Import the DAGs that are live in the pod.

    Args:
        context: where the pod is.
        names: its deployment.
        profile: of its Airflow.
        timeout: seconds it may take.

    Raises:
        AirflowError: it took too long or failed, or the pod is out of reach.
        ClusterError: these credentials may not.
        GateError: it ended without a report.
    """
    from airflow_deployer.api_streams import RefusedError, UnavailableError, in_background

    with in_background(context.name, context.kubeconfig) as (api, submit):
        # The agent has a process that has imported Airflow already.
        checking = submit(_ask_agent(api, names) if profile.hot else _run(api, names))
        try:
            report: GateReport = checking.result(timeout)
        except TimeoutError:
            checking.cancel()
            raise AirflowError(
                f"{_ASKING}: their import did not end within {timeout:.0f} s.",
                hint="Look for work at the top level of a DAG file, or raise `timeouts.import_check`.",
            ) from None
        except (UnavailableError, SyncError) as error:
            raise AirflowError(f"{_ASKING}: {str(error).rstrip('.')}.", hint=_HINT) from None
        except RefusedError as error:
            raise ClusterError(
                f"{_ASKING}: {error}.",
                hint="ask an administrator of the cluster for a Role with this verb and resource",
            ) from None
    return report


async def _ask_agent(api: ApiServer, names: Names) -> GateReport:
    from airflow_deployer.content_sync import ContentChannel

    channel = ContentChannel(api, names)
    try:
        await channel.connect()
        return await channel.check_live()
    finally:
        await channel.close()


async def _run(api: ApiServer, names: Names) -> GateReport:
    """Run it as in the image, whose content is what is live where nothing is brought into a running pod."""
    from airflow_deployer.pod_exec import PodExec

    command = await PodExec.start(api, names.namespace, names.pod, "airflow", IMPORT_CHECK)
    output = bytearray()
    try:
        while data := await command.read():
            output += data
    finally:
        await command.close()
    return parse_report(output.decode(), 0, [])
