"""The benchmark's own logic: statistics, the order of rounds, verdicts, the table, the plot, the exit code."""

from __future__ import annotations

import contextlib
import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from airflow_deployer import config
from airflow_deployer.airflow_profiles import PROFILES, Profile
from bench import __main__, blog, machine, measure, plot, pod_usage, project, publish, series
from bench.airflow_account import Database
from bench.measure import Group, Measured, Row, Side
from bench.programs import Kubectl, failed

Sides = AbstractContextManager[Sequence[Side]]


def sides_of(**values: float) -> Any:
    """What opens a side for each name, which always measures the same."""

    def opened(_: object) -> Sides:
        return contextlib.nullcontext([Side(name, partial(float, value), 3) for name, value in values.items()])

    return opened


def row(name: str = "row", sides: Any = None, **budgets: Any) -> Row[None]:
    return Row(name, f"what {name} is", "s", sides or sides_of(ours=1.0), **budgets)


def group(*rows: Row[None]) -> Group[None]:
    return Group(lambda: contextlib.nullcontext(None), rows)


def run(*groups: Group[None], **options: Any) -> list[Measured]:
    return measure.run(groups, **({"only": None, "rounds": None, "report": lambda line: None} | options))


# -- statistics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"), [([5.0], 5.0), ([3.0, 1.0, 2.0, 5.0, 4.0], 5.0), (list(range(1, 31)), 29), (range(100), 94)]
)
def test_the_95th_percentile_is_a_value_that_was_measured(values: Sequence[float], expected: float) -> None:
    assert measure.percentile(values, 95) == expected


def test_a_ratio_says_how_many_times_better_ours_is() -> None:
    assert measure.ratio([2.0, 1.0, 3.0], [12.0], more_is_better=False) == 6.0
    assert measure.ratio([300.0], [100.0], more_is_better=True) == 3.0


@pytest.mark.parametrize(
    ("rounds", "order"),
    [
        ([3, 3], [0, 1, 0, 1, 0, 1]),
        ([6, 2], [0, 0, 1, 0, 0, 0, 1, 0]),
        ([2, 1, 2], [0, 2, 1, 0, 2]),
        ([], []),
    ],
)
def test_rounds_are_interleaved_evenly(rounds: list[int], order: list[int]) -> None:
    assert list(measure.interleave(rounds)) == order


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "0.012"), (0.5, "0.500"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (12345.6, "12346"), (0, "0")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert measure.number(value) == text


# -- running --------------------------------------------------------------------------------------------------------


def test_sides_are_measured_in_turn_and_reported() -> None:
    order: list[str] = []
    lines: list[str] = []

    def side(name: str) -> Side:
        return Side(name, lambda: order.append(name) or 1.0, 2)  # type: ignore[func-returns-value]

    def opened(_: object) -> Sides:
        return contextlib.nullcontext([side("a"), side("b")])

    [measured] = run(group(row(sides=opened)), report=lines.append)
    assert order == ["a", "b", "a", "b"]
    assert measured.values == {"a": (1.0, 1.0), "b": (1.0, 1.0)}
    assert len(lines) == 4


@pytest.mark.parametrize(("rounds", "expected"), [(2, 2), (7, 3), (None, 3)])
def test_rounds_can_be_limited(rounds: int | None, expected: int) -> None:
    [measured] = run(group(row()), rounds=rounds)
    assert len(measured.values["ours"]) == expected


def test_only_the_chosen_rows_are_measured_and_no_group_is_opened_in_vain() -> None:
    def never() -> AbstractContextManager[None]:
        raise AssertionError

    measured = run(Group(never, (row("a"),)), group(row("b"), row("c")), only=frozenset({"c"}))
    assert [one.row.name for one in measured] == ["c"]


def test_a_failure_costs_only_its_own_row() -> None:
    values = iter([1.0])

    def opened(_: object) -> Sides:
        return contextlib.nullcontext([Side("ours", lambda: next(values), 3)])

    failed, fine = run(group(row("failed", opened), row("fine")))
    assert failed.values == {"ours": (1.0,)}
    assert failed.failure.startswith("StopIteration")
    assert fine.failure == ""


def test_a_group_that_cannot_be_opened_fails_each_of_its_rows() -> None:
    def broken() -> AbstractContextManager[None]:
        raise OSError("no cluster")

    measured = run(Group(broken, (row("a"), row("b"))), group(row("c")))
    assert [one.failure for one in measured] == ["OSError: no cluster", "OSError: no cluster", ""]


def test_what_was_measured_stays_when_its_deployment_cannot_be_removed() -> None:
    @contextlib.contextmanager
    def opened() -> Any:
        yield None
        raise OSError("not removed")

    [measured] = run(Group(opened, (row(),)))
    assert measured.values["ours"] == (1.0, 1.0, 1.0)
    assert measured.failure == ""


def test_of_a_failure_its_first_line_is_kept_and_everything_is_reported() -> None:
    error = failed("deployer up ended with 1", "preflight\nerror: no registry.\nnext: start one\n")
    lines: list[str] = []

    def opened() -> AbstractContextManager[None]:
        raise error

    [measured] = run(Group(opened, (row(),)), report=lines.append)
    assert measured.failure == "ProgramError: deployer up ended with 1: error: no registry."
    assert "next: start one" in lines[0]


# -- verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sides", "budgets", "missed"),
    [
        (sides_of(ours=1.0), {"budget": 1.0}, []),
        (sides_of(ours=1.1), {"budget": 1.0}, ["1.10 s, budget 1.00 s"]),
        (sides_of(ours=1.1), {"budget": 1.0, "more_is_better": True}, []),
        (sides_of(ours=0.9), {"budget": 1.0, "more_is_better": True}, ["0.900 s, budget 1.00 s"]),
        (sides_of(ours=1.0, theirs=6.0), {"at_least": {"theirs": 6.0}}, []),
        (
            sides_of(ours=1.0, theirs=5.0),
            {"at_least": {"theirs": 6.0}},
            ["5.00 times better than theirs, budget 6 times"],
        ),
        (sides_of(ours=1.0), {"at_least": {"theirs": 6.0}}, []),
    ],
)
def test_budgets_are_of_the_median_and_of_the_ratio(sides: Any, budgets: dict[str, Any], missed: list[str]) -> None:
    assert measure.misses(run(group(row(sides=sides, **budgets)))) == {"row": missed}


