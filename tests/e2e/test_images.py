"""The real Docker Engine: base image, DAG image, import check, push."""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import msgspec
import pytest

from airflow_deployer.base_context import find_lock
from airflow_deployer.config import Duration, Images, Settings, Timeouts
from airflow_deployer.content import read_project
from airflow_deployer.errors import DockerError, GateError, RegistryError, RequirementsError
from airflow_deployer.images import (
    CONTENT_ID_LABEL,
    UNCHECKED_SUFFIX,
    DagImage,
    Engine,
    ImagePlan,
    ImageRef,
    check_imports,
    ensure_base_image,
    ensure_dag_image,
    plan_images,
)
from airflow_deployer.progress import Silent, Step
from airflow_deployer.registry import Registry, choose_registry
from tests.e2e.registries import docker_config, engine_address, make_authority, run_registry, trust

pytestmark = pytest.mark.e2e

GOOD_DAG = """\
from airflow.sdk import dag, task

@dag(schedule=None)
def {name}():
    @task
    def greet():
        return "hello"
    greet()

{name}()
"""
CYCLE = """\
from airflow.sdk import DAG, task

with DAG("circular", schedule=None):
    @task
    def one(): ...
    @task
    def two(): ...
    first, second = one(), two()
    first >> second >> first
"""


class Recorder(Silent):
    """Keeps what was reported."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.details: list[str] = []

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        self.steps.append(title)
        yield self

    def update(self, detail: str) -> None:
        self.details.append(detail)

    def done(self, summary: str) -> None:
        self.details.append(summary)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def settings() -> Settings:
    """A name of our own, so that no other deployment's images are found; public images from the local mirror."""
    mirrored = Registry("localhost:5000").manifest_digest("library/python", "3.13-slim-trixie")
    return Settings(name=f"e2e-{secrets.token_hex(4)}", images=Images(mirror="localhost:5000" if mirrored else None))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    put(tmp_path, "dags/hello.py", GOOD_DAG.format(name="hello"))
    return tmp_path


def put(project: Path, path: str, text: str) -> None:
    file = project / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


class Build:
    """What `up` does with images, for one project."""

    def __init__(self, engine: Engine, settings: Settings, project: Path) -> None:
        self.engine, self.settings = engine, settings
        self.plan: ImagePlan = plan_images(
            settings,
            read_project(project, settings.project),
            find_lock(project, settings),
            choose_registry(settings.images, None),
            engine.platform,
        )
        self.registry = Registry(self.plan.address.push)
        self.progress = Recorder()

    def base(self) -> ImageRef:
        return ensure_base_image(self.engine, self.registry, self.plan, self.progress)

    def dags(self) -> DagImage:
        return ensure_dag_image(
            self.engine,
            self.registry,
            self.plan,
            self.base(),
            self.settings,
            self.progress,
            check=lambda image: check_imports(self.engine, image, self.settings, self.progress),
        )

    def held(self, suffix: str = "") -> str | None:
        return self.registry.manifest_digest(self.plan.dag_repository, self.plan.dag_tag + suffix)


@pytest.fixture
def build(engine: Engine, settings: Settings, project: Path) -> Callable[[], Build]:
    return lambda: Build(engine, settings, project)


