"""The supervisor's decisions with plain values, and its life with small programs in the place of Airflow's."""

from __future__ import annotations

import fcntl
import http.client
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from airflow_deployer_pod import content_store

from airflow_deployer import hold
from airflow_deployer.airflow_profiles import AIRFLOW_3
from tests.unit.base_image.conftest import POD_PACKAGE, read_profile

HEALTHY = {
    "metadatabase": {"status": "healthy"},
    "scheduler": {"status": "healthy", "latest_scheduler_heartbeat": "2026-11-23T09:27:06+00:00"},
    "triggerer": {"status": "healthy", "latest_triggerer_heartbeat": "2026-11-23T09:27:06+00:00"},
    "dag_processor": {"status": "healthy", "latest_dag_processor_heartbeat": "2026-11-23T09:27:06+00:00"},
}


@pytest.mark.parametrize(
    ("recorded", "state"),
    [
        ([], "fresh"),
        (["c"], "current"),
        (["a"], "behind"),
        (["zzz"], "unknown"),
        (["c", "zzz"], "unknown"),
    ],
)
def test_the_schema_is_compared_with_what_the_image_knows(supervisor: Any, recorded: list[str], state: str) -> None:
    known = supervisor.SchemaRevisions("3.3.2", frozenset({"c"}), frozenset({"a", "b", "c"}))
    assert supervisor.classify_schema(recorded, known) == state


def test_the_revisions_are_read_from_the_file_of_the_build(supervisor: Any, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps({"airflow": "3.3.2", "heads": ["b"], "revisions": ["a", "b"]}))
    assert supervisor.SchemaRevisions.read(file) == supervisor.SchemaRevisions(
        "3.3.2", frozenset({"b"}), frozenset({"a", "b"})
    )


def test_every_unhealthy_component_is_named(supervisor: Any) -> None:
    assert supervisor.missing_components(HEALTHY, HEALTHY) == []
    # As Airflow 3.3 reports it shortly after a start, and while the database is away.
    health = HEALTHY | {"triggerer": {"status": None}, "scheduler": {"status": "unhealthy"}, "dag_processor": None}
    assert supervisor.missing_components(health, HEALTHY) == [
        "scheduler is unhealthy",
        "triggerer is not reported yet",
        "dag_processor is not reported yet",
    ]
    # Airflow 1.10 has but two.
    assert supervisor.missing_components(health, ("metadatabase", "scheduler")) == ["scheduler is unhealthy"]


@pytest.mark.parametrize(
    ("exit_code", "cause"), [(0, "exit code 0"), (3, "exit code 3"), (-9, "signal SIGKILL"), (-64, "signal SIGRTMAX")]
)
def test_an_exit_is_told_in_words(supervisor: Any, exit_code: int, cause: str) -> None:
    assert supervisor.exit_cause(exit_code) == cause


def test_descendants_come_parents_first(supervisor: Any) -> None:
    parents = {1: 0, 10: 1, 20: 10, 21: 10, 30: 21, 99: 2}
    assert supervisor.descendants(10, parents) == [20, 21, 30]
    assert supervisor.descendants(30, parents) == []


def test_parents_are_read_past_strange_names_and_without_zombies(supervisor: Any, tmp_path: Path) -> None:
    for pid, stat in {
        "7": "7 (a b) (c)) S 3 7 7 0",
        "8": "8 (gone) Z 3 8 8 0",
        "self": "irrelevant",
    }.items():
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "stat").write_text(stat)
    (tmp_path / "9").mkdir()
    assert supervisor.read_parents(tmp_path) == {7: 3}


def test_a_dag_processor_inside_of_a_scheduler_is_no_worker(supervisor: Any, tmp_path: Path) -> None:
    for pid, command in {"7": b"airflow scheduler -- DagFileProcessorManager\0", "8": b"airflow\0scheduler\0"}.items():
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "cmdline").write_bytes(command)
    assert [supervisor.is_dag_processor(pid, tmp_path) for pid in (7, 8, 9)] == [True, False, False]