@pytest.mark.parametrize(("seconds", "missed"), [(2.0, []), (2.5, ["2.50 times small, budget 2 times"])])
def test_growth_is_against_another_row(seconds: float, missed: list[str]) -> None:
    large = row("large", sides_of(ours=seconds), grows_from=("small", 2.0))
    assert measure.misses(run(group(row("small"), large))) == {"small": [], "large": missed}
    assert measure.misses(run(group(large))) == {"large": []}


def test_a_row_without_values_misses_its_budget() -> None:
    found = measure.document([Measured(row(budget=1.0), {}, "OSError: gone")], {})
    assert found["met"] is False
    assert found["rows"][0]["missed"] == ["OSError: gone"]


# -- the document, the table, the plot --------------------------------------------------------------------------------


DOCUMENT = measure.document(
    [
        Measured(
            row("dev-edit", budget=1.0, at_least={"kubectl cp": 2.0}),
            {"deployer dev": (0.5, 0.7, 0.6), "kubectl cp": (1.1, 1.0, 1.2)},
        ),
        Measured(row("up-edit", budget=3.0), {"deployer up": (2.0,), "the blog's <steps>": (20.0,)}),
        Measured(row("none", grows_from=("dev-edit", 2.0)), {}, "OSError: gone"),
    ],
    {"processor": "A & B, 2 cores", "date": "2026-11-23"},
)


def test_the_document_has_every_value_and_its_statistics() -> None:
    side = DOCUMENT["rows"][0]["sides"][1]
    assert side == {
        "name": "kubectl cp",
        "rounds": 3,
        "min": 1.0,
        "median": 1.1,
        "p95": 1.2,
        "ratio": pytest.approx(1.1 / 0.6),
        "values": [1.1, 1.0, 1.2],
    }
    assert json.loads(json.dumps(DOCUMENT)) == DOCUMENT


