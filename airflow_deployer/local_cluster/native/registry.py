"""The image registry at localhost:5000, which Docker pushes to and the pods' containerd pulls from."""

from __future__ import annotations

import http.client
import json

from airflow_deployer.errors import LocalClusterError

from .layout import Layout
from .processes import ProcessSpec, ProcessTable

NAME = "registry"
ADDRESS = "127.0.0.1:5000"
HOST = "localhost:5000"


def configuration(layout: Layout) -> str:
    """The registry's configuration file (YAML, of which JSON is a part)."""
    return json.dumps(
        {
            "version": "0.1",
            "log": {"level": "warn", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(layout.registry)}},
            "http": {"addr": ADDRESS},
        },
        indent=2,
    )


def request(method: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str]]:
    """Ask the registry; status and headers (lower-case names) of the answer, status 0 when nothing answers."""
    connection = http.client.HTTPConnection(ADDRESS, timeout=5)
    try:
        connection.request(method, path, headers=headers or {})
        response = connection.getresponse()
        response.read()
        return response.status, {name.lower(): value for name, value in response.getheaders()}
    except (OSError, http.client.HTTPException):
        return 0, {}
    finally:
        connection.close()


def answers() -> bool:
    """Whether a registry answers (Distribution API, `GET /v2/`)."""
    return request("GET", "/v2/")[0] == 200


def digest(repository: str, tag: str) -> str | None:
    """The digest that a tag points to, None when the registry does not have it."""
    accept = "application/vnd.docker.distribution.manifest.v2+json"
    status, headers = request("HEAD", f"/v2/{repository}/manifests/{tag}", {"Accept": accept})
    return headers.get("docker-content-digest") if status == 200 else None


def ensure_registry(layout: Layout, table: ProcessTable) -> None:
    """Have our registry answer at localhost:5000.

    Raises:
        LocalClusterError: something else has the port, or the registry does not start.
    """
    if table.pid(NAME) is None and not table.marked(NAME) and request("GET", "/")[0] != 0:
        raise LocalClusterError(
            f"starting the registry failed: something else answers at {HOST}",
            hint=f"See what it is with `ss -ltnp 'sport = :{HOST.partition(':')[2]}'`, stop it, then run this again.",
        )
    layout.registry.mkdir(exist_ok=True)
    path = layout.configuration / "registry.yml"
    path.write_text(configuration(layout))
    table.ensure(ProcessSpec(NAME, ("/usr/bin/docker-registry", "serve", str(path)), inputs=(path,)))
    table.wait(NAME, answers, timeout=20)
