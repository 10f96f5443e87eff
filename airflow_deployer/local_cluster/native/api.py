"""The native cluster's API, as its own parts need it: JSON over one short TLS connection per request.

The official client takes half a second to import; `cluster up` with everything running has two seconds in all.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator
from typing import Any

from airflow_deployer.errors import LocalClusterError

from .certificates import certificate_path, key_path
from .layout import Layout

API_PORT = 6443
SERVER = f"https://127.0.0.1:{API_PORT}"
FIELD_MANAGER = "airflow-deployer"


class ApiError(LocalClusterError):
    """A request failed; `status` is the HTTP status, 0 when the API could not be reached."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message, hint="Run `deployer cluster up`, which repairs the cluster.")
        self.status = status


class Api:
    """The API as seen by the user whose certificate is called `user`."""

    def __init__(self, layout: Layout, user: str = "admin") -> None:
        self._context = ssl.create_default_context(cafile=certificate_path(layout, "ca"))
        self._context.load_cert_chain(certificate_path(layout, user), key_path(layout, user))

    def _connect(self, timeout: float) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection("127.0.0.1", API_PORT, timeout=timeout, context=self._context)

    def call(
        self, method: str, path: str, body: Any = None, *, content_type: str = "application/json"
    ) -> dict[str, Any]:
        """One request; returns the object.

        Raises:
            ApiError: the API cannot be reached or refuses.
        """
        connection = self._connect(timeout=15)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, body=payload, headers={"Content-Type": content_type})
            response = connection.getresponse()
            raw = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ApiError(f"{method} {path} failed: {error}", 0) from error
        finally:
            connection.close()
        try:
            answer = json.loads(raw)
        except ValueError:
            answer = {"message": raw.decode(errors="replace")}
        if response.status >= 300:
            raise ApiError(f"{method} {path} failed: {answer.get('message', response.reason)}", response.status)
        return dict(answer)

    def apply(self, path: str, body: dict[str, Any]) -> None:
        """Server-side apply of one object at its path.

        Raises:
            ApiError: the API cannot be reached or refuses.
        """
        query = f"{path}?fieldManager={FIELD_MANAGER}&force=true"
        self.call("PATCH", query, body, content_type="application/apply-patch+yaml")

    def watch(self, path: str, *, seconds: int) -> Iterator[dict[str, Any]]:
        """The events of a collection from now on, for at most `seconds`.

        Raises:
            ApiError: the API cannot be reached or ends the watch early.
        """
        connection = self._connect(timeout=seconds + 10)
        try:
            connection.request("GET", f"{path}?watch=true&timeoutSeconds={seconds}")
            response = connection.getresponse()
            if response.status != 200:
                raise ApiError(f"GET {path} failed: {response.reason}", response.status)
            while line := response.readline():
                yield dict(json.loads(line))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ApiError(f"watching {path} failed: {error}", 0) from error
        finally:
            connection.close()

    def is_ready(self) -> bool:
        """Whether the API server serves requests (`GET /readyz`)."""
        connection = self._connect(timeout=5)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
