"""The side of the blog: its image, its manifest and its steps by `docker` and `kubectl`, moved to each Airflow.

It gets the same Python, Airflow and packages, byte-compiled, by starting from our base image, and a DAG folder that
Airflow's user may write, so that `kubectl cp` works.
"""

from __future__ import annotations

import contextlib
import secrets
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from airflow_deployer.airflow_profiles import Profile
from airflow_deployer.airflow_settings import API_PORT
from bench.airflow_account import POD, Database, save_at_any_moment, wait_healthy
from bench.programs import Kubectl, run
from bench.project import EDITED, ROOT, Project, dag_file, write_dags

_MANIFEST = (ROOT / "bench" / "blog.yaml").read_text(encoding="utf-8")

# The base image's DAG folder is a link into a volume that the blog's pod does not have.
_BASE_DOCKERFILE = """FROM {image}
USER root
RUN rm -rf /home/airflow/dags /home/airflow/include /home/airflow/content
USER airflow
CMD []
"""
_DOCKERFILE = """FROM {base}
COPY --chown=airflow:airflow dags dags
"""


@dataclass(frozen=True)
class Images:
    """What both sides are made of.

    Attributes:
        deployer: the image of the container `airflow` that `deployer up` made.
        postgres: the database's.
        profile: of the series that they are of.
    """

    deployer: str
    postgres: str
    profile: Profile

    @property
    def registry(self) -> str:
        """Where it was pushed."""
        return self.deployer.partition("/")[0]

    @property
    def base(self) -> str:
        """The name of the blog's base image."""
        return f"{self.registry}/bench/airflow:{self.profile.locked}"


@dataclass
class Blog:
    """The blog's folder, and where it is deployed."""

    folder: Path
    namespace: str
    kubectl: Kubectl
    images: Images
    database: Database
    edits: int = 0
    jwt: str = field(default_factory=lambda: secrets.token_hex(32))

    @property
    def image(self) -> str:
        """The name of the image with the DAGs."""
        # `latest`, as the blog has it: the kubelet asks the registry at each start of the pod.
        return f"{self.images.registry}/bench/{self.namespace}:latest"

    def publish(self) -> None:
        """`docker build` and `docker push`."""
        label = f"airflow-deployer-bench={self.namespace}"
        run(["docker", "build", "--quiet", "--label", label, "--tag", self.image, "."], folder=self.folder)
        run(["docker", "push", "--quiet", self.image])

    def manifest(self) -> str:
        """The blog's YAML."""
        text = _MANIFEST
        values = {
            "postgres": self.images.postgres,
            "airflow": self.image,
            "jwt": self.jwt,
            "command": command(self.images.profile),
            "connection": connection_variable(self.images.profile),
        }
        for name, value in values.items():
            text = text.replace("{{" + name + "}}", value)
        return text

    def deploy(self) -> None:
        """`kubectl apply` in a new namespace, until all components are healthy."""
        began = time.time()
        self.kubectl("create", "namespace", self.namespace)
        self.apply()
        wait_healthy(self.kubectl, self.namespace, self.images.profile, since=began)

    def apply(self) -> None:
        """`kubectl apply` of the manifest."""
        self.kubectl("apply", "--filename", "-", namespace=self.namespace, text=self.manifest())

    def replace(self) -> float:
        """Seconds from `kubectl delete pod` until all components are healthy again."""
        began, moment = time.monotonic(), time.time()
        self.kubectl("delete", "pod", POD, namespace=self.namespace)
        wait_healthy(self.kubectl, self.namespace, self.images.profile, since=moment)
        return time.monotonic() - began

    def edit(self) -> str:
        """Save a new version of the edited DAG and return its description."""
        self.edits += 1
        description = f"edit {self.edits} of {self.namespace}"
        (self.folder / "dags" / f"{EDITED}.py").write_text(dag_file(EDITED, description), encoding="utf-8")
        return description

    def copy(self, file: str) -> None:
        """`kubectl cp` of one file of `dags/` into the pod."""
        source = str(self.folder / "dags" / file)
        target = f"{POD}:/home/airflow/dags/{file}"
        self.kubectl("cp", source, target, "--container", "airflow", namespace=self.namespace)

    def steps_with_edit(self) -> float:
        """Seconds from a saved edit through the blog's steps until Airflow is healthy and has parsed it."""
        began = time.monotonic()
        description = self.edit()
        self.publish()
        self.replace()
        self.database.wait_parsed(EDITED, description, seconds=120)
        return time.monotonic() - began

    def copy_to_parsed(self) -> float:
        """Seconds from a saved edit through `kubectl cp` until Airflow has parsed it."""
        save_at_any_moment()
        began = time.monotonic()
        description = self.edit()
        self.copy(f"{EDITED}.py")
        self.database.wait_parsed(EDITED, description, seconds=60)
        return time.monotonic() - began

    def new_to_parsed(self, *, seconds: float) -> float:
        """Seconds from a saved new file through `kubectl cp` until Airflow has parsed it, `seconds` at most."""
        began = time.monotonic()
        self.edits += 1
        dag_id, description = f"new_{self.edits}", f"new {self.edits} of {self.namespace}"
        file = f"{dag_id}.py"
        (self.folder / "dags" / file).write_text(dag_file(dag_id, description), encoding="utf-8")
        self.copy(file)
        self.database.wait_parsed(dag_id, description, seconds=seconds)
        return time.monotonic() - began


def command(profile: Profile) -> str:
    """What the blog's bash runs: the migration, then Airflow's own commands side by side."""
    beside = (f"{profile.web.name} -p {API_PORT}", *(process.name for process in profile.others))
    started = "".join(f"{{ airflow {process} & }} && " for process in beside)
    migration = " ".join(profile.migration.command)
    return f"until airflow {migration}; do sleep 1; done && {started}airflow {profile.scheduler.name}"


def connection_variable(profile: Profile) -> str:
    """The variable that has the connection to the database; ours names a command in its place."""
    [name] = (name for name in profile.wiring if name.endswith("__SQL_ALCHEMY_CONN_CMD"))
    return name.removesuffix("_CMD")


def publish_base(images: Images) -> None:
    """Build and push the blog's base image."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "Dockerfile").write_text(_BASE_DOCKERFILE.format(image=images.deployer), encoding="utf-8")
        run(["docker", "build", "--quiet", "--tag", images.base, "."], folder=Path(folder))
        run(["docker", "push", "--quiet", images.base])


@contextlib.contextmanager
def blog(kubectl: Kubectl, images: Images, *, files: int | None = None) -> Iterator[Blog]:
    """The blog's folder with its image published, not deployed yet; at the end its deployment is removed.

    Args:
        files: how many DAG files; None for the repository's own and the edited one.
    """
    with tempfile.TemporaryDirectory() as top, kubectl.namespace() as namespace:
        folder = Path(top)
        write_dags(folder, files=files)
        (folder / "Dockerfile").write_text(_DOCKERFILE.format(base=images.base), encoding="utf-8")
        known = Database(kubectl, namespace, user="airflow_user", name="airflow_db")
        made = Blog(folder, namespace, kubectl, images, known)
        try:
            made.publish()
            yield made
        finally:
            known.close()
            label = f"label=airflow-deployer-bench={namespace}"
            run(["docker", "image", "prune", "--all", "--force", "--filter", label])


def images_of(made: Project) -> Images:
    """The images of a project's deployment, which `deployer up` has made."""
    template = made.kubectl.get("statefulset/airflow", made.namespace)["spec"]["template"]
    found = {item["name"]: item["image"] for item in template["spec"]["containers"]}
    return Images(found["airflow"], found["postgres"], made.profile)
