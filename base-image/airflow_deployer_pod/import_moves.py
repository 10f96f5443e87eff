"""What moved between Airflow's series, and which lines of a DAG file are concerned.

`THINGS` is the table. Each thing is spelled differently in 1.10, 2 and 3, and every spelling says how it fares in the
newest release of each (1.10.15, 2.11.2, 3.3.2): `+` works, `d` works and is deprecated, `-` is gone or not there yet,
`p` and `q` are `+` and `d` where the package behind them is installed. The replacement of a spelling is the first one
of the same thing that works. `tests/e2e/test_import_moves.py` asks Airflow itself about all of them, in the image of
each series.

A spelling is one of these:

    airflow.operators.bash.BashOperator     a name to import; `{A,B}` in it stands for a thing each
    airflow.contrib.*                       all that a package holds, where nothing else is said of a name in it
    DAG(schedule=)                          an argument of a DAG or a `@dag`; of an `Operator` of any kind, or of a
                                            class of that name
    {{ ds }}                                a key of the task's context, in a template or in Python
    = text                                  what to do instead where no single name says it

Pure, and for every Python that a base image has.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

SERIES = ("1.10", "2", "3")
"""The columns of the table: the names of the profiles."""

_TABLE = """
airflow.DAG                                     +++
airflow.models.DAG                              +++
airflow.models.dag.DAG                          ++d
airflow.sdk.DAG                                 --+

airflow.decorators.dag                          -+d
airflow.models.dag.dag                          -+d
airflow.sdk.dag                                 --+
= with DAG(...)                                 +++

airflow.decorators.task                         -+d
airflow.operators.python.task                   -d-
airflow.sdk.task                                --+
= PythonOperator(python_callable=...)           +++

airflow.decorators.{task_group,setup,teardown}  -+d
airflow.sdk.{task_group,setup,teardown}         --+

airflow.models.BaseOperator                     +++
airflow.models.baseoperator.BaseOperator        ++d
airflow.sdk.BaseOperator                        --+

airflow.models.BaseOperatorLink                 +++
airflow.models.baseoperator.BaseOperatorLink    +d-
airflow.sdk.BaseOperatorLink                    --+

airflow.models.Variable                         +++
airflow.sdk.Variable                            --+

airflow.models.Connection                       +++
airflow.sdk.Connection                          --+

airflow.models.param.Param                      -+d
airflow.models.Param                            -++
airflow.sdk.Param                               --+
= a plain value in DAG(params=...)              +++

airflow.models.xcom.XCom                        ++d
airflow.models.XCom                             +++

airflow.models.xcom.BaseXCom                    ++d
airflow.sdk.BaseXCom                            --+

airflow.models.xcom_arg.XComArg                 -+d
airflow.sdk.XComArg                             --+

airflow.models.dagbag.DagBag                    ++d
airflow.models.DagBag                           +++

airflow.models.skipmixin.SkipMixin              ++d
airflow.models.SkipMixin                        +++

airflow.utils.helpers.{chain,cross_downstream}          +d-
airflow.models.baseoperator.{chain,cross_downstream,chain_linear}   -+d
airflow.sdk.{chain,cross_downstream,chain_linear}       --+

airflow.utils.helpers                                   +++

airflow.utils.decorators                                +++

airflow.operators.dummy_operator.DummyOperator                  +d-
airflow.operators.dummy.DummyOperator                           -d-
airflow.operators.empty.EmptyOperator                           -+d
airflow.providers.standard.operators.empty.EmptyOperator        -p+

airflow.operators.bash_operator.BashOperator                    +d-
airflow.operators.bash.BashOperator                             -+d
airflow.providers.standard.operators.bash.BashOperator          -p+

airflow.operators.python_operator.{Python,BranchPython,ShortCircuit,PythonVirtualenv}Operator   +d-
airflow.operators.python.{Python,BranchPython,ShortCircuit,PythonVirtualenv}Operator            -+d
airflow.providers.standard.operators.python.{Python,BranchPython,ShortCircuit,PythonVirtualenv}Operator -p+

