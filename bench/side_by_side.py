"""Our deployment and the blog's, both running, for the rows that compare them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from airflow_deployer.airflow_profiles import PROFILES, Profile
from bench.airflow_account import wait_healthy
from bench.blog import Blog, blog, images_of, publish_base
from bench.measure import Side
from bench.programs import Kubectl, local_context
from bench.project import Project, project


@dataclass(frozen=True)
class Pair:
    """Both deployments, healthy."""

    kubectl: Kubectl
    ours: Project
    blog: Blog

    def rest(self) -> None:
        """Let go of both databases: a connection costs memory."""
        self.ours.database.close()
        self.blog.database.close()

    def uids(self) -> tuple[str, str]:
        """The UIDs of our pod and of the blog's."""
        ours, theirs = (
            self.kubectl.get("pod/airflow-0", namespace)["metadata"]["uid"]
            for namespace in (self.ours.namespace, self.blog.namespace)
        )
        return ours, theirs


@contextlib.contextmanager
def pair(profile: Profile = PROFILES[0], *, files: int | None = None) -> Iterator[Pair]:
    """Deploy both.

    Args:
        profile: of the series whose newest release both run.
        files: how many DAG files both have; None for the repository's own and the edited one.
    """
    kubectl = Kubectl(local_context())
    with project(kubectl, profile, files=files) as ours:
        ours.up()
        images = images_of(ours)
        publish_base(images)
        with blog(kubectl, images, files=files) as theirs:
            theirs.deploy()
            wait_healthy(kubectl, ours.namespace, profile, since=0)
            yield Pair(kubectl, ours, theirs)


def in_turn(*sides: Side) -> contextlib.AbstractContextManager[Sequence[Side]]:
    """Sides that need nothing opened."""
    return contextlib.nullcontext(sides)
