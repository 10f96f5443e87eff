"""What commands tell when they are done: plain records with one form for programs and one for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from airflow_deployer.local_cluster import ClusterStatus

Lines = list[tuple[str, str]]


@dataclass(frozen=True)
class ImportErrorReport:
    """A DAG file that Airflow could not import; `cause` is the last line of its traceback."""

    file: str
    cause: str


@dataclass(frozen=True)
class UpReport:
    """What `deployer up` did and what runs now.

    Attributes:
        changes: object (`StatefulSet airflow`) to what happened to it; unchanged ones are left out.
        pod: kept, replaced, started or created.
        content: unchanged, switched (in the running pod, nothing restarted) or "with the pod".
        interrupted: running tasks that were cut off and start over.
        dags: the number of DAGs that Airflow lists.
        import_errors: what Airflow could not import.
        steps: seconds by step.
        url: where the forward answers, or None when there is none.
    """

    context: str
    namespace: str
    name: str
    image: str
    content_id: str
    airflow_version: str
    changes: dict[str, str]
    pod: str
    content: str
    interrupted: tuple[str, ...]
    dags: int
    import_errors: tuple[ImportErrorReport, ...]
    warnings: tuple[str, ...]
    steps: dict[str, float]
    url: str | None

    def document(self) -> dict[str, Any]:
        """The report as JSON-able values."""
        return asdict(self)

    def lines(self) -> Lines:
        """The report for a person."""
        changed = ", ".join(f"{what} {how}" for what, how in self.changes.items())
        pod = "" if self.pod == "kept" else f"pod {self.pod}"
        content = "DAG content switched in the running pod" if self.content == "switched" else ""
        times = ", ".join(f"{title} {seconds:.1f} s" for title, seconds in self.steps.items() if seconds >= 0.05)
        lines = [
            ("Airflow", f"{self.airflow_version}, {_count(self.dags, 'DAG')}, healthy"),
            ("where", f"{self.name} in namespace {self.namespace}, context {self.context}"),
            ("content", self.content_id[:12]),
            ("changed", "; ".join(filter(None, (changed, content, pod))) or "nothing"),
            ("took", f"{sum(self.steps.values()):.1f} s: {times}"),
        ]
        if self.import_errors:
            lines.append(("errors", "\n".join(f"{error.file}: {error.cause}" for error in self.import_errors)))
        if self.url:
            lines.append(("URL", self.url))
            lines.append(("login", "admin; the password: deployer status --show-password"))
        return lines


@dataclass(frozen=True)
class SyncReport:
    """What `deployer sync` did.

    Attributes:
        content_id: what is live now.
        changed: False when it was live before.
        seconds: by part: stage, check, live.
        parsed: the number of DAG files that Airflow parsed for it.
        in_image: whether an image holds this content, so that even a lost volume could not lose it.
    """

    context: str
    namespace: str
    name: str
    content_id: str
    changed: bool
    seconds: dict[str, float]
    parsed: int
    import_errors: tuple[ImportErrorReport, ...]
    in_image: bool

    def document(self) -> dict[str, Any]:
        """The report as JSON-able values."""
        return asdict(self)

    def lines(self) -> Lines:
        """The report for a person."""
        short = self.content_id[:12]
        if not self.changed:
            lines = [("content", f"{short} was live already")]
        else:
            times = ", ".join(f"{title} {seconds:.2f} s" for title, seconds in self.seconds.items())
            lines = [("content", f"{short} is live, {_count(self.parsed, 'file')} parsed"), ("took", times)]
        if self.import_errors:
            lines.append(("errors", "\n".join(f"{error.file}: {error.cause}" for error in self.import_errors)))
        if not self.in_image:
            lines.append(("image", "has older content; deployer up   makes this permanent"))
        return lines


@dataclass(frozen=True)
class DownReport:
    """What `deployer down` removed and what it kept."""

    context: str
    namespace: str
    name: str
    removed: tuple[str, ...]
    kept: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """The report as JSON-able values."""
        return asdict(self)

    def lines(self) -> Lines:
        """The report for a person."""
        lines = [("removed", ", ".join(self.removed) or "nothing: there was nothing left")]
        if self.kept:
            lines.append(("kept", ", ".join(self.kept) + "; the next `deployer up` goes on with it"))
        return lines


@dataclass(frozen=True)
class ContainerReport:
    """One container of the pod."""

    name: str
    image: str
    ready: bool
    restarts: int
    state: str


@dataclass(frozen=True)
class StatusReport:
    """What runs, for `deployer status`.

    Attributes:
        deployed: whether there is a StatefulSet at all.
        ready: whether its pod is ready.
        problem: why it is not, as the diagnosis says.
        content_id: of the DAG content in the image that `up` deployed.
        live_content_id: of what Airflow runs now; another one after a sync. None when the pod does not tell.
        content_scope: for what new content counts: each new `run`, each new `task`, also of a run that began before, or
            a new `pod`.
        components: Airflow's component to its health (`healthy`, `unhealthy`, or None when it has none).
        password: the admin user's, only when it was asked for.
    """

    context: str
    namespace: str
    name: str
    deployed: bool
    ready: bool = False
    problem: str = ""
    image: str = ""
    content_id: str = ""
    live_content_id: str | None = None
    content_scope: Literal["run", "task", "pod"] = "run"
    airflow_version: str = ""
    containers: tuple[ContainerReport, ...] = ()
    components: dict[str, str | None] = field(default_factory=dict)
    dags: int | None = None
    import_errors: tuple[ImportErrorReport, ...] = ()
    volume: str = ""
    url: str | None = None
    login: str | None = None
    password: str | None = field(default=None, repr=False)

    @property
    def healthy(self) -> bool:
        """True when the pod is ready and no component of Airflow is unhealthy."""
        return self.deployed and self.ready and all(state == "healthy" for state in self.components.values())

    def document(self) -> dict[str, Any]:
        """The report as JSON-able values; the password only when it was asked for."""
        document = asdict(self) | {"healthy": self.healthy}
        if self.password is None:
            del document["password"]
        return document

    def _content(self) -> str:
        deployed = self.content_id[:12]
        if self.content_scope == "pod":
            return f"{deployed} in the image; a change takes a new pod"
        if self.live_content_id is None:
            return f"{deployed} in the image"
        live = "live"
        if self.content_scope == "task":
            series = self.airflow_version.partition(".")[0]
            live += f" for every task that starts now (Airflow {series} has no DAG versions)"
        if self.live_content_id == self.content_id:
            return f"{deployed}, in the image and {live}"
        return (
            f"{self.live_content_id[:12]} is in no image yet and {live}, the image has {deployed}; "
            "deployer up   makes it permanent"
        )

    def lines(self) -> Lines:
        """The report for a person."""
        where = f"{self.name} in namespace {self.namespace}, context {self.context}"
        if not self.deployed:
            lines = [("state", "not deployed; deployer up   deploys it"), ("where", where)]
            return [*lines, ("volume", self.volume)] if self.volume else lines
        lines = [
            ("state", "healthy" if self.healthy else f"not healthy: {self.problem}"),
            ("where", where),
            ("Airflow", f"{self.airflow_version}" + (f", {_count(self.dags, 'DAG')}" if self.dags is not None else "")),
            ("image", self.image),
            ("content", self._content()),
        ]
        lines += [
            (container.name, f"{container.state}, {_count(container.restarts, 'restart')}")
            for container in self.containers
        ]
        if self.components:
            lines.append(("components", ", ".join(f"{name} {state}" for name, state in self.components.items())))
        if self.import_errors:
            lines.append(("errors", "\n".join(f"{error.file}: {error.cause}" for error in self.import_errors)))
        lines.append(("volume", self.volume))
        lines.append(("URL", self.url or "no forward runs; deployer port-forward   starts one"))
        if self.login:
            lines.append(("login", self.login + (f" / {self.password}" if self.password else "")))
        return lines


@dataclass(frozen=True)
class BackupReport:
    """What `deployer backup` wrote.

    Attributes:
        bytes: the size of the file.
        database_bytes: the size of the database, with indices.
        created_at: the moment that the backup shows, RFC 3339 by the pod's clock.
        seconds: how long it took.
    """

    context: str
    namespace: str
    name: str
    file: str
    bytes: int
    database_bytes: int
    tables: int
    rows: int
    airflow_version: str
    postgres_version: str
    created_at: str
    seconds: float

    def document(self) -> dict[str, Any]:
        """The report as JSON-able values."""
        return asdict(self)

    def lines(self) -> Lines:
        """The report for a person."""
        return [
            ("backup", f"{self.file}, {self.bytes / 1e6:,.1f} MB in {self.seconds:.1f} s"),
            ("of", f"{self.name} in namespace {self.namespace}, context {self.context}, at {self.created_at}"),
            ("holds", f"{_count(self.tables, 'table')}, {_count(self.rows, 'row')}, the key of stored connections"),
            ("versions", f"Airflow {self.airflow_version}, PostgreSQL {self.postgres_version}"),
            ("keep", "it safe: who has the file can read every stored connection"),
        ]


@dataclass(frozen=True)
class RestoreReport:
    """What `deployer restore` did.

    Attributes:
        created_at: the moment that the restored database shows, RFC 3339.
        rows: of all tables, counted and compared.
        reencrypted: stored values that were encrypted anew with this deployment's key.
        unreadable: stored values that the backup's key does not decrypt; Airflow could not read them before either.
        seconds: by part; `away` is how long Airflow was.
    """

    context: str
    namespace: str
    name: str
    file: str
    created_at: str
    tables: int
    rows: int
    reencrypted: int
    unreadable: tuple[str, ...]
    seconds: dict[str, float]

    def document(self) -> dict[str, Any]:
        """The report as JSON-able values."""
        return asdict(self)

    def lines(self) -> Lines:
        """The report for a person."""
        times = ", ".join(f"{title} {seconds:.1f} s" for title, seconds in self.seconds.items())
        lines = [
            ("restored", f"{self.file}, the database of {self.created_at}"),
            ("where", f"{self.name} in namespace {self.namespace}, context {self.context}"),
            ("holds", f"{_count(self.tables, 'table')}, {_count(self.rows, 'row')}, each as the backup says"),
            ("took", times),
        ]
        if self.reencrypted:
            lines.append(
                ("secrets", f"{_count(self.reencrypted, 'stored value')} encrypted with this deployment's key")
            )
        return lines


def cluster_lines(status: ClusterStatus) -> Lines:
    """The local cluster and its parts, for a person."""
    lines = [
        ("cluster", f"{status.provider}, {status.state}"),
        ("context", status.context),
        ("registry", status.registry),
    ]
    if status.kubernetes_version:
        lines.append(("Kubernetes", f"{status.kubernetes_version}, node {status.node or '?'}"))
    for part in status.parts:
        state = "running" if part.running else "not running"
        lines.append((part.name, state + (f", pid {part.pid}" if part.pid is not None else "")))
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
