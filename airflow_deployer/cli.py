"""The `deployer` command: reads the command line, calls the core, and turns errors into words and exit codes.

The only module that knows Typer. It composes; what a command does stands in `deploy` and `local_cluster`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from airflow_deployer import __version__
from airflow_deployer.errors import EXIT_FAILED, EXIT_INTERRUPTED, ConfigurationError, DeployerError

if TYPE_CHECKING:
    from airflow_deployer.config import Settings
    from airflow_deployer.console import Console


class Output(str, Enum):
    """The form of a result on stdout."""

    TEXT = "text"
    JSON = "json"


class Provider(str, Enum):
    """Who makes the local cluster."""

    AUTO = "auto"
    KIND = "kind"
    NATIVE = "native"


_FLAGS = {"--verbose", "-v", "--quiet", "-q"}
_WITH_VALUE = {"--context", "--namespace", "-n", "--config", "--output", "-o"}


def hoist(arguments: Sequence[str]) -> list[str]:
    """Move the global options to the front, so that they may stand before or after the command."""
    front: list[str] = []
    rest: list[str] = []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        if argument == "--":
            rest += [argument, *queue]
            break
        if argument in _FLAGS or ("=" in argument and argument.partition("=")[0] in _WITH_VALUE):
            front.append(argument)
        elif argument in _WITH_VALUE:
            front += [argument, *queue[:1]]
            del queue[:1]
        else:
            rest.append(argument)
    return front + rest


class _Commands(TyperGroup):
    """The group whose `invoke` is the one place where errors end."""

    def invoke(self, ctx: Any) -> Any:
        console: Console | None = None
        try:
            try:
                return super().invoke(ctx)
            finally:
                console = ctx.obj.console if isinstance(ctx.obj, Globals) else None
        except DeployerError as error:
            (console or _plain_console()).error(error)
            if console is not None and console.verbose:
                raise
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            name = ctx.invoked_subcommand or ""
            # Without it, the next one would only announce the upgrade again.
            asked = " --upgrade" if "--upgrade" in sys.argv else ""
            again = (
                f"run `deployer {name}{asked}` again to finish"
                if name in ("up", "down", "dev")
                else "nothing is left half-done"
            )
            (console or _plain_console()).warning(f"interrupted; {again}")
            raise typer.Exit(EXIT_INTERRUPTED) from None


class Globals:
    """The global options, and what is made of them on first use."""

    def __init__(
        self,
        *,
        context: str | None,
        namespace: str | None,
        config: Path | None,
        output: Output,
        verbose: bool,
        quiet: bool,
    ) -> None:
        from airflow_deployer.console import Console

        self.project = Path.cwd()
        self.console = Console(verbose=verbose, quiet=quiet, json_output=output is Output.JSON)
        self.config_file = config
        self._context = context
        self._namespace = namespace

    def settings(self, **overrides: object) -> Settings:
        """Load the configuration; `overrides` are flags of the command, by key with `__` for the dot."""
        from airflow_deployer import config

        flags = {key.replace("__", "."): value for key, value in overrides.items()}
        return config.load(
            self.project,
            config_file=self.config_file,
            env=os.environ,
            overrides={"context": self._context, "namespace": self._namespace, **flags},
        )


def _examples(*commands: str) -> str:
    """Write an epilog that keeps its lines."""
    return "\b\n" + "\n".join(("Examples:", *(f"  {command}" for command in commands)))


app = typer.Typer(
    cls=_Commands,
    name="deployer",
    help="Take a folder of DAGs to a running, durable Airflow on Kubernetes.",
    epilog="Global options may stand before or after the command. Exit codes: 0 done, 1 failed, 2 usage or "
    "configuration, 130 interrupted.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cluster_app = typer.Typer(
    help="Make, remove and inspect a local cluster with a registry, for trying and testing.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(cluster_app, name="cluster")


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        app(args=hoist(sys.argv[1:]), prog_name="deployer")
    except DeployerError as error:
        # Only with --verbose: the message is out already, this adds where it came from.
        import traceback

        traceback.print_exc()
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output has gone (`deployer render | head`): nothing to tell, and nobody to tell it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)
    except Exception as error:
        if {"--verbose", "-v"} & set(sys.argv):
            raise
        unexpected = DeployerError(
            f"This should not have happened: {type(error).__name__}: {error}.",
            hint="run the same command with --verbose and report what it prints",
        )
        _plain_console().error(unexpected)
        sys.exit(EXIT_FAILED)


def _plain_console() -> Console:
    from airflow_deployer.console import Console

    return Console()


def _show_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def global_options(
    ctx: typer.Context,
    context: Annotated[
        str | None,
        typer.Option(help="Kubeconfig context; naming it allows one that does not look local.", metavar="NAME"),
    ] = None,
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="Namespace; created when missing.", metavar="NAME")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Configuration file in place of ./deployer.toml.", metavar="FILE")
    ] = None,
    output: Annotated[Output, typer.Option("--output", "-o", help="Form of the result on stdout.")] = Output.TEXT,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tell more, with tracebacks of errors.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Tell only warnings, errors and results.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    ctx.obj = Globals(context=context, namespace=namespace, config=config, output=output, verbose=verbose, quiet=quiet)


@app.command(
    epilog=_examples(
        "deployer up",
        "deployer up --context kind-dev -n team-a",
        "deployer up --no-port-forward -o json",
        "deployer up --upgrade",
        "DEPLOYER_AIRFLOW_VERSION=2.11.2 deployer up --restore airflow-2.11.2.backup",
    )
)
def up(
    ctx: typer.Context,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Hold the terminal with the port-forward until Ctrl-C.")
    ] = False,
    port_forward: Annotated[
        bool, typer.Option("--port-forward/--no-port-forward", help="Forward a local port to Airflow.")
    ] = True,
    port: Annotated[int | None, typer.Option(help="Local port of the forward.  [default: 8080]")] = None,
    force_conflicts: Annotated[
        bool, typer.Option("--force-conflicts", help="Take over fields that another manager has changed.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace the pod even where only DAG content has changed.")
    ] = False,
    now: Annotated[
        bool, typer.Option("--now", help="Do not wait for running tasks where the pod is replaced; they start over.")
    ] = False,
    upgrade: Annotated[
        bool, typer.Option("--upgrade", help="Let a newer Airflow migrate the database, after a backup of it.")
    ] = False,
    restore: Annotated[
        Path | None,
        typer.Option(
            help="Put the database of this backup in place of the deployment's, after asking.", metavar="FILE"
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Answer the question of --restore with yes.")] = False,
) -> None:
    """Build, push and deploy the project in this folder, and wait until Airflow serves it.

    Where only DAG content has changed, the running pod takes it in: nothing restarts, running tasks go on. Any other
    change replaces the pod after its running tasks have ended. Safe to repeat: what is there already is left alone. The
    volume with the database is never touched.
    """
    from airflow_deployer import deploy, foreground_forward

    options: Globals = ctx.obj
    settings = options.settings(port_forward__port=port)
    if restore is not None and not yes:
        from airflow_deployer import backup_file, connection
        from airflow_deployer import restore as restores

        with backup_file.opened(restore) as made:
            _confirm(restores.question(connection.connect(settings), made))
    report = deploy.up(
        options.project,
        settings,
        options.console,
        deploy.UpOptions(
            forward=port_forward and not foreground,
            check_port=port_forward,
            force_conflicts=force_conflicts,
            replace=replace,
            now=now,
            upgrade=upgrade,
            restore=restore,
        ),
    )
    options.console.result(report.document(), report.lines())
    deploy.complain_of_import_errors(report)
    if foreground:
        foreground_forward.forward_in_foreground(settings, options.console)


@app.command(epilog=_examples("deployer dev", "deployer dev --run orders", "deployer dev --run orders.load -o json"))
def dev(
    ctx: typer.Context,
    run: Annotated[
        str | None,
        typer.Option("--run", help="Run this DAG, or one task of it, again after every save.", metavar="DAG[.TASK]"),
    ] = None,
) -> None:
    """Do what `up` does, then bring every save into the running pod, and show its logs, until Ctrl-C.

    A save that does not import is told with file, line and cause; the last good content stays live. Ctrl-C leaves
    Airflow running. With --output json, every event is one JSON object in a line of its own.
    """
    from airflow_deployer import dev as dev_loop

    options: Globals = ctx.obj
    dev_loop.run(options.project, options.settings, options.console, config_file=options.config_file, rerun=run)


@app.command(epilog=_examples("deployer sync", "deployer sync -o json"))
def sync(ctx: typer.Context) -> None:
    """Bring the DAGs of this folder into the running pod, once: nothing restarts, and no image is built.

    Running tasks finish on the code that they began with. The content survives restarts; `up` puts it into an image.
    """
    from airflow_deployer import deploy, single_sync

    options: Globals = ctx.obj
    report = single_sync.sync(options.project, options.settings(), options.console)
    options.console.result(report.document(), report.lines())
    deploy.complain_of_import_errors(report)


@app.command(epilog=_examples("deployer down", "deployer down --purge", "deployer down --purge --yes"))
def down(
    ctx: typer.Context,
    purge: Annotated[
        bool, typer.Option("--purge", help="Remove the volume with the database and the Secret too, after asking.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Answer the question of --purge with yes.")] = False,
) -> None:
    """Remove what `up` made and wait until it is gone; the volume and the Secret stay.

    The next `up` finds the database as it was. The namespace is never deleted.
    """
    from airflow_deployer import connection, teardown

    options: Globals = ctx.obj
    settings = options.settings()
    session = connection.connect(settings)
    if purge and not yes:
        _confirm(
            f"Delete the database, the task logs and the Secret of {session.names.name!r} in namespace "
            f"{session.names.namespace!r} (context {session.context.name!r}) for good?"
        )
    report = teardown.down(session, options.console, purge=purge)
    options.console.result(report.document(), report.lines())


@app.command(
    "port-forward",
    epilog=_examples("deployer port-forward", "deployer port-forward --port 9090", "deployer port-forward --stop"),
)
def port_forward_command(
    ctx: typer.Context,
    port: Annotated[int | None, typer.Option(help="Local port.  [default: 8080]")] = None,
    stop: Annotated[bool, typer.Option("--stop", help="End the forward that runs in the background.")] = False,
) -> None:
    """Forward a local port to Airflow until Ctrl-C; pods may come and go meanwhile."""
    from airflow_deployer import foreground_forward

    options: Globals = ctx.obj
    settings = options.settings(port_forward__port=port)
    if stop:
        ended = foreground_forward.stop_forward(settings)
        options.console.result({"stopped": ended}, [("forward", "stopped" if ended else "none was running")])
        return
    foreground_forward.forward_in_foreground(settings, options.console)


@app.command(
    epilog=_examples("deployer backup shop.backup", "deployer backup shop.backup --force", "deployer backup b -o json")
)
def backup(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="Where the backup goes; readable for you only.", metavar="FILE")],
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write the database into FILE while Airflow goes on: every run, connection and variable, and the key to them.

    The file is a tar that holds the dump, what restores need to know of it, and checksums. It appears under its name
    once it is complete and checked. Task logs and DAGs are not in it.
    """
    from airflow_deployer import backup as backups

    options: Globals = ctx.obj
    report = backups.backup(options.settings(), file, options.console, force=force)
    options.console.result(report.document(), report.lines())