@pytest.mark.parametrize(
    ("pending", "data", "text", "rest"),
    [
        (b"", b"one\ntwo\n", b"[x] one\n[x] two\n", b""),
        (b"on", b"e\ntw", b"[x] one\n", b"tw"),
        (b"", b"\n", b"[x] \n", b""),
        (b"", b"a" * 40000, b"[x] " + b"a" * 16384 + b"\n" + b"[x] " + b"a" * 16384 + b"\n", b"a" * 7232),
    ],
)
def test_lines_get_a_prefix(supervisor: Any, pending: bytes, data: bytes, text: bytes, rest: bytes) -> None:
    assert supervisor.prefix_lines(b"[x] ", pending, data) == (text, rest)


def test_the_log_pump_loses_nothing_and_ends_with_the_last_writer(supervisor: Any) -> None:
    reader, writer = os.pipe()
    pump = supervisor.LogPump(writer)
    first, second = pump.open("first"), pump.open("second")
    received: list[bytes] = []

    def collect() -> None:
        while data := os.read(reader, 65536):
            received.append(data)

    collector = threading.Thread(target=collect)
    collector.start()
    pump.start()
    # More than the pipes hold, so that the pump has to keep up with a writer that is held up meanwhile.
    for number in range(20000):
        os.write(first, f"line {number}\n".encode())
    os.write(second, b"no line end")
    os.close(first)
    os.close(second)
    pump.drain(5.0)
    os.close(writer)
    collector.join()
    os.close(reader)
    lines = b"".join(received).decode().splitlines()
    assert [line for line in lines if line.startswith("[first]")] == [f"[first] line {n}" for n in range(20000)]
    assert lines.count("[second] no line end") == 1
    assert len(lines) == 20001


def test_settings_come_from_the_environment(supervisor: Any) -> None:
    assert supervisor.Settings.from_environment({}) == supervisor.Settings()
    settings = supervisor.Settings.from_environment(
        {
            "AIRFLOW_HOME": "/somewhere",
            "AIRFLOW_DEPLOYER_STOP_SECONDS": "12.5",
            "AIRFLOW__DATABASE__EXTERNAL_DB_MANAGERS": "some.Manager",
        }
    )
    assert (settings.airflow_home, settings.stop_seconds) == (Path("/somewhere"), 12.5)
    assert settings.external_database_managers
    with pytest.raises(supervisor.StartError, match="AIRFLOW_DEPLOYER_STOP_SECONDS is 'soon'"):
        supervisor.Settings.from_environment({"AIRFLOW_DEPLOYER_STOP_SECONDS": "soon"})


@pytest.fixture
def health_server() -> Iterator[tuple[int, list[str]]]:
    """A server that answers every path with the health document; yields its port and the paths it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(HEALTHY).encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1], asked
        server.shutdown()
        thread.join()


def test_health_is_asked_once_a_second(supervisor: Any, health_server: tuple[int, list[str]], tmp_path: Path) -> None:
    port, asked = health_server
    now = 100.0
    api = supervisor.WebServer(port, read_profile(AIRFLOW_3, tmp_path), clock=lambda: now)
    assert [api.health() for _ in range(5)] == [HEALTHY] * 5
    assert asked == ["/api/v2/monitor/health"]
    now = 101.0
    assert api.health() == HEALTHY
    assert len(asked) == 2
    # The kubelet asks every second too, and is content with an older answer as long as all is well.
    now = 105.0
    assert api.health(5.0) == HEALTHY
    assert len(asked) == 2
    now = 106.0
    assert api.health(5.0) == HEALTHY
    assert len(asked) == 3


def test_a_closed_port_is_no_health(supervisor: Any, tmp_path: Path) -> None:
    web = supervisor.WebServer(1, read_profile(AIRFLOW_3, tmp_path))
    assert web.health() is None
    assert not web.answers(1.0)


DRIVER = """
import json, sys
from pathlib import Path
sys.dont_write_bytecode = True
from airflow_deployer_pod import supervisor as module
from airflow_deployer_pod.profile import Component, Profile
module.QUIET_SECONDS = 0.5
module.PARENT_PAUSE_SECONDS = 0.5
module.PARENT_SECONDS = 2.0
folder, ports, programs = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])

