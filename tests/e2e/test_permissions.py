"""A service account with a Role: what it lacks is named beforehand, and the documented minimum is enough."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from airflow_deployer import kube_context
from airflow_deployer.cluster import NAMESPACE, Kind, Object
from airflow_deployer.manifests import make_namespace
from tests.e2e.conftest import DUMMY_DAG, ROOT, Project
from tests.e2e.test_deploy import versions

pytestmark = pytest.mark.e2e

ACCOUNT = "restricted"
SERVICE_ACCOUNT = Kind("", "v1", "ServiceAccount", "serviceaccounts")
ROLE = Kind("rbac.authorization.k8s.io", "v1", "Role", "roles")
ROLE_BINDING = Kind("rbac.authorization.k8s.io", "v1", "RoleBinding", "rolebindings")


def documented_rules() -> tuple[list[Object], list[Object]]:
    """The rules of docs/permissions.md: for `up`, and what `down --purge` needs besides."""
    text = (ROOT / "docs" / "permissions.md").read_text(encoding="utf-8")
    role, more = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    return role["rules"], more


class Account:
    """A service account of the project's namespace, and a kubeconfig that is its alone."""

    def __init__(self, project: Project, folder: Path) -> None:
        self._cluster, self._namespace = project.cluster, project.names.namespace
        self._cluster.create(NAMESPACE, None, make_namespace(self._namespace))
        self._cluster.create(SERVICE_ACCOUNT, self._namespace, self._object(SERVICE_ACCOUNT))
        self._cluster.create(ROLE, self._namespace, self._object(ROLE, rules=[]))
        subject = {"kind": "ServiceAccount", "name": ACCOUNT, "namespace": self._namespace}
        role = {"apiGroup": ROLE.group, "kind": "Role", "name": ACCOUNT}
        binding = self._object(ROLE_BINDING, subjects=[subject], roleRef=role)
        self._cluster.create(ROLE_BINDING, self._namespace, binding)
        self.kubeconfig = folder / "restricted.kubeconfig"
        self.kubeconfig.touch(mode=0o600)
        self.kubeconfig.write_text(yaml.safe_dump(self._configuration(project, self._token())), encoding="utf-8")

    def allow(self, rules: list[Object]) -> None:
        """Let the account do this, and nothing else."""
        self._cluster.replace(ROLE, self._namespace, self._object(ROLE, rules=rules))

    def _object(self, kind: Kind, **fields: Any) -> Object:
        return {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": {"name": ACCOUNT}} | fields

    def _token(self) -> str:
        from kubernetes import client
        from kubernetes.config import new_client_from_config

        api = new_client_from_config(context=self._cluster.context.name)  # type: ignore[no-untyped-call]
        request = client.AuthenticationV1TokenRequest(
            spec=client.V1TokenRequestSpec(audiences=[], expiration_seconds=3600)
        )
        made: Any = client.CoreV1Api(api).create_namespaced_service_account_token(ACCOUNT, self._namespace, request)
        return str(made.status.token)

    def _configuration(self, project: Project, token: str) -> Object:
        context = project.cluster.context
        for path in kube_context.kubeconfig_paths().split(os.pathsep):
            document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            clusters = [item for item in document.get("clusters") or [] if item["name"] == context.cluster]
            if clusters:
                break
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": clusters,
            "users": [{"name": ACCOUNT, "user": {"token": token}}],
            "contexts": [{"name": context.name, "context": {"cluster": context.cluster, "user": ACCOUNT}}],
        }


def test_a_service_account(project: Project, tmp_path: Path) -> None:
    account = Account(project, tmp_path)
    rules, for_down = documented_rules()
    env = {
        "KUBECONFIG": str(account.kubeconfig),
        # It may not read what the cluster announces in kube-public.
        "DEPLOYER_IMAGES_REGISTRY": "localhost:5000",
        "DEPLOYER_IMAGES_MIRROR": "localhost:5000",
    }

    # Nothing is allowed: everything is named.
    result = project.deployer("up", env=env)
    assert result.code == 1, result
    assert "create, patch, delete statefulsets.apps" in result.stderr.replace("get, list, watch, ", ""), result
    assert "get pods/log" in result.stderr, result

    # Two verbs are missing: these two are named, and no others.
    lacking = [dict(rule, verbs=list(rule["verbs"])) for rule in rules]
    next(rule for rule in lacking if rule["resources"] == ["pods"])["verbs"].remove("delete")
    next(rule for rule in lacking if rule["resources"] == ["persistentvolumeclaims"])["verbs"].remove("create")
    account.allow(lacking)
    result = project.deployer("up", env=env)
    assert result.code == 1, result
    assert "needs: create persistentvolumeclaims; delete pods." in result.stderr, result
    assert f"namespace '{project.names.namespace}'" in result.stderr, result
    assert "next: ask an administrator of the cluster for a Role" in result.stderr, result
    assert not project.has("Secret")
    assert not project.has("claim")
    assert not project.has("StatefulSet")

    # A namespace that it would have to make.
    elsewhere = project.deployer("up", "--namespace", f"{project.names.namespace}-other", env=env)
    assert elsewhere.code == 1, elsewhere
    assert "may not do what a deployment to namespace" in elsewhere.stderr, elsewhere

    # The documented minimum is enough for the whole way.
    account.allow(rules)
    result = project.deployer("up", "--output", "json", env=env)
    assert result.code == 0, result
    assert result.json["dags"] == 1
    status = project.deployer("status", env=env)
    assert status.code == 0, status

    # It may not ask the pod through the API server, and still finds out that there is nothing to do, and what there is.
    before = versions(project)
    result = project.deployer("up", "--output", "json", env=env)
    assert result.code == 0, result
    assert (result.json["changes"], result.json["content"], result.json["pod"]) == ({}, "unchanged", "kept")
    assert "DAG content" not in result.stderr, result
    assert versions(project) == before
    project.write("dags/dummy.py", DUMMY_DAG + "# edited\n")
    result = project.deployer("up", "--output", "json", env=env)
    assert result.code == 0, result
    assert (result.json["content"], result.json["pod"]) == ("switched", "kept")

    # Removing takes more, and says so.
    result = project.deployer("down", env=env)
    assert result.code == 1, result
    assert "services" in result.stderr, result
    account.allow(rules + for_down)
    result = project.deployer("down", "--purge", "--yes", env=env)
    assert result.code == 0, result
    assert not project.has("claim")
    assert not project.has("Secret")
