"""Run Airflow's processes in one container: start and stop them in order, answer the probes, lose no log line.

PID 1 of the container `airflow`. It imports nothing but the standard library (and the database driver, for one check),
so that it is there at once and stays small; Airflow itself runs in its children.

Which processes those are depends on the series of Airflow in the image, and stands in its profile (`profile.py`).

Order of a start: the parent that imports Airflow and forks the others (`parent.py`), which takes as long as Postgres
takes to start; the DAG content on the volume (`content_store.py`); wait for Postgres, compare the schema with the
revisions that were written down when the image was built (`schema_revisions.py`), the migration only where it is
behind, everything that runs no tasks, and once the web server answers the scheduler: Airflow 3's tasks talk to that
server, and one that meets a closed port has burned its attempt.

What the parent cannot start, because it is turned off, has died or refuses, is spawned: slower, and otherwise the same.
Airflow goes on when the parent dies later; another one is started for the checks of staged DAG files.

Order of a stop (SIGTERM, SIGINT, or a process that died): scheduler first, web server last, because running tasks
report to it; then whatever is left over is killed. As long as this process lives it holds the lock on the file
`supervisor.lock`, and Postgres waits for that lock before it stops: however this process ends, the kernel frees it.
A second signal cuts the wait for running tasks short.

Whoever replaces the database asks for a hold: a lock on the file `hold`, which `deployer` takes through the container
`postgres`. As long as somebody holds it nothing of Airflow runs, which the file `held` says; then everything starts
again. The kernel frees the lock however its holder ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import http.client
import http.server
import json
import os
import re
import select
import selectors
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from airflow_deployer_pod.admin_user import ensure_users
from airflow_deployer_pod.airflow_database import libpq_url
from airflow_deployer_pod.content_store import CONTENT_FOLDER, IMAGE_FOLDER, ContentError, Store
from airflow_deployer_pod.parent import CHECK_SOCKET, Link
from airflow_deployer_pod.profile import Component, Profile

POSTGRES_SECONDS = 300.0  # initdb on a slow disk, or the lock on the volume that a killed pod's survivor still holds
LOGIN_REFUSED_SECONDS = 15.0  # a server that is still being set up may refuse the login for a moment
MIGRATION_SECONDS = 1800.0
PARENT_SECONDS = 120.0  # the import of Airflow, then each fork; what takes longer is killed and done without
PARENT_PAUSE_SECONDS = 60.0  # from one start of a parent that keeps dying to the next
WEB_SECONDS = 180.0
SEEN_SECONDS = 1.5  # `deployer` looks at the running tasks twice a second
QUIET_SECONDS = 2.0  # a scheduler that has had no task for so long waits for none, and ends in one second
RELEASE_SECONDS = 5.0  # what the scheduler gets to end its job cleanly once its workers are gone
SWEEP_SECONDS = 5.0
DRAIN_SECONDS = 2.0
STUCK_SECONDS = 60.0  # nothing the main loop does takes longer than the 3 s of a database login
HEALTH_AGE_SECONDS = 1.0
# The kubelet asks every second, and each answer costs Airflow four queries, which itself waits 30 s for a heartbeat.
GOOD_HEALTH_AGE_SECONDS = 5.0

# What Airflow adds after it has stamped a new database, by table; Airflow 1.10 knows but the first one.
_INITIAL_ROWS = {"slot_pool": "slot_pool WHERE pool = 'default_pool'", "log_template": "log_template"}
_MAX_LINE = 16 * 1024  # the size at which container runtimes split lines anyway
_PR_SET_CHILD_SUBREAPER = 36

SCHEMA_FILE = Path(__file__).parents[1] / "schema.json"

SchemaState = Literal["fresh", "behind", "current", "unknown"]


class StartError(Exception):
    """Airflow cannot run as things are; the message says why and is what the pod's status will show."""


class StopRequestedError(Exception):
    """SIGTERM or SIGINT arrived."""


class HoldRequestedError(Exception):
    """Somebody holds the lock that keeps Airflow stopped."""


class LoginRefusedError(Exception):
    """Postgres answers, but does not let this user in, or has no such database."""


PARENT = Component("parent", (sys.executable, "-m", "airflow_deployer_pod.parent"))


