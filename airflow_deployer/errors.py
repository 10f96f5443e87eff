"""What can go wrong, told to a person: each error is a message, and a hint that names what to do next.

The message says the action, its object and the cause; the hint is the command to run next. `cli.main` is the one
place that catches these and turns them into an exit code.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class DeployerError(Exception):
    """Something the user asked for could not be done (exit code 1).

    Args:
        message: action, object and cause in one sentence without a trailing newline; may be followed by more lines.
        hint: what to do about it, normally the next command to run.
        details: further lines of evidence (events, log lines), shown indented below the message.
    """

    exit_code = EXIT_FAILED

    def __init__(self, message: str, *, hint: str = "", details: tuple[str, ...] | list[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = tuple(details)


class ConfigurationError(DeployerError):
    """The command line, `deployer.toml` or the environment asks for something that cannot be (exit code 2)."""

    exit_code = EXIT_USAGE


class ProjectError(ConfigurationError):
    """The project folder is not something that can be deployed: no `dags/`, an empty one, an unreadable file."""


class ChangedError(ProjectError):
    """A file changed between being read and being sent; another try will do."""


class DockerError(DeployerError):
    """The Docker Engine could not be reached, or a build or a push failed."""


class RequirementsError(DeployerError):
    """Packages do not fit together: the project's with Airflow's own, or a version of Airflow's among themselves."""


class RegistryError(DeployerError):
    """The image registry could not be reached, refused the login, or does not hold what it should."""


class ClusterError(DeployerError):
    """The Kubernetes API refused or failed a request, or could not be reached."""


class GateError(DeployerError):
    """The DAGs do not import, share an id or hold a cycle; nothing was deployed."""


class SyncError(DeployerError):
    """The running pod could not take the DAG content, or Airflow did not parse it; what was live before stays live.

    Args:
        kind: the agent's name for the cause (`no_space`, `busy`, ...), or `not_live`, `protocol`.
    """

    def __init__(self, message: str, *, kind: str, hint: str = "", details: tuple[str, ...] | list[str] = ()) -> None:
        super().__init__(message, hint=hint, details=details)
        self.kind = kind


class RolloutError(DeployerError):
    """The pod did not become ready; the message carries the diagnosis."""


class UpgradeError(DeployerError):
    """The database belongs to another Airflow version, and moving it was not asked for, cannot be, or failed."""


class BackupError(DeployerError):
    """A backup could not be made or is not to be trusted, or the database could not be replaced by it."""


class AirflowError(DeployerError):
    """Airflow itself reports that a component is unhealthy, or refuses a request."""


class ForwardError(DeployerError):
    """The port-forward could not be started or stopped."""


class LocalClusterError(DeployerError):
    """The local cluster (`deployer cluster`) could not be made, repaired or removed."""
