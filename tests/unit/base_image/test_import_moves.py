"""The table of what moved, and which lines of a DAG file are said to be concerned."""

from __future__ import annotations

import textwrap

import pytest
from airflow_deployer_pod.import_moves import SERIES, THINGS, Series, Spelling, provider_package, replacement

from airflow_deployer.airflow_profiles import PROFILES


def uses(series: str, source: str) -> list[tuple[int, str, bool]]:
    """Line, name and whether it is gone, for each use that nobody has thought of."""
    found = Series(series).read(textwrap.dedent(source).encode()).uses
    return [(use.line, use.move.name, use.move.gone) for use in found if not use.handled]


def advice(series: str, name: str) -> str:
    move = Series(series).find(name)
    assert move is not None
    return move.advice


def test_the_table_has_a_column_for_each_profile_and_no_name_twice() -> None:
    assert set(SERIES) == {profile.series for profile in PROFILES}
    concerned = [
        spelling.text
        for thing in THINGS
        for spelling in thing
        if spelling.module and set(spelling.states) & set("dq-") and "+" in spelling.states[:2]
    ]
    assert len(concerned) == len(set(concerned))
    assert all(
        set(spelling.states) <= set("+d-pq") and len(spelling.states) == 3 for thing in THINGS for spelling in thing
    )


def test_braces_stand_for_a_thing_each() -> None:
    thing = next(thing for thing in THINGS if thing[0].text == "airflow.operators.python_operator.ShortCircuitOperator")
    assert thing[1] == Spelling("airflow.operators.python.ShortCircuitOperator", "-+d")
    assert replacement(thing, "3") == thing[2]


@pytest.mark.parametrize(
    ("series", "name", "instead"),
    [
        (
            "3",
            "airflow.operators.dummy_operator.DummyOperator",
            "from airflow.providers.standard.operators.empty import EmptyOperator",
        ),
        (
            "2",
            "airflow.operators.dummy_operator.DummyOperator",
            "from airflow.operators.empty import EmptyOperator",
        ),
        (
            "1.10",
            "airflow.operators.empty.EmptyOperator",
            "from airflow.operators.dummy_operator import DummyOperator",
        ),
        ("2", "airflow.sdk.DAG", "from airflow import DAG"),
        ("1.10", "airflow.sdk.task", "PythonOperator(python_callable=...)"),
        ("1.10", "airflow.sdk.DeadlineAlert", "airflow.models, airflow.decorators and airflow.utils"),
        (
            "3",
            "airflow.contrib.hooks.ssh_hook.SSHHook",
            "from airflow.providers.ssh.hooks.ssh import SSHHook (package apache-airflow-providers-ssh)",
        ),
        ("3", "airflow.contrib.hooks.jira_hook.JiraHook", "the provider package that took it over"),
        ("3", "airflow.operators.bash_operator", "import airflow.providers.standard.operators.bash"),
        ("3", "DAG(schedule_interval=)", "DAG(schedule=)"),
        ("1.10", "DAG(schedule=)", "DAG(schedule_interval=)"),
        ("3", "{{ execution_date }}", "{{ logical_date }}"),
        ("1.10", "{{ logical_date }}", "{{ execution_date }}"),
    ],
)
def test_the_replacement_is_what_works_in_that_series(series: str, name: str, instead: str) -> None:
    assert advice(series, name) == instead


@pytest.mark.parametrize(
    "name",
    [
        "airflow.DAG",
        "airflow.models.Variable",
        "airflow.utils.dates",
        "airflow.unknown.Thing",
        "DAG(dag_id=)",
        "{{ ds }}",
    ],
)
def test_what_works_everywhere_or_is_unknown_is_left_alone(name: str) -> None:
    assert all(Series(series).find(name) is None for series in SERIES)