@dataclass(frozen=True)
class Settings:
    """Where things are in the container, and how long running tasks are waited for when it stops.

    Args:
        secrets: the mounted Secret: `sql-alchemy-conn` and `simple-auth-passwords.json` are read.
        shared: the emptyDir shared with the container `postgres`; the files `supervisor.lock` and `hold` are locked
            there.
        airflow_home: a writable directory.
        content: the DAG content on the volume.
        image_content: the DAG content of the image.
        content_id: the id of the image's content; empty where the image has none of its own to bring.
        deployed_at: when `deployer up` deployed it, in seconds since 1970.
        schema: what `schema_revisions.py` wrote.
        termination_log: Kubernetes' `terminationMessagePath`; the cause of a failure goes there.
        web_port: Airflow's UI and API, on 127.0.0.1.
        probe_port: `/livez` and `/readyz` are served there, on every address.
        stop_seconds: how long the scheduler may wait for running tasks.
        external_database_managers: whether more than Airflow's own schema has to be migrated, which the check by
            revisions does not see; then every start migrates.
        fork: whether one parent imports Airflow and forks the processes.
        check_socket: where that parent checks staged DAG files.
    """

    secrets: Path = Path("/run/secrets/airflow-deployer")
    shared: Path = Path("/run/airflow-deployer")
    airflow_home: Path = Path("/home/airflow")
    content: Path = CONTENT_FOLDER
    image_content: Path = IMAGE_FOLDER
    content_id: str = ""
    deployed_at: int = 0
    schema: Path = SCHEMA_FILE
    termination_log: Path = Path("/dev/termination-log")
    web_port: int = 8080
    probe_port: int = 8081
    stop_seconds: float = 30.0
    external_database_managers: bool = False
    fork: bool = True
    check_socket: Path = CHECK_SOCKET

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read the variables `AIRFLOW_DEPLOYER_...` and the settings of Airflow that matter here.

        Raises:
            StartError: a value is not a number.
        """

        def number(name: str, default: float) -> float:
            try:
                return float(environment.get(name, default))
            except ValueError:
                raise StartError(f"{name} is {environment[name]!r}, which is not a number.") from None

        return cls(
            airflow_home=Path(environment.get("AIRFLOW_HOME", "/home/airflow")),
            stop_seconds=number("AIRFLOW_DEPLOYER_STOP_SECONDS", 30.0),
            external_database_managers=bool(environment.get("AIRFLOW__DATABASE__EXTERNAL_DB_MANAGERS", "").strip()),
            content_id=environment.get("AIRFLOW_DEPLOYER_CONTENT_ID", ""),
            deployed_at=int(number("AIRFLOW_DEPLOYER_DEPLOYED_AT", 0)),
            fork=environment.get("AIRFLOW_DEPLOYER_FORK", "1") != "0",
        )


@dataclass
class Process:
    """A child that was started.

    Args:
        component: what it is.
        pid: its process id, the id of its session too; None until the parent has said that it is there.
        exit_code: None while it runs; negative: the signal that ended it.
    """

    component: Component
    pid: int | None = None
    exit_code: int | None = None

    @property
    def running(self) -> bool:
        """Whether its end has not been seen yet."""
        return self.exit_code is None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this process alone; does nothing when it has ended."""
        if self.running and self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def ask_to_end(self) -> None:
        """Send SIGTERM, also to its children where the component wants that."""
        if self.running and self.pid is not None and self.component.stop_children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGTERM)
        else:
            self.signal(signal.SIGTERM)


@dataclass(frozen=True)
class SchemaRevisions:
    """What the Airflow in this image knows of the database's history.

    Args:
        airflow: its version.
        heads: the revisions of an up-to-date database.
        revisions: every revision it can migrate from.
    """

    airflow: str
    heads: frozenset[str]
    revisions: frozenset[str]

    @classmethod
    def read(cls, path: Path) -> SchemaRevisions:
        """Read what `schema_revisions.py` wrote."""
        document = json.loads(path.read_text(encoding="utf-8"))
        return cls(document["airflow"], frozenset(document["heads"]), frozenset(document["revisions"]))


def classify_schema(recorded: Collection[str], known: SchemaRevisions) -> SchemaState:
    """Compare the rows of `alembic_version` with what this Airflow knows.

    `unknown` is a database that some other Airflow migrated past what this one can read, normally a newer one.
    """
    if not recorded:
        return "fresh"
    if frozenset(recorded) == known.heads:
        return "current"
    if frozenset(recorded) <= known.revisions:
        return "behind"
    return "unknown"


def connect(url: str) -> Any:
    """Log in to Postgres within three seconds.

    Raises:
        LoginRefusedError: the server answered and refused this user or this database.
        ConnectionError: nothing answers yet, or the server is starting.
    """
    import psycopg2

    try:
        return psycopg2.connect(url, connect_timeout=3, application_name="supervisor")
    except psycopg2.OperationalError as error:
        cause = str(error).strip().partition("\n")[0]
        # The driver reports no SQLSTATE for a failed connection, so the text has to tell.
        if re.search(r"authentication failed|(role|database) .* does not exist", cause):
            raise LoginRefusedError(cause) from None
        raise ConnectionError(cause) from None


def read_schema(connection: Any) -> frozenset[str]:
    """Return the rows of `alembic_version`; empty for a database that has none, or whose initial rows are missing.

    Airflow stamps a new database before it adds the default pool and the log template, without which no task runs and
    no log is found; a first start that was interrupted in between has to migrate again.
    """
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT to_regclass('alembic_version')")
        if cursor.fetchone()[0] is None:
            return frozenset()
        cursor.execute("SELECT version_num FROM alembic_version")
        recorded = frozenset(row[0] for row in cursor.fetchall())
        for table, rows in _INITIAL_ROWS.items():
            cursor.execute("SELECT to_regclass(%s)", (table,))
            if cursor.fetchone()[0] is not None:
                cursor.execute(f"SELECT EXISTS (SELECT 1 FROM {rows})")  # noqa: S608 - a constant
                if not cursor.fetchone()[0]:
                    return frozenset()
        return recorded


