"""What a measurement is: rows of sides that are measured in turn, their statistics, and whether budgets are met.

Nothing here knows what is measured. The first side of a row is ours, the others are what a user would run instead.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

QUICK_ROUNDS = 30
"""For what takes less than 3 s."""
SLOW_ROUNDS = 5

T = TypeVar("T")


@dataclass(frozen=True)
class Side:
    """One way to do a row's work: `measure` does it once and returns the value in the row's unit."""

    name: str
    measure: Callable[[], float]
    rounds: int


@dataclass(frozen=True)
class Row(Generic[T]):
    """A line of the table.

    Attributes:
        name: for `--only`.
        what: what is measured, for people.
        unit: of every value.
        sides: given what the row's group has opened, opens what the sides need.
        budget: what the median of the first side may be at most, or at least where `more_is_better`.
        at_least: by the name of a side, how many times better than it the first one must be; sides that were not
            measured are not compared.
        grows_from: the name of another row, and how many times its median this row's may be at most.
    """

    name: str
    what: str
    unit: str
    sides: Callable[[T], AbstractContextManager[Sequence[Side]]]
    budget: float | None = None
    at_least: Mapping[str, float] = field(default_factory=dict)
    grows_from: tuple[str, float] | None = None
    more_is_better: bool = False


@dataclass(frozen=True)
class Group(Generic[T]):
    """Rows that are measured on the same deployments, which `open` makes and removes."""

    open: Callable[[], AbstractContextManager[T]]
    rows: tuple[Row[T], ...]


@dataclass(frozen=True)
class Measured:
    """A row with its values by side, the first side first; `failure` tells why there are none, or no more."""

    row: Row[Any]
    values: Mapping[str, tuple[float, ...]]
    failure: str = ""

    @property
    def median(self) -> float | None:
        """The median of the first side, None where it has no value."""
        ours = next(iter(self.values.values()), ())
        return statistics.median(ours) if ours else None


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of all do not exceed (nearest rank), so one that was really measured."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def ratio(ours: Sequence[float], theirs: Sequence[float], *, more_is_better: bool) -> float:
    """How many times better the median of `ours` is than that of `theirs`."""
    mine, other = statistics.median(ours), statistics.median(theirs)
    return mine / other if more_is_better else other / mine


def interleave(rounds: Sequence[int]) -> Iterator[int]:
    """Yield indexes into `rounds`, each as often as it says, in turn and spread evenly over the whole time.

    `[3, 3]` gives 0, 1, 0, 1, 0, 1: whatever else the machine does meets all sides alike.
    """
    positions = [((turn + 0.5) / count, index) for index, count in enumerate(rounds) for turn in range(count)]
    for _, index in sorted(positions):
        yield index


def measure(
    row: Row[T], opened: T, *, rounds: int | None, report: Callable[[str], None], clock: Callable[[], float]
) -> Measured:
    """Measure a row; whatever goes wrong is kept as its failure, so that the other rows are measured all the same.

    Args:
        rounds: at most so many of each side, whatever its own number.
        report: takes a line about each value.
        clock: seconds, for the report.
    """
    values: dict[str, list[float]] = {}
    failure = ""
    try:
        with row.sides(opened) as sides:
            values = {side.name: [] for side in sides}
            for index in interleave([min(side.rounds, rounds or side.rounds) for side in sides]):
                side = sides[index]
                began = clock()
                value = side.measure()
                values[side.name].append(value)
                report(f"{row.name}: {side.name}: {number(value)} {row.unit} (took {clock() - began:.0f} s)")
    except Exception as error:
        failure = _one_line(error)
        report(f"{row.name}: failed: {error}")
    return Measured(row, {name: tuple(found) for name, found in values.items()}, failure)


def run(
    groups: Iterable[Group[Any]],
    *,
    only: frozenset[str] | None,
    rounds: int | None,
    report: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> list[Measured]:
    """Measure the chosen rows of all groups, all of them where `only` is None."""
    done: list[Measured] = []
    for group in groups:
        rows = [row for row in group.rows if only is None or row.name in only]
        if not rows:
            continue
        measured: list[Measured] = []
        try:
            with group.open() as opened:
                for row in rows:
                    measured.append(measure(row, opened, rounds=rounds, report=report, clock=clock))
        except Exception as error:
            report(f"{', '.join(row.name for row in rows)}: failed: {error}")
            measured += [Measured(row, {}, _one_line(error)) for row in rows[len(measured) :]]
        done += measured
    return done


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def misses(measured: Sequence[Measured]) -> dict[str, list[str]]:
    """Tell for each row, by its name, how it misses its budgets; an empty list where it keeps them."""
    medians = {one.row.name: one.median for one in measured}
    return {one.row.name: list(_misses(one, medians)) for one in measured}


def _misses(one: Measured, medians: Mapping[str, float | None]) -> Iterator[str]:
    row, ours = one.row, one.median
    if one.failure:
        yield one.failure
    if ours is None:
        return
    if row.budget is not None and (ours < row.budget if row.more_is_better else ours > row.budget):
        yield f"{number(ours)} {row.unit}, budget {number(row.budget)} {row.unit}"
    first = next(iter(one.values))
    for name, least in row.at_least.items():
        if theirs := one.values.get(name):
            found = ratio(one.values[first], theirs, more_is_better=row.more_is_better)
            if found < least:
                yield f"{found:.2f} times better than {name}, budget {least:g} times"
    if row.grows_from is not None:
        other, most = row.grows_from
        before = medians.get(other)
        if before is not None and ours > most * before:
            yield f"{ours / before:.2f} times {other}, budget {most:g} times"


def document(measured: Sequence[Measured], machine: Mapping[str, Any]) -> dict[str, Any]:
    """Everything as JSON-able values: the machine, and for each row its budgets, values and statistics."""
    missed = misses(measured)
    return {
        "machine": dict(machine),
        "met": not any(missed.values()),
        "rows": [_row_document(one, missed[one.row.name]) for one in measured],
    }


def _row_document(one: Measured, missed: list[str]) -> dict[str, Any]:
    row = one.row
    ours = next(iter(one.values.values()), ())
    return {
        "name": row.name,
        "what": row.what,
        "unit": row.unit,
        "budget": row.budget,
        "at_least": dict(row.at_least),
        "grows_from": list(row.grows_from) if row.grows_from else None,
        "more_is_better": row.more_is_better,
        "missed": missed,
        "sides": [
            {
                "name": name,
                "rounds": len(values),
                "min": min(values),
                "median": statistics.median(values),
                "p95": percentile(values, 95),
                "ratio": ratio(ours, values, more_is_better=row.more_is_better) if ours else None,
                "values": list(values),
            }
            for name, values in one.values.items()
            if values
        ],
    }


HEADINGS = ("what", "who", "rounds", "min", "median", "p95", "ratio", "budget", "")


def cells(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The lines of the table, one for each side of each row of a `document`."""
    lines: list[tuple[str, ...]] = []
    measured = {row["name"] for row in found["rows"] if row["sides"]}
    for row in found["rows"]:
        verdict = "missed" if row["missed"] else "met" if _is_judged(row, measured) else ""
        for index, side in enumerate(row["sides"]):
            figures = (number(side[key]) for key in ("min", "median", "p95"))
            ours = index == 0
            compared = "" if ours or side["ratio"] is None else f"{side['ratio']:.2f}"
            what = f"{row['what']} [{row['unit']}]" if ours else ""
            own = (_budget(row), verdict) if ours else ("", "")
            lines.append((what, side["name"], str(side["rounds"]), *figures, compared, *own))
        if not row["sides"]:
            lines.append((row["what"], "not measured", "", "", "", "", "", _budget(row), verdict))
    return lines