class WithoutPostgres(module.Supervisor):
    def _wait_for_schema(self):
        return programs.get("schema", "current")

def component(name, **more):
    return Component(name, (sys.executable, "-S", "-c", programs[name]), entry="stand_in:main", **more)

settings = module.Settings(
    secrets=folder / "secrets", shared=folder / "shared", airflow_home=folder / "home",
    content=folder / "content", image_content=folder / "image", content_id=programs.get("content-id", ""),
    termination_log=folder / "termination-log", web_port=ports[0], probe_port=ports[1],
    stop_seconds=programs.get("stop-seconds", 5.0), fork=programs["fork"], check_socket=folder / "check.sock",
)
profile = Profile(
    web=component("api-server"), scheduler=component("scheduler"), others=(component("triggerer", stop_children=True),),
    migration=component("migration"), answer_path="/api/v2/version", health_path="/api/v2/monitor/health",
    health_components=("metadatabase", "scheduler", "dag_processor", "triggerer"),
    scheduler_waits=programs.get("scheduler-waits", True),
)
sys.exit(WithoutPostgres(settings, profile, component("parent")).run())
"""

# The parent with a module in the place of Airflow; what it forks runs the program that is its last argument.
STAND_IN = """
import sys
def main():
    exec(sys.argv[-1], {"__name__": "__main__"})
def answer(connection):
    connection.sendall(b"checked " + connection.recv(100))
"""
PARENT = """
import socket, sys
from pathlib import Path
from airflow_deployer_pod.parent import Parent
Parent(socket.socket(fileno=int(sys.argv[-1])), Path(CHECK_SOCKET), ["stand_in"], ["json"], "stand_in:answer").run()
"""

# Each program writes down when it starts and ends, so that the order can be seen in the log.
ENDS_ON_SIGTERM = """
import signal, sys, time
def end(number, frame):
    print('ending', flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print('started', flush=True)
while True:
    time.sleep(60)
"""
API = """
import http.server, json, signal, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(HEALTH if 'health' in self.path else {'version': '3'}).encode())
    def log_message(self, *args):
        pass