def reset_interrupted_tasks(connection: Any) -> int:
    """Make running tasks what they were before they were queued; return how many there were. Nothing may run yet.

    The scheduler of Airflow 1.10 does so with scheduled and queued tasks when it starts. Running ones it finds minutes
    later, without a heartbeat, and calls them failed: for good where they have no retries.
    """
    with connection, connection.cursor() as cursor:
        cursor.execute("UPDATE task_instance SET state = NULL WHERE state = 'running'")
        changed: int = cursor.rowcount
        return changed


def missing_components(health: Mapping[str, Any], components: Iterable[str]) -> list[str]:
    """Name the components that Airflow's health document does not call healthy, with the status it gives them."""
    missing = []
    for name in components:
        entry = health.get(name)
        status = entry.get("status") if isinstance(entry, Mapping) else None
        if status != "healthy":
            missing.append(f"{name} is {status or 'not reported yet'}")
    return missing


def exit_code_of(status: int) -> int:
    """The exit code that a wait status stands for, negative for a signal.

    `os.waitstatus_to_exitcode` does the same from Python 3.9 on; this package also runs on 3.8.
    """
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def exit_cause(exit_code: int) -> str:
    """Say how a process ended."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-exit_code).name}"
    return f"signal {-exit_code}"


def descendants(root: int, parents: Mapping[int, int]) -> list[int]:
    """List the processes below `root`, parents before their children, from a map of process id to parent's id."""
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    found: list[int] = []
    level = [root]
    while level:
        level = [pid for parent in level for pid in sorted(children.get(parent, []))]
        found += level
    return found


def read_parents(proc: Path = Path("/proc")) -> dict[int, int]:
    """Map every process id that is seen here to its parent's, zombies left out (proc(5), `stat`)."""
    parents = {}
    for entry in proc.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # The name in parentheses may hold spaces and parentheses itself.
                state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents[int(entry.name)] = int(parent)
    return parents


def is_dag_processor(pid: int, proc: Path = Path("/proc")) -> bool:
    """Whether a process calls itself what the DAG processor inside of Airflow 1.10's scheduler does.

    It has a child for each file that it parses, as a worker has one for each task.
    """
    try:
        return b"DagFileProcessorManager" in (proc / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False


def prefix_lines(prefix: bytes, pending: bytes, data: bytes) -> tuple[bytes, bytes]:
    """Put a prefix before each whole line of `pending + data`; return those lines, and the beginning of the next one.

    A line longer than 16 KiB is cut, so that what is pending stays small.
    """
    *lines, rest = (pending + data).split(b"\n")
    while len(rest) > _MAX_LINE:
        lines.append(rest[:_MAX_LINE])
        rest = rest[_MAX_LINE:]
    return b"".join(prefix + line + b"\n" for line in lines), rest


class LogPump(threading.Thread):
    """Copies what the children write to one output, line by line, with the name of who wrote it.

    A thread of its own: a slow reader of the container's log holds up the writers, as it would without us, but never
    signals or probes. At most one pipe's content and one unfinished line per child are held in memory.
    """

    def __init__(self, output: int) -> None:
        super().__init__(name="log pump", daemon=True)
        self._output = output
        self._selector = selectors.DefaultSelector()
        self._drain_until: float | None = None

    def open(self, name: str) -> int:
        """Return the descriptor to write to as `name`; the reader sees its end when every copy is closed."""
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        self._selector.register(reader, selectors.EVENT_READ, _Source(f"[{name}] ".encode()))
        return writer

    def drain(self, seconds: float) -> None:
        """Write out what is still in the pipes and end: when all are closed, at the latest after `seconds`."""
        self._drain_until = time.monotonic() + seconds
        self.join(seconds + 1.0)

    def run(self) -> None:
        while self._drain_until is None or (self._selector.get_map() and time.monotonic() < self._drain_until):
            for key, _ in self._selector.select(0.2):
                self._copy(key)
        for key in list(self._selector.get_map().values()):
            self._end(key)

    def _copy(self, key: selectors.SelectorKey) -> None:
        try:
            data = os.read(key.fd, 65536)
        except BlockingIOError:
            return
        if not data:
            self._end(key)
            return
        source: _Source = key.data
        text, source.pending = prefix_lines(source.prefix, source.pending, data)
        self._write(text)

    def _end(self, key: selectors.SelectorKey) -> None:
        source: _Source = key.data
        if source.pending:
            self._write(source.prefix + source.pending + b"\n")
        self._selector.unregister(key.fileobj)
        os.close(key.fd)

    def _write(self, text: bytes) -> None:
        view = memoryview(text)
        with contextlib.suppress(OSError):  # nobody reads any more: the children must go on all the same
            while view:
                view = view[os.write(self._output, view) :]


@dataclass
class _Source:
    prefix: bytes
    pending: bytes = b""


class WebServer:
    """What Airflow's web server on this host says about itself and the others."""

    def __init__(self, port: int, profile: Profile, clock: Callable[[], float] = time.monotonic) -> None:
        self._port = port
        self._profile = profile
        self._clock = clock
        self._lock = threading.Lock()
        self._health: Mapping[str, Any] | None = None
        self._health_at = float("-inf")

    def answers(self, timeout: float) -> bool:
        """Whether `Profile.answer_path` is answered with 200 in `timeout` s."""
        return self._get(self._profile.answer_path, timeout) is not None

    def health(self, good_for: float = HEALTH_AGE_SECONDS) -> Mapping[str, Any] | None:
        """Airflow's health document, asked for at most once a second; None when there is no answer within 3 s.

        It comes with HTTP 200 whatever the state of the components, so it has to be read.

        Args:
            good_for: seconds for which an answer that all is well is not asked for again.
        """
        with self._lock:
            well = self._health is not None and not self.missing(self._health)
            if self._clock() - self._health_at >= (good_for if well else HEALTH_AGE_SECONDS):
                document = self._get(self._profile.health_path, 3.0)
                self._health = document if isinstance(document, dict) else None
                self._health_at = self._clock()
            return self._health

    def missing(self, health: Mapping[str, Any]) -> list[str]:
        """What the health document does not call healthy."""
        return missing_components(health, self._profile.health_components)

    def _get(self, path: str, timeout: float) -> Any | None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=timeout)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return json.loads(response.read()) if response.status == 200 else None
        except (OSError, ValueError, http.client.HTTPException):
            return None
        finally:
            connection.close()


