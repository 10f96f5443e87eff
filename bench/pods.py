"""Rows: a pod that is made, replaced and at rest."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.airflow_account import wait_healthy
from bench.blog import Images, blog, images_of, publish_base
from bench.measure import SLOW_ROUNDS, Group, Row, Side
from bench.pod_usage import ProcessorMeter, memory
from bench.programs import Kubectl, local_context
from bench.project import project
from bench.side_by_side import Pair, in_turn

REST_SECONDS = 60.0


def _replaced(pair: Pair) -> contextlib.AbstractContextManager[Sequence[Side]]:
    numbers = iter(range(1000))
    # What earlier rows have edited goes into an image now, and costs nothing below.
    pair.ours.up()

    def up() -> float:
        began, moment = time.monotonic(), time.time()
        pair.ours.configure(next(numbers))
        pair.ours.up()
        wait_healthy(pair.kubectl, pair.ours.namespace, since=moment)
        return time.monotonic() - began

    return in_turn(Side("deployer up", up, SLOW_ROUNDS), Side("kubectl delete pod", pair.blog.replace, SLOW_ROUNDS))


@contextlib.contextmanager
def _memory(pair: Pair) -> Iterator[Sequence[Side]]:
    pair.rest()
    ours, theirs = pair.uids()
    time.sleep(REST_SECONDS)
    yield (
        Side("deployer's pod", lambda: memory(ours), SLOW_ROUNDS),
        Side("the blog's pod", lambda: memory(theirs), SLOW_ROUNDS),
    )


@contextlib.contextmanager
def _processor(pair: Pair) -> Iterator[Sequence[Side]]:
    pair.rest()
    ours, theirs = (ProcessorMeter(uid, REST_SECONDS) for uid in pair.uids())
    yield (
        Side("deployer's pod", ours.measure, SLOW_ROUNDS),
        Side("the blog's pod", theirs.measure, SLOW_ROUNDS),
    )


@dataclass(frozen=True)
class _Ready:
    """A cluster whose node has the images of both sides."""

    kubectl: Kubectl
    images: Images


@contextlib.contextmanager
def _images_on_the_node() -> Iterator[_Ready]:
    kubectl = Kubectl(local_context())
    with project(kubectl) as made:
        made.up("--no-port-forward")
        images = images_of(kubectl, made.namespace)
        publish_base(images)
    yield _Ready(kubectl, images)


def _fresh(ready: _Ready) -> contextlib.AbstractContextManager[Sequence[Side]]:
    def ours() -> float:
        with project(ready.kubectl) as made:
            began, moment = time.monotonic(), time.time()
            made.up("--no-port-forward")
            wait_healthy(ready.kubectl, made.namespace, since=moment)
            return time.monotonic() - began

    def theirs() -> float:
        with blog(ready.kubectl, ready.images) as made:
            began = time.monotonic()
            made.deploy()
            return time.monotonic() - began

    return in_turn(Side("deployer up", ours, SLOW_ROUNDS), Side("the blog's manifest", theirs, SLOW_ROUNDS))


ROWS: tuple[Row[Pair], ...] = (
    Row("replace", "pod replaced, stop included, to all components healthy", "s", _replaced, budget=13.0),
    Row("rest-memory", "pod at rest, PSS with Postgres", "MB", _memory, budget=800.0),
    Row("rest-cpu", "pod at rest, processor over 60 s", "% of a core", _processor, budget=12.0),
)
FRESH = Group(
    _images_on_the_node,
    (Row("fresh", "fresh namespace, images on the node, to all components healthy", "s", _fresh, budget=15.0),),
)
