"""Rows: from a saved DAG file to Airflow having parsed it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from bench.measure import QUICK_ROUNDS, SLOW_ROUNDS, Row, Side
from bench.rivals import RIVALS
from bench.side_by_side import Pair, in_turn

SCAN_SECONDS = 310.0
"""Airflow looks for new files every 300 s."""


def _up_with_edit(pair: Pair) -> contextlib.AbstractContextManager[Sequence[Side]]:
    return in_turn(
        # Where nothing is hot, it takes a new pod.
        Side("deployer up", pair.ours.up_with_edit, QUICK_ROUNDS if pair.ours.profile.hot else SLOW_ROUNDS),
        Side("the blog's steps", pair.blog.steps_with_edit, SLOW_ROUNDS),
    )


@contextlib.contextmanager
def _saved(pair: Pair) -> Iterator[Sequence[Side]]:
    with contextlib.ExitStack() as stack:
        rivals = [
            Side(rival.name, stack.enter_context(rival.saved_to_parsed(pair.kubectl, pair.blog.images)), QUICK_ROUNDS)
            for rival in RIVALS
            if rival.is_there()
        ]
        stack.enter_context(pair.ours.dev())
        yield (
            Side("deployer dev", pair.ours.save_to_parsed, QUICK_ROUNDS),
            Side("kubectl cp", pair.blog.copy_to_parsed, QUICK_ROUNDS),
            *rivals,
        )


@contextlib.contextmanager
def _new(pair: Pair) -> Iterator[Sequence[Side]]:
    with pair.ours.dev():
        yield (
            Side("deployer dev", pair.ours.new_to_parsed, QUICK_ROUNDS),
            # Minutes of waiting, of which a second round would tell nothing new.
            Side("kubectl cp", lambda: pair.blog.new_to_parsed(seconds=SCAN_SECONDS), 1),
        )


UP_EDIT = Row(
    "up-edit",
    "DAG edited, deployer up, parsed and deployed for good",
    "s",
    _up_with_edit,
    budget=3.0,
    at_least={"the blog's steps": 6.0},
)
ROWS: tuple[Row[Pair], ...] = (
    UP_EDIT,
    Row(
        "dev-edit",
        "deployer dev, known file saved to parsed",
        "s",
        _saved,
        budget=1.0,
        at_least={"Tilt": 1.0},
    ),
    Row("dev-new", "deployer dev, new file saved to parsed", "s", _new, budget=1.5),
)
