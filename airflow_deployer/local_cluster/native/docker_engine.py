"""The Docker Engine that builds and pushes: the machine's own where one answers, otherwise one that we start.

It listens on the default socket either way, so that every Docker program finds it without configuration.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
from pathlib import Path

from airflow_deployer.errors import LocalClusterError

from . import network
from .commands import search_path
from .layout import Layout
from .processes import ProcessSpec, ProcessTable, end, end_containers, start_time

SOCKET = Path("/var/run/docker.sock")
NAME = "dockerd"


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def server_version(path: Path = SOCKET, *, timeout: float = 5) -> str | None:
    """The version of the Docker Engine that answers at the socket, None when none does (Engine API, `GET /version`)."""
    connection = _UnixConnection(path, timeout)
    try:
        connection.request("GET", "/version")
        response = connection.getresponse()
        return str(json.loads(response.read())["Version"]) if response.status == 200 else None
    except (OSError, http.client.HTTPException, ValueError, KeyError):
        return None
    finally:
        connection.close()


def _exec_root(layout: Layout) -> Path:
    return layout.run / "docker"


def configuration(layout: Layout, mtu: int) -> dict[str, object]:
    """Our engine's daemon.json; the machine's own /etc/docker/daemon.json stays out of it."""
    return {
        "data-root": str(layout.docker),
        "exec-root": str(_exec_root(layout)),
        "pidfile": str(layout.run / "dockerd.pid"),
        "hosts": [f"unix://{SOCKET}"],
        "mtu": mtu,
        "log-opts": {"max-size": "10m", "max-file": "2"},
    }


def _forget_dead_containerd(layout: Layout) -> None:
    # dockerd takes whatever has the pid in this file, even a zombie, for its own containerd and waits for it in vain.
    pid_file = _exec_root(layout) / "containerd" / "containerd.pid"
    with contextlib.suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        if start_time(pid) is None or Path(f"/proc/{pid}/comm").read_text().strip() != "containerd":
            pid_file.unlink()


def ensure_docker(layout: Layout, table: ProcessTable) -> tuple[str, bool]:
    """Have a Docker Engine answer at the default socket; returns its version and whether it is ours.

    Raises:
        LocalClusterError: it does not start.
    """
    ours = table.pid(NAME) is not None
    version = server_version()
    if version is not None and not ours and not table.marked(NAME):
        return version, False
    program = shutil.which("dockerd", path=search_path())
    if program is None:
        raise LocalClusterError("starting Docker failed: there is no dockerd", hint="Run `apt-get install docker.io`.")
    path = layout.configuration / "dockerd.json"
    path.write_text(json.dumps(configuration(layout, network.default_mtu(layout)), indent=2))
    if table.pid(NAME) is None:
        network.remember_forward_policy(layout)
        (layout.run / "dockerd.pid").unlink(missing_ok=True)
        _forget_dead_containerd(layout)
    table.ensure(ProcessSpec(NAME, (program, f"--config-file={path}"), inputs=(path,)))
    table.wait(NAME, lambda: server_version() is not None, timeout=60)
    return server_version() or "unknown", True


def stop_docker(layout: Layout, table: ProcessTable) -> None:
    """End our Docker Engine with its containers; one that is not ours is left alone."""
    ours = table.record(NAME) is not None
    table.stop(NAME, grace=30)
    # What a dockerd that was killed has left: its containers, its containerd and that one's shims.
    end_containers(layout.docker, grace=5)
    end(table.marked(NAME), grace=5)
    if ours and server_version() is None:
        SOCKET.unlink(missing_ok=True)
