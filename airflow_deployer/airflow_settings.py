"""Where things are in the `airflow` container, whatever Airflow's version."""

from __future__ import annotations

HOME = "/home/airflow"
SECRETS = "/run/secrets/airflow-deployer"
API_PORT = 8080
