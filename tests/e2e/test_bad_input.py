"""Bad input: each mistake has one clear error with the next command, the right exit code, and costs nothing.

Most of these end in the preflight, so that not even the namespace is made.
"""

from __future__ import annotations

import http.server
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from airflow_deployer import kube_context
from airflow_deployer.cluster import CLAIM, NAMESPACE, SECRET, STATEFUL_SET, STORAGE_CLASS, Cluster, Object
from airflow_deployer.manifests import make_claim, make_namespace
from tests.e2e import registries
from tests.e2e.conftest import DUMMY_DAG, Project, Result, free_port

pytestmark = pytest.mark.e2e

_DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"


def refused(project: Project, code: int, *words: str, env: dict[str, str] | None = None) -> Result:
    """Run `up`, which must end with `code` and one error that says `words`, and must have made nothing."""
    began = time.monotonic()
    result = project.deployer("up", env=env)
    assert result.code == code, result
    assert result.stderr.count("error: ") == 1, result
    assert "Traceback" not in result.stderr, result
    assert result.stdout == "", result
    for word in words:
        assert word in result.stderr, result
    assert time.monotonic() - began < 10, "a mistake that is known at the start must be told at the start"
    assert project.cluster.get(NAMESPACE, None, project.names.namespace) is None
    return result


def kubeconfig(project: Project, file: Path, change: Callable[[Object], None]) -> str:
    """Write the kubeconfig of the test's context to `file`, alone and changed; return its path."""
    name = project.cluster.context.name
    document: Object = {}
    for path in kube_context.kubeconfig_paths().split(os.pathsep):
        part = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if any(context["name"] == name for context in part.get("contexts") or []):
            document = part
            break
    context = next(item for item in document["contexts"] if item["name"] == name)
    document["contexts"] = [context]
    document["current-context"] = name
    for kind in ("clusters", "users"):
        wanted = context["context"][kind.removesuffix("s")]
        document[kind] = [item for item in document[kind] if item["name"] == wanted]
    change(document)
    file.touch(mode=0o600)
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    return str(file)


def rename_context(name: str) -> Callable[[Object], None]:
    """A change of a kubeconfig."""

    def change(document: Object) -> None:
        document["contexts"][0]["name"] = document["current-context"] = name

    return change


# -- the project ----------------------------------------------------------------------------------------------------


def test_no_dags_folder(project: Project) -> None:
    shutil.rmtree(project.folder / "dags")
    refused(project, 2, "it has no folder dags/", "next: ", "mkdir dags")


def test_an_empty_dags_folder(project: Project) -> None:
    (project.folder / "dags" / "dummy.py").unlink()
    refused(project, 2, "dags/ holds no DAG file", "next: Put a DAG into dags/")


_CYCLE = """
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG

with DAG("cycle"):
    a, b = EmptyOperator(task_id="a"), EmptyOperator(task_id="b")
    a >> b >> a
"""


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        (
            "dags/broken.py",
            "from airflow import DAG\n\nwith DAG('x'\n    pass\n",
            ("dags/broken.py, line 3", "SyntaxError"),
        ),
        ("dags/again.py", DUMMY_DAG, ("2 DAGs have the id", "dags/again.py, line", "dags/dummy.py, line")),
        ("dags/cycle.py", _CYCLE, ("dags/cycle.py", "ycle")),
    ],
    ids=["syntax error", "one id twice", "cycle"],
)
def test_dags_that_cannot_work_are_not_deployed(project: Project, path: str, text: str, words: tuple[str, ...]) -> None:
    project.write(path, text)
    result = project.deployer("up")
    assert result.code == 1, result
    for word in ("Nothing was deployed", *words, "next: "):
        assert word in result.stderr, result
    assert not project.has("StatefulSet")
    assert not project.has("Secret")
    assert not project.has("claim")


