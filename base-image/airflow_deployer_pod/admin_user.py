"""The users of Airflow's Flask-AppBuilder login, as the Secret has them: written by SQL, in some milliseconds.

`airflow users create` takes five to nine seconds, wants the password among its arguments, and leaves an old password as
it is. The tables are Flask-AppBuilder's (`flask_appbuilder/security/sqla/models.py`), and the same in Airflow 1.10 and
2. A password is kept in the form that Werkzeug reads (`werkzeug.security.check_password_hash`),
`pbkdf2:sha256:<iterations>$<salt>$<hex digits>`.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from typing import Any

ROLE = "Admin"
# A generated password of 96 bits needs no stretching, and every request to the API pays for it once more.
ITERATIONS = 10_000

_METHOD = "pbkdf2:sha256"


def hash_password(password: str) -> str:
    """A new hash of a password."""
    salt = secrets.token_hex(8)
    return f"{_METHOD}:{ITERATIONS}${salt}${_digest(password, salt, ITERATIONS)}"


def is_password(password: str, kept: str | None) -> bool:
    """Whether `kept` is a hash of this password by the method that is used here."""
    try:
        method, salt, digest = (kept or "").split("$")
        name, _, iterations = method.rpartition(":")
        return name == _METHOD and hmac.compare_digest(_digest(password, salt, int(iterations)), digest)
    except ValueError:
        return False


def _digest(password: str, salt: str, iterations: int) -> str:
    return hashlib.pbkdf2_hmac("sha256", password.encode(), salt.encode(), iterations).hex()


def ensure_users(connection: Any, passwords: Mapping[str, str]) -> list[str]:
    """Make every user of `passwords` an active admin with that password; return those who were not.

    Args:
        connection: to Airflow's database, whose web server has made the roles.
        passwords: by user name.
    """
    changed = []
    with connection, connection.cursor() as cursor:
        for name, password in passwords.items():
            cursor.execute("SELECT id, password, active FROM ab_user WHERE username = %s", (name,))
            row = cursor.fetchone()
            if row is None:
                cursor.execute(
                    "INSERT INTO ab_user (id, first_name, last_name, username, email, password, active, created_on,"
                    " changed_on) VALUES (nextval('ab_user_id_seq'), %s, %s, %s, %s, %s, true, now(), now())"
                    " RETURNING id",
                    (name, "", name, f"{name}@localhost", hash_password(password)),
                )
                (user,) = cursor.fetchone()
                changed.append(name)
            else:
                user, kept, active = row
                if not active or not is_password(password, kept):
                    cursor.execute(
                        "UPDATE ab_user SET password = %s, active = true, changed_on = now() WHERE id = %s",
                        (hash_password(password), user),
                    )
                    changed.append(name)
            cursor.execute(
                "INSERT INTO ab_user_role (id, user_id, role_id)"
                " SELECT nextval('ab_user_role_id_seq'), %s, id FROM ab_role WHERE name = %s"
                " AND NOT EXISTS (SELECT 1 FROM ab_user_role WHERE user_id = %s AND role_id = ab_role.id)",
                (user, ROLE, user),
            )
    return changed
