"""The plot of the README: how long an edit takes until Airflow has parsed it, drawn as SVG from the figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from bench.measure import number

# The rows whose sides are bars, and what an edit has become by then.
ROWS = {"dev-edit": "in the running pod", "up-edit": "deployed for good"}

_WIDTH, _LEFT, _RIGHT, _TOP, _STEP, _BAR = 760, 250, 90, 64, 34, 20
_OURS, _THEIRS, _INK, _GREY = "#0b7285", "#adb5bd", "#212529", "#5c636a"


@dataclass(frozen=True)
class Bar:
    """One side of one row, in seconds."""

    name: str
    what: str
    ours: bool
    low: float
    median: float
    p95: float


def bars(found: Mapping[str, Any]) -> list[Bar]:
    """Take the bars out of a `measure.document`; rows that were not measured have none."""
    rows = {row["name"]: row for row in found["rows"]}
    return [
        Bar(side["name"], what, index == 0, side["min"], side["median"], side["p95"])
        for name, what in ROWS.items()
        if name in rows
        for index, side in enumerate(rows[name]["sides"])
    ]


def draw(found: Mapping[str, Any]) -> str:
    """The SVG document: a bar for each median, a line from the minimum to the 95th percentile."""
    drawn = bars(found)
    longest = max((bar.p95 for bar in drawn), default=1.0)
    scale = (_WIDTH - _LEFT - _RIGHT) / longest
    height = _TOP + _STEP * len(drawn) + 34
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="14" role="img" aria-labelledby="title">',
        '<title id="title">Seconds from a saved DAG file until Airflow has parsed it</title>',
        f'<rect width="{_WIDTH}" height="{height}" rx="6" fill="#ffffff"/>',
        f'<text x="20" y="30" font-size="16" font-weight="600" fill="{_INK}">'
        "From a saved DAG file until Airflow has parsed it</text>",
        f'<text x="20" y="48" font-size="12" fill="{_GREY}">median in seconds; the line: fastest to 95th percentile'
        "</text>",
    ]
    for index, bar in enumerate(drawn):
        top = _TOP + index * _STEP
        middle = top + _BAR / 2
        colour = _OURS if bar.ours else _THEIRS
        end = _LEFT + bar.median * scale
        after = max(end, _LEFT + bar.p95 * scale) + 8
        lines += [
            f'<text x="{_LEFT - 10}" y="{top + 9}" text-anchor="end" fill="{_INK}">{escape(bar.name)}</text>',
            f'<text x="{_LEFT - 10}" y="{top + 23}" text-anchor="end" font-size="11" fill="{_GREY}">'
            f"{escape(bar.what)}</text>",
            f'<rect x="{_LEFT}" y="{top}" width="{max(1.0, bar.median * scale):.1f}" height="{_BAR}" rx="2" '
            f'fill="{colour}"/>',
            f'<line x1="{_LEFT + bar.low * scale:.1f}" y1="{middle}" x2="{_LEFT + bar.p95 * scale:.1f}" y2="{middle}" '
            f'stroke="{_INK}" stroke-width="1.5"/>',
            f'<text x="{after:.1f}" y="{middle + 5}" font-weight="{600 if bar.ours else 400}" fill="{_INK}">'
            f"{number(bar.median)} s</text>",
        ]
    machine = found["machine"]
    note = ", ".join(machine[key] for key in ("processor", "date") if key in machine)
    lines += [f'<text x="20" y="{height - 14}" font-size="11" fill="{_GREY}">{escape(note)}</text>', "</svg>"]
    return "\n".join(lines) + "\n"
