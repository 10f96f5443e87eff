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

AIRFLOW_LINES = [
    (
        "[scheduler] 2026-11-23T13:02:36.756118Z [info     ] 1 tasks up for execution     [airflow.jobs] x=1",
        LogLine("scheduler", "info", "1 tasks up for execution  [airflow.jobs] x=1"),
    ),
    (
        "[dag-processor] 2026-11-23T13:02:36.756118Z [error    ] Boom  [airflow.x]",
        LogLine("dag-processor", "error", "Boom  [airflow.x]"),
    ),
    ('[dag-processor]   File "x.py", line 1', LogLine("dag-processor", "error", '  File "x.py", line 1')),
    ("[scheduler] plain", LogLine("scheduler", "info", "plain")),
    ("[supervisor] 2026-11-23T13:05:15.103Z Stopping.", LogLine("supervisor", "info", "Stopping.")),
    ("no prefix", LogLine("airflow", "info", "no prefix")),
]


def test_airflow_lines_are_taken_apart() -> None:
    parser = LineParser("airflow")
    assert [parser.parse(text) for text, _ in AIRFLOW_LINES] == [line for _, line in AIRFLOW_LINES]


def test_postgres_lines_are_taken_apart() -> None:
    parser = LineParser("postgres")
    stamp = "2026-11-23 12:59:24.740 UTC [46]"
    assert parser.parse(f'{stamp} ERROR:  relation "log" does not exist') == LogLine(
        "postgres", "error", 'relation "log" does not exist'
    )
    assert parser.parse("\tSELECT 1").level == "error"
    assert parser.parse(f"{stamp} LOG:  checkpoint starting: time").is_routine


def test_what_the_import_check_says_is_told_by_us() -> None:
    parser = LineParser("airflow")
    stamp = "[parent] 2026-11-23T13:14:04.1Z [error    ]"
    lines = [f"{stamp} Failed to import: x.py [airflow.dag_processing.importers] loc=1", "[parent] Traceback"]
    assert all(parser.parse(line).is_routine for line in lines)
    assert not parser.parse(f"{stamp} Cannot fork [airflow_deployer_pod.parent]").is_routine


@pytest.mark.parametrize(
    ("line", "routine"),
    [
        (LogLine("dag-processor", "info", "Refreshing bundle dags"), True),
        (LogLine("dag-processor", "warning", "slow"), False),
        (LogLine("scheduler", "info", "Adopting or resetting orphaned tasks for active dag runs"), True),
        (LogLine("scheduler", "info", "1 tasks up for execution"), False),
        (LogLine("supervisor", "info", "Stopping."), False),
    ],
)
def test_what_is_routine(line: LogLine, routine: bool) -> None:
    assert line.is_routine is routine


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