def test_requirements_that_conflict_with_airflows_own_packages(project: Project) -> None:
    project.write("requirements.txt", "# needs an older cffi than Airflow has\ndbt-core==1.5.0\n")
    result = project.deployer("up")
    assert result.code == 1, result
    assert result.stderr.count("error: ") == 1, result
    for word in (
        "error: Cannot install the packages of requirements.txt: dbt-core==1.5.0 needs cffi>=1.9,<2.0.0, and Airflow ",
        "is locked with cffi 2.",
        "next: Ask for a version of dbt-core that works with cffi 2.",
    ):
        assert word in result.stderr, result
    assert "Step " not in result.stderr, "the builder's own output tells nothing more"
    assert not project.has("StatefulSet")


def test_an_import_error_leaves_the_running_deployment_alone(project: Project) -> None:
    first = project.up()
    pod, stateful_set = project.pod(), project.cluster.get(STATEFUL_SET, project.names.namespace, project.names.name)
    project.write("dags/orders.py", "from airflow.sdk import DAG\nimport nowhere\n")
    result = project.deployer("up")
    assert result.code == 1, result
    for word in (
        "Nothing was deployed, the DAGs have an error:",
        "dags/orders.py, line 2: ModuleNotFoundError: No module named 'nowhere'",
        "next: A package that the base image lacks goes into requirements.txt",
    ):
        assert word in result.stderr, result
    after = project.cluster.get(STATEFUL_SET, project.names.namespace, project.names.name)
    assert stateful_set is not None
    assert after is not None
    assert after["metadata"]["resourceVersion"] == stateful_set["metadata"]["resourceVersion"]
    assert project.pod()["metadata"]["uid"] == pod["metadata"]["uid"]
    status = project.deployer("status", "--output", "json")
    assert status.code == 0, status
    assert status.json["content_id"] == first["content_id"]
    assert status.json["import_errors"] == []


# -- the configuration ----------------------------------------------------------------------------------------------


def test_an_unknown_key(project: Project) -> None:
    project.write("deployer.toml", 'nmae = "shop"\n')
    refused(project, 2, "nmae", "deployer.toml", "Did you mean `name`?")


def test_a_value_of_the_wrong_type(project: Project) -> None:
    project.write("deployer.toml", 'name = "shop"\n[port_forward]\nport = "eighty"\n')
    refused(project, 2, "`port_forward.port`", "deployer.toml", "expected integer, got string")


def test_a_version_of_airflow_whose_packages_are_not_locked(project: Project) -> None:
    project.write("deployer.toml", '[airflow]\nversion = "2.10.5"\n')
    refused(project, 2, "Airflow 2.10.5", "there is no airflow-2.10.5.txt", "next: deployer lock")


@pytest.mark.parametrize("version", ["2.4", "latest", "1.8.0"])
def test_what_is_no_release_of_airflow(project: Project, version: str) -> None:
    refused(project, 2, f'"{version}" is no release of Airflow', env={"DEPLOYER_AIRFLOW_VERSION": version})


def test_a_release_that_does_not_exist_or_was_yanked_is_not_locked(project: Project) -> None:
    for version, words in (
        ("3.2.99", ("there is no such release", "nearest: 3.2.2 and 3.3.0")),
        ("1.10.13", ("this release was yanked: ", "nearest: 1.10.12 and 1.10.14")),
    ):
        result = project.deployer("lock", version)
        assert result.code == 2, result
        assert result.stderr.count("error: ") == 1, result
        for word in (f"error: Cannot lock Airflow {version}: ", *words):
            assert word in result.stderr, result
        assert not [*project.folder.glob("airflow-*.txt")]


def test_a_file_that_is_not_toml(project: Project) -> None:
    project.write("deployer.toml", "name = shop\n")
    refused(project, 2, "deployer.toml", "line 1")


@pytest.mark.parametrize(("variable", "value"), [("DEPLOYER_NAMESPACE", "Team_A"), ("DEPLOYER_NAME", "my.airflow")])
def test_a_name_that_kubernetes_does_not_take(project: Project, variable: str, value: str) -> None:
    refused(project, 2, variable, f'"{value}"', env={variable: value})


