"""The generated secrets: complete, fresh, consistent with one another, and encodable."""

from __future__ import annotations

import base64
import json

from airflow_deployer import credentials


def test_every_key_is_made() -> None:
    assert set(credentials.new()) == set(credentials.KEYS)


def test_two_deployments_share_nothing() -> None:
    one, other = credentials.new(), credentials.new()
    assert all(one[key] != other[key] for key in credentials.KEYS)


def test_the_values_fit_together() -> None:
    values = credentials.new()
    assert values["postgres-password"] in values["sql-alchemy-conn"]
    assert json.loads(values["simple-auth-passwords.json"]) == {"admin": values["admin-password"]}
    assert len(base64.urlsafe_b64decode(values["fernet-key"])) == 32
    assert len(values["jwt-secret"]) >= 64


def test_encoding_round_trips() -> None:
    values = credentials.new()
    assert credentials.decode(credentials.encode(values)) == values
