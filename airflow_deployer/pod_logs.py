"""Following the logs of the pod's containers, through restarts of the pod and of the API server, each line once.

The API's parameters are those of
https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/#get-read-log-of-the-specified-pod.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING
from urllib.parse import quote

from airflow_deployer.api_streams import ApiServer, UnavailableError

if TYPE_CHECKING:
    pass

# A log that stays silent for so long is asked for again: that is how a connection that died with the laptop's sleep is
# noticed, and it costs nothing where it had not.
_SILENCE = 30.0
_ANSWER = 15.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0
_LONGEST_LINE = 1 << 20

_STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d) ?")
_COMPONENT = re.compile(r"\[([a-z-]+)\] ?")
# Airflow's own lines, as structlog writes them: time, level, an event that is padded, its logger and its fields. The
# supervisor's have no level.
_AIRFLOW = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d\.\d+(?:Z|\+00:00) (?:\[([a-z]+) *\] ?)?")
# The lines of Airflow 2 and 1.10, of gunicorn and of Alembic, whose loggers have no names here. They are Airflow's own:
# what a DAG logs goes to a file.
_OLDER = re.compile(
    r"(?:\[[\d-]+[T ][\d:.,]+(?:\+\d+)?\] \{[^}]*\} (?P<airflow>[A-Z]+) - "
    r"|\[[\d-]+ [\d:]+ [+-]\d+\] \[\d+\] \[(?P<gunicorn>[A-Z]+)\] "
    r"|(?P<alembic>[A-Z]+) +\[alembic[\w.]*\] )(?P<event>.*)"
)
_LOGGER = re.compile(r"(?P<event>.*) \[(?P<logger>[A-Za-z_][\w.]*)\](?P<fields>(?: \w+=.*)?)")
_BANNER = re.compile(r"[\s_/()|\\=]*")
_POSTGRES = re.compile(r"[\d-]+ [\d:.]+ \S+ \[\d+\] (LOG|WARNING|ERROR|FATAL|PANIC): +")
_POSTGRES_LEVELS = {"LOG": "info", "WARNING": "warning", "ERROR": "error", "FATAL": "error", "PANIC": "critical"}
_FINISHED = re.compile(
    r"(?:TaskInstance|DagRun) Finished: dag_id=([^,]+),(?: task_id=([^,]+),)?.*? run_id=([^,]+),.*? state=([a-z_]+)"
)
# What loggers of Airflow itself and of its libraries are called; any other belongs to somebody's DAG.
_OWN_LOGGERS = ("airflow", "supervisor", "uvicorn", "alembic", "sqlalchemy", "httpx", "__main__", "py.warnings")
# What is said of every look at the log of a running task (docs/pod.md), and of a task whose run was ended under it.
_NOISE = (
    "Could not read served logs",
    "Pydantic serializer warnings",
    "Cannot update Task Instance in invalid state",
    "Recovery retry of terminal-state API call failed",
)
# The import check's log; what comes of the check is told by whoever asked for it.
_IMPORTING = "airflow.dag_processing."


@dataclass(frozen=True)
class LogLine:
    """One line of a log.

    Attributes:
        component: who wrote it: `scheduler`, `api-server`, `supervisor`, `postgres`, ...
        level: `debug`, `info`, `warning`, `error` or `critical`; a line that names none has that of the one before it.
        text: the line without time, component, level, logger and fields.
        logger: the logger's name, empty where the line names none.
        is_routine: it says no more than that Airflow goes on as it should.
    """

    component: str
    level: str
    text: str
    logger: str = ""
    is_routine: bool = False

    @property
    def is_of_task(self) -> bool:
        """True for what a task, not Airflow itself, has logged, and for its end."""
        return self.component == "scheduler" and bool(self.logger) and not self.logger.startswith(_OWN_LOGGERS)


class LineParser:
    """Takes the lines of one container apart; keeps what a line that is not the first of its message inherits.

    Args:
        container: who wrote a line that does not say who wrote it.
    """

    def __init__(self, container: str) -> None:
        self._container = container
        self._first: dict[str, LogLine] = {}

    def parse(self, text: str) -> LogLine:
        """Parse one line, its API time stamp taken off."""
        component = self._container
        if match := _COMPONENT.match(text):
            component, text = match[1], text[match.end() :]
        text = text.rstrip()
        if match := _POSTGRES.match(text):
            level = _POSTGRES_LEVELS[match[1]]
            line = LogLine(component, level, text[match.end() :], is_routine=level == "info")
        elif match := _AIRFLOW.match(text):
            line = _airflow_line(component, match[1] or "", text[match.end() :])
        elif match := _OLDER.fullmatch(text):
            level = next(filter(None, match.group("airflow", "gunicorn", "alembic"))).lower()
            line = _airflow_line(component, level, match["event"])
        else:
            first = self._first.get(
                component, LogLine(component, "info", "", is_routine=_BANNER.fullmatch(text) is not None)
            )
            event = _LOGGER.fullmatch(text)
            return LogLine(
                component, first.level, event["event"].rstrip() if event else text, first.logger, first.is_routine
            )
        self._first[component] = line
        return line


def _airflow_line(component: str, level: str, text: str) -> LogLine:
    if not level:
        return LogLine(component, "info", text)
    match = _LOGGER.fullmatch(text)
    event, logger, fields = match.group("event", "logger", "fields") if match else (text, "", "")
    event = event.rstrip()
    if finished := _FINISHED.match(event):
        dag_id, task_id, run_id, state = finished.groups()
        shown = f"{dag_id}.{task_id}" if task_id else f"the run of {dag_id}"
        return LogLine(component, "info" if state == "success" else "warning", f"{shown} {state} in {run_id}", "task")
    routine = level in ("info", "debug") and (logger.startswith(_OWN_LOGGERS) or logger == "task" or not logger)
    if logger == "py.warnings" and "filename=/opt/airflow/" in fields:
        routine = True
    if event.startswith(_NOISE) or (component == "parent" and logger.startswith(_IMPORTING)):
        routine = True
    return LogLine(component, level, event, logger, routine)


class PodApi(ApiServer):
    """The API server of a context, with what following logs asks of it."""

    async def container_id(self, namespace: str, pod: str, container: str) -> str | None:
        """Ask which container runs, or ran last, under this name; None before the first one.

        Raises:
            UnavailableError: no answer, or no such pod.
            RefusedError: these credentials may not.
        """
        async with self.get(_pod_path(namespace, pod), (), _ANSWER) as response:
            status = (await response.json()).get("status", {})
        found = (item for item in status.get("containerStatuses", []) if item["name"] == container)
        return next((item.get("containerID") for item in found), None)

    async def follow_log(
        self, namespace: str, pod: str, container: str, query: Sequence[tuple[str, str]]
    ) -> AsyncIterator[str]:
        """Yield the lines of a container's log as they are written, until the container ends.

        Args:
            query: further parameters.

        Raises:
            UnavailableError: not now, or no longer.
            RefusedError: these credentials may not.
        """
        path = _pod_path(namespace, pod) + "/log"
        query = [("container", container), ("follow", "true"), ("timestamps", "true"), *query]
        pending = b""
        async with self.get(path, query, _SILENCE) as response:
            async for chunk in response.content.iter_any():
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    yield line.decode(errors="replace")
                if len(pending) > _LONGEST_LINE:
                    yield pending.decode(errors="replace")
                    pending = b""
        if pending:
            yield pending.decode(errors="replace")


def _pod_path(namespace: str, pod: str) -> str:
    return f"/api/v1/namespaces/{quote(namespace)}/pods/{quote(pod)}"


class PodLog:
    """The log of one container name, from the first `follow` on; can be left and followed again.

    Args:
        api: where the pod is.
        namespace: the pod's.
        pod: its name; other pods of that name may come.
        container: `airflow` or `postgres`.
    """

    def __init__(self, api: PodApi, namespace: str, pod: str, container: str) -> None:
        self._api = api
        self._place = (namespace, pod, container)
        self._parser = LineParser(container)
        self._container_id: str | None = None
        self._position: _Position | None = None

    async def follow(self, on_line: Callable[[LogLine], None]) -> None:
        """Tell each line that is written from now on, until cancelled.

        Raises:
            RefusedError: the credentials do not allow reading logs.
        """
        pause = _FIRST_PAUSE
        while True:
            began = time.monotonic()
            try:
                query = await self._resume()
                async for line in self._api.follow_log(*self._place, query):
                    self._take(line, on_line)
            except UnavailableError:
                # Whoever needs the pod says so; a log is only silent.
                pass
            if time.monotonic() - began > _LONGEST_PAUSE:
                pause = _FIRST_PAUSE
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def _resume(self) -> list[tuple[str, str]]:
        """Say from where on to read: the end at first, then where it was left, then all of each new container."""
        container_id = await self._api.container_id(*self._place)
        if self._position is None:
            self._container_id, self._position = container_id, _Position([("tailLines", "0")])
        elif container_id != self._container_id:
            # Another container, perhaps on another node with another clock.
            self._container_id, self._position = container_id, _Position([])
        return self._position.query()

    def _take(self, line: str, on_line: Callable[[LogLine], None]) -> None:
        match = _STAMP.match(line)
        if match is None or self._position is None:
            return
        if self._position.passes(_nanoseconds(match)):
            on_line(self._parser.parse(line[match.end() :]))


class _Position:
    """Where in a log we are. `sinceTime` has whole seconds, so what comes again is counted off.

    Args:
        start: the parameters to begin with.
    """

    def __init__(self, start: list[tuple[str, str]]) -> None:
        self._start = start
        self._last: int | None = None
        self._taken_of_last = 0
        self._again = 0

    def query(self) -> list[tuple[str, str]]:
        """The parameters to go on from here."""
        self._again = self._taken_of_last
        if self._last is None:
            return self._start
        since = datetime.fromtimestamp(self._last // 1_000_000_000, timezone.utc)
        return [("sinceTime", since.strftime("%Y-%m-%dT%H:%M:%SZ"))]

    def passes(self, moment: int) -> bool:
        """Note a line of that time (nanoseconds since the epoch); False when it was taken before."""
        if self._last is not None and moment < self._last:
            return False
        if moment == self._last:
            if self._again:
                self._again -= 1
                return False
            self._taken_of_last += 1
            return True
        self._last, self._taken_of_last, self._again = moment, 1, 0
        return True


def _nanoseconds(stamp: re.Match[str]) -> int:
    seconds = datetime.fromisoformat(stamp[1] + stamp[3].replace("Z", "+00:00")).timestamp()
    return int(seconds) * 1_000_000_000 + int((stamp[2] or "0").ljust(9, "0"))
