"""Who holds the lock, as a pure question about a Lease's spec and a time."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from airflow_deployer import lease

NOW = 1_800_000_000.0


def spec(holder: str, *, age: float, duration: int = 30) -> dict[str, object]:
    moment = lease._micro_time(NOW - age)
    return {
        "holderIdentity": holder,
        "leaseDurationSeconds": duration,
        "acquireTime": moment,
        "renewTime": moment,
    }


@pytest.mark.parametrize(
    "held",
    [
        {},
        {"holderIdentity": ""},
        spec("ann@elsewhere up pid=1/1", age=31),
        {"holderIdentity": "ann@elsewhere up pid=1/1"},
        {"holderIdentity": "ann@elsewhere up pid=1/1", "renewTime": "nonsense"},
    ],
)
def test_free(held: dict[str, object]) -> None:
    assert lease.refuse(held, NOW) == ""


def test_held_by_somebody_else() -> None:
    told = lease.refuse(spec("ann@elsewhere up pid=1/1", age=12), NOW)
    assert told == "ann@elsewhere is running `deployer up` on it since 12 s"


def test_held_by_a_living_process_of_this_machine() -> None:
    me = f"bob@{socket.gethostname()} down pid={os.getpid()}/{lease._process_start(os.getpid())}"
    assert "deployer down" in lease.refuse(spec(me, age=1), NOW)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="process start times come from procfs")
def test_a_dead_or_reused_process_of_this_machine_holds_nothing() -> None:
    reused = f"bob@{socket.gethostname()} up pid={os.getpid()}/1"
    assert lease.refuse(spec(reused, age=1), NOW) == ""
