"""The scripts around Postgres' programs, with other programs in their place, and how their errors are told."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from typing import Any

import pytest
from aiohttp import WSMessage, WSMsgType

from airflow_deployer import pod_postgres
from airflow_deployer.pod_exec import PodExec
from airflow_deployer.pod_postgres import PostgresError, Psql


def run(script: str, *arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run a script as it is run in the container."""
    return subprocess.run(
        ["bash", "-c", script, "name", *arguments], input=given, capture_output=True, timeout=10, check=False
    )


def test_a_program_sees_the_end_of_what_was_announced() -> None:
    done = run(pod_postgres._PIPED, "4", "cat", given=b"dumpand more")
    assert (done.returncode, done.stdout) == (0, b"dump")


def test_a_program_that_fails_fails() -> None:
    assert run(pod_postgres._PIPED, "4", "false", given=b"dump").returncode == 1


@pytest.mark.parametrize("code", [0, 3])
def test_a_watched_program_keeps_its_output_and_exit_code(code: int) -> None:
    running = subprocess.Popen(
        ["bash", "-c", pod_postgres._WATCHED, "pg_dump", "bash", "-c", f"sleep 0.5; echo dump; exit {code}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert running.stdout is not None
    # Its input stays open for as long as the connection does.
    assert running.stdout.read() == b"dump\n"
    assert running.wait(timeout=5) == code
    running.stdout.close()
    assert running.stdin is not None
    running.stdin.close()


def test_a_watched_program_ends_with_the_connection() -> None:
    # Nobody reads what it writes, as when the deployer was killed.
    reader, writer = os.pipe()
    running = subprocess.Popen(
        ["bash", "-c", pod_postgres._WATCHED, "pg_dump", "bash", "-c", "echo $$ >&2; exec cat /dev/zero"],
        stdin=subprocess.PIPE,
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    assert running.stderr is not None
    program = int(running.stderr.readline())
    time.sleep(0.3)
    running.communicate(timeout=5)
    assert running.returncode > 128
    with pytest.raises(ProcessLookupError):
        os.kill(program, 0)
    os.close(reader)


class Server:
    """psql, as far as one statement: answers with rows, or complains and ends."""

    def __init__(self, rows: bytes = b"", complaint: bytes = b"") -> None:
        self._rows = rows
        self._complaint = complaint
        self._frames: list[bytes] = []

    async def send_bytes(self, data: bytes) -> None:
        mark = data.decode().split("'")[-2].encode()
        if self._complaint:
            self._frames = [b"\2" + self._complaint, b'\3{"status": "Failure", "message": "exit code 3"}']
        else:
            self._frames = [b"\1" + self._rows, b"\1" + mark + b"\n"]

    async def receive(self) -> WSMessage:
        if self._frames:
            return WSMessage(WSMsgType.BINARY, self._frames.pop(0), "")
        return WSMessage(WSMsgType.CLOSED, None, None)


def query(server: Server) -> list[list[str]]:
    stream: Any = server
    return asyncio.run(Psql(PodExec(stream)).query("SELECT 1"))


def test_rows_are_text_with_line_breaks_and_nulls() -> None:
    rows = b'a,"b, ""c""\nd"\n\n,\n'
    assert query(Server(rows)) == [["a", 'b, "c"\nd'], [""], ["", ""]]
    assert query(Server()) == []


def test_the_error_of_postgres_is_what_is_told() -> None:
    complaint = b'psql:<stdin>:1: ERROR:  relation "dag" does not exist\nLINE 1: SELECT\n               ^\n'
    with pytest.raises(PostgresError, match=r'^Postgres in the pod: relation "dag" does not exist\.$'):
        query(Server(complaint=complaint))