def shell(image: str, command: str) -> str:
    return subprocess.run(
        ["docker", "run", "--rm", "--network=none", "--entrypoint=sh", image, "-c", command],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def import_checks() -> list[str]:
    """Containers of import checks that are there."""
    listed = subprocess.run(
        ["docker", "ps", "--all", "--quiet", "--filter=label=airflow-deployer=import-check"],
        capture_output=True,
        text=True,
        check=True,
    )
    return listed.stdout.split()


def test_the_base_image_is_built_once(build: Callable[[], Build]) -> None:
    first = build().base()
    again = build()
    assert again.base() == first
    assert again.progress.details == [f"{first.tag} is in the registry"]
    assert first.digest == again.registry.manifest_digest(first.repository, first.tag)


def test_a_dag_image_holds_the_content_and_is_built_once(build: Callable[[], Build], project: Path) -> None:
    put(project, "dags/with space/ünïcode\nline.py", "# nothing")
    put(project, "include/query.sql", "select 1")
    put(project, "plugins/own.py", "")
    first = build()
    image = first.dags()
    assert image.report is not None and image.report.dag_ids == ["hello"]
    assert image.ref.digest == first.held() == first.held(UNCHECKED_SUFFIX)
    assert {"Base image", "DAG image", "Push", "Import check"} == set(first.progress.steps)

    listing = shell(
        image.ref.pinned,
        "cd /opt/airflow-deployer/content && find . /home/airflow/plugins -type f -printf '%u %m %p\\n' | sort",
    )
    assert listing.splitlines() == [
        "airflow 644 /home/airflow/plugins/own.py",
        "line.py",
        "root 644 ./dags/hello.py",
        "root 644 ./dags/with space/ünïcode",
        "root 644 ./include/query.sql",
    ]
    assert shell(image.ref.pinned, "id -u").strip() == "50000"
    label = f'{{{{index .Config.Labels "{CONTENT_ID_LABEL}"}}}}'
    inspected = subprocess.run(
        ["docker", "image", "inspect", "--format", label, image.ref.pinned], capture_output=True, text=True, check=True
    )
    assert inspected.stdout.strip() == first.plan.content.content_id

    again = build()
    assert again.dags() == DagImage(image.ref, report=None)
    assert again.progress.steps == ["Base image"]


def test_dags_that_cannot_be_are_not_tagged(build: Callable[[], Build], project: Path) -> None:
    put(project, "dags/broken.py", "import airflow  # dag\nx = = 1\n")
    put(project, "dags/package.py", "# airflow dag\nimport nowhere\n")
    put(project, "dags/again.py", GOOD_DAG.format(name="hello"))
    put(project, "dags/circle.py", CYCLE)
    for _ in range(2):  # the second time Docker Engine has the image already, and it is checked all the same
        attempt = build()
        with pytest.raises(GateError) as caught:
            attempt.dags()
        for finding in (
            "Nothing was deployed, the DAGs have 4 errors:",
            "dags/broken.py, line 2: SyntaxError",
            "dags/package.py, line 2: ModuleNotFoundError: No module named 'nowhere'",
            "dags/circle.py, line 3: AirflowDagCycleException",
            '2 DAGs have the id "hello": dags/again.py, line 4 and dags/hello.py, line 4',
        ):
            assert finding in caught.value.message
        assert caught.value.hint
        assert attempt.held() is None
    assert import_checks() == []


def test_what_only_the_database_knows_is_a_warning(build: Callable[[], Build], project: Path) -> None:
    put(project, "dags/asks.py", "from airflow.sdk import Variable, dag\nVariable.get('region')\n")
    report = build().dags().report
    assert report is not None and len(report.warnings) == 1
    assert "dags/asks.py, line 2" in report.warnings[0]


def test_settings_and_environment_reach_the_import(engine: Engine, settings: Settings, project: Path) -> None:
    put(project, "dags/hello.py", GOOD_DAG.format(name="hello") + "import os\nassert os.environ['REGION'] == 'eu'\n")
    airflow = msgspec.structs.replace(settings.airflow, env={"REGION": "eu"})
    assert Build(engine, msgspec.structs.replace(settings, airflow=airflow), project).dags().report


HANGING = """\
import airflow, time  # dag
while True:
    try:
        time.sleep(1)
    except BaseException:
        pass
"""


def test_an_import_that_never_ends_is_ended(engine: Engine, settings: Settings, project: Path) -> None:
    put(project, "dags/hangs.py", HANGING)
    short = msgspec.structs.replace(settings, timeouts=Timeouts(import_check=Duration(8)))
    attempt = Build(engine, short, project)
    started = time.monotonic()
    with pytest.raises(GateError, match="did not end within 8s"):
        attempt.dags()
    assert time.monotonic() - started < 30
    assert attempt.held() is None
    assert import_checks() == []


def test_an_interrupted_check_leaves_nothing(build: Callable[[], Build], project: Path) -> None:
    put(project, "dags/hangs.py", HANGING)
    attempt = build()
    image = attempt.engine.build(
        f"{attempt.plan.address.push}/{attempt.plan.dag_repository}:interrupted",
        attempt.plan.content.files,
        Recorder(),
        dockerfile=f"FROM {attempt.base().pinned}\nCOPY dags /opt/airflow-deployer/content/dags\n",
        labels={},
        platform=attempt.plan.platform,
    )
    code = (
        "import sys\n"
        "from airflow_deployer.config import Settings\n"
        "from airflow_deployer.images import Engine, check_imports\n"
        "from airflow_deployer.progress import Silent\n"
        "check_imports(Engine(), sys.argv[1], Settings(), Silent())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, image], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 20
        while not import_checks():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in errors
    assert import_checks() == []


def test_requirements_are_installed_for_airflow_and_owned_by_root(build: Callable[[], Build], project: Path) -> None:
    put(project, "requirements.txt", "# one small package\ncowsay==6.1\n")
    put(project, "dags/hello.py", GOOD_DAG.format(name="hello") + "import cowsay\n")
    image = build().dags().ref.pinned
    found = shell(image, "python -c 'import cowsay; print(cowsay.__file__)' | xargs dirname | xargs ls -ld; ls -A /tmp")
    assert found.split()[2] == "root"
    assert len(found.splitlines()) == 1, "something was left in /tmp"
    assert shell(image, "python -c 'import cowsay; print(cowsay.__cached__)' | xargs ls").strip()


@pytest.mark.parametrize(
    ("text", "reason", "hint"),
    [
        (
            "cowsay==6.1\napache-airflow==3.0.0\n",
            "it asks for apache-airflow==3.0.0, and Airflow 3.3.2 is locked with apache-airflow 3.3.2.",
            "Leave apache-airflow out of requirements.txt",
        ),
        (
            "dbt-core==1.5.0\n",
            r"dbt-core==1.5.0 needs cffi>=1.9,<2.0.0, and Airflow 3.3.2 is locked with cffi 2\.\S+.",
            "Ask for a version of dbt-core that works with cffi 2.",
        ),
        ("cowsay==99\n", "the package index has no cowsay==99.", "Correct it in requirements.txt."),
    ],
    ids=["Airflow itself", "what a package needs", "no such release"],
)
def test_requirements_cannot_change_airflow(
    build: Callable[[], Build], project: Path, text: str, reason: str, hint: str
) -> None:
    put(project, "requirements.txt", text)
    attempt = build()
    with pytest.raises(
        RequirementsError, match=f"^Cannot install the packages of requirements.txt: {reason}$"
    ) as caught:
        attempt.dags()
    assert caught.value.hint.startswith(hint)
    assert caught.value.details == ()
    assert attempt.held() is None


def tiny_image(engine: Engine, name: str, project: Path, dockerfile: str = "FROM scratch\nCOPY dags /dags\n") -> str:
    files = read_project(project, Settings().project).files
    return engine.build(name, files, Recorder(), dockerfile=dockerfile, labels={}, platform=engine.platform)


def test_a_parent_that_is_nowhere(engine: Engine, project: Path) -> None:
    with pytest.raises(DockerError, match=r"Cannot build localhost:5000/e2e/none:1: ") as caught:
        tiny_image(engine, "localhost:5000/e2e/none:1", project, "FROM localhost:5000/none/parent:1\n")
    assert "images.mirror" in caught.value.hint


def test_a_command_that_fails_shows_the_end_of_the_log(engine: Engine, settings: Settings, project: Path) -> None:
    base = Build(engine, settings, project).base().pinned
    with pytest.raises(DockerError) as caught:
        tiny_image(
            engine,
            "localhost:5000/e2e/none:1",
            project,
            # The engine puts the two outputs together as they come.
            f"FROM {base}\nRUN seq 100; sleep 1; echo the cause >&2; exit 3\n",
        )
    assert "returned a non-zero code: 3" in caught.value.message
    assert "the cause" in caught.value.details
    assert len(caught.value.details) == 15


def test_a_push_with_login_and_tls(
    tmp_path: Path, engine: Engine, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a name of the machine that is not loopback: there Docker Engine insists on a trusted certificate."""
    authority = make_authority()
    config = tmp_path / "docker-config"
    monkeypatch.setenv("DOCKER_CONFIG", str(config))
    fresh: Callable[[], AbstractContextManager[Engine]] = fresh_engine
    with run_registry(tmp_path / "registry", address=engine_address(), authority=authority, login=True) as running:
        name = f"{running.host}/team/app:1"
        tiny_image(engine, name, project)
        with fresh() as own, pytest.raises(RegistryError, match="x509") as caught:
            own.push(name, Recorder())
        assert f"/etc/docker/certs.d/{running.host}/ca.crt" in caught.value.hint

        trust(running.host, authority)
        with fresh() as own, pytest.raises(RegistryError, match="Cannot push") as caught:
            own.push(name, Recorder())
        assert caught.value.hint == f"docker login {running.host}"

        docker_config(config, running.host)
        with fresh() as own:
            digest = own.push(name, Recorder())
        registry = Registry(running.host)
        assert digest and digest == registry.manifest_digest("team/app", "1")
        registry.put_tag("team/app", digest, "2")
        registry.put_tag("team/app", digest, "2")
        assert registry.manifest_digest("team/app", "2") == digest
        with pytest.raises(RegistryError, match="no such repository"):
            registry.put_tag("team/app", "sha256:" + "0" * 64, "3")


@contextmanager
def fresh_engine() -> Iterator[Engine]:
    """An engine that reads Docker's configuration anew."""
    engine = Engine()
    yield engine
    engine.close()


def test_a_push_to_a_registry_that_is_gone(tmp_path: Path, engine: Engine, project: Path) -> None:
    with run_registry(tmp_path / "registry") as running:
        name = f"{running.host}/team/app:1"
    tiny_image(engine, name, project)
    with pytest.raises(RegistryError, match="connection refused") as caught:
        engine.push(name, Recorder())
    assert "deployer cluster up" in caught.value.hint


def test_an_image_without_the_check_says_so(engine: Engine, project: Path) -> None:
    image = tiny_image(engine, "localhost:5000/e2e/none:1", project)
    with pytest.raises(DockerError, match="Cannot run"):
        check_imports(engine, image, Settings(), Silent())
    assert import_checks() == []