def test_imports_arguments_and_keys_are_found_with_their_lines() -> None:
    source = """\
        from airflow import DAG
        from airflow.operators.bash import BashOperator
        from airflow.operators import python_operator
        import airflow.utils.dates as dates

        def late(execution_date, **context):
            from airflow.operators.dummy_operator import DummyOperator
            return context["next_ds"], context.get("prev_ds")

        with DAG(
            "x",
            schedule_interval="@daily",
            start_date=dates.days_ago(1),
        ):
            BashOperator(task_id="a", bash_command="{{ ds }} {{ dag_run.execution_date }} {{ execution_date | ts }}")
            python_operator.PythonOperator(task_id="b", python_callable=late, provide_context=True)
        """
    assert uses("3", source) == [
        (2, "airflow.operators.bash.BashOperator", False),
        (3, "airflow.operators.python_operator", True),
        (6, "{{ execution_date }}", True),
        (7, "airflow.operators.dummy_operator.DummyOperator", True),
        (8, "{{ next_ds }}", True),
        (8, "{{ prev_ds }}", True),
        (10, "DAG(schedule_interval=)", True),
        (13, "airflow.utils.dates.days_ago", True),
        (15, "{{ execution_date }}", True),
        (16, "PythonOperator(provide_context=)", True),
    ]


def test_a_decorated_dag_is_a_dag() -> None:
    source = """\
        from airflow.sdk import dag, task

        @dag(schedule=None)
        def x():
            @task
            def y(execution_date): ...
        """
    assert uses("3", source) == [(6, "{{ execution_date }}", True)]
    assert (3, "dag(schedule=)", True) in uses("1.10", source)


def test_only_what_an_import_runs_in_any_case_is_certain() -> None:
    source = b"""\
from airflow.operators.dummy_operator import DummyOperator
def f():
    from airflow.operators.dummy_operator import DummyOperator
class C:
    from airflow.operators.dummy_operator import DummyOperator
"""
    found = Series("3").read(source).uses
    assert [(use.line, use.certain) for use in found] == [(1, True), (3, False), (5, True)]


@pytest.mark.parametrize(
    "source",
    [
        """\
        try:
            from airflow.operators.empty import EmptyOperator
        except ImportError:
            from airflow.operators.dummy_operator import DummyOperator as EmptyOperator
        """,
        """\
        try:
            from airflow.operators.empty import EmptyOperator
        except (KeyError, ModuleNotFoundError):
            EmptyOperator = None
        """,
        """\
        if TYPE_CHECKING:
            from airflow.operators.empty import EmptyOperator
        """,
        """\
        from contextlib import suppress
        with suppress(ImportError):
            from airflow.operators.empty import EmptyOperator
        """,
        '''\
        """Says {{ execution_date }} of airflow.operators.empty."""
        ''',
    ],
)
def test_what_somebody_has_thought_of_is_left_alone(source: str) -> None:
    assert [uses(series, source) for series in SERIES] == [[], [], []]


def test_a_caught_failure_of_another_kind_is_none() -> None:
    source = """\
        try:
            from airflow.operators.empty import EmptyOperator
        except KeyError:
            pass
        """
    assert uses("1.10", source) == [(2, "airflow.operators.empty.EmptyOperator", True)]


@pytest.mark.parametrize("source", [b"def x(:", b"\0", b"", b"from airflow.operators.bash import *\n" + b"(" * 500])
def test_what_cannot_be_parsed_uses_nothing(source: bytes) -> None:
    assert Series("3").read(source).uses == ()


def test_a_file_without_any_of_the_words_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    modern = (
        b"from airflow.sdk import DAG, task\nfrom airflow.providers.standard.operators.empty import EmptyOperator\n"
    )
    monkeypatch.setattr(Series, "read_thoroughly", lambda *_: pytest.fail("it was parsed"))
    assert Series("3").read(modern).uses == ()


def test_the_package_of_a_provider() -> None:
    assert provider_package("airflow.providers.http.hooks.http.HttpHook") == "apache-airflow-providers-http"
    assert provider_package("airflow.providers.cncf.kubernetes") == "apache-airflow-providers-cncf-kubernetes"
    assert provider_package("airflow.operators.bash") == ""