@dataclass(frozen=True)
class Answer:
    """What a probe is told: `ok` becomes 200 or 503, the document its JSON body."""

    ok: bool
    document: dict[str, Any]


class ProbeServer(http.server.ThreadingHTTPServer):
    """Serves `GET /livez`, `GET /readyz` and `GET /content` as JSON."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int, answers: Mapping[str, Callable[[], Answer]]) -> None:
        self.answers = answers
        super().__init__(("", port), _ProbeHandler)


class _ProbeHandler(http.server.BaseHTTPRequestHandler):
    timeout = 5
    server: ProbeServer

    def do_GET(self) -> None:
        answer = self.server.answers.get(self.path.partition("?")[0])
        if answer is None:
            self.send_error(404)
            return
        result = answer()
        body = json.dumps(result.document).encode() + b"\n"
        self.send_response(200 if result.ok else 503)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the kubelet asks every few seconds."""


@dataclass
class Supervisor:
    """Starts, watches and stops the processes; `run` is its life.

    Args:
        settings: paths, ports and times.
        profile: the processes of this series of Airflow.
        parent: forks the others; its last argument will be the descriptor of the socket that it inherits.
        output: descriptor that all log lines go to.
    """

    settings: Settings
    profile: Profile
    parent: Component = PARENT
    output: int = 1

    phase: str = field(default="starting", init=False)
    processes: dict[str, Process] = field(default_factory=dict, init=False)
    _signals: int = field(default=0, init=False)
    _beat: float = field(default_factory=time.monotonic, init=False)
    _web_answered: bool = field(default=False, init=False)
    _parent: Process | None = field(default=None, init=False)
    _link: Link | None = field(default=None, init=False)
    _parent_ready: bool = field(default=False, init=False)
    _parent_wanted: bool = field(default=False, init=False)
    _parent_started: float = field(default=0.0, init=False)
    _parent_deadline: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._started = time.monotonic()
        self._pump = LogPump(self.output)
        self._log_pipe = self._pump.open("supervisor")
        os.set_blocking(self._log_pipe, False)
        self._web = WebServer(self.settings.web_port, self.profile)
        self._store = Store(self.settings.content)
        self._wakeup, self._wakeup_writer = os.pipe()
        os.set_blocking(self._wakeup, False)
        os.set_blocking(self._wakeup_writer, False)

    def run(self) -> int:
        """Run until a signal or until something fails, leave nothing behind, and return the exit code (0 or 1)."""
        self._pump.start()
        exit_code = 0
        lock = probes = None
        try:
            self._adopt_orphans()
            self._catch_signals()
            lock = self._lock()
            answers = {"/livez": self.liveness, "/readyz": self.readiness, "/content": self.content}
            probes = ProbeServer(self.settings.probe_port, answers)
            threading.Thread(target=probes.serve_forever, name="probes", daemon=True).start()
            while True:
                self._live_until_held()
        except StopRequestedError:
            self.log("Stopping: the container is asked to end.")
        except StartError as error:
            exit_code = 1
            self.log(f"Stopping: {error}")
            self._report(str(error))
        except Exception as error:
            # PID 1 must not go without stopping the others; what it was is for the log.
            exit_code = 1
            self.log(f"Stopping: the supervisor itself failed: {error!r}")
            self._report(f"The supervisor itself failed: {error!r}")
        # A signal that arrives from now on means: do not wait.
        self._signals = 0
        self._stop()
        self.log(f"Stopped after {time.monotonic() - self._started:.1f} s.")
        os.close(self._log_pipe)
        self._pump.drain(DRAIN_SECONDS)
        if probes:
            probes.server_close()
        if lock is not None:
            os.close(lock)
        return exit_code

    def _live_until_held(self) -> None:
        """Start Airflow once nobody holds it, and return when it has stopped for somebody who does."""
        self._stay_held()
        try:
            self._start()
            while True:
                self._step(1.0)
        except HoldRequestedError:
            self.log("Stopping: Airflow is to be held.")
        self._stop()
        self.processes.clear()
        self._web_answered = False

    def _stay_held(self) -> None:
        """Wait, with nothing of Airflow running, until nobody asks for that any more."""
        mark = self.settings.shared / "held"
        # One that was left by a life that was killed would promise what is not so.
        mark.unlink(missing_ok=True)
        if not self._is_held():
            return
        self._enter("held")
        mark.touch()
        try:
            while self._is_held():
                self._wait_for_event(0.2)
                if self._signals:
                    raise StopRequestedError
        finally:
            mark.unlink(missing_ok=True)

    def _is_held(self) -> bool:
        """Whether somebody has locked the file `hold`."""
        try:
            descriptor = os.open(self.settings.shared / "hold", os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def _is_hurried(self) -> bool:
        """Whether running tasks are not to be waited for: a second signal, or a hold that says `now`."""
        if self._signals:
            return True
        try:
            return self._is_held() and (self.settings.shared / "hold").read_text(encoding="ascii").strip() == "now"
        except FileNotFoundError:
            return False

    def _lock(self) -> int:
        """Hold the lock that Postgres waits for before it stops; children do not inherit the descriptor."""
        descriptor = os.open(self.settings.shared / "supervisor.lock", os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor

    def log(self, message: str) -> None:
        """Write a line of our own, dropped rather than waited for when nobody reads the log."""
        now = time.time()
        stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"
        with contextlib.suppress(BlockingIOError):
            os.write(self._log_pipe, f"{stamp} {message}\n".encode())

    def liveness(self) -> Answer:
        """Whether a restart would help: the main loop is stuck, or the web server hangs. Postgres plays no part."""
        problem = None
        web = self.processes.get(self.profile.web.name)
        if time.monotonic() - self._beat > STUCK_SECONDS:
            problem = "the supervisor is stuck"
        elif self.phase != "stopping" and self._web_answered and not (web and web.running and self._web.answers(5.0)):
            problem = f"the {self.profile.web.name} does not answer"
        return Answer(problem is None, {"live": problem is None, "phase": self.phase, "problem": problem})

    def readiness(self) -> Answer:
        """Whether Airflow calls all its components healthy, and if not, what is missing."""
        health: Mapping[str, Any] | None = None
        if self.phase != "running":
            missing = [self.phase]
        elif (health := self._web.health(GOOD_HEALTH_AGE_SECONDS)) is None:
            missing = [f"the {self.profile.web.name} does not answer"]
        else:
            missing = self._web.missing(health)
        processes = {
            name: "running" if process.exit_code is None else exit_cause(process.exit_code)
            for name, process in list(self.processes.items())
        }
        document = {
            "ready": not missing,
            "phase": self.phase,
            "missing": missing,
            "components": health or {},
            "processes": processes,
        }
        return Answer(not missing, document)

    def content(self) -> Answer:
        """Which DAG content is live, which one was deployed last and when, and which one the image carries."""
        return Answer(True, {**self._store.state(), "image": self.settings.content_id})

    def _start(self) -> None:
        self._read_secrets()
        if self.settings.fork and self.profile.fork:
            self._start_parent()
        if self.settings.content_id:
            self._enter("preparing the content")
            self._adopt_content()
        self._enter("waiting for postgres")
        if self._wait_for_schema() != "current":
            self._enter("migrating the database")
            self._migrate()
        if self._parent and not self._parent_ready:
            self._enter("importing airflow")
            while self._parent and not self._parent_ready:
                self._step(0.2)
        if not self.profile.resets_interrupted:
            self._reset_interrupted_tasks()
        web = self.profile.web
        self._enter(f"starting {web.name}")
        # What runs no tasks starts beside it: the wait for it is long enough to share a second processor.
        for component in (web, *self.profile.others):
            self._start_process(component)
        deadline = time.monotonic() + WEB_SECONDS
        while not self._web.answers(1.0):
            if time.monotonic() > deadline:
                raise StartError(f"the {web.name} did not answer within {WEB_SECONDS:.0f} s.")
            self._step(0.05)
        self._web_answered = True
        # Only now: the web server makes the roles.
        self._ensure_users()
        self._start_process(self.profile.scheduler)
        self._enter("running")

    def _enter(self, phase: str) -> None:
        self.phase = phase
        self.log(f"{phase[0].upper()}{phase[1:]} ({time.monotonic() - self._started:.1f} s after the start).")

    def _ensure_users(self) -> None:
        """Have the users of the Secret in the database, where Airflow's login looks there."""
        if self.profile.login != "fab":
            return
        connection = connect(self._database_url())
        try:
            for name in ensure_users(connection, json.loads(self._passwords())):
                self.log(f"The user {name} has the password of the Secret.")
        finally:
            connection.close()

    def _reset_interrupted_tasks(self) -> None:
        """Have tasks start over that were running when Airflow was killed."""
        connection = connect(self._database_url())
        try:
            if tasks := reset_interrupted_tasks(connection):
                self.log(f"{tasks} tasks that were interrupted start over.")
        finally:
            connection.close()

    def _read_secrets(self) -> None:
        """Put what Airflow's processes inherit of the mounted Secret in its place."""
        for variable, key in self.profile.secret_files.items():
            os.environ[variable] = self._secret(key, variable).decode().strip()
        if self.profile.login == "simple":
            self._copy_passwords(self._passwords())

    def _passwords(self) -> bytes:
        return self._secret("simple-auth-passwords.json", "the login of Airflow")

    def _database_url(self) -> str:
        return libpq_url(self._secret("sql-alchemy-conn", "the address of the database").decode())

    def _secret(self, key: str, what: str) -> bytes:
        try:
            return (self.settings.secrets / key).read_bytes()
        except OSError as error:
            raise StartError(f"{what} cannot be read from the Secret: {error}.") from None

    def _copy_passwords(self, content: bytes) -> None:
        """Write the password file, which Airflow opens for writing: the Secret is read-only."""
        target = self.settings.airflow_home / "simple-auth-passwords.json"
        # A file of an earlier start keeps its mode when it is opened again, so it goes first.
        target.unlink(missing_ok=True)
        target.touch(mode=0o600, exist_ok=False)
        target.write_bytes(content)
        os.environ["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE"] = str(target)

    def _adopt_content(self) -> None:
        """Make the image's DAG content live, unless the volume holds what was deployed or synced since."""
        failures: list[ContentError] = []

        def adopt() -> None:
            try:
                store, settings = self._store, self.settings
                if store.adopt(settings.image_content, settings.content_id, settings.deployed_at):
                    self.log(f"The DAG content of the image is live: {settings.content_id[:12]}.")
                else:
                    self.log(f"The DAG content of the volume stays live: {store.live_version()}.")
            except ContentError as error:
                failures.append(error)

        # A thread of its own: a copy of much content must hold up neither signals nor probes.
        thread = threading.Thread(target=adopt, name="content", daemon=True)
        thread.start()
        while thread.is_alive():
            self._step(0.01)
        if failures:
            raise StartError(f"the DAG content cannot be prepared: {failures[0]}")

    def _wait_for_schema(self) -> SchemaState:
        known = SchemaRevisions.read(self.settings.schema)
        recorded = self._wait_for_postgres()
        state = classify_schema(recorded, known)
        if state == "unknown":
            raise StartError(
                f"the database is at schema revision {', '.join(sorted(recorded))}, which Airflow {known.airflow} in "
                "this image does not know: a newer Airflow has used this database. Nothing was changed. Deploy the "
                "newer Airflow again, or restore a backup made before the upgrade."
            )
        self.log(f"The schema of the database is {state}.")
        return "behind" if state == "current" and self.settings.external_database_managers else state

    def _wait_for_postgres(self) -> frozenset[str]:
        url = self._database_url()
        begin = time.monotonic()
        refused_since: float | None = None
        told, told_at = "", begin
        while True:
            try:
                connection = connect(url)
                try:
                    return read_schema(connection)
                finally:
                    connection.close()
            except LoginRefusedError as error:
                cause = str(error)
                refused_since = refused_since or time.monotonic()
                if time.monotonic() - refused_since > LOGIN_REFUSED_SECONDS:
                    raise StartError(
                        f"Postgres refuses the login: {cause}. The volume and the Secret do not belong together."
                    ) from None
            except ConnectionError as error:
                cause = str(error)
                refused_since = None
            now = time.monotonic()
            if now - begin > POSTGRES_SECONDS:
                raise StartError(f"Postgres did not answer within {POSTGRES_SECONDS:.0f} s: {cause}.")
            if cause != told or now - told_at > 15.0:
                self.log(f"Postgres is not there yet: {cause}")
                told, told_at = cause, now
            self._step(0.1)

    def _migrate(self) -> None:
        migration = self.profile.migration
        process = self._start_process(migration)
        deadline = time.monotonic() + MIGRATION_SECONDS
        while process.running:
            if time.monotonic() > deadline:
                raise StartError(f"`{' '.join(migration.argv)}` did not end within {MIGRATION_SECONDS:.0f} s.")
            self._step(1.0)
        if process.exit_code:
            raise StartError(f"`{' '.join(migration.argv)}` failed with {exit_cause(process.exit_code)}; see the log.")
        del self.processes[migration.name]

    def _step(self, seconds: float) -> None:
        """Wait for the next event, at most `seconds`, and act on it.

        Raises:
            StopRequestedError: a signal asks us to stop.
            HoldRequestedError: somebody holds Airflow.
            StartError: one of the processes that must run has ended.
        """
        self._wait_for_event(seconds)
        if self._signals:
            raise StopRequestedError
        # What is half done now would have to be done again: a migration, a copy of the DAG content.
        if self.phase not in ("migrating the database", "preparing the content") and self._is_held():
            raise HoldRequestedError
        for process in self.processes.values():
            if process.exit_code is not None and process.component is not self.profile.migration:
                reason = " Postgres does not answer." if self._postgres_is_away() else ""
                raise StartError(f"{process.component.name} ended with {exit_cause(process.exit_code)}.{reason}")

    def _wait_for_event(self, seconds: float) -> None:
        self._beat = time.monotonic()
        select.select([self._wakeup, *([self._link.fileno()] if self._link else [])], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wakeup, 4096)
        ended = self._reap()
        # Only now, because whatever has ended had said before that it was there.
        self._hear_parent()
        for process in (*self.processes.values(), *([self._parent] if self._parent else [])):
            if process.pid in ended:
                process.exit_code = ended[process.pid]
        self._watch_parent()
        self._beat = time.monotonic()

    def _reap(self) -> dict[int, int]:
        """Collect every child that ended, orphans that were handed to us included: exit codes by process id."""
        ended = {}
        with contextlib.suppress(ChildProcessError):
            while (result := os.waitpid(-1, os.WNOHANG))[0]:
                ended[result[0]] = exit_code_of(result[1])
        return ended

    def _start_parent(self) -> None:
        self._parent_started = time.monotonic()
        self._parent_deadline = self._parent_started + PARENT_SECONDS
        self._parent_ready = False
        self._link = Link()
        with self._link.parents_end() as descriptor:
            self._parent = Process(self.parent, self._spawn(self.parent, descriptor))

    def _hear_parent(self) -> None:
        """Take in what the parent says."""
        if not self._link or not self._parent:
            return
        messages = self._link.receive()
        for message in messages or ():
            process = self.processes.get(message.get("component", ""))
            event = message["event"]
            if event == "started" and process:
                process.pid = message["pid"]
            elif event == "failed" and process:
                self.log(f"The parent cannot fork {process.component.name}: {message['cause']}.")
                process.pid = self._spawn(process.component)
            elif event == "ready":
                self._parent_ready = self._parent_wanted = True
                self.log(f"The parent has imported Airflow in {message['seconds']:.1f} s.")
            elif event == "unsafe":
                self._parent_wanted = False
                self.log(f"Airflow's processes are not forked: {message['cause']}.")
        if self._parent_ready and all(process.pid is not None for process in self.processes.values()):
            self._parent_deadline = None
        late = self._parent_deadline is not None and time.monotonic() > self._parent_deadline
        if late:
            self.log(f"Killing the parent, which did nothing for {PARENT_SECONDS:.0f} s.")
        if late or messages is None:
            self._parent_deadline = None
            self._parent.signal(signal.SIGKILL)
        if messages is None:
            self._link.close()
            self._link = None

    def _watch_parent(self) -> None:
        """Do without a parent that has died, and start another one in time, for the checks of staged DAG files."""
        # What it was forking when it died holds the socket until it has said that it is there: nothing starts twice.
        if self._parent and self._parent.exit_code is not None and not self._link:
            cause = exit_cause(self._parent.exit_code)
            self._parent = None
            # Where nobody listens, whoever wants a check had better not connect.
            self.settings.check_socket.unlink(missing_ok=True)
            if self.phase == "stopping":
                return
            self.log(f"The parent ended with {cause}.")
            for process in self.processes.values():
                if process.pid is None:
                    process.pid = self._spawn(process.component)
        elif (
            not self._parent
            and self._parent_wanted
            and self.phase == "running"
            and time.monotonic() - self._parent_started > PARENT_PAUSE_SECONDS
        ):
            self._start_parent()

    def _end_parent(self) -> None:
        """End the parent, which has nothing to lose; what it was still asked to start has never begun."""
        if self._parent:
            self._parent.signal(signal.SIGKILL)
            self._wait_until(lambda: self._parent is None, SWEEP_SECONDS)
        for name in [name for name, process in self.processes.items() if process.pid is None]:
            del self.processes[name]

    def _start_process(self, component: Component) -> Process:
        """Start a component: forked where there is a parent, else spawned."""
        self.processes[component.name] = process = Process(component)
        if self._link:
            writer = self._pump.open(component.name)
            try:
                self._link.start(component.name, component.entry, component.argv, writer)
                self._parent_deadline = time.monotonic() + PARENT_SECONDS
                return process
            except OSError:
                pass  # it has just died, which will be noticed
            finally:
                os.close(writer)
        process.pid = self._spawn(component)
        return process

    def _spawn(self, component: Component, inherited: int | None = None) -> int:
        """Start a component as a program of its own; return its process id.

        Args:
            inherited: a descriptor that it gets as its third one, whose number becomes the last argument.
        """
        writer = self._pump.open(component.name)
        argv = component.argv if inherited is None else (*component.argv, "3")
        try:
            return os.posix_spawnp(
                argv[0],
                argv,
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, writer, 1),
                    (os.POSIX_SPAWN_DUP2, writer, 2),
                    *([] if inherited is None else [(os.POSIX_SPAWN_DUP2, inherited, 3)]),
                ],
                # A session of its own: no signal meant for it reaches the others.
                setsid=True,
                # Python ignores it, and what is ignored stays ignored in a child.
                setsigdef=[signal.SIGPIPE],
            )
        except OSError as error:
            raise StartError(f"{component.name} cannot be started: {error}.") from None
        finally:
            os.close(writer)

    def _stop(self) -> None:
        self._enter("stopping")
        self._end_parent()
        scheduler = self.processes.get(self.profile.scheduler.name)
        if scheduler and scheduler.running:
            if self.profile.scheduler_waits:
                scheduler.ask_to_end()
            else:
                # Its workers go on with what they have, and it gives them nothing new.
                scheduler.signal(signal.SIGSTOP)
        else:
            # The workers of a scheduler that died would go on, deaf to SIGTERM.
            self._kill_strays()
        web = self.processes.get(self.profile.web.name)
        others = [process for process in self.processes.values() if process not in (scheduler, web)]
        begin = time.monotonic()
        for process in others:
            process.ask_to_end()
        if scheduler and self._await_scheduler(
            scheduler, self.settings.stop_seconds if self._tasks_can_finish() else 0.0
        ):
            # Whoever watches the running tasks is to see that the last one has ended, and was not cut off.
            self._wait_until(lambda: self._signals > 0, SEEN_SECONDS)
        for process in others:
            self._await(process, begin)
        if web:
            begin = time.monotonic()
            web.ask_to_end()
            self._await(web, begin)
        self._kill_strays()
        self._wait_for_event(0.0)  # what was killed last is collected too

    def _tasks_can_finish(self) -> bool:
        """Whether it makes sense to wait for running tasks: they need the web server, and that needs Postgres."""
        web = self.processes.get(self.profile.web.name)
        if not web or not web.running:
            return False
        return not self._postgres_is_away()

    def _postgres_is_away(self) -> bool:
        """Whether the web server says that it cannot reach the database."""
        health = self._web.health()
        return health is not None and any(line.startswith("metadatabase ") for line in self._web.missing(health))

    def _await_scheduler(self, scheduler: Process, seconds: float) -> bool:
        """Let running tasks finish for `seconds`, then end them in a way that lets them start over.

        Returns whether there were any, and all have ended by themselves.

        A task that is killed together with its worker reports nothing, so that the next scheduler runs it again even
        where it has no retries; one that is asked to end would be a failed one. The scheduler itself still ends its job
        cleanly, which is how the next one knows at once that these tasks have no owner.
        """
        begin = time.monotonic()
        last_task = begin
        told = False
        while scheduler.running and (now := time.monotonic()) < begin + seconds and not self._is_hurried():
            if self._runs_tasks(scheduler):
                last_task = now
                if not told and now - begin > 1.0:
                    self.log(f"Waiting up to {seconds:.0f} s for running tasks; a second signal ends them now.")
                    told = True
            elif now - last_task > QUIET_SECONDS:
                break
            self._wait_for_event(0.2)
        runs_tasks = scheduler.running and self._runs_tasks(scheduler)
        if runs_tasks:
            self.log("Ending the running tasks; they start over at the next start.")
        if runs_tasks or not self.profile.scheduler_waits:
            for pid in self._below(scheduler, read_parents()):
                _kill(pid)
        if self.profile.scheduler_waits:
            self._wait_until(lambda: not scheduler.running, QUIET_SECONDS)
        else:
            scheduler.signal(signal.SIGCONT)
        # Once more: Python drops what a signal raises while it forks, and a scheduler that starts forks its workers.
        scheduler.ask_to_end()
        self._wait_until(lambda: not scheduler.running, RELEASE_SECONDS)
        if scheduler.running:
            self.log("Killing scheduler, which did not end.")
            scheduler.signal(signal.SIGKILL)
            self._wait_until(lambda: not scheduler.running, SWEEP_SECONDS)
        return last_task > begin and not runs_tasks

    def _runs_tasks(self, scheduler: Process) -> bool:
        """Whether a worker of the scheduler has a child: LocalExecutor's workers start one for each task."""
        parents = read_parents()
        children = {pid for pid, parent in parents.items() if parent == scheduler.pid}
        return any(parent in children and not is_dag_processor(parent) for parent in parents.values())

    def _await(self, process: Process, begin: float) -> None:
        component = process.component
        self._wait_until(lambda: not process.running, begin + component.kill_seconds - time.monotonic())
        if process.running:
            self.log(f"Killing {component.name} {component.kill_seconds:.0f} s after it was asked to end.")
            process.signal(signal.SIGKILL)
            self._wait_until(lambda: not process.running, SWEEP_SECONDS)

    def _wait_until(self, done: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done() and (left := deadline - time.monotonic()) > 0:
            self._wait_for_event(min(left, 0.2))

    def _kill_strays(self) -> None:
        """Kill whatever lives below us and belongs to no process that still runs, and wait until it is gone."""
        deadline = time.monotonic() + SWEEP_SECONDS
        while strays := self._strays():
            if time.monotonic() > deadline:
                self.log(f"Leaving processes that cannot be killed: {strays}")
                return
            for pid in strays:
                _kill(pid)
            self._wait_for_event(0.05)

    def _strays(self) -> list[int]:
        parents = read_parents()
        owned: set[int | None] = set()
        for process in (*self.processes.values(), *([self._parent] if self._parent else [])):
            if process.running:
                owned.update((process.pid, *self._below(process, parents)))
        return [pid for pid in descendants(os.getpid(), parents) if pid not in owned]

    @staticmethod
    def _below(process: Process, parents: Mapping[int, int]) -> list[int]:
        return [] if process.pid is None else descendants(process.pid, parents)

    def _adopt_orphans(self) -> None:
        """Have orphans handed to us also where we are not PID 1 (a runtime's own init, a shared process namespace)."""
        if os.getpid() != 1:
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def _catch_signals(self) -> None:
        def stop(number: int, frame: object) -> None:
            self._signals += 1

        signal.set_wakeup_fd(self._wakeup_writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        # A handler is what makes it write to the wake-up descriptor; `_reap` does the work.
        signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def _report(self, cause: str) -> None:
        """Leave the cause where the kubelet puts it into the container's status."""
        with contextlib.suppress(OSError):
            self.settings.termination_log.write_text(f"{cause[0].upper()}{cause[1:]}\n", encoding="utf-8")


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def main() -> int:
    """Run the supervisor with the settings of the environment; return the exit code."""
    try:
        settings = Settings.from_environment(os.environ)
    except StartError as error:
        print(f"[supervisor] {error}", flush=True)
        return 1
    return Supervisor(settings, Profile.read()).run()


if __name__ == "__main__":
    sys.exit(main())
