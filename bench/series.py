"""Rows: start-up, an edit and memory for the other series of Airflow; all other rows are of the newest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

from airflow_deployer.airflow_profiles import PROFILES, Profile
from bench.edits import UP_EDIT
from bench.measure import Group, Row, T
from bench.pods import FRESH, REST_MEMORY, images_on_the_node
from bench.side_by_side import pair

FILES = 3
"""As many as the repository's own and the edited one, which do not all run on every series."""


def _row(row: Row[T], profile: Profile) -> Row[T]:
    """The same row for another series; the budgets are of the newest."""
    name, what = f"{row.name}-{profile.locked}", f"Airflow {profile.locked}: {row.what}"
    return dataclasses.replace(row, name=name, what=what, budget=None, at_least={})


def _groups(profile: Profile) -> Iterator[Group[Any]]:
    yield Group(partial(pair, profile, files=FILES), (_row(UP_EDIT, profile), _row(REST_MEMORY, profile)))
    yield Group(partial(images_on_the_node, profile, files=FILES), (_row(FRESH, profile),))


GROUPS = tuple(group for profile in PROFILES[1:] for group in _groups(profile))