def test_the_table_is_aligned_and_names_what_was_missed() -> None:
    lines = measure.text_table(DOCUMENT).splitlines()
    assert lines[0].split() == ["what", "who", "rounds", "min", "median", "p95", "ratio", "budget"]
    assert [line.index("median") for line in lines[:1]] == [lines[1].index("0.600") + len("0.600") - len("median")]
    assert "≤ 1, ≥ 2x kubectl cp  missed" in lines[1]
    assert "1.83" in lines[2]
    assert lines[3].endswith("≤ 3                   met")
    assert "not measured" in lines[5]
    assert lines[6:] == [
        "missed: dev-edit: 1.83 times better than kubectl cp, budget 2 times",
        "missed: none: OSError: gone",
    ]


def test_what_was_compared_with_nothing_is_neither_met_nor_missed() -> None:
    small, large = row("small"), row("large", grows_from=("small", 2.0))
    rivalled = row("rivalled", at_least={"Tilt": 1.0})

    def verdicts(*rows: Row[None]) -> list[str]:
        return [line[-1] for line in measure.cells(measure.document(run(group(*rows)), {}))]

    assert verdicts(large, rivalled) == ["", ""]
    assert verdicts(small, large) == ["", "met"]


def test_the_readme_gets_machine_table_and_verdict_between_its_marks() -> None:
    text = publish.with_figures(f"before\n{publish.BEGIN}old\n{publish.END}after\n", DOCUMENT)
    assert text.startswith(f"before\n{publish.BEGIN}\n- processor: A & B, 2 cores\n")
    assert (
        "| what dev-edit is [s] | deployer dev | 3 | 0.500 | 0.600 | 0.700 |  | ≤ 1, ≥ 2x kubectl cp | missed |" in text
    )
    assert text.endswith(f"- none: OSError: gone\n\n{publish.END}after\n")
    assert publish.with_figures(text, DOCUMENT) == text


def test_the_marks_are_in_the_readme() -> None:
    publish.with_figures(publish.README.read_text(encoding="utf-8"), DOCUMENT)


def test_every_row_is_explained_in_the_readme() -> None:
    text = publish.README.read_text(encoding="utf-8")
    names = [row.name for group in __main__.GROUPS for row in group.rows]
    assert len(set(names)) == len(names)
    assert [name for name in names if f"`{name}`" not in text] == []


