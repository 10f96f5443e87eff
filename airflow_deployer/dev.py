"""`deployer dev`: deploy, then bring every save into the running pod, with its logs, until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from airflow_deployer import background_forward, credentials, deploy, keyboard, lease, objects, preflight
from airflow_deployer.config import Settings
from airflow_deployer.connection import Session, connect, require_hot
from airflow_deployer.content import ProjectContent, read_project
from airflow_deployer.errors import ChangedError, ClusterError, ConfigurationError, DeployerError, SyncError
from airflow_deployer.save_loop import SaveLoop
from airflow_deployer.watching import Watch

if TYPE_CHECKING:
    from airflow_deployer.console import Console
    from airflow_deployer.dag_runs import Rerun
    from airflow_deployer.pod_logs import LogLine, PodApi

_CONTAINERS = ("airflow", "postgres")
_REPLACE_KEYS = "rR"
_TORN_TRIES = 5
# What a new pod cannot change: where it is.
_PLACE = ("name", "namespace", "context")

Wish = Literal["end", "replace"]


def run(
    project: Path,
    load: Callable[[], Settings],
    console: Console,
    *,
    config_file: Path | None,
    rerun: str | None,
) -> None:
    """Deploy the project and follow it until Ctrl-C.

    Args:
        project: the project folder.
        load: reads the configuration; called again when it may have changed.
        console: told what happens.
        config_file: the file that `--config` names.
        rerun: `DAG` or `DAG.TASK`, to be run after every change.

    Raises:
        ConfigurationError: this Airflow takes no content while it runs.
        LockedError: another `deployer dev` follows this deployment.
        DeployerError: the project cannot be deployed.
    """
    settings = load()
    require_hot(settings, "dev")
    session = connect(settings)
    names = session.names
    if not preflight.check_namespace(session.cluster, names.namespace):
        objects.ensure_namespace(session.cluster, names.namespace)
    with lease.held(session.cluster, names.namespace, names.dev_lease, labels=names.labels, doing="dev"):
        content = _deploy(project, settings, console)
        while asyncio.run(_follow(project, session, content, load, console, config_file, rerun)) == "replace":
            try:
                settings = _same_place(session.settings, load())
                content = _deploy(project, settings, console)
                session = connect(settings)
            except DeployerError as error:
                # The pod that runs goes on running; the loop tells again what it lacks.
                console.error(error)


def _deploy(project: Path, settings: Settings, console: Console) -> ProjectContent:
    """Do what `deployer up` does; return what was deployed."""
    for tries_left in reversed(range(_TORN_TRIES)):
        content = read_project(project, settings.project)
        try:
            report = deploy.up(project, settings, console, deploy.UpOptions())
            break
        except (ChangedError, SyncError) as error:
            # Who iterates saves while this is under way.
            if not tries_left or (isinstance(error, SyncError) and error.kind != "invalid"):
                raise
            console.event("again", "a file was saved meanwhile; once more", mark="!")
    console.event(
        "deployed",
        f"Airflow {report.airflow_version} runs at {report.url} with {report.dags} DAG{'s' * (report.dags != 1)}",
        mark="✓",
        report=report.document(),
    )
    for failure in report.import_errors:
        message = f"{failure.file}: {failure.cause}"
        console.event("import_error", message, mark="x", file=failure.file, cause=failure.cause)
    return content


def _same_place(before: Settings, after: Settings) -> Settings:
    moved = [key for key in _PLACE if getattr(before, key) != getattr(after, key)]
    if moved:
        raise ConfigurationError(
            f"Cannot replace the pod: the configuration names another {' and '.join(moved)} now.",
            hint="end this with Ctrl-C and start deployer dev again, which deploys it there",
        )
    return after


async def _follow(
    project: Path,
    session: Session,
    deployed: ProjectContent,
    load: Callable[[], Settings],
    console: Console,
    config_file: Path | None,
    target: str | None,
) -> Wish:
    """Watch, sync and show logs until the user wants an end or a new pod."""
    from airflow_deployer.content_sync import ContentChannel

    names, settings = session.names, session.settings
    wishes: asyncio.Queue[Wish] = asyncio.Queue()

    def on_key(key: str) -> None:
        if key in _REPLACE_KEYS:
            wishes.put_nowait("replace")

    async with contextlib.AsyncExitStack() as stack:
        api = await stack.enter_async_context(_pod_api(session))
        stack.enter_context(_signals(lambda: wishes.put_nowait("end")))
        listening = stack.enter_context(keyboard.keys(on_key))
        watch = await stack.enter_async_context(
            Watch(project, settings.project, config_file, lambda text: console.event("watch", text, mark="!"))
        )
        rerun = stack.enter_context(_rerun(session, target, console)) if target is not None else None
        loop = SaveLoop(
            project,
            deployed,
            settings,
            console,
            load=load,
            connect=lambda: ContentChannel(api, names),
            still_there=lambda: _still_there(api, session),
            on_live=rerun.start if rerun is not None else lambda: None,
            how_to_replace="press r" if listening else "end this and start deployer dev again",
        )
        paths = settings.project
        console.event(
            "watching",
            f"watching {paths.dags}/, {paths.include}/, {paths.plugins}/ and the configuration; "
            + ("r runs deployer up, " if listening else "")
            + "Ctrl-C ends this and leaves Airflow running",
            mark=">",
        )
        logs = (_show_log(api, session, name, console, with_run=target is not None) for name in _CONTAINERS)
        tasks = [loop.follow(watch), *logs]
        wish = await _first(wishes, [asyncio.ensure_future(task) for task in tasks])
    if wish == "end":
        loop.tell_end()
    return wish


async def _first(wishes: asyncio.Queue[Wish], tasks: list[asyncio.Future[None]]) -> Wish:
    """Wait for a wish, or for a task to fail; end the tasks."""
    wish = asyncio.ensure_future(wishes.get())
    try:
        pending: set[asyncio.Future[Any]] = {wish, *tasks}
        while not wish.done():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        return wish.result()
    finally:
        wish.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(wish, *tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def _pod_api(session: Session) -> AsyncIterator[PodApi]:
    from airflow_deployer.pod_logs import PodApi

    api = PodApi(session.context.name, session.context.kubeconfig)
    try:
        await api.load()
        yield api
    finally:
        await api.close()


@contextlib.contextmanager
def _signals(on_end: Callable[[], None]) -> Iterator[None]:
    """Have Ctrl-C and its kin be a wish, so that what is under way is ended in order."""
    loop = asyncio.get_running_loop()
    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in ending:
        loop.add_signal_handler(number, on_end)
    try:
        yield
    finally:
        for number in ending:
            loop.remove_signal_handler(number)


async def _still_there(api: PodApi, session: Session) -> None:
    """Make sure that what we follow was not removed.

    Raises:
        ClusterError: it was.
        UnavailableError: it cannot be told.
    """
    names = session.names
    await api.reload_if_changed()
    if await api.stateful_set_is_gone(names.namespace, names.name):
        raise ClusterError(
            f"The deployment {names.name!r} in namespace {names.namespace!r} was removed.",
            hint="deployer dev   deploys it again",
        )


@contextlib.contextmanager
def _rerun(session: Session, text: str, console: Console) -> Iterator[Rerun]:
    from airflow_deployer.airflow_api import AirflowApi
    from airflow_deployer.dag_runs import Rerun

    def connect() -> AirflowApi:
        _, secret = objects.ensure_secret(session.cluster, session.names)
        url = background_forward.ensure(session.target, port=session.settings.port_forward.port).url
        api = AirflowApi(url, session.settings.airflow.profile)
        api.login(credentials.ADMIN_USER, secret[credentials.ADMIN_PASSWORD])
        return api

    rerun = Rerun(connect, text, console)
    try:
        yield rerun
    finally:
        rerun.stop()


async def _show_log(api: PodApi, session: Session, container: str, console: Console, *, with_run: bool) -> None:
    from airflow_deployer.api_streams import RefusedError
    from airflow_deployer.pod_logs import PodLog

    def show(line: LogLine) -> None:
        # The run that is followed has its tasks' logs shown by their names.
        if console.verbose or not (line.is_routine or (with_run and line.is_of_task)):
            console.log(line.component, line.level, line.text)

    try:
        await PodLog(api, session.names.namespace, session.names.pod, container).follow(show)
    except RefusedError as error:
        console.event("log_error", f"the log of {container} cannot be read: {error}", mark="!")
