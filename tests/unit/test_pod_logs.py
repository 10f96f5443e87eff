"""Reading the pod's logs: who says what, and each line once through restarts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from airflow_deployer import pod_logs
from airflow_deployer.pod_logs import LineParser, LogLine, PodApi, PodLog

STAMP = "2026-11-23T13:02:36.756118Z"
AIRFLOW_LINES = [
    (
        f"[scheduler] {STAMP} [info     ] 1 tasks up for execution     [airflow.jobs.scheduler] loc=x.py:1 count=1",
        LogLine("scheduler", "info", "1 tasks up for execution", "airflow.jobs.scheduler", is_routine=True),
    ),
    (
        "[scheduler] 2026-11-23 13:24:55.8+00:00 [info     ] 12 of 40 loaded  [unusual_prefix_1_orders] task_id=load",
        LogLine("scheduler", "info", "12 of 40 loaded", "unusual_prefix_1_orders"),
    ),
    (
        f"[scheduler] {STAMP} [info     ] got [1] x   [task.stdout]",
        LogLine("scheduler", "info", "got [1] x", "task.stdout"),
    ),
    (
        f"[dag-processor] {STAMP} [error    ] Boom  [airflow.x]",
        LogLine("dag-processor", "error", "Boom", "airflow.x"),
    ),
    ('[dag-processor]   File "x.py", line 1', LogLine("dag-processor", "error", '  File "x.py", line 1', "airflow.x")),
    (f"[supervisor] {STAMP} Stopping.", LogLine("supervisor", "info", "Stopping.")),
    ("[triggerer] ____  /| |_  /__  ___/_", LogLine("triggerer", "info", "____  /| |_  /__  ___/_", is_routine=True)),
    ("[triggerer] Traceback", LogLine("triggerer", "info", "Traceback")),
    ("no prefix", LogLine("airflow", "info", "no prefix")),
    (
        f"[scheduler] {STAMP} [info     ] TaskInstance Finished: dag_id=chain, task_id=third, run_id=r1, map_index=-1, "
        "duration=0.5, state=success, executor=LocalExecutor(), executor_state=success [airflow.j] x=1",
        LogLine("scheduler", "info", "chain.third success in r1", "task"),
    ),
    (
        f"[scheduler] {STAMP} [info     ] DagRun Finished: dag_id=chain, logical_date=None, run_id=r1, x=12.1, "
        "state=failed, run_type=manual [airflow.models.dagrun.DagRun] loc=x.py:1",
        LogLine("scheduler", "warning", "the run of chain failed in r1", "task"),
    ),
    (
        f"[api-server] {STAMP} [warning  ] A key is short. [py.warnings] category=X filename=/opt/airflow/lib/jwt.py",
        LogLine("api-server", "warning", "A key is short.", "py.warnings", is_routine=True),
    ),
    (
        f"[parent] {STAMP} [error    ] Failed to import: x.py [airflow.dag_processing.importers] loc=1",
        LogLine("parent", "error", "Failed to import: x.py", "airflow.dag_processing.importers", is_routine=True),
    ),
    (
        "[parent] Traceback",
        LogLine("parent", "error", "Traceback", "airflow.dag_processing.importers", is_routine=True),
    ),
]


def test_airflow_lines_are_taken_apart() -> None:
    parser = LineParser("airflow")
    assert [parser.parse(text) for text, _ in AIRFLOW_LINES] == [line for _, line in AIRFLOW_LINES]


def routine(component: str, text: str) -> LogLine:
    return LogLine(component, "info", text, is_routine=True)


OLDER_LINES = [
    (
        "[migration] INFO  [alembic.runtime.migration] Running upgrade a -> b, merge heads",
        routine("migration", "Running upgrade a -> b, merge heads"),
    ),
    (
        "[webserver] [2026-11-23 16:26:44 +0000] [37] [INFO] Listening at: http://0.0.0.0:8080 (37)",
        routine("webserver", "Listening at: http://0.0.0.0:8080 (37)"),
    ),
    (
        "[webserver] [2026-11-23 16:26:12,052] {manager.py:710} WARNING - No user yet created.",
        LogLine("webserver", "warning", "No user yet created."),
    ),
    (
        "[scheduler] [2026-11-23T16:26:46.653+0000] {scheduler_job_runner.py:959} INFO - Starting the scheduler",
        routine("scheduler", "Starting the scheduler"),
    ),
    (
        "[scheduler] [2026-11-23T16:27:46.653+0000] {scheduler_job_runner.py:783} INFO - TaskInstance Finished: "
        "dag_id=hello, task_id=greet, run_id=r1, map_index=0, run_duration=1.0, state=success, executor_state=success",
        LogLine("scheduler", "info", "hello.greet success in r1", "task"),
    ),
]


def test_lines_of_older_airflows_are_taken_apart() -> None:
    parser = LineParser("airflow")
    assert [parser.parse(text) for text, _ in OLDER_LINES] == [line for _, line in OLDER_LINES]


def test_whose_line_it_is() -> None:
    assert [line.text for _, line in AIRFLOW_LINES if line.is_of_task] == [
        "12 of 40 loaded",
        "got [1] x",
        "chain.third success in r1",
        "the run of chain failed in r1",
    ]


def test_postgres_lines_are_taken_apart() -> None:
    parser = LineParser("postgres")
    stamp = "2026-11-23 12:59:24.740 UTC [46]"
    assert parser.parse(f'{stamp} ERROR:  relation "log" does not exist') == LogLine(
        "postgres", "error", 'relation "log" does not exist'
    )
    assert parser.parse("\tSELECT 1").level == "error"
    assert parser.parse(f"{stamp} LOG:  checkpoint starting: time").is_routine


class Logs:
    """An API server with one pod, whose log it serves as a kubelet does: from `sinceTime` in whole seconds on."""

    def __init__(self) -> None:
        self.container_id: str | None = "one"
        self.lines: list[tuple[str, str]] = []
        self.refuse = 0
        self.requests: list[dict[str, str]] = []
        self._changed = asyncio.Event()
        self._cut = False

    def write(self, moment: str, text: str) -> None:
        self.lines.append((f"2026-11-23T12:00:{moment}Z", text))
        self._changed.set()

    def cut(self) -> None:
        """Break the connections that follow."""
        self._cut = True
        self._changed.set()

    async def get_pod(self, request: web.Request) -> web.Response:
        statuses = [{"name": "airflow", "containerID": self.container_id}] if self.container_id else []
        return web.json_response({"status": {"containerStatuses": statuses}})

    async def get_log(self, request: web.Request) -> web.StreamResponse:
        if self.refuse:
            return web.json_response({"kind": "Status"}, status=self.refuse)
        self.requests.append(dict(request.query))
        self._cut = False
        response = web.StreamResponse()
        await response.prepare(request)
        since = request.query.get("sinceTime", "")[:19]
        place = len(self.lines) if request.query.get("tailLines") == "0" else 0
        while not self._cut:
            self._changed.clear()
            for stamp, text in self.lines[place:]:
                if stamp[:19] >= since:
                    await response.write(f"{stamp} {text}\n".encode())
            place = len(self.lines)
            await self._changed.wait()
        assert request.transport is not None
        request.transport.abort()
        return response


@asynccontextmanager
async def following(tmp_path: Path, logs: Logs) -> AsyncIterator[list[str]]:
    app = web.Application()
    app.router.add_get("/api/v1/namespaces/ns/pods/airflow-0", logs.get_pod)
    app.router.add_get("/api/v1/namespaces/ns/pods/airflow-0/log", logs.get_log)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    kubeconfig = tmp_path / "config"
    kubeconfig.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
                "clusters": [{"name": "fake", "cluster": {"server": f"http://127.0.0.1:{runner.addresses[0][1]}"}}],
                "users": [{"name": "fake", "user": {"token": "t"}}],
            }
        )
    )
    api = PodApi("fake", str(kubeconfig))
    await api.load()
    seen: list[str] = []
    task = asyncio.create_task(PodLog(api, "ns", "airflow-0", "airflow").follow(lambda line: seen.append(line.text)))
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await api.close()
        await runner.cleanup()


async def until(seen: list[str], expected: list[str]) -> None:
    for _ in range(300):
        if len(seen) >= len(expected):
            break
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    assert seen == expected


async def until_asked(logs: Logs, times: int) -> None:
    for _ in range(300):
        if len(logs.requests) >= times:
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"asked {len(logs.requests)} times, not {times}")


def test_each_line_comes_once_when_the_connection_breaks(tmp_path: Path) -> None:
    async def scenario() -> None:
        logs = Logs()
        logs.write("00.5", "before")
        async with following(tmp_path, logs) as seen:
            await until_asked(logs, 1)
            for moment, text in (("01.000000001", "a"), ("01.25", "b"), ("01.25", "c")):
                logs.write(moment, text)
            await until(seen, ["a", "b", "c"])
            logs.cut()
            await until_asked(logs, 2)
            assert logs.requests[1]["sinceTime"] == "2026-11-23T12:00:01Z"
            logs.write("01.25", "d")
            logs.write("01.3", "e")
            await until(seen, ["a", "b", "c", "d", "e"])

    asyncio.run(scenario())


def test_a_new_container_is_read_from_its_start_whatever_its_clock_says(tmp_path: Path) -> None:
    async def scenario() -> None:
        logs = Logs()
        async with following(tmp_path, logs) as seen:
            await until_asked(logs, 1)
            logs.write("30.0", "old")
            await until(seen, ["old"])
            logs.container_id, logs.lines = "two", []
            logs.write("10.0", "new")
            logs.cut()
            await until(seen, ["old", "new"])

    asyncio.run(scenario())


def test_a_silent_log_is_asked_again_without_its_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_logs, "_SILENCE", 0.1)

    async def scenario() -> None:
        logs = Logs()
        logs.write("00.5", "before")
        async with following(tmp_path, logs) as seen:
            await until_asked(logs, 3)
            logs.write("31.0", "after")
            await until(seen, ["after"])

    asyncio.run(scenario())


def test_a_pod_that_is_away_is_waited_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        logs = Logs()
        logs.refuse = 404
        async with following(tmp_path, logs) as seen:
            await asyncio.sleep(0.3)
            logs.refuse = 0
            await until_asked(logs, 1)
            logs.write("01.0", "here")
            await until(seen, ["here"])

    asyncio.run(scenario())