def test_the_plot_has_a_bar_for_each_side_and_is_valid_xml() -> None:
    assert [(bar.name, bar.ours, bar.median) for bar in plot.bars(DOCUMENT)] == [
        ("deployer dev", True, 0.6),
        ("kubectl cp", False, 1.1),
        ("deployer up", True, 2.0),
        ("the blog's <steps>", False, 20.0),
    ]
    root = ET.fromstring(plot.draw(DOCUMENT))  # noqa: S314 - our own
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "0.600 s" in texts
    assert "A & B, 2 cores, 2026-11-23" in texts


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command with the given rows and arguments, without a cluster."""
    monkeypatch.setattr(__main__, "local_context", lambda: "none")
    monkeypatch.setattr(machine, "describe", lambda kubectl: {"processor": "one"})

    def call(*arguments: str, rows: Sequence[Row[None]]) -> int:
        monkeypatch.setattr(__main__, "GROUPS", (group(*rows),))
        monkeypatch.setattr("sys.argv", ["bench", *arguments])
        return __main__.main()

    return call


@pytest.mark.parametrize(("budget", "code"), [(1.0, 0), (0.9, 1)])
def test_a_missed_budget_ends_with_1_after_every_row(
    command: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, budget: float, code: int
) -> None:
    file = tmp_path / "figures.json"
    assert command("--rounds", "1", "--json", str(file), rows=[row("a", budget=budget), row("b")]) == code
    assert "what b is" in capsys.readouterr().out
    assert [found["name"] for found in json.loads(file.read_text())["rows"]] == ["a", "b"]


def test_a_full_run_publishes_its_figures(command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("LATEST", "README", "PLOT"):
        monkeypatch.setattr(publish, name, tmp_path / name)
    publish.README.write_text(publish.BEGIN + publish.END, encoding="utf-8")
    assert command("--only", "a", rows=[row("a"), row("b")]) == 0
    assert not publish.LATEST.exists()
    assert command(rows=[row("a"), row("b")]) == 0
    assert json.loads(publish.LATEST.read_text())["machine"]["processor"] == "one"
    assert "what b is" in publish.README.read_text()
    assert publish.PLOT.read_text().startswith("<svg")


def test_an_unknown_row_is_wrong_usage(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command("--only", "a,x", rows=[row("a")])
    assert ended.value.code == 2
    assert "no such row: x; there are a" in capsys.readouterr().err


# -- the series of Airflow --------------------------------------------------------------------------------------------


def test_every_series_has_the_three_rows_and_only_the_newest_has_budgets() -> None:
    rows = {row.name: row for group in __main__.GROUPS for row in group.rows}
    for name in ("up-edit", "rest-memory", "fresh"):
        assert rows[name].budget is not None
        others = [rows[f"{name}-{profile.locked}"] for profile in PROFILES[1:]]
        assert [(row.budget, row.at_least) for row in others] == [(None, {})] * len(others)
        assert all(row.sides is rows[name].sides for row in others)
    assert sum(len(group.rows) for group in series.GROUPS) == 3 * (len(PROFILES) - 1)


@pytest.mark.parametrize(
    ("profile", "command", "variable"),
    [
        (
            PROFILES[0],
            "until airflow db migrate; do sleep 1; done && { airflow api-server -p 8080 & } && "
            "{ airflow dag-processor & } && { airflow triggerer & } && airflow scheduler",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN",
        ),
        (
            PROFILES[1],
            "until airflow db migrate; do sleep 1; done && { airflow webserver -p 8080 & } && "
            "{ airflow dag-processor & } && { airflow triggerer & } && airflow scheduler",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN",
        ),
        (
            PROFILES[2],
            "until airflow upgradedb; do sleep 1; done && { airflow webserver -p 8080 & } && airflow scheduler",
            "AIRFLOW__CORE__SQL_ALCHEMY_CONN",
        ),
    ],
)
def test_the_blogs_pod_runs_each_series_own_commands(profile: Profile, command: str, variable: str) -> None:
    assert blog.command(profile) == command
    assert blog.connection_variable(profile) == variable


def test_a_project_keeps_its_version_of_airflow_when_it_is_configured(tmp_path: Path) -> None:
    kubectl = Kubectl("none")
    database = Database(kubectl, "none", user="none", name="none")
    made = project.Project(tmp_path, "none", kubectl, PROFILES[2], {}, database)
    made.configure('[airflow.env]\nBENCH = "1"\n')
    found = config.load(tmp_path, config_file=None, env={}, overrides={}).airflow
    assert (found.version, found.env) == (PROFILES[2].locked, {"BENCH": "1"})


# -- reading the node -----------------------------------------------------------------------------------------------


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node with two processes of the pod `u-1` and one of another."""
    monkeypatch.setattr(pod_usage, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(pod_usage, "_CGROUPS", tmp_path / "cgroup")
    for pid, pod, kilobytes in ((10, "podu-1", 1000), (11, "podu-1", 500), (12, "podu-2", 7)):
        process = tmp_path / "proc" / str(pid)
        process.mkdir(parents=True)
        lines = f"4:memory:/kubepods/{pod}/c\n3:cpu,cpuacct:/kubepods/{pod}/c\n0::/kubepods/{pod}/c\n"
        (process / "cgroup").write_text(lines)
        (process / "smaps_rollup").write_text(f"Rss: 9 kB\nPss:  {kilobytes} kB\nPss_Dirty: 5 kB\n")
    return tmp_path / "cgroup"


def test_memory_is_the_sum_over_the_pods_processes(node: Path) -> None:
    assert pod_usage.memory("u-1") == pytest.approx(1500 * 1024 / 1e6)


def test_processor_time_is_the_pods_own_account(node: Path) -> None:
    with pytest.raises(LookupError):
        pod_usage.processor_seconds("u-1")
    second = node / "kubepods" / "podu-1"
    second.mkdir(parents=True)
    (second / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
    assert pod_usage.processor_seconds("u-1") == 2.5
    first = node / "cpuacct" / "kubepods" / "podu-1"
    first.mkdir(parents=True)
    (first / "cpuacct.usage").write_text("1500000000\n")
    assert pod_usage.processor_seconds("u-1") == 1.5
