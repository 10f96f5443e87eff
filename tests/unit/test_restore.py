"""What is compared before and after a backup is loaded, and stored secrets from one key to another."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from cryptography.fernet import Fernet

from airflow_deployer import reencryption, restore
from airflow_deployer.backup_file import Table
from airflow_deployer.errors import BackupError
from tests.unit.test_backup_file import MANIFEST

KNOWN = {"airflow": "3.3.2", "heads": ["new"], "revisions": ["old", "new"]}


@pytest.mark.parametrize(
    ("airflow", "revision", "known"),
    [
        ("3.3.2", "new", KNOWN),
        ("2.11.2", "old", KNOWN),
        ("3.4.0", "new", KNOWN),  # a newer Airflow of the same schema
        ("3.3.2", "whatever", None),
        ("2.11.2", "whatever", None),
    ],
)
def test_a_schema_that_the_deployed_airflow_can_migrate(airflow: str, revision: str, known: Any) -> None:
    manifest = msgspec.structs.replace(MANIFEST, airflow=airflow, alembic_revisions=(revision,))
    restore.require_known_schema(manifest, "3.3.2", known)


@pytest.mark.parametrize(
    ("airflow", "revision", "known", "way"),
    [
        ("3.4.0", "newer", KNOWN, "deploy Airflow 3.4.0 first"),
        ("3.4.0", "newer", None, "deploy Airflow 3.4.0 first"),
        ("1.10.15", "ancient", KNOWN, "restore it to a deployment of that version"),
    ],
)
def test_a_schema_that_it_does_not_know(airflow: str, revision: str, known: Any, way: str) -> None:
    manifest = msgspec.structs.replace(MANIFEST, airflow=airflow, alembic_revisions=(revision,))
    with pytest.raises(BackupError, match=f"of Airflow {airflow}, whose schema") as caught:
        restore.require_known_schema(manifest, "3.3.2", known)
    assert way in caught.value.hint


def test_every_difference_is_told() -> None:
    before = {
        "public.a": Table(1, "1"),
        "public.b": Table(2, "2"),
        "public.c": Table(3, "3"),
        "public.d": Table(4, "4"),
    }
    restore._require_same(before, dict(before))
    after = {"public.a": Table(1, "1"), "public.b": Table(1, "2"), "public.c": Table(3, "4"), "public.e": Table(0, "0")}
    with pytest.raises(BackupError, match=r"4 table\(s\) differ") as caught:
        restore._require_same(before, after)
    assert caught.value.details == (
        "public.b: 2 rows in the backup, 1 rows restored",
        "public.c: 3 rows in the backup, 3 rows restored, other values",
        "public.d: 4 rows in the backup, missing restored",
        "public.e: missing in the backup, 0 rows restored",
    )


def test_a_pod_that_crashes() -> None:
    assert restore._last_words({}) == ""
    state = {"waiting": {"reason": "CrashLoopBackOff"}}
    last = {"terminated": {"exitCode": 1, "message": "`airflow db migrate` failed with exit code 1; see the log.\n"}}
    statuses = [
        {"name": "postgres", "restartCount": 7, "state": {"running": {}}},
        {"name": "airflow", "restartCount": 2, "state": state, "lastState": last},
    ]
    pod = {"status": {"containerStatuses": statuses}}
    assert restore._last_words(pod) == "`airflow db migrate` failed with exit code 1; see the log."
    assert restore._restarts(pod) == 2
    assert restore._waits_for_restart(pod)


def test_values_move_from_one_key_to_another() -> None:
    old, older, new, spare = (Fernet.generate_key().decode() for _ in range(4))
    rotate = reencryption._rotation(f"{old},{older}", f"{new}, {spare}")
    for key in (old, older):
        token = rotate(Fernet(key).encrypt("pässword".encode()).decode())
        assert token is not None
        assert Fernet(new).decrypt(token).decode() == "pässword"
    assert rotate(Fernet(spare).encrypt(b"of nobody").decode()) is None
    assert rotate("never encrypted") is None
    with pytest.raises(BackupError, match="is none"):
        reencryption._rotation("short", new)
