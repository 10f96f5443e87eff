"""The passwords of Airflow's Flask-AppBuilder login."""

from __future__ import annotations

import pytest
from airflow_deployer_pod.admin_user import hash_password, is_password


def test_a_password_is_known_by_its_hash_which_is_another_one_each_time() -> None:
    kept = hash_password("secret")
    assert kept.startswith("pbkdf2:sha256:10000$")
    assert is_password("secret", kept)
    assert not is_password("Secret", kept)
    assert hash_password("secret") != kept


def test_a_hash_that_werkzeug_made_is_read() -> None:
    # werkzeug.security.generate_password_hash("pw", method="pbkdf2:sha256:50") with the salt `salt`.
    assert is_password("pw", "pbkdf2:sha256:50$salt$00d5d893a0fb0a593433705abb5c512d3c42e7909aa547fb562746694c1cc63b")


@pytest.mark.parametrize("kept", [None, "", "scrypt:32768:8:1$salt$00", "pbkdf2:sha256:x$salt$00", "plain"])
def test_anything_else_is_not_the_password(kept: str | None) -> None:
    assert not is_password("pw", kept)
