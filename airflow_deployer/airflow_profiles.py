"""What differs between Airflow's series: one table of profiles, and the one place where a version is compared.

Whoever needs a difference reads a field of the deployment's `Profile`; nobody else looks at the version. What the pod
needs to know goes into the base image as `Profile.pod_document()`. Setting names are Airflow's
(https://airflow.apache.org/docs/apache-airflow/stable/configurations-ref.html and the same page of each version).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from airflow_deployer import credentials
from airflow_deployer.airflow_settings import API_PORT, HOME, SECRETS


@dataclass(frozen=True)
class Process:
    """One of Airflow's processes in the pod and how patiently it is stopped.

    Attributes:
        name: prefix of its log lines.
        command: arguments of `airflow`, or of the interpreter where `module` is set.
        module: a module to run instead of `airflow`, mostly of the base image's own package.
        function: what runs in that module when it is forked.
        kill_seconds: SIGKILL follows SIGTERM after this time; the scheduler has the deployment's drain time instead.
        stop_children: SIGTERM goes to its children too.
    """

    name: str
    command: tuple[str, ...]
    module: str = ""
    function: str = "main"
    kill_seconds: float = 5.0
    stop_children: bool = False


@dataclass(frozen=True)
class Parsing:
    """What parsing a DAG file is called in one series; names are `module:attribute`, "" of what there is not.

    Attributes:
        source: what Airflow reads DAG files from, by which its tables name them: a `bundle`, which has versions, or
            the `folder` `[core] dags_folder`.
        dag_bag: imports DAG files and collects their DAGs.
        dag: the class of a DAG.
        dag_context: collects the DAGs that no variable of the file holds.
        list_files: lists the DAG files below a folder, `.airflowignore` and safe mode (`[core]
            dag_discovery_safe_mode`) heeded.
        might_contain_dag: safe mode's look at one file.
        serialize: what is done with each DAG before it is stored, and may refuse one.
        error_log: the logger that has the traceback of an import error, where `dag_bag` keeps only its message.
        timeout_section: where `dag_file_processor_timeout` is set, the limit of one file.
        without_database: settings of a process that has no database: an empty one in memory answers every question
            with an error that can be told apart.
    """

    source: Literal["bundle", "folder"]
    dag_bag: str
    dag: str
    dag_context: str
    list_files: str
    might_contain_dag: str
    serialize: str
    error_log: str
    timeout_section: str
    without_database: Mapping[str, str]


@dataclass(frozen=True)
class RestApi:
    """How a series' stable REST API is spoken to.

    Attributes:
        path: what its paths begin with.
        login: how a request proves who it is: `token` (from `POST /auth/token`) or `basic` (user and password in each).
        dag_file: the field of a DAG that names its file: relative to its bundle, or absolute in the pod.
        trigger: what starts a run, beside the run's id.
        clear: what runs a task again, beside what every series understands.
        task_log: what it answers for a log: `events`, one object for each message, or `text`, as the file has it.
    """

    path: str
    login: Literal["token", "basic"]
    dag_file: Literal["relative_fileloc", "fileloc"]
    task_log: Literal["events", "text"]
    trigger: Mapping[str, Any] = field(default_factory=dict)
    clear: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """One series of Airflow.

    Attributes:
        series: its name here and in messages: `3`, `2` or `1.10`.
        first: the oldest version that it fits.
        locked: its newest release, whose packages are locked in `base-image/requirements/`.
        pythons: the Python versions that Airflow supports (`Requires-Python` and its documentation), oldest first.
        python: the one that the lock was made for and that `parent` has.
        parent: the public image that the base image is built on.
        postgres_image: the database's image of a new deployment.
        postgres_majors: the oldest and the newest PostgreSQL that Airflow supports.
        requirements: what the base image installs beside `apache-airflow[postgres]`, pins included.
        web: serves the UI and the API on `API_PORT`; started first, stopped last.
        scheduler: runs the tasks; started when `web` answers, stopped first.
        others: started beside `web`.
        migration: brings the schema up to date.
        migrates_from: the oldest Airflow whose schema that can start from (`airflow/migrations/versions`).
        scheduler_waits: whether the scheduler waits for running tasks after SIGTERM; another one is held up meanwhile.
        resets_interrupted: whether Airflow itself has tasks start over that were running when it was killed; otherwise
            the pod does.
        fork: whether one parent may import Airflow and fork the processes.
        first_imports: what the migration has loaded: modules that the parent must have before anything is forked.
        imports: what else the processes have loaded once they run, and what most DAGs import.
        login: how the admin user comes to be: `simple` (a password file) or `fab` (a row that the pod adds).
        answer_path: answered with 200 as soon as `web` serves; needs no login.
        health_path: Airflow's health document.
        health_components: what has to be healthy in it.
        api: the REST API, None where it has no stable one.
        hot: whether DAG content can be switched in the running pod; otherwise every change replaces it.
        versioned: whether a run finishes on the content it began with.
        parsing: what parsing a DAG file is called.
        wiring: settings that hold the pod together; they always win.
        tuning: settings that differ from Airflow's defaults because one small pod serves one small team.
        secret_files: settings whose values the supervisor reads from the mounted Secret: variable to key. For what
            has no `_CMD` variant.
    """

    series: str
    first: tuple[int, ...]
    locked: str
    pythons: tuple[str, ...]
    python: str
    parent: str
    postgres_image: str
    postgres_majors: tuple[int, int]
    requirements: tuple[str, ...]
    web: Process
    scheduler: Process
    others: tuple[Process, ...]
    migration: Process
    migrates_from: tuple[int, ...]
    fork: bool
    login: Literal["simple", "fab"]
    answer_path: str
    health_path: str
    health_components: tuple[str, ...]
    api: RestApi | None
    hot: bool
    versioned: bool
    parsing: Parsing
    wiring: Mapping[str, str]
    tuning: Mapping[str, str]
    scheduler_waits: bool = True
    resets_interrupted: bool = True
    first_imports: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    secret_files: Mapping[str, str] = field(default_factory=dict)

    @property
    def content_scope(self) -> Literal["run", "task", "pod"]:
        """For what new DAG content counts: each new run, each new task (of older runs too), or a new pod."""
        if not self.hot:
            return "pod"
        return "run" if self.versioned else "task"

    def pod_document(self) -> str:
        """What the pod has to know, as JSON: `profile.json` of the base image."""
        names = (
            *("series", "fork", "first_imports", "imports", "login", "answer_path", "health_path", "health_components"),
            *("scheduler_waits", "resets_interrupted", "hot", "versioned"),
        )
        document: dict[str, Any] = {name: getattr(self, name) for name in names}
        document["secret_files"] = dict(self.secret_files)
        document["parsing"] = dataclasses.asdict(self.parsing)
        document |= {name: dataclasses.asdict(getattr(self, name)) for name in ("web", "scheduler", "migration")}
        document["others"] = [dataclasses.asdict(process) for process in self.others]
        return json.dumps(document, sort_keys=True)


_WIRING = {
    "AIRFLOW_HOME": HOME,
    "AIRFLOW__CORE__DAGS_FOLDER": f"{HOME}/dags",
    "AIRFLOW__CORE__PLUGINS_FOLDER": f"{HOME}/plugins",
    "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
    # Values of secrets stay in files: a variable would show in `kubectl describe`, in /proc and in crash reports.
    "AIRFLOW__CORE__FERNET_KEY_CMD": f"cat {SECRETS}/{credentials.FERNET_KEY}",
}

_TUNING = {
    "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    # 300 s by default: a task that a crash interrupted would wait that long for its second try.
    "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "30",
    # 32 by default, and LocalExecutor starts that many workers ahead: 90 MB more at rest.
    "AIRFLOW__CORE__PARALLELISM": "8",
}

# A connection on which nothing is asked yet holds a thread of gunicorn, for 5 s or, in old releases, until it ends: a
# browser and the forward open such connections ahead. Threads are started when they are needed. Connections are kept
# for longer than the forward keeps one (`port_streams.FRESH_FOR`; 2 s by default): to find one closed costs a second.
_GUNICORN = ("--threads=32", "--keep-alive=35", "--worker-tmp-dir=/dev/shm")

_SQL_ALCHEMY_CONN_CMD = f"cat {SECRETS}/{credentials.SQL_ALCHEMY_CONN}"

# Older Airflows make this folder when they are imported, below the home folder, which only the pod can write to.
_PARSING_LOGS = {"AIRFLOW__SCHEDULER__CHILD_PROCESS_LOG_DIRECTORY": "/tmp/parsing-logs"}  # noqa: S108 - of the check

AIRFLOW_3 = Profile(
    series="3",
    first=(3, 2, 0),
    locked="3.3.2",
    pythons=("3.10", "3.11", "3.12", "3.13", "3.14"),
    python="3.13",
    parent="python:3.13-slim-trixie",
    postgres_image="postgres:17",
    postgres_majors=(14, 18),
    # Airflow 3 opens the database with both drivers, and even `airflow version` fails without asyncpg.
    requirements=("asyncpg",),
    # It closes its port at once, finishes the requests it has, and where it is not forked then spends seconds on taking
    # its own objects apart.
    web=Process("api-server", ("api-server",), kill_seconds=2.0),
    scheduler=Process("scheduler", ("scheduler", "--skip-serve-logs")),
    others=(
        Process("dag-processor", (), module="airflow_deployer_pod.dag_processor"),
        # Alone with its signal, the triggerer's parent waits ten seconds for a child that does not hear it; told both,
        # they end in one second, and the job is recorded as ended, so that the next triggerer takes over what waits
        # without a delay.
        Process("triggerer", ("triggerer", "--skip-serve-logs"), stop_children=True, kill_seconds=8.0),
    ),
    migration=Process("migration", ("db", "migrate"), kill_seconds=10.0),
    migrates_from=(2, 6, 2),
    fork=True,
    first_imports=("airflow.__main__", "airflow.cli.commands.db_command", "airflow.utils.db"),
    # `sys.modules` of each process, compared. `airflow.api_fastapi.main` is left out: it makes the application, and for
    # that it loads the plugins.
    imports=(
        "airflow.cli.commands.dag_processor_command",
        "airflow.cli.commands.triggerer_command",
        "airflow.cli.commands.scheduler_command",
        "airflow.callbacks.database_callback_sink",
        "airflow.executors.local_executor",
        "airflow.utils.serve_logs",
        "multiprocessing.popen_fork",
        "multiprocessing.queues",
        "multiprocessing.synchronize",
        "airflow.cli.commands.api_server_command",
        "airflow.api_fastapi.app",
        "airflow.api_fastapi.core_api.routes.public",
        "airflow.api_fastapi.core_api.routes.ui",
        "airflow.api_fastapi.execution_api.routes",
        "airflow.api_fastapi.execution_api.versions",
        "airflow.api_fastapi.auth.middlewares.refresh_token",
        "airflow.api_fastapi.auth.managers.simple.simple_auth_manager",
        "airflow.api_fastapi.auth.managers.simple.routes.login",
        "uvicorn.lifespan.on",
        "uvicorn.loops.auto",
        "uvicorn.protocols.http.auto",
        "uvicorn.protocols.websockets.auto",
        "airflow.sdk",
        "airflow.sdk.execution_time.task_runner",
        "airflow.dag_processing.dagbag",
        "airflow.providers.standard.operators.bash",
        "airflow.providers.standard.operators.empty",
        "airflow.providers.standard.operators.python",
        "airflow_deployer_pod.dag_processor",
        "airflow_deployer_pod.import_check",
    ),
    login="simple",
    answer_path="/api/v2/version",
    health_path="/api/v2/monitor/health",
    health_components=("metadatabase", "scheduler", "dag_processor", "triggerer"),
    api=RestApi(
        "/api/v2",
        login="token",
        dag_file="relative_fileloc",
        task_log="events",
        # Required, and null for a run that belongs to no interval.
        trigger={"logical_date": None},
        clear={"run_on_latest_version": True},
    ),
    hot=True,
    versioned=True,
    parsing=Parsing(
        source="bundle",
        dag_bag="airflow.dag_processing.dagbag:BundleDagBag",
        dag="airflow.sdk:DAG",
        dag_context="airflow.sdk.definitions._internal.contextmanager:DagContext",
        list_files="airflow.utils.file:list_py_file_paths",
        might_contain_dag="airflow.utils.file:might_contain_dag",
        serialize="airflow.serialization.serialized_objects:LazyDeserializedDAG.from_dag",
        error_log="",
        timeout_section="dag_processor",
        without_database={"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": "sqlite://"},
    ),
    wiring=_WIRING
    | {
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": f"{HOME}/logs",
        # Tasks talk to the API server; the default does not follow `[api] port`.
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://localhost:{API_PORT}/execution/",
        "AIRFLOW__API__PORT": str(API_PORT),
        "AIRFLOW__CORE__AUTH_MANAGER": (
            "airflow.api_fastapi.auth.managers.simple.simple_auth_manager.SimpleAuthManager"
        ),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{credentials.ADMIN_USER}:admin",
        # DAG content in versions, so that a run finishes on the one it began with (base-image/.../dag_bundle.py).
        "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST": json.dumps(
            [{"name": "dags", "classpath": "airflow_deployer_pod.dag_bundle.ContentBundle", "kwargs": {}}]
        ),
        # 1800 s by default: our own retention looks at the runs and the DAGs, Airflow's at the age alone.
        "AIRFLOW__DAG_PROCESSOR__STALE_BUNDLE_CLEANUP_INTERVAL": "0",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_CMD": _SQL_ALCHEMY_CONN_CMD,
        "AIRFLOW__API_AUTH__JWT_SECRET_CMD": f"cat {SECRETS}/{credentials.JWT_SECRET}",
        "AIRFLOW__API__SECRET_KEY_CMD": f"cat {SECRETS}/{credentials.API_SECRET_KEY}",
    },
    tuning=_TUNING
    | {
        # True by default: every process would compare the schema once more, which the supervisor has done already, and
        # for that import what migrates it (0.3 s and 10 MB each).
        "AIRFLOW__DATABASE__CHECK_MIGRATIONS": "False",
        # 300 s by default. A switch of content wakes the DAG processor; this is for one that was cut off before it did.
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "30",
        # 30 s by default: an edited task structure would stay unseen for that long, and of two saves the second be
        # lost.
        "AIRFLOW__CORE__MIN_SERIALIZED_DAG_UPDATE_INTERVAL": "0",
        # A line for every probe would bury the others.
        "AIRFLOW__LOGGING__NAMESPACE_LEVELS": "http.access=WARNING",
    },
)

AIRFLOW_2 = Profile(
    series="2",
    first=(2, 7, 0),
    locked="2.11.2",
    pythons=("3.10", "3.11", "3.12"),
    python="3.11",
    parent="python:3.11-slim-bookworm",
    postgres_image="postgres:15",
    postgres_majors=(12, 16),
    requirements=(),
    # What `airflow webserver` starts with these settings. It would then stay beside it, a hundred megabytes of Airflow
    # that see to it that the worker lives, as gunicorn itself and the pod's probe do. One worker of the default class
    # would serve one connection at a time: an idle one would block all others.
    web=Process(
        "webserver",
        (
            *("--bind", f":{API_PORT}", "--name", "airflow-webserver", "--timeout", "120"),
            *("--workers", "1", "--worker-class", "gthread", *_GUNICORN),
            *("--config", "python:airflow.www.gunicorn_config", "airflow.www.app:cached_app()"),
        ),
        module="gunicorn.app.wsgiapp",
        function="run",
        kill_seconds=8.0,
    ),
    scheduler=Process("scheduler", (), module="airflow_deployer_pod.folder_scheduler"),
    others=(
        Process("dag-processor", (), module="airflow_deployer_pod.folder_dag_processor"),
        Process("triggerer", ("triggerer", "--skip-serve-logs"), stop_children=True, kill_seconds=8.0),
    ),
    migration=Process("migration", ("db", "migrate"), kill_seconds=10.0),
    migrates_from=(1, 10, 10),
    fork=True,
    first_imports=("airflow.__main__", "airflow.cli.commands.db_command", "airflow.utils.db"),
    imports=(
        "airflow.cli.commands.dag_processor_command",
        "airflow.cli.commands.scheduler_command",
        "airflow.cli.commands.triggerer_command",
        "airflow.cli.commands.task_command",
        "airflow.executors.local_executor",
        "airflow.task.task_runner.standard_task_runner",
        "airflow.models.dagbag",
        "airflow.operators.bash",
        "airflow.operators.empty",
        "airflow.operators.python",
        "gunicorn.app.wsgiapp",
        "gunicorn.workers.gthread",
        "airflow.www.app",
        "airflow.www.gunicorn_config",
        "airflow.www.views",
        "airflow.api_connexion.endpoints.dag_endpoint",
        "airflow.providers.fab.auth_manager.security_manager.override",
        "airflow_deployer_pod.import_check",
    ),
    login="fab",
    answer_path="/health",
    health_path="/health",
    health_components=("metadatabase", "scheduler", "dag_processor", "triggerer"),
    api=RestApi("/api/v1", login="basic", dag_file="fileloc", task_log="text"),
    hot=True,
    versioned=False,
    parsing=Parsing(
        source="folder",
        dag_bag="airflow.models.dagbag:DagBag",
        dag="airflow.models.dag:DAG",
        dag_context="airflow.models.dag:DagContext",
        list_files="airflow.utils.file:list_py_file_paths",
        might_contain_dag="airflow.utils.file:might_contain_dag",
        serialize="airflow.serialization.serialized_objects:SerializedDAG.to_dict",
        error_log="",
        timeout_section="core",
        without_database={
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": "sqlite://",
            "AIRFLOW__CORE__EXECUTOR": "SequentialExecutor",
            **_PARSING_LOGS,
        },
    ),
    wiring=_WIRING
    | {
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": f"{HOME}/logs",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_CMD": _SQL_ALCHEMY_CONN_CMD,
        "AIRFLOW__WEBSERVER__SECRET_KEY_CMD": f"cat {SECRETS}/{credentials.API_SECRET_KEY}",
        "AIRFLOW__API__AUTH_BACKENDS": "airflow.api.auth.backend.basic_auth,airflow.api.auth.backend.session",
        # Ours wakes up when the content is switched; the scheduler then parses nothing itself.
        "AIRFLOW__SCHEDULER__STANDALONE_DAG_PROCESSOR": "True",
    },
    tuning=_TUNING
    | {
        "AIRFLOW__DATABASE__CHECK_MIGRATIONS": "False",
        # 300 s by default, as above.
        "AIRFLOW__SCHEDULER__DAG_DIR_LIST_INTERVAL": "30",
        "AIRFLOW__CORE__MIN_SERIALIZED_DAG_UPDATE_INTERVAL": "0",
    },
)

AIRFLOW_1 = Profile(
    series="1.10",
    first=(1, 10, 10),
    locked="1.10.15",
    # Airflow itself runs on 3.6 and 3.7 too; what runs beside it in the pod does not.
    pythons=("3.8",),
    python="3.8",
    parent="python:3.8-slim-bookworm",
    postgres_image="postgres:15",
    postgres_majors=(9, 15),
    # Later releases of these broke what Airflow 1.10 imports; nobody will adapt it any more. Of setproctitle it is the
    # last one with wheels for Python 3.8: the build stage has no compiler.
    requirements=("markupsafe<2.1", "wtforms<3", "sqlalchemy<1.4", "setuptools<66", "setproctitle<1.3.8"),
    web=Process("webserver", ("webserver",), kill_seconds=8.0),
    scheduler=Process("scheduler", ("scheduler",)),
    others=(),
    migration=Process("migration", ("upgradedb",), kill_seconds=10.0),
    migrates_from=(1, 10, 10),
    # It ends at once, and its workers with it, but not their tasks.
    scheduler_waits=False,
    resets_interrupted=False,
    fork=False,
    login="fab",
    answer_path="/health",
    health_path="/health",
    health_components=("metadatabase", "scheduler"),
    api=None,
    hot=False,
    versioned=False,
    parsing=Parsing(
        source="folder",
        dag_bag="airflow.models.dagbag:DagBag",
        dag="airflow.models.dag:DAG",
        dag_context="",
        list_files="airflow.utils.dag_processing:list_py_file_paths",
        might_contain_dag="",
        # It stores serialized DAGs only where it is told to.
        serialize="",
        error_log="airflow.models.dagbag.DagBag",
        timeout_section="core",
        # LocalExecutor refuses such a database.
        without_database={
            "AIRFLOW__CORE__SQL_ALCHEMY_CONN": "sqlite://",
            "AIRFLOW__CORE__EXECUTOR": "SequentialExecutor",
            **_PARSING_LOGS,
        },
    ),
    wiring=_WIRING
    | {
        "AIRFLOW__CORE__BASE_LOG_FOLDER": f"{HOME}/logs",
        "AIRFLOW__WEBSERVER__WEB_SERVER_PORT": str(API_PORT),
        # 4 by default, each some 150 MB.
        "AIRFLOW__WEBSERVER__WORKERS": "1",
        # One worker of the default class serves one connection at a time: an idle one would block all others.
        "AIRFLOW__WEBSERVER__WORKER_CLASS": "gthread",
        "GUNICORN_CMD_ARGS": " ".join(_GUNICORN),
        # 30 s by default, for DAG files that change: a new worker each time, which imports all of Airflow.
        "AIRFLOW__WEBSERVER__WORKER_REFRESH_INTERVAL": "0",
        "AIRFLOW__CORE__SQL_ALCHEMY_CONN_CMD": _SQL_ALCHEMY_CONN_CMD,
        # The old web interface has no login at all.
        "AIRFLOW__WEBSERVER__RBAC": "True",
    },
    tuning=_TUNING
    | {
        # 300 s by default.
        "AIRFLOW__SCHEDULER__DAG_DIR_LIST_INTERVAL": "30",
        # A line for every probe would bury the others.
        "AIRFLOW__WEBSERVER__ACCESS_LOGFILE": "",
    },
    secret_files={"AIRFLOW__WEBSERVER__SECRET_KEY": credentials.API_SECRET_KEY},
)

PROFILES = (AIRFLOW_3, AIRFLOW_2, AIRFLOW_1)
"""Every series, newest first."""

DEFAULT_VERSION = AIRFLOW_3.locked


def parse_version(version: str) -> tuple[int, ...] | None:
    """The numbers of a release such as `2.11.2`, three of them; None for anything else, pre-releases included."""
    match = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", version)
    return tuple(map(int, match.groups())) if match else None


def find_profile(version: str) -> Profile | None:
    """The profile of a version: its series', for a future one the newest; None for one too old, or no release."""
    numbers = parse_version(version)
    if numbers is None:
        return None
    for profile in PROFILES:
        if numbers >= profile.first:
            # What came after 1.10 and before the first 2.x that fits is no 1.10.
            same = profile is PROFILES[0] or numbers[0] == profile.first[0]
            return profile if same else None
    return None


def unsupported(version: str) -> str | None:
    """Why a version cannot be deployed, None when it has a profile."""
    if find_profile(version):
        return None
    oldest = ", ".join(f"{'.'.join(map(str, profile.first))} and later {profile.series}.x" for profile in PROFILES)
    return f'"{version}" is no release of Airflow that can be deployed; those are {oldest}'


def is_newer_than_known(version: str) -> bool:
    """Whether it belongs to a minor series that came after this release of the deployer."""
    numbers, known = parse_version(version), parse_version(PROFILES[0].locked)
    return numbers is not None and known is not None and numbers[:2] > known[:2]


def own_settings() -> frozenset[str]:
    """Every variable that some profile sets for itself, without `_CMD`: the user may not set it."""
    names = {name for profile in PROFILES for name in (*profile.wiring, *profile.secret_files)}
    return frozenset(re.sub(r"_CMD$", "", name) for name in names)


def environment(profile: Profile, user: Mapping[str, str]) -> dict[str, str]:
    """The variables of the `airflow` container: tuning, then what the user set, then the wiring, which always wins."""
    return {**profile.tuning, **user, **profile.wiring}