@app.command(
    epilog=_examples(
        "deployer restore shop.backup", "deployer restore shop.backup --yes -n other", "deployer restore b --now"
    )
)
def restore(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="What deployer backup wrote.", metavar="FILE")],
    now: Annotated[
        bool, typer.Option("--now", help="Do not wait for running tasks of the database that is replaced.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Answer the question with yes.")] = False,
) -> None:
    """Replace the deployment's database by that of a backup, all or nothing, after asking.

    The backup is checked, loaded and compared beside the database in use; then Airflow stops, the databases change
    places and Airflow starts again. Whatever fails, the old database stays or comes back. The deployment may be another
    one than the backup is of; its password and keys stay.
    """
    from airflow_deployer import backup_file, connection
    from airflow_deployer import restore as restores

    options: Globals = ctx.obj
    settings = options.settings()
    with options.console.step("Backup") as step:
        opened = backup_file.opened(file, lambda size: step.update(f"{size / 1e6:,.1f} MB checked"))
        checked = ctx.with_resource(opened)
        step.done(f"{file} is whole")
    session = connection.connect(settings)
    if not yes:
        _confirm(restores.question(session, checked))
    report = restores.restore(session, checked, options.console, now=now)
    options.console.result(report.document(), report.lines())


@app.command(epilog=_examples("deployer status", "deployer status -o json", "deployer status --show-password"))
def status(
    ctx: typer.Context,
    show_password: Annotated[
        bool, typer.Option("--show-password", help="Include the password of Airflow's admin user.")
    ] = False,
) -> None:
    """Show what runs: pod, image and DAG content, Airflow's components, import errors, storage and the URL.

    Exits with 1 when something is deployed but not healthy, or nothing is deployed.
    """
    from airflow_deployer import inspection

    options: Globals = ctx.obj
    report = inspection.status(options.settings(), show_password=show_password)
    options.console.result(report.document(), report.lines())
    if not report.healthy:
        raise typer.Exit(EXIT_FAILED)


