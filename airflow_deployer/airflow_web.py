"""Airflow's web server at a base URL: patient requests, and its health, which needs no login."""

from __future__ import annotations

import json
from typing import Any

from airflow_deployer.airflow_profiles import Profile
from airflow_deployer.errors import AirflowError
from airflow_deployer.running_airflow import Component

_CONNECT_TIMEOUT = 5.0
_READ_TIMEOUT = 15.0
# Resets are normal while a pod is replaced. With the growing pauses between them these retries take about 3 s.
_RETRIES = 5
# A request that was sent and got no answer may have cost the whole time-out.
_READ_RETRIES = 2
_PAUSE_FACTOR = 0.1
_DETAIL_LIMIT = 300


class AirflowWeb:
    """A client of the web server at `url`, which has no path: `http://localhost:8080`.

    Every method raises `AirflowError` when Airflow does not answer or refuses; idempotent requests are repeated a few
    times when their connection breaks.
    """

    def __init__(self, url: str, profile: Profile) -> None:
        from urllib3 import PoolManager, Timeout

        self._url = url.rstrip("/")
        self._profile = profile
        self._pool = PoolManager(timeout=Timeout(connect=_CONNECT_TIMEOUT, read=_READ_TIMEOUT))
        self._headers: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._url!r})"

    def health(self) -> dict[str, Component]:
        """Return the health of each component that the series has; needs no login.

        The HTTP status says nothing: it is 200 with a dead scheduler or database too.
        """
        document = self.request("GET", self._profile.health_path, doing="read Airflow's health")
        reports = {name: document.get(name) or {} for name in self._profile.health_components}
        return {
            name: Component(report.get("status"), report.get(f"latest_{name}_heartbeat"))
            for name, report in reports.items()
        }

    def request(
        self,
        method: str,
        path: str,
        *,
        doing: str,
        body: Any = None,
        idempotent: bool = False,
        quote: bool = True,
        missing_ok: bool = False,
    ) -> Any:
        """Send one request and return the decoded JSON answer.

        Args:
            method: the HTTP verb.
            path: from the slash on, query included.
            doing: what it is for, as it follows "Cannot" in an error: "list the DAGs".
            body: sent as JSON.
            idempotent: a POST or PATCH may be sent again when the connection breaks, as every other verb is.
            quote: an error may show what the server answered.
            missing_ok: return None where the server knows no such thing (404).

        Raises:
            AirflowError: no answer, an answer other than 2xx, or one that is not JSON.
        """
        from urllib3 import Retry
        from urllib3.exceptions import HTTPError

        retries = Retry(
            total=_RETRIES,
            read=_READ_RETRIES,
            redirect=False,
            backoff_factor=_PAUSE_FACTOR,
            # None: any verb. The default leaves out POST and PATCH.
            allowed_methods=None if idempotent else Retry.DEFAULT_ALLOWED_METHODS,
            respect_retry_after_header=False,
        )
        headers = {"Accept": "application/json", **self._headers}
        content = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = json.dumps(body).encode()
        try:
            response = self._pool.request(method, self._url + path, body=content, headers=headers, retries=retries)
        except HTTPError as error:
            raise AirflowError(
                f"Cannot {doing}: Airflow does not answer at {self._url}: {_cause(error)}.",
                hint="deployer status   shows the state of the pod and its components",
            ) from None
        # To the only user, who may do everything, a 403 says the same: Airflow 2 takes a wrong password for no login at
        # all, which it knows as the role Public.
        if response.status in (401, 403):
            raise AirflowError(
                f"Cannot {doing}: Airflow does not accept the login ({response.status}).",
                hint="deployer up   brings the password in the Secret and in the pod together",
            )
        if missing_ok and response.status == 404:
            return None
        if not 200 <= response.status < 300:
            detail = f": {_detail(response.data)}" if quote and response.data else ""
            raise AirflowError(f"Cannot {doing}: Airflow answers {response.status} to {method} {path}{detail}.")
        try:
            return response.json()
        except ValueError:
            raise AirflowError(
                f"Cannot {doing}: what answers at {self._url} is not Airflow's API: {path} is not JSON.",
                hint="deployer port-forward   with another --port, if another program answers there",
            ) from None


def _cause(error: Exception) -> str:
    """Say what broke: urllib3 wraps it once for the retries and once for the pool."""
    cause: object = getattr(error, "reason", None) or error
    text = " ".join(str(cause).split())
    # urllib3 puts the connection's repr in front.
    return text.rpartition(">: ")[2] or type(cause).__name__


def _detail(data: bytes) -> str:
    """Take the reason out of an error body: `{"detail": ...}`, in Airflow 2 with the reason's `title` beside it."""
    try:
        document = json.loads(data)
        detail = document["detail"] or document["title"]
    except (ValueError, KeyError, TypeError):
        detail = data.decode(errors="replace")
    text = " ".join((detail if isinstance(detail, str) else json.dumps(detail)).split())
    return text if len(text) <= _DETAIL_LIMIT else text[:_DETAIL_LIMIT] + "..."