airflow.operators.python.{ExternalPython,BranchExternalPython,BranchPythonVirtualenv}Operator           -+d
airflow.providers.standard.operators.python.{ExternalPython,BranchExternalPython,BranchPythonVirtualenv}Operator -p+

airflow.operators.python.get_current_context                    -+d
airflow.sdk.get_current_context                                 --+
= PythonOperator(provide_context=True)                          +--

airflow.operators.branch_operator.BaseBranchOperator            +d-
airflow.operators.branch.BaseBranchOperator                     -+d
airflow.sdk.BaseBranchOperator                                  --+

airflow.operators.email_operator.EmailOperator                  +d-
airflow.operators.email.EmailOperator                           -+d
airflow.providers.smtp.operators.smtp.EmailOperator             -p+

airflow.operators.dagrun_operator.TriggerDagRunOperator                     +d-
airflow.operators.trigger_dagrun.TriggerDagRunOperator                      -+d
airflow.providers.standard.operators.trigger_dagrun.TriggerDagRunOperator   -p+

airflow.operators.latest_only_operator.LatestOnlyOperator                   +d-
airflow.operators.latest_only.LatestOnlyOperator                            -+d
airflow.providers.standard.operators.latest_only.LatestOnlyOperator         -p+

airflow.operators.datetime.BranchDateTimeOperator                           -+d
airflow.providers.standard.operators.datetime.BranchDateTimeOperator        -p+

airflow.operators.weekday.BranchDayOfWeekOperator                           -+d
airflow.providers.standard.operators.weekday.BranchDayOfWeekOperator        -p+

airflow.operators.subdag_operator.SubDagOperator                +d-
airflow.operators.subdag.SubDagOperator                         -d-
airflow.utils.task_group.TaskGroup                              -+d
airflow.sdk.TaskGroup                                           --+

airflow.operators.generic_transfer.GenericTransfer                          ++d
airflow.providers.common.sql.operators.generic_transfer.GenericTransfer     -++

airflow.operators.check_operator.CheckOperator                              dd-
airflow.operators.sql.SQLCheckOperator                                      +d-
airflow.providers.common.sql.operators.sql.SQLCheckOperator                 -++

airflow.operators.sql_branch_operator.BranchSqlOperator                     dd-
airflow.operators.sql.BranchSQLOperator                                     +d-
airflow.providers.common.sql.operators.sql.BranchSQLOperator                -++

airflow.operators.http_operator.SimpleHttpOperator                          +--
airflow.providers.http.operators.http.HttpOperator                          -+p

airflow.operators.postgres_operator.PostgresOperator                        +--
airflow.operators.mysql_operator.MySqlOperator                              p--
airflow.operators.sqlite_operator.SqliteOperator                            +--
airflow.operators.mssql_operator.MsSqlOperator                              p--
airflow.operators.oracle_operator.OracleOperator                            p--
airflow.operators.jdbc_operator.JdbcOperator                                p--
airflow.providers.common.sql.operators.sql.SQLExecuteQueryOperator          -++

airflow.operators.slack_operator.SlackAPIPostOperator                       pq-
airflow.providers.slack.operators.slack.SlackAPIPostOperator                -pp

airflow.operators.docker_operator.DockerOperator                            pq-
airflow.providers.docker.operators.docker.DockerOperator                    -pp

airflow.sensors.base_sensor_operator.BaseSensorOperator         +d-
airflow.sensors.base.BaseSensorOperator                         -+d
airflow.sdk.BaseSensorOperator                                  --+

airflow.sensors.base.PokeReturnValue                            -+d
airflow.sdk.PokeReturnValue                                     --+

airflow.contrib.sensors.python_sensor.PythonSensor              +d-
airflow.sensors.python.PythonSensor                             -+d
airflow.providers.standard.sensors.python.PythonSensor          -p+