@app.command(epilog=_examples("deployer lock", "deployer lock 2.10.5", "deployer lock 2.10.5 -o json"))
def lock(
    ctx: typer.Context,
    version: Annotated[
        str | None, typer.Argument(help="Airflow's version.  [default: airflow.version]", metavar="VERSION")
    ] = None,
) -> None:
    """Pin the packages of an Airflow version, with hashes, in airflow-VERSION.txt, for a version without a lock.

    The next `up` of that version builds its base image from the file, which belongs into version control. Safe to
    repeat: packages stay at what the file holds; delete it for the newest ones.
    """
    from airflow_deployer import locking

    options: Globals = ctx.obj
    report = locking.lock(options.project, options.settings(airflow__version=version), options.console)
    options.console.result(report.document(), report.lines())


@app.command(epilog=_examples("deployer render", "deployer render > airflow.yaml"))
def render(ctx: typer.Context) -> None:
    """Print the Kubernetes objects that `up` would apply, as YAML (as JSON with --output json); secrets stay blank."""
    from airflow_deployer import deploy

    options: Globals = ctx.obj
    objects = deploy.render(options.project, options.settings(), options.console)
    if options.console.json_output:
        import json

        options.console.text(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}, indent=2) + "\n")
        return
    import yaml

    options.console.text(yaml.safe_dump_all(objects, sort_keys=False, width=120))


