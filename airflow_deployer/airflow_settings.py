"""The environment of the `airflow` container: each setting that the pod depends on or that differs from Airflow's own.

Names are Airflow's (`AIRFLOW__SECTION__KEY`,
https://airflow.apache.org/docs/apache-airflow/stable/configurations-ref.html). What users set in `deployer.toml`
comes on top and may replace the tuned values, never the ones that hold the pod together (`config.OWN_SETTINGS`).
"""

from __future__ import annotations

import json

from airflow_deployer import credentials

HOME = "/home/airflow"
SECRETS = "/run/secrets/airflow-deployer"
API_PORT = 8080

# What holds the pod together.
WIRING = {
    "AIRFLOW_HOME": HOME,
    "AIRFLOW__CORE__DAGS_FOLDER": f"{HOME}/dags",
    "AIRFLOW__CORE__PLUGINS_FOLDER": f"{HOME}/plugins",
    "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
    "AIRFLOW__LOGGING__BASE_LOG_FOLDER": f"{HOME}/logs",
    # Tasks talk to the API server; the default does not follow `[api] port`.
    "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://localhost:{API_PORT}/execution/",
    "AIRFLOW__API__PORT": str(API_PORT),
    "AIRFLOW__CORE__AUTH_MANAGER": ("airflow.api_fastapi.auth.managers.simple.simple_auth_manager.SimpleAuthManager"),
    "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{credentials.ADMIN_USER}:admin",
    # DAG content in versions, so that a run finishes on the one it began with (base-image/.../dag_bundle.py).
    "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST": json.dumps(
        [{"name": "dags", "classpath": "airflow_deployer_pod.dag_bundle.ContentBundle", "kwargs": {}}]
    ),
    # 1800 s by default: our own retention looks at the runs and the DAGs, Airflow's at the age alone.
    "AIRFLOW__DAG_PROCESSOR__STALE_BUNDLE_CLEANUP_INTERVAL": "0",
    # Values of secrets stay in files: a variable would show in `kubectl describe`, in /proc and in crash reports.
    "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_CMD": f"cat {SECRETS}/{credentials.SQL_ALCHEMY_CONN}",
    "AIRFLOW__CORE__FERNET_KEY_CMD": f"cat {SECRETS}/{credentials.FERNET_KEY}",
    "AIRFLOW__API_AUTH__JWT_SECRET_CMD": f"cat {SECRETS}/{credentials.JWT_SECRET}",
    "AIRFLOW__API__SECRET_KEY_CMD": f"cat {SECRETS}/{credentials.API_SECRET_KEY}",
}

# What differs from Airflow's defaults because one small pod serves one small team.
TUNING = {
    "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    # True by default: every process would compare the schema once more, which the supervisor has done already, and for
    # that import what migrates it (0.3 s and 10 MB each).
    "AIRFLOW__DATABASE__CHECK_MIGRATIONS": "False",
    # 300 s by default. A switch of content wakes the DAG processor; this is for one that was cut off before it did.
    "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "30",
    # 30 s by default: an edited task structure would stay unseen for that long, and of two saves the second be lost.
    "AIRFLOW__CORE__MIN_SERIALIZED_DAG_UPDATE_INTERVAL": "0",
    # 300 s by default: a task that a crash interrupted would wait that long for its second try.
    "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "30",
    # 32 by default, and LocalExecutor starts that many workers ahead: 90 MB more at rest.
    "AIRFLOW__CORE__PARALLELISM": "8",
    # A line for every probe would bury the others.
    "AIRFLOW__LOGGING__NAMESPACE_LEVELS": "http.access=WARNING",
}


def environment(user: dict[str, str]) -> dict[str, str]:
    """Merge the wiring, the tuning and what the user set; the wiring always wins."""
    return TUNING | user | WIRING
