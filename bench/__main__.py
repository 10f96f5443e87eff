"""Measures every row, prints the table, and ends with 1 when a budget is missed or a row cannot be measured.

python -m bench [--only ROW,...] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from bench import commands, edits, machine, measure, pods, port_forward, publish, scale, series
from bench.measure import Group
from bench.programs import Kubectl, ProgramError, local_context
from bench.side_by_side import pair

GROUPS: tuple[Group[Any], ...] = (
    commands.HELP,
    Group(pair, (*commands.ROWS, *edits.ROWS, *pods.ROWS)),
    Group(pods.images_on_the_node, (pods.FRESH,)),
    *port_forward.GROUPS,
    *scale.GROUPS,
    *series.GROUPS,
)


def main() -> int:
    """Return the exit code: 0 every budget is met, 1 one is missed or not measured; wrong usage exits with 2."""
    names = [row.name for group in GROUPS for row in group.rows]
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure on the local cluster, side by side with what a user would run instead.",
        epilog=f"Rows: {', '.join(names)}.",
    )
    parser.add_argument("--only", metavar="ROW,...", help="these rows; without it, all, and the figures are published")
    parser.add_argument("--rounds", type=int, metavar="N", help="at most so many rounds of each side")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    arguments = parser.parse_args()
    only = frozenset(arguments.only.split(",")) if arguments.only else None
    if unknown := sorted((only or frozenset()) - set(names)):
        parser.error(f"no such row: {', '.join(unknown)}; there are {', '.join(names)}")
    try:
        described = machine.describe(Kubectl(local_context()))
    except ProgramError as error:
        print(f"Cannot measure: {error}\nnext: deployer cluster up", file=sys.stderr)
        return 1
    began = time.monotonic()
    measured = measure.run(GROUPS, only=only, rounds=arguments.rounds, report=_report)
    found = measure.document(measured, described | {"duration": f"{(time.monotonic() - began) / 60:.0f} min"})
    print(measure.text_table(found))
    text = json.dumps(found, indent=1) + "\n"
    if arguments.json:
        arguments.json.write_text(text, encoding="utf-8")
    if only is None and arguments.rounds is None:
        publish.LATEST.write_text(text, encoding="utf-8")
        publish.main()
    return 0 if found["met"] else 1


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        _report("interrupted; what was deployed is removed")
        sys.exit(130)