airflow.contrib.sensors.bash_sensor.BashSensor                  +d-
airflow.sensors.bash.BashSensor                                 -+d
airflow.providers.standard.sensors.bash.BashSensor              -p+

airflow.contrib.sensors.file_sensor.FileSensor                  +d-
airflow.sensors.filesystem.FileSensor                           -+d
airflow.providers.standard.sensors.filesystem.FileSensor        -p+

airflow.contrib.sensors.weekday_sensor.DayOfWeekSensor          +d-
airflow.sensors.weekday.DayOfWeekSensor                         -+d
airflow.providers.standard.sensors.weekday.DayOfWeekSensor      -p+

airflow.sensors.external_task_sensor.{ExternalTaskSensor,ExternalTaskMarker}                +d-
airflow.sensors.external_task.{ExternalTaskSensor,ExternalTaskMarker}                       -+d
airflow.providers.standard.sensors.external_task.{ExternalTaskSensor,ExternalTaskMarker}    -p+

airflow.sensors.date_time_sensor.DateTimeSensor                 +d-
airflow.sensors.date_time.DateTimeSensor                        -+d
airflow.providers.standard.sensors.date_time.DateTimeSensor     -p+

airflow.sensors.time_sensor.TimeSensor                          ++d
airflow.providers.standard.sensors.time.TimeSensor              -p+

airflow.sensors.time_delta_sensor.TimeDeltaSensor               +d-
airflow.sensors.time_delta.TimeDeltaSensor                      -+d
airflow.providers.standard.sensors.time_delta.TimeDeltaSensor   -p+

airflow.sensors.sql_sensor.SqlSensor                            +d-
airflow.sensors.sql.SqlSensor                                   -d-
airflow.providers.common.sql.sensors.sql.SqlSensor              -++

airflow.sensors.http_sensor.HttpSensor                          +d-
airflow.providers.http.sensors.http.HttpSensor                  -+p

airflow.sensors.s3_key_sensor.S3KeySensor                       +q-
airflow.providers.amazon.aws.sensors.s3.S3KeySensor             -pp

airflow.hooks.base_hook.BaseHook                                +d-
airflow.hooks.base.BaseHook                                     -+d
airflow.sdk.BaseHook                                            --+

airflow.hooks.dbapi_hook.DbApiHook                              +d-
airflow.hooks.dbapi.DbApiHook                                   -d-
airflow.providers.common.sql.hooks.sql.DbApiHook                -++

airflow.contrib.hooks.fs_hook.FSHook                            +d-
airflow.hooks.filesystem.FSHook                                 -+d
airflow.providers.standard.hooks.filesystem.FSHook              -p+

airflow.hooks.subprocess.SubprocessHook                         -+d
airflow.providers.standard.hooks.subprocess.SubprocessHook      -p+

airflow.hooks.http_hook.HttpHook                                +d-
airflow.providers.http.hooks.http.HttpHook                      -+p

airflow.hooks.postgres_hook.PostgresHook                        +d-
airflow.providers.postgres.hooks.postgres.PostgresHook          -++

airflow.hooks.mysql_hook.MySqlHook                              pq-
airflow.providers.mysql.hooks.mysql.MySqlHook                   -pp

airflow.hooks.sqlite_hook.SqliteHook                            +d-
airflow.providers.sqlite.hooks.sqlite.SqliteHook                -+p

airflow.hooks.S3_hook.S3Hook                                    pq-
airflow.providers.amazon.aws.hooks.s3.S3Hook                    -pp

airflow.hooks.slack_hook.SlackHook                              pq-
airflow.providers.slack.hooks.slack.SlackHook                   -pp

airflow.contrib.hooks.ssh_hook.SSHHook                          pq-
airflow.providers.ssh.hooks.ssh.SSHHook                         -pp

airflow.contrib.operators.ssh_operator.SSHOperator              pq-
airflow.providers.ssh.operators.ssh.SSHOperator                 -pp