@cluster_app.command(
    "up",
    epilog=_examples(
        "deployer cluster up",
        "deployer cluster up --provider native",
        "deployer cluster up --airflow 2.11.2 --airflow 1.10.15",
    ),
)
def cluster_up(
    ctx: typer.Context,
    provider: Annotated[
        Provider, typer.Option(help="kind where Docker and kind are there, else native (Debian, as root).")
    ] = Provider.AUTO,
    airflow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VERSION",
            help="A version of Airflow to be deployed there, beside the default one; may be repeated. Native makes the "
            "images it builds on.",
        ),
    ] = None,
) -> None:
    """Make or start a local cluster with a registry that `deployer up` finds by itself."""
    from dataclasses import asdict

    from airflow_deployer import local_cluster, reports

    options: Globals = ctx.obj
    found = local_cluster.up(provider.value, options.console, airflow=airflow or ())
    options.console.result(asdict(found), reports.cluster_lines(found))


@cluster_app.command("down", epilog=_examples("deployer cluster down", "deployer cluster down --purge --yes"))
def cluster_down(
    ctx: typer.Context,
    provider: Annotated[Provider, typer.Option(help="Whose cluster.")] = Provider.AUTO,
    purge: Annotated[
        bool, typer.Option("--purge", help="Remove its volumes, registry content and caches too, after asking.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Answer the question of --purge with yes.")] = False,
) -> None:
    """Stop the local cluster; it comes back as it was with the next `cluster up`."""
    from airflow_deployer import local_cluster

    options: Globals = ctx.obj
    if purge and not yes:
        _confirm("Delete the local cluster with all its volumes, images and caches for good?")
    local_cluster.down(provider.value, options.console, purge=purge)
    state = "removed" if purge else "stopped"
    options.console.result({"state": state}, [("cluster", state)])


@cluster_app.command("status", epilog=_examples("deployer cluster status", "deployer cluster status -o json"))
def cluster_status(
    ctx: typer.Context,
    provider: Annotated[Provider, typer.Option(help="Whose cluster.")] = Provider.AUTO,
) -> None:
    """Show the local cluster and its parts; exits with 1 when it does not run."""
    from dataclasses import asdict

    from airflow_deployer import local_cluster, reports

    options: Globals = ctx.obj
    found = local_cluster.status(provider.value)
    options.console.result(asdict(found), reports.cluster_lines(found))
    if found.state != "running":
        raise typer.Exit(EXIT_FAILED)


def _confirm(question: str) -> None:
    """Ask before data is deleted.

    Raises:
        ConfigurationError: there is nobody to ask, or the answer is no.
    """
    if not sys.stdin.isatty():
        raise ConfigurationError(
            "Refusing to delete data without a question, and there is no terminal to ask on.", hint="add --yes"
        )
    if not typer.confirm(question, default=False, err=True):
        raise ConfigurationError("Nothing was deleted.")
