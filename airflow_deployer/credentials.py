"""The generated secrets of a Deployment: made once, kept as long as the volume, never rotated silently.

`new` makes the data of the Secret; whoever holds the volume needs this same Secret, because the database keeps the
password and every stored connection is encrypted with the Fernet key.
"""

from __future__ import annotations

import base64
import json
import secrets

ADMIN_USER = "admin"
POSTGRES_USER = "airflow"
POSTGRES_DATABASE = "airflow"

POSTGRES_PASSWORD = "postgres-password"
SQL_ALCHEMY_CONN = "sql-alchemy-conn"
FERNET_KEY = "fernet-key"
JWT_SECRET = "jwt-secret"
API_SECRET_KEY = "api-secret-key"
ADMIN_PASSWORD = "admin-password"
SIMPLE_AUTH_PASSWORDS = "simple-auth-passwords.json"

POSTGRES_KEYS = (POSTGRES_PASSWORD,)
AIRFLOW_KEYS = (SQL_ALCHEMY_CONN, FERNET_KEY, JWT_SECRET, API_SECRET_KEY, SIMPLE_AUTH_PASSWORDS)
KEYS = (*POSTGRES_KEYS, *AIRFLOW_KEYS, ADMIN_PASSWORD)


def new() -> dict[str, str]:
    """Make fresh values for every key of the Secret, as plain text.

    The Fernet key is 32 random bytes in URL-safe base64 (https://cryptography.io/en/latest/fernet/); the JWT secret
    has 64 bytes because Airflow signs with HS512.
    """
    database_password = secrets.token_urlsafe(32)
    admin_password = secrets.token_urlsafe(12)
    return {
        POSTGRES_PASSWORD: database_password,
        SQL_ALCHEMY_CONN: (
            f"postgresql+psycopg2://{POSTGRES_USER}:{database_password}@127.0.0.1:5432/{POSTGRES_DATABASE}"
        ),
        FERNET_KEY: base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
        JWT_SECRET: secrets.token_urlsafe(64),
        API_SECRET_KEY: secrets.token_urlsafe(32),
        ADMIN_PASSWORD: admin_password,
        SIMPLE_AUTH_PASSWORDS: json.dumps({ADMIN_USER: admin_password}),
    }


def encode(values: dict[str, str]) -> dict[str, str]:
    """Encode plain values as a Secret's `data`."""
    return {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}


def decode(data: dict[str, str]) -> dict[str, str]:
    """Decode a Secret's `data` to plain values."""
    return {key: base64.b64decode(value).decode() for key, value in data.items()}