airflow.contrib.hooks.ftp_hook.FTPHook                          +d-
airflow.providers.ftp.hooks.ftp.FTPHook                         -+p

airflow.contrib.hooks.sftp_hook.SFTPHook                        pq-
airflow.providers.sftp.hooks.sftp.SFTPHook                      -pp

airflow.contrib.operators.sftp_operator.SFTPOperator            pq-
airflow.providers.sftp.operators.sftp.SFTPOperator              -pp

airflow.contrib.operators.kubernetes_pod_operator.KubernetesPodOperator         pq-
airflow.providers.cncf.kubernetes.operators.pod.KubernetesPodOperator           -pp

airflow.contrib.operators.spark_submit_operator.SparkSubmitOperator             +q-
airflow.providers.apache.spark.operators.spark_submit.SparkSubmitOperator       -pp

airflow.contrib.hooks.gcs_hook.GoogleCloudStorageHook           pq-
airflow.providers.google.cloud.hooks.gcs.GCSHook                -pp

airflow.contrib.*                                               +q-
= the provider package that took it over                        -++

airflow.Dataset                                                 -+d
airflow.datasets.Dataset                                        -+-
airflow.sdk.Asset                                               --+

airflow.datasets.DatasetAlias                                   -+-
airflow.sdk.AssetAlias                                          --+

airflow.datasets.DatasetAll                                     -+-
airflow.sdk.AssetAll                                            --+

airflow.datasets.DatasetAny                                     -+-
airflow.sdk.AssetAny                                            --+

airflow.datasets.metadata.Metadata                              -+-
airflow.sdk.Metadata                                            --+

airflow.timetables.datasets.DatasetOrTimeSchedule               -+-
airflow.timetables.assets.AssetOrTimeSchedule                   --+

airflow.utils.dates.days_ago                                    +d-
= pendulum.today("UTC").add(days=-N)                            +++
airflow.utils.dates                                             +++

airflow.utils.trigger_rule.TriggerRule                          ++d
airflow.sdk.TriggerRule                                         --+

airflow.utils.weight_rule.WeightRule                            ++d
airflow.sdk.WeightRule                                          --+

airflow.utils.edgemodifier.Label                                -++
airflow.sdk.Label                                               --+

airflow.utils.timezone.{datetime,utcnow}                        ++d
airflow.sdk.timezone.{datetime,utcnow}                          --+

airflow.utils.db.provide_session                                +++
airflow.utils.session.provide_session                           -++

airflow.utils.db.create_session                                 ++-
airflow.utils.session.create_session                            -++

airflow.utils.decorators.apply_defaults                         +d-
= leave it out                                                  -++

airflow.utils.log.secrets_masker.mask_secret                    -+-
airflow.sdk.log.mask_secret                                     --+

airflow.utils.context.Context                                   -+d
airflow.sdk.Context                                             --+

airflow.notifications.basenotifier.BaseNotifier                 -+d
airflow.sdk.BaseNotifier                                        --+

airflow.io.path.ObjectStoragePath                               -+d
airflow.sdk.ObjectStoragePath                                   --+

airflow.exceptions.Airflow{SkipException,FailException,SensorTimeout,TaskTimeout}      ++d
airflow.sdk.exceptions.Airflow{SkipException,FailException,SensorTimeout,TaskTimeout}  --+

airflow.triggers.temporal.{DateTimeTrigger,TimeDeltaTrigger}                        -+d
airflow.providers.standard.triggers.temporal.{DateTimeTrigger,TimeDeltaTrigger}     -p+

airflow.macros.{ds_add,ds_format}                               ++d
= {{ macros.NAME(...) }} in a template                          +++

airflow.kubernetes.secret.Secret                                +q-
airflow.providers.cncf.kubernetes.secret.Secret                 -pp

airflow.api.common.experimental.*                               +d-
airflow.www.*                                                   ++-
= the REST API                                                  +++

