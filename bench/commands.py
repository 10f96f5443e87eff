"""Rows: how long the short commands take, against `kubectl`'s."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

from bench.measure import QUICK_ROUNDS, Group, Row, Side
from bench.programs import deployer_command, timed
from bench.side_by_side import Pair, in_turn

_Sides = contextlib.AbstractContextManager[Sequence[Side]]


def _help(_: None) -> _Sides:
    return in_turn(
        Side("deployer --help", lambda: timed(deployer_command(), "--help"), QUICK_ROUNDS),
        Side("kubectl version --client", lambda: timed("kubectl", "version", "--client"), QUICK_ROUNDS),
    )


def _status(pair: Pair) -> _Sides:
    listing = pair.kubectl.command("get", "statefulset,pod,persistentvolumeclaim", namespace=pair.blog.namespace)
    ours = pair.ours
    return in_turn(
        Side(
            "deployer status",
            lambda: timed(deployer_command(), "status", folder=ours.folder, env=ours.env),
            QUICK_ROUNDS,
        ),
        Side("kubectl get", lambda: timed(*listing), QUICK_ROUNDS),
    )


def _up_unchanged(pair: Pair) -> _Sides:
    def apply() -> float:
        began = time.monotonic()
        pair.blog.apply()
        return time.monotonic() - began

    ours = pair.ours
    return in_turn(
        Side("deployer up", lambda: timed(deployer_command(), "up", folder=ours.folder, env=ours.env), QUICK_ROUNDS),
        Side("kubectl apply", apply, QUICK_ROUNDS),
    )


HELP = Group(
    lambda: contextlib.nullcontext(None),
    (Row("help", "deployer --help", "s", _help, budget=0.25),),
)
ROWS: tuple[Row[Pair], ...] = (
    Row("status", "deployer status", "s", _status, budget=0.8),
    Row("up-unchanged", "deployer up, nothing changed", "s", _up_unchanged, budget=1.0),
)
