"""Replacing the pod while tasks run: they are shown and waited for up to a limit, and what was cut off is listed.

The pod's own graceful stop does the waiting: its scheduler starts nothing new and lets running tasks finish for
`timeouts.drain`. Tasks that it ends after that start over in the next pod, also those without retries.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from airflow_deployer import rollout
from airflow_deployer.cluster import POD, Cluster, Object
from airflow_deployer.errors import DeployerError
from airflow_deployer.kube_context import KubeContext
from airflow_deployer.manifests import Names, grace_seconds
from airflow_deployer.progress import Progress, Step
from airflow_deployer.running_airflow import RunningAirflow, RunningTask

Ask = Callable[[], AbstractContextManager[RunningAirflow]]

_POLL_SECONDS = 0.5
_SHOWN = 3
_SECOND_SIGNAL = ("bash", "-c", "kill -TERM 1")


@dataclass
class Observed:
    """The running tasks as they were last seen."""

    tasks: tuple[RunningTask, ...] = ()
    ended: threading.Event = field(default_factory=threading.Event)


def stop_pod(
    cluster: Cluster,
    names: Names,
    pod: Object,
    *,
    ask: Ask,
    now: bool,
    step: Step,
    progress: Progress,
) -> tuple[RunningTask, ...]:
    """Delete the pod, wait until it is gone, and return the tasks that it was not given the time to finish.

    Args:
        pod: what to delete.
        ask: has the Airflow in it answer, for the time of a block.
        now: do not wait for running tasks.
        step: shows what is waited for at the moment.
        progress: is told once which tasks run.

    Raises:
        RolloutError: it does not stop.
    """
    uid = pod["metadata"]["uid"]
    with watched(ask, step, now=now) as observed:
        if observed.tasks:
            progress.info(told(observed.tasks, now=now))
        cluster.delete(POD, names.namespace, names.pod, uid=uid)
        if now:
            with contextlib.suppress(Exception):  # the wait is then as long as without it
                asyncio.run(_signal_again(cluster.context, names))
        rollout.wait_deleted(
            cluster, names.namespace, POD, names.pod, uid=uid, timeout=grace_seconds(pod) + 60.0, step=_Quiet()
        )
    return observed.tasks


@contextlib.contextmanager
def watched(ask: Ask, step: Step, *, now: bool) -> Iterator[Observed]:
    """Look at the running tasks in the background for the time of the block, as long as Airflow answers."""
    observed = Observed()

    def look() -> None:
        try:
            with ask() as airflow:
                observed.tasks = airflow.running_tasks()
                ready.set()
                while not observed.ended.wait(_POLL_SECONDS):
                    observed.tasks = airflow.running_tasks()
                    step.update(told(observed.tasks, now=now))
        except DeployerError:
            # It has stopped: what was seen last is what was still running.
            return
        finally:
            ready.set()

    ready = threading.Event()
    thread = threading.Thread(target=look, name="running tasks", daemon=True)
    thread.start()
    ready.wait(timeout=10.0)
    step.update(told(observed.tasks, now=now))
    try:
        yield observed
    finally:
        observed.ended.set()
        thread.join(timeout=5.0)


def told(tasks: tuple[RunningTask, ...], *, now: bool) -> str:
    """Say which tasks are waited for, or ended."""
    if not tasks:
        return "stopping the pod"
    more = f" and {len(tasks) - _SHOWN} more" if len(tasks) > _SHOWN else ""
    shown = ", ".join(str(task) for task in tasks[:_SHOWN])
    waiting = "ending" if now else "waiting for"
    skip = "" if now else " (deployer up --now does not wait)"
    return f"{waiting} {len(tasks)} running task{'s' * (len(tasks) != 1)}: {shown}{more}{skip}"


async def _signal_again(context: KubeContext, names: Names) -> None:
    """Tell the supervisor not to wait: that is what a second signal means to it."""
    from airflow_deployer.api_streams import ApiServer, UnavailableError
    from airflow_deployer.pod_exec import PodExec

    api = ApiServer(context.name, context.kubeconfig)
    try:
        await api.load()
        # Its first signal comes from the kubelet, which takes a moment to hear of the deletion.
        await asyncio.sleep(2.0)
        command = await PodExec.start(api, names.namespace, names.pod, "airflow", _SECOND_SIGNAL)
        with contextlib.suppress(UnavailableError):
            await command.read_exactly(1)
        await command.close()
    finally:
        await api.close()


class _Quiet:
    """The observer tells more than "waiting for the pod to be gone"."""

    def update(self, detail: str) -> None:
        pass

    def done(self, summary: str) -> None:
        pass