def end(number, frame):
    print('ending', flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
time.sleep(0.3)
server = http.server.HTTPServer(('127.0.0.1', PORT), Handler)
print('answering', flush=True)
server.serve_forever()
"""
# A worker that does not hear SIGTERM, as a LocalExecutor's, with a task in a session of its own, as a BashOperator's.
WITH_WORKER = """
import os, signal, subprocess, sys, time
def end(number, frame):
    print('waiting for tasks', flush=True)
    worker.wait()
    print('ending', flush=True)
    sys.exit(0)
worker = subprocess.Popen([sys.executable, '-S', '-c', '''
import signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
task = subprocess.Popen(["sleep", "61"], start_new_session=True)
print("worker", task.pid, flush=True)
time.sleep(60)
'''])
signal.signal(signal.SIGTERM, end)
while True:
    time.sleep(60)
"""


class Life:
    """A running supervisor, what it wrote, and the folder it works in."""

    def __init__(self, folder: Path, ports: list[int], programs: dict[str, Any]) -> None:
        self.folder = folder
        self.probe_port = ports[1]
        for name in ("secrets", "shared", "home"):
            (folder / name).mkdir(exist_ok=True)
        if programs.get("password-file", True):
            (folder / "secrets" / "simple-auth-passwords.json").write_text('{"admin": "pw"}')
        (folder / "stand_in.py").write_text(STAND_IN)
        self.check_socket = folder / "check.sock"
        self.log = folder / "log"
        defaults = {
            "api-server": API.replace("PORT", str(ports[0])).replace("HEALTH", repr(HEALTHY)),
            "scheduler": ENDS_ON_SIGTERM,
            "triggerer": ENDS_ON_SIGTERM,
            "migration": "print('migrated')",
            "parent": PARENT.replace("CHECK_SOCKET", repr(str(self.check_socket))),
        }
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", DRIVER, str(folder), json.dumps(ports), json.dumps(defaults | programs)],
                stdout=output,
                stderr=output,
                env=os.environ | {"PYTHONPATH": f"{POD_PACKAGE.parent}:{folder}"},
            )

    @property
    def lines(self) -> list[str]:
        """The log so far, the times of the supervisor's own lines cut off."""
        return [
            line if not line.startswith("[supervisor] 2") else f"[supervisor] {line.split(' ', 2)[2]}"
            for line in self.log.read_text().splitlines()
        ]

    def wait_for(self, text: str) -> str:
        """Return the first line with this text, once there is one."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for line in self.lines:
                if text in line:
                    return line
            time.sleep(0.02)
        raise AssertionError(f"{text!r} did not come:\n" + "\n".join(self.lines))

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        """Ask a probe; return the status and the document."""
        connection = http.client.HTTPConnection("127.0.0.1", self.probe_port, timeout=5)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def end(self) -> int:
        """Wait for the end; return the exit code."""
        return self.process.wait(timeout=20)


Start = Callable[..., Life]


@pytest.fixture(params=[True, False], ids=["forked", "spawned"])
def start(request: pytest.FixtureRequest, tmp_path: Path, unused_ports: list[int]) -> Iterator[Start]:
    """Start a supervisor with programs of one's own in the place of Airflow's."""
    lives = []

    def begin(**programs: Any) -> Life:
        programs["fork"] = request.param
        life = Life(tmp_path, unused_ports, {name.replace("_", "-"): text for name, text in programs.items()})
        lives.append(life)
        return life

    yield begin
    for life in lives:
        if life.process.poll() is None:
            life.process.terminate()
            life.process.wait(timeout=20)


@pytest.fixture
def unused_ports() -> list[int]:
    """Two ports of this host that nobody listens on."""
    servers = [http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) for _ in range(2)]
    ports = [int(server.server_address[1]) for server in servers]
    for server in servers:
        server.server_close()
    return ports


def is_locked(file: Path) -> bool:
    """Whether somebody holds the lock, as the `flock` of Postgres' preStop would find."""
    with file.open() as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def positions(lines: list[str], *texts: str) -> list[int]:
    """Where each text first stands."""
    return [next(index for index, line in enumerate(lines) if text in line) for text in texts]


def test_starts_api_first_and_stops_scheduler_first(start: Start, tmp_path: Path) -> None:
    life = start(schema="behind")
    life.wait_for("Starting api-server")
    status, document = life.get("/readyz")
    assert (status, document["phase"], document["missing"]) == (503, "starting api-server", ["starting api-server"])
    assert life.get("/livez")[0] == 200
    life.wait_for("[scheduler] started")
    life.wait_for("[triggerer] started")
    status, document = life.get("/readyz")
    assert (status, document["ready"], document["missing"]) == (200, True, [])
    assert document["processes"] == dict.fromkeys(("api-server", "scheduler", "triggerer"), "running")
    assert life.get("/livez") == (200, {"live": True, "phase": "running", "problem": None})
    password_file = tmp_path / "home" / "simple-auth-passwords.json"
    assert (password_file.read_text(), password_file.stat().st_mode & 0o777) == ('{"admin": "pw"}', 0o600)
    assert is_locked(tmp_path / "shared" / "supervisor.lock")
    life.process.send_signal(signal.SIGTERM)
    assert life.end() == 0
    assert not is_locked(tmp_path / "shared" / "supervisor.lock")
    order = positions(life.lines, "migrated", "[api-server] answering", "[scheduler] started", "[scheduler] ending")
    assert order == sorted(order)
    order = positions(life.lines, "[scheduler] ending", "[api-server] ending", "Stopped after")
    assert order == sorted(order)


def test_a_process_that_dies_ends_the_others(start: Start, tmp_path: Path) -> None:
    life = start(triggerer="import sys; print('oh dear', file=sys.stderr); sys.exit(3)")
    assert life.end() == 1
    assert (tmp_path / "termination-log").read_text() == "Triggerer ended with exit code 3.\n"
    order = positions(life.lines, "[triggerer] oh dear", "Stopping: triggerer ended with exit code 3.", "Stopped after")
    assert order == sorted(order)
    assert not is_locked(tmp_path / "shared" / "supervisor.lock")


def test_a_failed_migration_is_fatal(start: Start, tmp_path: Path) -> None:
    life = start(schema="fresh", migration="import sys; sys.exit('no')")
    assert life.end() == 1
    assert "failed with exit code 1" in (tmp_path / "termination-log").read_text()
    assert "[migration] no" in life.lines
    assert not any("[api-server]" in line for line in life.lines)


def test_a_missing_secret_is_fatal(start: Start, tmp_path: Path) -> None:
    life = start(password_file=False)
    assert life.end() == 1
    assert (tmp_path / "termination-log").read_text().startswith("The login of Airflow cannot be read from the Secret")


def parent_of(pid: int) -> int:
    """The process id of its parent."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def task_of(life: Life) -> int:
    """The process id of the task that `WITH_WORKER` started."""
    return int(life.wait_for("[scheduler] worker").rpartition(" ")[2])


def test_tasks_are_waited_for_then_killed_and_the_scheduler_ends_by_itself(start: Start) -> None:
    life = start(scheduler=WITH_WORKER, stop_seconds=1.0)
    task = task_of(life)
    begin = time.monotonic()
    life.process.send_signal(signal.SIGTERM)
    assert life.end() == 0
    assert time.monotonic() - begin > 1.0
    order = positions(
        life.lines, "[scheduler] waiting", "Ending the running tasks", "[scheduler] ending", "[api-server] ending"
    )
    assert order == sorted(order)
    assert not Path(f"/proc/{task}").exists()


def test_a_second_signal_waits_no_longer(start: Start) -> None:
    life = start(scheduler=WITH_WORKER, stop_seconds=60.0)
    task_of(life)
    life.process.send_signal(signal.SIGTERM)
    life.wait_for("[scheduler] waiting for tasks")
    life.process.send_signal(signal.SIGINT)
    assert life.end() == 0
    assert any("Ending the running tasks" in line for line in life.lines)


def test_a_scheduler_that_missed_its_signal_is_asked_once_more(start: Start) -> None:
    # Airflow's does so when it is asked while it forks its workers.
    misses = """
import signal, sys, time
asked = 0
def end(number, frame):
    global asked
    asked += 1
    print('asked', asked, flush=True)
    if asked == 2:
        sys.exit(0)
signal.signal(signal.SIGTERM, end)
print('started', flush=True)
while True:
    time.sleep(60)
"""
    life = start(scheduler=misses, stop_seconds=60.0)
    life.wait_for("[scheduler] started")
    life.process.send_signal(signal.SIGTERM)
    assert life.end() == 0
    assert "[scheduler] asked 2" in life.lines


def test_the_workers_of_a_killed_scheduler_do_not_survive_it(start: Start) -> None:
    life = start(scheduler=WITH_WORKER)
    task = task_of(life)
    worker = parent_of(task)
    scheduler = parent_of(worker)
    assert parent_of(scheduler) == life.process.pid
    os.kill(scheduler, signal.SIGKILL)
    assert life.end() == 1
    assert any("scheduler ended with signal SIGKILL" in line for line in life.lines)
    assert not Path(f"/proc/{task}").exists()


# One that ends at once when it is asked to, as Airflow 1.10's. Its worker tells what it does.
ENDS_AT_ONCE = """
import signal, subprocess, sys, time
def end(number, frame):
    print('ending', flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
subprocess.Popen([sys.executable, '-S', '-c', '''
import subprocess, time
subprocess.run(["sh", "-c", "echo task begins; sleep SECONDS; echo task done"])
time.sleep(60)
'''])
while True:
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("seconds", "stop_seconds", "texts"),
    [
        ("1.5", 30.0, ("task begins", "Stopping (", "task done", "[scheduler] ending", "[api-server] ending")),
        ("61", 1.0, ("task begins", "Ending the running tasks", "[scheduler] ending", "[api-server] ending")),
    ],
    ids=["in time", "too long"],
)
def test_a_scheduler_that_does_not_wait_is_held_up_while_tasks_run(
    start: Start, seconds: str, stop_seconds: float, texts: tuple[str, ...]
) -> None:
    scheduler = ENDS_AT_ONCE.replace("SECONDS", seconds)
    life = start(scheduler=scheduler, scheduler_waits=False, stop_seconds=stop_seconds)
    life.wait_for("task begins")
    life.process.send_signal(signal.SIGTERM)
    assert life.end() == 0
    order = positions(life.lines, *texts)
    assert order == sorted(order)


def check(life: Life) -> bytes:
    """Ask the parent for a check; empty when there is none."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(life.check_socket))
        except OSError:
            return b""
        connection.sendall(b"it")
        return connection.recv(100)


def parent_process(life: Life) -> int:
    """The process id of the parent."""
    children = Path(f"/proc/{life.process.pid}/task/{life.process.pid}/children").read_text().split()
    return next(int(pid) for pid in children if b"check.sock" in Path(f"/proc/{pid}/cmdline").read_bytes())


@pytest.mark.parametrize("start", [True], ids=["forked"], indirect=True)
def test_a_parent_that_dies_is_replaced_and_takes_nobody_with_it(start: Start) -> None:
    life = start()
    life.wait_for("[scheduler] started")
    assert check(life) == b"checked it"
    os.kill(parent_process(life), signal.SIGKILL)
    life.wait_for("The parent ended with signal SIGKILL.")
    assert not life.check_socket.exists()
    deadline = time.monotonic() + 5
    while check(life) != b"checked it" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert check(life) == b"checked it"
    assert sum("[scheduler] started" in line for line in life.lines) == 1
    assert life.get("/readyz")[0] == 200
    life.process.send_signal(signal.SIGTERM)
    assert life.end() == 0
    assert not life.check_socket.exists()


@pytest.mark.parametrize("start", [True], ids=["forked"], indirect=True)
@pytest.mark.parametrize(
    ("parent", "told"),
    [
        ("raise SystemExit(5)", "The parent ended with exit code 5."),
        ("import time; time.sleep(60)", "Killing the parent, which did nothing for 2 s."),
        (
            PARENT.replace('["json"]', '["json", "threads"]').replace("CHECK_SOCKET", "'/nowhere'"),
            "not forked: the import of Airflow has started 1 threads",
        ),
    ],
    ids=["dies", "hangs", "unsafe"],
)
def test_what_the_parent_cannot_start_is_spawned(start: Start, tmp_path: Path, parent: str, told: str) -> None:
    (tmp_path / "threads.py").write_text(
        "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    )
    life = start(schema="behind", parent=parent)
    life.wait_for(told)
    life.wait_for("[scheduler] started")
    order = positions(life.lines, "[migration] migrated", "[api-server] answering", "[scheduler] started")
    assert order == sorted(order)
    time.sleep(1.0)
    # It is not tried again.
    assert sum("The parent ended" in line for line in life.lines) == 1
    life.process.send_signal(signal.SIGTERM)
    assert life.end() == 0


@pytest.mark.parametrize("start", [True], ids=["forked"], indirect=True)
def test_a_stop_does_not_wait_for_the_import(start: Start) -> None:
    life = start(parent="import time; time.sleep(60)")
    life.wait_for("Importing airflow")
    life.process.send_signal(signal.SIGTERM)
    assert life.end() == 0


def write_content(folder: Path) -> str:
    """Write the content of an image; return its id."""
    file = folder / "image" / "dags" / "shop.py"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"shop = 1\n")
    return content_store.files_id(
        {"dags/shop.py": content_store.FileEntry(False, 9, sha256(b"shop = 1\n").hexdigest())}
    )


def test_the_content_of_the_image_is_there_before_airflow(start: Start, tmp_path: Path) -> None:
    content_id = write_content(tmp_path)
    looks = (
        f"print('found', open({str(tmp_path / 'content/current/dags/shop.py')!r}).read(), flush=True)" + ENDS_ON_SIGTERM
    )
    life = start(content_id=content_id, triggerer=looks)
    life.wait_for("[triggerer] found shop = 1")
    status, document = life.get("/content")
    assert status == 200
    assert (document["live"], document["deployed"], document["image"]) == (content_id, content_id, content_id)


def test_content_that_is_not_what_it_should_be_is_fatal(start: Start, tmp_path: Path) -> None:
    write_content(tmp_path)
    life = start(content_id="ab" * 32)
    assert life.end() == 1
    assert (tmp_path / "termination-log").read_text().startswith("The DAG content cannot be prepared: the image holds")


def test_a_port_that_is_taken_is_fatal(start: Start, tmp_path: Path, unused_ports: list[int]) -> None:
    with http.server.HTTPServer(("", unused_ports[1]), http.server.BaseHTTPRequestHandler):
        life = start()
        assert life.end() == 1
    assert "Address already in use" in (tmp_path / "termination-log").read_text()


class Holder:
    """What `airflow_deployer.hold` runs in the container `postgres`, with the test's own folder."""

    def __init__(self, folder: Path, *, how: str = "drain") -> None:
        self.process = subprocess.Popen(
            ["bash", "-c", hold.SCRIPT, "hold", str(folder / "shared"), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def said(self) -> str:
        """The next line, once it is there."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self) -> str:
        """Close its input, as the end of the connection does; what it complained about."""
        return self.process.communicate(timeout=10)[1]


def wait_until_ready(life: Life) -> None:
    """Wait until all components are there."""
    deadline = time.monotonic() + 10
    while life.get("/readyz")[0] != 200:
        assert time.monotonic() < deadline, life.lines
        time.sleep(0.05)


def test_a_hold_stops_airflow_and_its_end_starts_it_again(start: Start, tmp_path: Path) -> None:
    life = start()
    life.wait_for("[scheduler] started")
    holder = Holder(tmp_path)
    assert holder.said() == "held\n"
    status, document = life.get("/readyz")
    assert (status, document["phase"], document["missing"], document["processes"]) == (503, "held", ["held"], {})
    assert life.get("/livez")[0] == 200
    # Postgres, and whoever waits for Airflow's end, still sees somebody who lives.
    assert is_locked(tmp_path / "shared" / "supervisor.lock")
    assert "another deployer holds Airflow" in Holder(tmp_path).end()
    life.wait_for("Held (")
    order = positions(life.lines, "Airflow is to be held", "[scheduler] ending", "[api-server] ending", "Held (")
    assert order == sorted(order)

    assert holder.end() == ""
    wait_until_ready(life)
    deadline = time.monotonic() + 10
    while life.lines.count("[scheduler] started") < 2:
        assert time.monotonic() < deadline, life.lines
        time.sleep(0.05)
    life.process.terminate()
    assert life.end() == 0
    # Every line has been written by now.
    begun = positions(life.lines, "Held (")[0]
    order = positions(life.lines[begun:], "Starting api-server", "[api-server] answering", "[scheduler] started")
    assert order == sorted(order)
    assert not (tmp_path / "shared" / "held").exists()


def test_a_hold_that_is_killed_is_over(start: Start, tmp_path: Path) -> None:
    life = start()
    life.wait_for("[scheduler] started")
    holder = Holder(tmp_path)
    assert holder.said() == "held\n"
    holder.process.kill()
    holder.end()
    wait_until_ready(life)


def test_a_hold_waits_for_running_tasks_unless_it_is_urgent(start: Start, tmp_path: Path) -> None:
    life = start(scheduler=WITH_WORKER, stop_seconds=60.0)
    task = task_of(life)
    holder = Holder(tmp_path)
    life.wait_for("Waiting up to 60 s for running tasks")
    assert Path(f"/proc/{task}").exists()
    holder.end()
    holder = Holder(tmp_path, how="now")
    assert holder.said() == "held\n"
    assert not Path(f"/proc/{task}").exists()
    holder.end()


def test_whoever_holds_airflow_holds_its_next_life_too(start: Start, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    holder = Holder(tmp_path)
    assert holder.said() == "held\n", "no supervisor runs, so nothing has to stop"
    (tmp_path / "shared" / "held").touch()  # as a life that was killed leaves it
    life = start()
    life.wait_for("Held (")
    assert not any("[scheduler]" in line for line in life.lines)
    life.process.terminate()
    assert life.end() == 0
    assert not (tmp_path / "shared" / "held").exists()
    holder.end()