def _is_judged(row: Mapping[str, Any], measured: Set[str]) -> bool:
    """Whether there was anything to hold a row's median against."""
    compared = any(side["name"] in row["at_least"] for side in row["sides"])
    return row["budget"] is not None or compared or bool(row["grows_from"] and row["grows_from"][0] in measured)


def text_table(found: Mapping[str, Any]) -> str:
    """The table for a terminal, with a line for each budget that is missed below it."""
    lines = [HEADINGS, *cells(found)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    aligned = [
        "  ".join(
            cell.ljust(width) if column in (0, 1, 7, 8) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    notes = [f"missed: {row['name']}: {text}" for row in found["rows"] for text in row["missed"]]
    return "\n".join([*aligned, *notes]) + "\n"


def markdown_table(found: Mapping[str, Any]) -> str:
    """The same table as GitHub's Markdown."""
    lines = [HEADINGS, ("---", "---", *["--:"] * 5, "---", "---"), *cells(found)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def number(value: float) -> str:
    """Three significant digits, and no exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 3)}f}"


def _budget(row: Mapping[str, Any]) -> str:
    sign = "≥" if row["more_is_better"] else "≤"
    parts = [f"{sign} {row['budget']:g}"] if row["budget"] is not None else []
    parts += [f"≥ {least:g}x {name}" for name, least in row["at_least"].items()]
    if row["grows_from"]:
        other, most = row["grows_from"]
        parts.append(f"≤ {most:g}x {other}")
    return ", ".join(parts)