# -- Docker and the registry ----------------------------------------------------------------------------------------


def test_no_docker_engine_where_docker_host_says(project: Project, tmp_path: Path) -> None:
    address = f"unix://{tmp_path}/docker.sock"
    refused(project, 1, "Cannot reach Docker Engine", address, "next: ", "DOCKER_HOST", env={"DOCKER_HOST": address})


def test_no_docker_engine_on_this_machine(project: Project) -> None:
    # In a mount namespace of its own, so that Docker is gone for this one command.
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    command = 'mount --bind /dev/null "$(readlink -f /var/run/docker.sock)" && exec "$0" -m airflow_deployer up'
    env = {key: value for key, value in project.env.items() if key != "DOCKER_HOST"}
    done = subprocess.run(
        [*unshare, "sh", "-c", command, sys.executable],
        cwd=project.folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done
    assert "Cannot reach Docker Engine: " in done.stderr
    assert "next: Start it: sudo systemctl start docker" in done.stderr
    assert project.cluster.get(NAMESPACE, None, project.names.namespace) is None


def test_a_registry_that_does_not_run(project: Project) -> None:
    address = f"localhost:{free_port()}"
    refused(
        project,
        1,
        f"Cannot reach the registry {address}: connection refused",
        "next: Start a local registry with: deployer cluster up",
        env={"DEPLOYER_IMAGES_REGISTRY": address},
    )


def test_a_registry_host_that_does_not_resolve(project: Project) -> None:
    env = {"DEPLOYER_IMAGES_REGISTRY": "registry.invalid"}
    refused(project, 1, "Cannot reach the registry registry.invalid", "`images.registry`", env=env)


@contextmanager
def _web_server() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"localhost:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_web_server_in_place_of_the_registry(project: Project) -> None:
    with _web_server() as address:
        env = {"DEPLOYER_IMAGES_REGISTRY": address}
        refused(project, 1, f"Cannot use {address} as registry", "HTTP 200", "next: ", env=env)


def test_a_registry_that_refuses_the_push(project: Project, tmp_path: Path) -> None:
    with registries.run_registry(tmp_path / "registry", read_only=True) as registry:
        result = project.deployer("up", env={"DEPLOYER_IMAGES_REGISTRY": registry.host})
    assert result.code == 1, result
    assert f"to the registry {registry.host}: it is read-only" in result.stderr, result
    assert "next: Set `images.registry`" in result.stderr, result
    # Asked where something must be pushed, but before it is built.
    assert "Base image" not in result.stderr, result
    assert not project.has("Secret")
    assert not project.has("StatefulSet")


# -- the cluster ----------------------------------------------------------------------------------------------------


def test_no_kubeconfig(project: Project, tmp_path: Path) -> None:
    env = {"KUBECONFIG": str(tmp_path / "none"), "DEPLOYER_CONTEXT": ""}
    refused(project, 1, f"there is no kubeconfig at {tmp_path / 'none'}", "next: deployer cluster up", env=env)


def test_a_kubeconfig_that_is_not_one(project: Project, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("a: [b\n")
    refused(
        project, 1, f"Cannot read the kubeconfig {tmp_path / 'config'}", env={"KUBECONFIG": str(tmp_path / "config")}
    )


def test_an_unknown_context(project: Project) -> None:
    name = project.cluster.context.name
    wrong = name[:-1]
    refused(
        project, 2, f"The context '{wrong}' does not exist", f"Did you mean '{name}'?", env={"DEPLOYER_CONTEXT": wrong}
    )


def test_a_remote_looking_context_is_used_on_purpose_only(project: Project, tmp_path: Path) -> None:
    remote = kubeconfig(project, tmp_path / "config", rename_context("production"))
    env = {"KUBECONFIG": remote, "DEPLOYER_CONTEXT": ""}
    refused(project, 2, "context 'production'", "does not look like a local cluster", "--context production", env=env)
    named = project.deployer("status", "--context", "production", env=env)
    assert named.code == 1, named
    assert "not deployed" in named.stdout, named


def test_an_api_server_that_does_not_answer(project: Project, tmp_path: Path) -> None:
    server = f"https://127.0.0.1:{free_port()}"

    def move(document: Object) -> None:
        document["clusters"][0]["cluster"]["server"] = server

    env = {"KUBECONFIG": kubeconfig(project, tmp_path / "config", move)}
    refused(project, 1, f"the API server {server}", "connection refused", "next: deployer cluster up", env=env)


def test_credentials_that_the_api_server_does_not_know(project: Project, tmp_path: Path) -> None:
    def forget(document: Object) -> None:
        document["users"][0]["user"] = {"token": "nobody"}

    env = {"KUBECONFIG": kubeconfig(project, tmp_path / "config", forget)}
    refused(project, 1, "HTTP 401", "next: renew the credentials", env=env)


@contextmanager
def _no_default_class(cluster: Cluster) -> Iterator[None]:
    """Take the mark off the default StorageClass for the time of the block."""
    from kubernetes import client, config

    config.load_kube_config(context=cluster.context.name)  # type: ignore[no-untyped-call]
    api = client.StorageV1Api()

    def mark(name: str, value: str | None) -> None:
        api.patch_storage_class(name, {"metadata": {"annotations": {_DEFAULT_CLASS: value}}})

    marked = [
        item["metadata"]["name"]
        for item in cluster.list_objects(STORAGE_CLASS, None)["items"]
        if (item["metadata"].get("annotations") or {}).get(_DEFAULT_CLASS) == "true"
    ]
    assert marked
    try:
        for name in marked:
            mark(name, "false")
        yield
    finally:
        for name in marked:
            mark(name, "true")


def test_no_default_storage_class(project: Project) -> None:
    with _no_default_class(project.cluster):
        refused(project, 1, "has no default StorageClass", "next: set storage.class in deployer.toml to one of: ")


def test_a_storage_class_that_does_not_exist(project: Project) -> None:
    refused(project, 2, "StorageClass 'fast'", "next: choose one of: ", env={"DEPLOYER_STORAGE_CLASS": "fast"})


def test_a_volume_whose_secret_is_gone(project: Project) -> None:
    """A new Secret would lock the user out of the database; giving the data up is the user's own word."""
    from airflow_deployer import config

    cluster, names = project.cluster, project.names
    cluster.create(NAMESPACE, None, make_namespace(names.namespace))
    settings = config.load(project.folder, config_file=None, env={}, overrides={})
    claim = cluster.create(
        CLAIM, names.namespace, make_claim(names, settings, postgres_image="postgres:17", airflow_version="3.3.2")
    )

    result = project.deployer("up")
    assert result.code == 1, result
    assert f"the Secret {names.secret} is gone" in result.stderr
    assert "Nothing was changed" in result.stderr
    assert "deployer down --purge" in result.stderr
    assert not project.has("Secret")
    assert not project.has("StatefulSet")
    kept = cluster.get(CLAIM, names.namespace, names.claim)
    assert kept is not None
    assert kept["metadata"]["uid"] == claim["metadata"]["uid"]

    # A Secret with one key missing would do the same harm.
    cluster.create(
        SECRET,
        names.namespace,
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": names.secret}, "data": {"fernet-key": "eA=="}},
    )
    result = project.deployer("up")
    assert result.code == 1, result
    assert f"the Secret {names.secret} lacks" in result.stderr
    assert "postgres-password" in result.stderr

    unasked = project.deployer("down", "--purge")
    assert unasked.code == 2, unasked
    assert "add --yes" in unasked.stderr
    assert project.has("claim")
    purged = project.deployer("down", "--purge", "--yes")
    assert purged.code == 0, purged
    assert not project.has("claim")
    assert not project.has("Secret")
