"""Rows: a pod that is made, replaced and at rest."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from airflow_deployer.airflow_profiles import PROFILES, Profile
from bench.airflow_account import wait_healthy
from bench.blog import Images, blog, images_of, publish_base
from bench.measure import SLOW_ROUNDS, Row, Side
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
        # A harmless setting, each time another one.
        pair.ours.configure(f'[airflow.env]\nBENCH = "{next(numbers)}"\n')
        pair.ours.up()
        wait_healthy(pair.kubectl, pair.ours.namespace, pair.ours.profile, since=moment)
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
class Ready:
    """A cluster whose node has the images of both sides.

    Attributes:
        files: how many DAG files both have; None for the repository's own and the edited one.
    """

    kubectl: Kubectl
    images: Images
    files: int | None


@contextlib.contextmanager
def images_on_the_node(profile: Profile = PROFILES[0], *, files: int | None = None) -> Iterator[Ready]:
    """Let both sides' images of a series' newest release be pulled."""
    kubectl = Kubectl(local_context())
    with project(kubectl, profile, files=files) as made:
        made.up("--no-port-forward")
        images = images_of(made)
        publish_base(images)
    yield Ready(kubectl, images, files)


def _fresh(ready: Ready) -> contextlib.AbstractContextManager[Sequence[Side]]:
    def ours() -> float:
        with project(ready.kubectl, ready.images.profile, files=ready.files) as made:
            began, moment = time.monotonic(), time.time()
            made.up("--no-port-forward")
            wait_healthy(ready.kubectl, made.namespace, made.profile, since=moment)
            return time.monotonic() - began

    def theirs() -> float:
        with blog(ready.kubectl, ready.images, files=ready.files) as made:
            began = time.monotonic()
            made.deploy()
            return time.monotonic() - began

    return in_turn(Side("deployer up", ours, SLOW_ROUNDS), Side("the blog's manifest", theirs, SLOW_ROUNDS))


REST_MEMORY = Row("rest-memory", "pod at rest, PSS with Postgres", "MB", _memory, budget=800.0)
ROWS: tuple[Row[Pair], ...] = (
    Row("replace", "pod replaced, stop included, to all components healthy", "s", _replaced, budget=13.0),
    REST_MEMORY,
    Row("rest-cpu", "pod at rest, processor over 60 s", "% of a core", _processor, budget=12.0),
)
FRESH = Row("fresh", "fresh namespace, images on the node, to all components healthy", "s", _fresh, budget=15.0)
