"""A registry with a login and TLS by an authority of one's own, from the push to the pull by the node.

The registry is real and listens on the address of Docker's bridge: not a loopback one, so that neither Docker Engine
nor containerd waives TLS for it, and both reach it.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from airflow_deployer.cluster import NAMESPACE, NODE, SECRET, Cluster
from airflow_deployer.kube_context import NATIVE_CONTEXT
from airflow_deployer.local_cluster.native.layout import Layout
from tests.e2e.conftest import Project, Result
from tests.e2e.registries import (
    PASSWORD,
    USERNAME,
    Authority,
    docker_config,
    engine_address,
    make_authority,
    run_registry,
    trust,
)

pytestmark = pytest.mark.e2e

WRONG_PASSWORD = "not-the-password"


@contextmanager
def node_trusts(cluster: Cluster, host: str, authority: Authority) -> Iterator[None]:
    """Give the authority to the container runtime of every node for the time of the block."""
    if cluster.context.name == NATIVE_CONTEXT:
        folder = Layout().certs_d / host
        folder.mkdir(parents=True)
        try:
            (folder / "ca.crt").write_bytes(authority.pem)
            (folder / "hosts.toml").write_text(f'server = "https://{host}"\nca = "{folder}/ca.crt"\n')
            yield
        finally:
            shutil.rmtree(folder)
        return
    nodes = [node["metadata"]["name"] for node in cluster.list_objects(NODE, None)["items"]]
    place = f"/etc/containerd/certs.d/{host}"

    def on_every_node(script: str, data: bytes = b"") -> None:
        for node in nodes:
            subprocess.run(["docker", "exec", "-i", node, "sh", "-c", script], input=data, check=True, timeout=30)

    on_every_node(f"mkdir -p '{place}' && cat > '{place}/ca.crt'", authority.pem)
    try:
        yield
    finally:
        on_every_node(f"rm -r '{place}'")


def test_a_login_and_a_private_authority(project: Project, tmp_path: Path) -> None:
    cluster, names = project.cluster, project.names
    authority = make_authority()
    with run_registry(tmp_path / "registry", address=engine_address(), authority=authority, login=True) as registry:
        host = registry.host
        project.write("deployer.toml", f'[images]\nregistry = "{host}"\n')
        no_login = tmp_path / "no-login"
        no_login.mkdir()

        def run(docker: Path, command: str = "up") -> Result:
            result = project.deployer(
                command, "--verbose", "--output", "json", env={"DOCKER_CONFIG": str(docker)}, timeout=600
            )
            for secret in (PASSWORD, WRONG_PASSWORD):
                told = result.stdout + result.stderr
                assert secret not in told
                assert base64.b64encode(f"{USERNAME}:{secret}".encode()).decode() not in told
            return result

        # Each of these is found out before anything is built or made.
        result = run(no_login)
        assert result.code == 1, result
        assert f"the registry {host}: its certificate is not trusted" in result.stderr, result
        assert f"/etc/docker/certs.d/{host}/ca.crt" in result.stderr, result

        trust(host, authority)
        result = run(no_login)
        assert result.code == 1, result
        assert f"the registry {host}: it wants a login" in result.stderr, result
        assert f"next: docker login {host}" in result.stderr, result

        result = run(docker_config(tmp_path / "wrong", host, password=WRONG_PASSWORD))
        assert result.code == 1, result
        assert f"the registry {host}: it refuses the login in Docker's configuration" in result.stderr, result
        assert f"next: docker login {host}" in result.stderr, result
        assert cluster.get(NAMESPACE, None, names.namespace) is None

        # Docker Engine on this machine trusts it by now, the node's runtime does not.
        right = docker_config(tmp_path / "right", host)
        result = run(right)
        assert result.code == 1, result
        assert "the node cannot pull" in result.stderr, result
        assert "x509" in result.stderr, result
        assert "certs.d/HOST/ca.crt" in result.stderr, result

        with node_trusts(cluster, host, authority):
            result = run(right)
            assert result.code == 0, result
            assert result.json["dags"] == 1
            assert result.json["image"].startswith(f"{host}/")
            pod = project.pod()
            assert pod["spec"]["imagePullSecrets"] == [{"name": names.pull_secret}]
            airflow = next(item for item in pod["status"]["containerStatuses"] if item["name"] == "airflow")
            assert airflow["imageID"].startswith(f"{host}/")
            secret = cluster.get(SECRET, names.namespace, names.pull_secret)
            assert secret is not None
            assert secret["type"] == "kubernetes.io/dockerconfigjson"
            logins = json.loads(base64.b64decode(secret["data"][".dockerconfigjson"]))["auths"]
            assert list(logins) == [host]

            result = run(right)
            assert result.code == 0, result
            assert result.json["changes"] == {}
            rendered = run(right, "render")
            assert rendered.code == 0, rendered

        result = run(right, "down")
        assert result.code == 0, result
        assert cluster.get(SECRET, names.namespace, names.pull_secret) is None
        assert project.has("claim")