airflow.providers.*                                             -pp
= airflow.operators, airflow.sensors, airflow.hooks and airflow.contrib     +--

airflow.sdk.*                                                   --+
= airflow.models, airflow.decorators and airflow.utils          ++-

DAG(schedule_interval=)                         +d-
DAG(timetable=)                                 -d-
DAG(schedule=)                                  -++

DAG(concurrency=)                               +d-
DAG(max_active_tasks=)                          -++

DAG(sla_miss_callback=)                         ++d
= DAG(deadline=DeadlineAlert(...))              --+

DAG(default_view=)                              ++-
DAG(orientation=)                               ++-
= leave it out                                  --+

DAG(fail_stop=)                                 -+-
DAG(fail_fast=)                                 --+

{Python,BranchPython,ShortCircuit}Operator(provide_context=)  +d-
= leave it out: the context is always given     -++

Operator(task_concurrency=)                     +d-
Operator(max_active_tis_per_dag=)               -++

Operator(sla=)                                  ++d
= DAG(deadline=DeadlineAlert(...))              --+

TriggerDagRunOperator(execution_date=)          +d-
TriggerDagRunOperator(logical_date=)            -++

{{ triggering_dataset_events }}                 -+-
{{ triggering_asset_events }}                   --+

{{ execution_date }}                            +d-
{{ logical_date }}                              -++

{{ next_execution_date }}                       +d-
{{ data_interval_end }}                         -++

{{ prev_execution_date }}                       +d-
{{ prev_data_interval_start_success }}          -++

{{ prev_execution_date_success }}               +d-
{{ prev_data_interval_start_success }}          -++

{{ next_ds }}                                   +d-
= {{ data_interval_end | ds }}                  -++

{{ next_ds_nodash }}                            +d-
= {{ data_interval_end | ds_nodash }}           -++

{{ prev_ds }}                                   +d-
{{ prev_ds_nodash }}                            +d-
= {{ prev_data_interval_start_success | ds }}   -++

{{ yesterday_ds }}                              +d-
{{ yesterday_ds_nodash }}                       +d-
= {{ macros.ds_add(ds, -1) }}                   +++

{{ tomorrow_ds }}                               +d-
{{ tomorrow_ds_nodash }}                        +d-
= {{ macros.ds_add(ds, 1) }}                    +++
"""

_BRACES = re.compile(r"^(.*)\{([\w,]+)\}([\w(=)]*)$")
_ARGUMENT = re.compile(r"^(\w+)\((\w+)=\)$")
_CONTEXT_KEY = re.compile(r"^\{\{ (\w+) \}\}$")
_TEMPLATE = re.compile(r"\{\{(.*?)\}\}|\{%(.*?)%\}", re.DOTALL)
_WORD = re.compile(r"(?<![\w.\"'])[A-Za-z_]\w*")
# What is called on these is a DAG, what is called by such a name is an operator of any kind.
_DAG_MAKERS = re.compile(r"^airflow\.(?:[\w.]+\.)?(?:DAG|dag)$")
_OPERATOR = re.compile(r"^airflow\..*(?:Operator|Sensor)$")
_TASK_DECORATOR = re.compile(r"^airflow\.(?:sdk|decorators)\.task(?:\.|$)")
_CALLABLE = re.compile(rb"python_callable=(\w+)")
_CONTEXTS = ("context", "kwargs")
_HARMLESS = ("ImportError", "ModuleNotFoundError", "Exception", "BaseException", "AttributeError")


@dataclass(frozen=True)
class Spelling:
    """How a thing is written somewhere.

    Attributes:
        text: as the module's documentation says.
        states: one character for each of `SERIES`.
    """

    text: str
    states: str

    def state(self, series: str) -> str:
        """One of the characters of the table."""
        return self.states[SERIES.index(series)]

    @property
    def module(self) -> str:
        """The module of a name to import; empty for any other spelling."""
        return self.text.rpartition(".")[0] if re.match(r"airflow[\w.]+$", self.text) else ""


@dataclass(frozen=True)
class Move:
    """A spelling that does not, or not for long, work in a series.

    Attributes:
        name: the spelling, without its parameters.
        gone: whether it does not work; otherwise it is deprecated.
        advice: what to write instead, as code or as words; empty where there is nothing.
    """

    name: str
    gone: bool
    advice: str


@dataclass(frozen=True)
class Use:
    """A line that is concerned by a move.

    Attributes:
        line: from 1.
        move: what it is.
        certain: whether importing the file runs this line in any case: not in a function, behind an `if`, or where a
            failure is caught.
        handled: whether somebody has thought of it: behind an `if`, or where a failed import is caught.
    """

    line: int
    move: Move
    certain: bool
    handled: bool


@dataclass(frozen=True)
class Import:
    """A module that importing a file imports in any case, with what is taken from it; `level` counts leading dots."""

    level: int
    module: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """What a file's text says: the uses of what moved, by line, and its unconditional imports."""

    uses: tuple[Use, ...]
    imports: tuple[Import, ...]


