"""The manifests: valid for every Kubernetes minor that can be checked, restricted, and free of secrets."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import kubernetes_validate
import msgspec
import pytest
from kubernetes_validate.utils import all_versions, major_minor

from airflow_deployer import credentials, manifests
from airflow_deployer.airflow_profiles import AIRFLOW_3, environment
from airflow_deployer.config import Airflow, Duration, Settings, Storage, Timeouts
from airflow_deployer.manifests import Image, Names

NAMES = Names("airflow", "team-a")
IMAGE = Image(f"localhost:5000/airflow-deployer/airflow@sha256:{'0' * 64}", content_id="c" * 64, image_id="c-i")
OLDEST = (1, 28)
MINORS = sorted(
    {major_minor(version) for version in all_versions() if tuple(map(int, major_minor(version).split("."))) >= OLDEST}
)


def stateful_set(settings: Settings | None = None, **overrides: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"postgres_image": "postgres:17", "pull_secret": None} | overrides
    return manifests.make_stateful_set(NAMES, settings or Settings(), IMAGE, **arguments)


def every_object() -> list[dict[str, Any]]:
    return [
        manifests.make_namespace("team-a"),
        manifests.make_secret(NAMES, credentials.new()),
        manifests.make_pull_secret(NAMES, "e30="),
        manifests.make_claim(
            NAMES, Settings(storage=Storage(class_="fast")), postgres_image="postgres:17", airflow_version="3.3.2"
        ),
        manifests.make_service(NAMES),
        stateful_set(pull_secret="airflow-registry"),
        manifests.make_pull_pod(NAMES, [IMAGE.reference], node="node", pull_secrets=[]),
    ]


def test_there_are_schemas_to_check_against() -> None:
    assert len(MINORS) >= 4


@pytest.mark.parametrize("minor", MINORS)
def test_the_objects_are_valid_in(minor: str) -> None:
    for item in every_object():
        assert kubernetes_validate.validate(item, minor, strict=True) == minor


def test_the_names_derive_from_the_deployment() -> None:
    assert (NAMES.pod, NAMES.claim, NAMES.secret) == ("airflow-0", "airflow-data", "airflow-secrets")


def test_we_decide_when_the_pod_is_replaced() -> None:
    assert stateful_set()["spec"]["updateStrategy"] == {"type": "OnDelete"}


@pytest.mark.parametrize("index", [0, 1])
def test_containers_are_restricted(index: int) -> None:
    pod = stateful_set()["spec"]["template"]["spec"]
    security = pod["containers"][index]["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] > 0
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False


def test_postgres_listens_on_loopback_only_and_takes_the_lock_first() -> None:
    postgres = stateful_set()["spec"]["template"]["spec"]["containers"][0]
    script = postgres["command"][-1]
    assert script.index("flock") < script.index("docker-entrypoint.sh")
    assert "listen_addresses=127.0.0.1" in script
    assert "ports" not in postgres


def test_no_value_of_a_secret_is_in_the_stateful_set() -> None:
    values = credentials.new()
    text = json.dumps(stateful_set())
    assert all(value not in text for value in values.values())


def test_each_container_sees_only_its_own_secrets() -> None:
    volumes = {volume["name"]: volume for volume in stateful_set()["spec"]["template"]["spec"]["volumes"]}
    keys = {
        name: {item["key"] for item in volumes[name]["secret"]["items"]}
        for name in volumes
        if "secret" in volumes[name]
    }
    assert keys == {
        "airflow-secrets": set(credentials.AIRFLOW_KEYS),
        "postgres-secrets": set(credentials.POSTGRES_KEYS),
    }


def test_the_users_settings_replace_tuning_but_not_wiring() -> None:
    user = Airflow(settings={"core": {"parallelism": 3}}, env={"TEAM": "a"}).environment()
    merged = environment(AIRFLOW_3, user | {"AIRFLOW__CORE__EXECUTOR": "SequentialExecutor"})
    assert merged["AIRFLOW__CORE__PARALLELISM"] == "3"
    assert merged["TEAM"] == "a"
    assert merged["AIRFLOW__CORE__EXECUTOR"] == "LocalExecutor"


def test_a_pull_secret_is_named_only_when_there_is_one() -> None:
    assert "imagePullSecrets" not in stateful_set()["spec"]["template"]["spec"]
    with_login = stateful_set(pull_secret="login")["spec"]["template"]["spec"]
    assert with_login["imagePullSecrets"] == [{"name": "login"}]


def test_the_claim_leaves_the_class_to_the_cluster_unless_one_is_named() -> None:
    assert (
        "storageClassName"
        not in manifests.make_claim(NAMES, Settings(), postgres_image="postgres:17", airflow_version="3.3.2")["spec"]
    )
    assert (
        manifests.make_claim(
            NAMES, Settings(storage=Storage(class_="fast")), postgres_image="postgres:17", airflow_version="3.3.2"
        )["spec"]["storageClassName"]
        == "fast"
    )


def test_the_pod_template_changes_only_with_what_the_pod_is_made_of() -> None:
    other = Image(IMAGE.reference, IMAGE.content_id, image_id="d-i")
    one = stateful_set()
    two = manifests.make_stateful_set(NAMES, Settings(), other, postgres_image="postgres:17", pull_secret=None)
    assert one["spec"]["template"] == two["spec"]["template"]
    assert one["metadata"]["annotations"] != two["metadata"]["annotations"]


def template(**changes: Any) -> dict[str, Any]:
    """The pod template of one image."""
    image = dataclasses.replace(IMAGE, **changes)
    made = manifests.make_stateful_set(NAMES, Settings(), image, postgres_image="postgres:17", pull_secret=None)
    found: dict[str, Any] = made["spec"]["template"]
    return found


def test_a_running_pod_takes_in_dag_content_and_nothing_else() -> None:
    other = template(reference="localhost:5000/other@sha256:1", content_id="d" * 64, deployed_at=7)
    assert template() != other
    # A ControllerRevision keeps the template as a patch.
    assert manifests.same_but_for_content(template() | {"$patch": "replace"}, other)
    assert not manifests.same_but_for_content(template(), template(runtime_id="another"))
    changed = template()
    changed["spec"]["containers"][1]["env"].append({"name": "TEAM", "value": "blue"})
    assert not manifests.same_but_for_content(template(), changed)
    assert changed["spec"]["containers"][1]["image"] == IMAGE.reference


def test_a_pull_is_no_pod_of_the_deployment() -> None:
    pod = manifests.make_pull_pod(NAMES, ["one", "two"], node="here", pull_secrets=[{"name": "login"}])
    labels = pod["metadata"]["labels"]
    assert any(labels.get(key) != value for key, value in NAMES.selector.items())
    assert [container["image"] for container in pod["spec"]["containers"]] == ["one", "two"]
    assert pod["spec"]["imagePullSecrets"] == [{"name": "login"}]
    assert pod["spec"]["nodeName"] == "here"


def test_the_grace_period_outlasts_the_drain() -> None:
    settings = msgspec.structs.replace(Settings(), timeouts=Timeouts(drain=Duration(300)))
    spec = stateful_set(settings)["spec"]["template"]["spec"]
    assert spec["terminationGracePeriodSeconds"] == 360
    variables = {item["name"]: item["value"] for item in spec["containers"][1]["env"]}
    assert variables["AIRFLOW_DEPLOYER_STOP_SECONDS"] == "300"
    assert "flock --timeout 340" in spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][2]
