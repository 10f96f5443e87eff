"""When a DAG is parsed and when Airflow is healthy, by Airflow's own account and in the same way for every side.

Both are asked inside the pod, so that no port-forward is part of what is measured: the database by one `psql` that
stays, Airflow's health by a loop beside the API server.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import time
from typing import IO, cast

from airflow_deployer.airflow_profiles import Profile
from airflow_deployer.airflow_settings import API_PORT
from bench.programs import Kubectl, ProgramError, run

POD = "airflow-0"
PAUSE_SECONDS = 0.01
_END = "--end--"

# Runs in the container `airflow`: until every component is healthy by a heartbeat after the given moment. The time of
# the heartbeat matters: Airflow calls a component healthy for 30 s after its last one, dead or alive.
_HEALTHY = """
import datetime, json, sys, time, urllib.request
since, deadline = (datetime.datetime.fromtimestamp(float(text), datetime.timezone.utc) for text in sys.argv[1:3])
address, *components = sys.argv[3:]
while True:
    try:
        with urllib.request.urlopen(address, timeout=2) as answer:
            found = json.load(answer)
        # The database has none.
        beats = [found[name][f"latest_{name}_heartbeat"] for name in components if name != "metadatabase"]
        healthy = all(found[name]["status"] == "healthy" for name in components)
        if healthy and all(datetime.datetime.fromisoformat(beat) >= since for beat in beats):
            break
    except (OSError, KeyError, TypeError, ValueError):
        pass
    if datetime.datetime.now(datetime.timezone.utc) > deadline:
        sys.exit("not healthy in time")
    time.sleep(0.05)
"""


def wait_healthy(kubectl: Kubectl, namespace: str, profile: Profile, *, since: float, seconds: float = 300) -> None:
    """Wait until the web server answers that all other components are healthy, the database included.

    Args:
        profile: says which these are, and where they are asked for.
        since: only heartbeats from this moment on count; seconds since the epoch.
        seconds: the longest wait.

    Raises:
        ProgramError: they are not in time.
    """
    deadline = time.time() + seconds
    address = f"http://localhost:{API_PORT}{profile.health_path}"
    arguments = [_HEALTHY, str(since), str(deadline), address, *profile.health_components]
    command = kubectl.command(
        "exec", POD, "--container", "airflow", "--", "python3", "-c", *arguments, namespace=namespace
    )
    while True:
        try:
            run(command)
            return
        except ProgramError:
            # Until the container runs there is nothing to run the loop in.
            if time.time() > deadline:
                raise
            time.sleep(0.05)


def save_at_any_moment() -> None:
    """Wait up to a second: Airflow looks at its files once a second, and rounds must not keep step with that."""
    time.sleep(random.random())  # noqa: S311 - no secret


class Database:
    """Airflow's database, asked through one `psql` in the container `postgres`, started anew when its pod was replaced.

    Args:
        user: of Postgres.
        name: of the database.
    """

    def __init__(self, kubectl: Kubectl, namespace: str, *, user: str, name: str) -> None:
        inside = ["psql", "--quiet", "--no-align", "--tuples-only", "--no-psqlrc", f"--username={user}", name]
        self._command = kubectl.command(
            "exec", "--stdin", POD, "--container", "postgres", "--", *inside, namespace=namespace
        )
        self._process: subprocess.Popen[str] | None = None

    def ask(self, query: str) -> list[str]:
        """Return the answer's lines, fields separated by `|`.

        Raises:
            ProgramError: `psql` does not answer; the next call starts it anew.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        stdin, stdout = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)
        lines: list[str] = []
        try:
            stdin.write(f"{query};\nSELECT '{_END}';\n")
            stdin.flush()
            while (line := stdout.readline()) != f"{_END}\n":
                if not line:
                    raise OSError("no answer")
                lines.append(line.rstrip("\n"))
        except OSError as error:
            self.close()
            raise ProgramError(f"psql has ended: {error}") from None
        return lines

    def wait(self, query: str, *, seconds: float, what: str) -> None:
        """Ask until there is an answer.

        Raises:
            ProgramError: there is none in time.
        """
        deadline = time.monotonic() + seconds
        while True:
            # The pod may just be starting.
            with contextlib.suppress(ProgramError):
                if self.ask(query):
                    return
            if time.monotonic() > deadline:
                raise ProgramError(f"not within {seconds:.0f} s: {what}")
            time.sleep(PAUSE_SECONDS)

    def wait_parsed(self, dag_id: str, description: str, *, seconds: float) -> None:
        """Wait until Airflow has parsed the DAG with this description, so not an earlier version of the file."""
        query = f"SELECT 1 FROM dag WHERE dag_id = '{dag_id}' AND description = '{description}'"  # noqa: S608 - ours
        self.wait(query, seconds=seconds, what=f"DAG {dag_id} parsed as {description!r}")

    def close(self) -> None:
        """End `psql`, if it runs."""
        if self._process is not None:
            self._process.kill()
            # Closes the pipes as well; what could not be written is of no use any more.
            with contextlib.suppress(OSError):
                self._process.communicate()
            self._process = None
