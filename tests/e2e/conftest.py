"""What the end-to-end tests stand on: the real cluster, a namespace and a project per test, what is kept of failures.

The tests drive the installed `deployer` command as a user would and look at the cluster through the API. Without a
running cluster they fail; they never skip themselves. `E2E_KEEP=1` leaves every namespace for a post-mortem.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from airflow_deployer import kube_context
from airflow_deployer.airflow_api import AirflowApi
from airflow_deployer.airflow_profiles import find_profile
from airflow_deployer.cluster import CLAIM, EVENT, NAMESPACE, POD, SECRET, STATEFUL_SET, Cluster
from airflow_deployer.manifests import Names
from airflow_deployer.running_airflow import VERSION_LABEL
from tests.e2e.bad_network import Proxy

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = ROOT / "artifacts"

_FAILED = pytest.StashKey[bool]()

DUMMY_DAG = (ROOT / "dags" / "dummy.py").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Result:
    """How a command ended and what it said."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """Standard output as JSON."""
        return json.loads(self.stdout)

    def __str__(self) -> str:
        return f"exit code {self.code}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


@dataclass
class Project:
    """A project folder of its own, deployed to a namespace of its own by the real command."""

    folder: Path
    cluster: Cluster
    names: Names
    port: int
    env: dict[str, str]
    history: list[str] = field(default_factory=list)

    def write(self, path: str, content: str) -> Path:
        """Write a file of the project."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
        return file

    def deployer(self, *arguments: str, timeout: float = 420, env: dict[str, str] | None = None) -> Result:
        """Run `deployer` in the project folder."""
        done = subprocess.run(
            [sys.executable, "-m", "airflow_deployer", *arguments],
            cwd=self.folder,
            env=self.env | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        result = Result(done.returncode, done.stdout, done.stderr)
        self.history.append(f"$ deployer {' '.join(arguments)}\n{result}\n")
        return result

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `deployer` in the project folder and do not wait for its end.

        It is returned once Python itself is up and has taken over Ctrl-C: nobody can catch one before.
        """
        running = subprocess.Popen(
            [sys.executable, "-m", "airflow_deployer", *arguments],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        status = Path(f"/proc/{running.pid}/status")
        eventually(
            lambda: running.poll() is not None or _catches_sigint(status),
            seconds=10,
            what="Python has taken over Ctrl-C",
        )
        return running

    def up(self, *arguments: str) -> Any:
        """Run `deployer up`, which must succeed; return its report."""
        result = self.deployer("up", "--output", "json", *arguments)
        assert result.code == 0, result
        return result.json

    def secret(self, key: str) -> str:
        """A value of the generated Secret."""
        from airflow_deployer import credentials

        found = self.cluster.get(SECRET, self.names.namespace, self.names.secret)
        assert found is not None
        return credentials.decode(found["data"])[key]

    def api(self) -> AirflowApi:
        """Airflow's own API through the forward, logged in."""
        profile = find_profile(self.pod()["metadata"]["labels"][VERSION_LABEL])
        assert profile is not None
        api = AirflowApi(f"http://127.0.0.1:{self.port}", profile)
        api.login("admin", self.secret("admin-password"))
        return api

    def pod(self) -> dict[str, Any]:
        """The pod, which must exist."""
        found = self.cluster.get(POD, self.names.namespace, self.names.pod)
        assert found is not None
        return found

    def is_ready(self, *, not_uid: str = "") -> bool:
        """Whether the pod is there, is not the one with the UID `not_uid`, and says that it is ready."""
        found = self.cluster.get(POD, self.names.namespace, self.names.pod)
        if found is None or found["metadata"]["uid"] == not_uid:
            return False
        conditions = found.get("status", {}).get("conditions") or []
        return any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)

    def wait_for_new_pod(self, uid: str) -> None:
        """Wait for the successor of the pod `uid` to be ready; nobody but Kubernetes makes it."""
        eventually(lambda: self.is_ready(not_uid=uid), seconds=240, what="a new pod is ready")

    def shell(self, script: str) -> str:
        """Run a shell script in the container `airflow`; its output, whatever its exit code."""
        return self._exec("bash", "-c", script).stdout

    def command(self, *command: str) -> str:
        """Run a command in the container `airflow`, which must succeed; return its output."""
        done = self._exec(*command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def _exec(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                *("kubectl", "--context", self.cluster.context.name, "-n", self.names.namespace),
                *("exec", self.names.pod, "-c", "airflow", "--", *command),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def has(self, what: str) -> bool:
        """Whether the StatefulSet, claim or Secret exists."""
        kind, name = {
            "StatefulSet": (STATEFUL_SET, self.names.name),
            "claim": (CLAIM, self.names.claim),
            "Secret": (SECRET, self.names.secret),
            "pod": (POD, self.names.pod),
        }[what]
        return self.cluster.get(kind, self.names.namespace, name) is not None


def eventually(check: Callable[[], Any], *, seconds: float, what: str) -> Any:
    """Wait until `check` returns something true, and return it."""
    deadline = time.monotonic() + seconds
    while True:
        found = check()
        if found:
            return found
        if time.monotonic() >= deadline:
            pytest.fail(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.3)


def _catches_sigint(status: Path) -> bool:
    caught = next((line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("SigCgt:")), "")
    return bool(int(caught.partition(":")[2] or "0", 16) & (1 << (signal.SIGINT - 1)))


def free_port() -> int:
    """A local port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """The local cluster, which must run."""
    done = subprocess.run(
        [sys.executable, "-m", "airflow_deployer", "cluster", "status", "--output", "json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(f"no local cluster runs; deployer cluster up starts one\n{done.stdout}{done.stderr}", pytrace=False)
    context = json.loads(done.stdout)["context"]
    return Cluster(kube_context.resolve(context))


@contextmanager
def new_project(cluster: Cluster, folder: Path, node: pytest.Item | pytest.Collector) -> Iterator[Project]:
    """A project with the blog's DAG; its namespace is removed afterwards, and on failure all is kept as artifacts.

    Args:
        cluster: where it is deployed to.
        folder: an empty one.
        node: the test, or the module whose tests share the project.
    """
    namespace = f"e2e-{secrets.token_hex(4)}"
    port = free_port()
    env = {key: value for key, value in os.environ.items() if not key.startswith("DEPLOYER_")}
    env |= {
        "DEPLOYER_CONTEXT": cluster.context.name,
        "DEPLOYER_NAMESPACE": namespace,
        "DEPLOYER_PORT_FORWARD_PORT": str(port),
        "XDG_STATE_HOME": str(folder / "state"),
    }
    made = Project(folder / "project", cluster, Names("airflow", namespace), port, env)
    made.write("dags/dummy.py", DUMMY_DAG)
    yield made
    if node.stash.get(_FAILED, False):
        _save(made, node.name)
    made.deployer("port-forward", "--stop")
    if not os.environ.get("E2E_KEEP"):
        cluster.delete(NAMESPACE, None, namespace)


@pytest.fixture
def project(cluster: Cluster, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Project]:
    """A project of the test's own."""
    with new_project(cluster, tmp_path, request.node) as made:
        yield made


@pytest.fixture(scope="module")
def shared_project(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Project]:
    """A project that a module's tests share, in the order in which they stand there."""
    with new_project(cluster, tmp_path_factory.mktemp("shared"), request.node) as made:
        yield made


@contextmanager
def through_proxy(project: Project, folder: Path) -> Iterator[Proxy]:
    """Lead this project's commands to the API server through a proxy, for the time of the block.

    Args:
        folder: where the kubeconfig that leads there is written.
    """
    server = urlsplit(project.cluster.server)
    between = Proxy(server.hostname or "", server.port or 443)
    text = subprocess.run(
        ["kubectl", "config", "view", "--raw", "--minify", "--flatten", "--context", project.cluster.context.name],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    document = yaml.safe_load(text)
    document["clusters"][0]["cluster"] |= {
        "server": f"https://127.0.0.1:{between.port}",
        "tls-server-name": server.hostname,
    }
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(document), encoding="utf-8")
    direct = dict(project.env)
    project.env["KUBECONFIG"] = str(kubeconfig)
    yield between
    between.close()
    project.env = direct


@pytest.fixture
def proxy(project: Project, tmp_path: Path) -> Iterator[Proxy]:
    """The way of this project's commands to the API server."""
    with through_proxy(project, tmp_path) as between:
        yield between


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Let the fixtures know that a test of theirs has failed."""
    outcome: Any = yield
    if outcome.get_result().failed:
        for node in item.listchain():
            node.stash[_FAILED] = True


def _save(project: Project, test: str) -> None:
    """Keep pods, events, logs and the commands' output of a failed test."""
    folder = ARTIFACTS / re.sub(r"[^A-Za-z0-9_.-]+", "-", test)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "commands.txt").write_text("\n".join(project.history), encoding="utf-8")
    namespace = project.names.namespace
    for kind in (POD, EVENT, STATEFUL_SET, CLAIM):
        listed = project.cluster.list_objects(kind, namespace)
        (folder / f"{kind.plural}.json").write_text(json.dumps(listed, indent=1), encoding="utf-8")
    for container in ("airflow", "postgres"):
        for previous in (False, True):
            lines = project.cluster.log(namespace, project.names.pod, container, previous=previous, lines=2000)
            name = f"{container}{'-previous' if previous else ''}.log"
            (folder / name).write_text("\n".join(lines), encoding="utf-8")