def _parse(table: str) -> tuple[tuple[Spelling, ...], ...]:
    things: list[tuple[Spelling, ...]] = []
    for block in table.strip().split("\n\n"):
        # Braces stand for a thing each: what has none belongs to all of them.
        family: dict[str, list[Spelling]] = {}
        for row in block.splitlines():
            text, states = row.rsplit(None, 1)
            braces = _BRACES.match(text)
            for member in braces[2].split(",") if braces else [""]:
                family.setdefault(member, []).append(
                    Spelling(f"{braces[1]}{member}{braces[3]}" if braces else text, states)
                )
        shared = family.pop("", [])
        things += [(*spellings, *shared) for spellings in family.values()] or [tuple(shared)]
    return tuple(things)


THINGS = _parse(_TABLE)
"""What moved: the spellings of each thing, the oldest first."""


def replacement(thing: tuple[Spelling, ...], series: str) -> Spelling | None:
    """The spelling that works in a series, rather one that needs no package of its own; None where there is none."""
    working = {spelling.state(series): spelling for spelling in reversed(thing)}
    return working.get("+") or working.get("p")


def _advice(thing: tuple[Spelling, ...], series: str) -> str:
    found = replacement(thing, series)
    if found is None:
        return ""
    if not found.module:
        return found.text.lstrip("= ")
    package = provider_package(found.text)
    needs = f" (package {package})" if found.state(series) == "p" and package else ""
    return f"from {found.module} import {found.text.rpartition('.')[2]}{needs}"


def provider_package(name: str) -> str:
    """The package that holds a name of `airflow.providers`; empty for any other name.

    A provider's name has one part (`http`) or, under these parents, two (`cncf.kubernetes`).
    """
    parts = name.split(".")[2:]
    if not name.startswith("airflow.providers.") or not parts[0]:
        return ""
    length = 2 if parts[0] in ("apache", "atlassian", "cncf", "common", "dbt", "microsoft") else 1
    return "-".join(["apache-airflow-providers", *parts[:length]])


class Series:
    """What moved, as seen from one series.

    Args:
        name: one of `SERIES`.
    """

    def __init__(self, name: str) -> None:
        self._moves: dict[str, Move] = {}
        self._fine: set[str] = set()
        modules: dict[str, list[Move | None]] = {}
        for thing in THINGS:
            advice = _advice(thing, name)
            for spelling in thing:
                state = spelling.state(name)
                concerned = state in "dq-" and not spelling.text.startswith("=")
                move = Move(spelling.text, state == "-", advice) if concerned else None
                if move is None:
                    self._fine.add(spelling.text)
                else:
                    self._moves.setdefault(spelling.text, move)
                if spelling.module:
                    modules.setdefault(spelling.module, []).append(move)
        for module, moves in modules.items():
            # A module of which nothing is left is gone itself; of one with something left nothing is said.
            if (
                f"{module}.*" not in self._moves
                and module not in self._moves
                and all(move is not None and move.gone for move in moves)
            ):
                into = sorted({move.advice.split()[1] for move in moves if move and move.advice.startswith("from ")})
                self._moves[module] = Move(module, True, f"import {', '.join(into)}" if into else "")
        self._packages = [text[:-1] for text in self._moves if text.endswith(".*")]
        packages = {text.split(".")[1] for text in self._moves if text.startswith("airflow.")}
        self._imports = re.compile(
            rb"airflow(?: import\b|\.(?:"
            + "|".join(map(re.escape, sorted(packages))).encode()
            + rb")\b)|import airflow\b"
        )
        found = [_ARGUMENT.match(text) or _CONTEXT_KEY.match(text) for text in self._moves]
        self._words = sorted({match[match.re.groups].encode() for match in found if match})

    def find(self, name: str) -> Move | None:
        """What is to say of a name, or of an argument or key as the table spells it."""
        if name in self._fine:
            return None
        if name in self._moves:
            return self._moves[name]
        module = name.rpartition(".")[0]
        while module:
            if module in self._moves:
                return Move(name, True, self._moves[module].advice)
            module = module.rpartition(".")[0]
        for package in self._packages:
            if f"{name}.".startswith(package):
                return Move(name, self._moves[f"{package}*"].gone, self._moves[f"{package}*"].advice)
        return None

    def read(self, source: bytes) -> Reading:
        """Find what a file uses of what moved; a file that Python cannot parse uses nothing."""
        # Parsing takes a hundred times as long as looking for the words.
        if not self._imports.search(source) and not any(word in source for word in self._words):
            return Reading((), ())
        return self.read_thoroughly(source)

    def read_thoroughly(self, source: bytes) -> Reading:
        """The same for a file whose imports matter even if it names nothing that moved."""
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return Reading((), ())
        reader = _Reader(self, source)
        try:
            reader.visit(tree)
        except RecursionError:
            return Reading((), ())
        unique = {(use.line, use.move.name): use for use in reversed(reader.uses)}
        return Reading(tuple(sorted(unique.values(), key=lambda use: (use.line, use.move.name))), tuple(reader.imports))


class _Reader(ast.NodeVisitor):
    """Walks one file."""

    def __init__(self, series: Series, source: bytes) -> None:
        self.uses: list[Use] = []
        self.imports: list[Import] = []
        self._series = series
        self._names: dict[str, str] = {}
        self._later = 0
        self._handled = 0
        self._callables = set(_CALLABLE.findall(source))

    def _use(self, node: ast.AST, name: str, *, shown: str = "", at_run: bool = False) -> bool:
        move = self._series.find(name)
        if move is None:
            return False
        if shown:
            move = replace(move, name=shown)
        certain = not (self._later or self._handled or at_run)
        self.uses.append(Use(getattr(node, "lineno", 1), move, certain, self._handled > 0))
        return True

    # -- where a line stands ------------------------------------------------------------------------------------------

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        self._visit_handled([*node.body, *node.orelse])

    def visit_Try(self, node: ast.Try) -> None:
        caught = {_last_name(each) for handler in node.handlers for each in _caught(handler)}
        if caught.isdisjoint(_HARMLESS):
            self.generic_visit(node)
            return
        self._visit_handled([*node.body, *node.handlers, *node.orelse])
        for each in node.finalbody:
            self.visit(each)

    def visit_With(self, node: ast.With) -> None:
        calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
        if any(_last_name(call.func) == "suppress" for call in calls):
            self._visit_handled(node.body)
        else:
            self.generic_visit(node)

    def _visit_handled(self, nodes: list[ast.AST] | list[ast.stmt]) -> None:
        self._handled += 1
        for node in nodes:
            self.visit(node)
        self._handled -= 1

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._visit_function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._visit_function(node)

    def _visit_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for decorator in node.decorator_list:
            self.visit(decorator)
        decorators = [each.func if isinstance(each, ast.Call) else each for each in node.decorator_list]
        if node.name.encode() in self._callables or any(
            _TASK_DECORATOR.match(self._resolve(each)) for each in decorators
        ):
            for argument in (*node.args.args, *node.args.kwonlyargs):
                self._use(argument, f"{{{{ {argument.arg} }}}}", at_run=True)
        self._later += 1
        for each in (node.args, *node.body):
            self.visit(each)
        self._later -= 1

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._later += 1
        self.generic_visit(node)
        self._later -= 1

    def visit_Expr(self, node: ast.Expr) -> None:
        # A text alone on its line is documentation.
        if not isinstance(node.value, ast.Constant):
            self.visit(node.value)

    # -- what it uses -------------------------------------------------------------------------------------------------

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            first = alias.name.partition(".")[0]
            self._names[alias.asname or first] = alias.name if alias.asname else first
            self._note_import(Import(0, alias.name, ()))
            if first == "airflow":
                self._use(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        self._note_import(Import(node.level, module, tuple(alias.name for alias in node.names)))
        if node.level or module.partition(".")[0] != "airflow":
            return
        for alias in node.names:
            name = module if alias.name == "*" else f"{module}.{alias.name}"
            self._names[alias.asname or alias.name] = name
            self._use(node, name)

    def _note_import(self, found: Import) -> None:
        if not (self._later or self._handled):
            self.imports.append(found)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = self._resolve(node)
        # What an import statement has named already is not named again.
        imported = name.rpartition(".")[0] in {use.move.name for use in self.uses}
        if imported or not name.startswith("airflow.") or not self._use(node, name):
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        callee = self._resolve(node.func)
        own = callee.rpartition(".")[2] if callee.startswith("airflow.") else ""
        kinds = ["DAG"] if _DAG_MAKERS.match(callee) else [own, "Operator"] if _OPERATOR.match(callee) else []
        for keyword in node.keywords:
            for kind in kinds:
                self._use(node, f"{kind}({keyword.arg}=)", shown=f"{own}({keyword.arg}=)")
        if isinstance(node.func, ast.Attribute) and node.func.attr == "get" and node.args:
            self._use_key(node, node.func.value, node.args[0])
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        # Python 3.8 wraps the key.
        key = node.slice if isinstance(node.slice, ast.Constant) else getattr(node.slice, "value", None)
        self._use_key(node, node.value, key)
        self.generic_visit(node)

    def _use_key(self, node: ast.AST, holder: ast.AST, key: ast.AST | None) -> None:
        called = isinstance(holder, ast.Call) and _last_name(holder.func) == "get_current_context"
        if not called and not (isinstance(holder, ast.Name) and holder.id in _CONTEXTS):
            return
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            self._use(node, f"{{{{ {key.value} }}}}", at_run=True)

    def visit_Constant(self, node: ast.Constant) -> None:
        if not isinstance(node.value, str) or "{" not in node.value:
            return
        for expression in _TEMPLATE.finditer(node.value):
            for word in _WORD.findall(expression[1] or expression[2]):
                self._use(node, f"{{{{ {word} }}}}", at_run=True)

    def _resolve(self, node: ast.AST) -> str:
        """The dotted name that an expression stands for, as far as import statements say; else empty."""
        if isinstance(node, ast.Name):
            return self._names.get(node.id, "")
        if isinstance(node, ast.Attribute):
            holder = self._resolve(node.value)
            return f"{holder}.{node.attr}" if holder else ""
        return ""


def _last_name(node: ast.AST | None) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _caught(handler: ast.ExceptHandler) -> Iterator[ast.AST | None]:
    if isinstance(handler.type, ast.Tuple):
        yield from handler.type.elts
    else:
        # A bare `except` catches everything.
        yield handler.type or ast.Name("BaseException", ast.Load())
