"""What a command in a pod says, and how its end is told from a stream that broke."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import WSMessage, WSMsgType

from airflow_deployer.api_streams import UnavailableError
from airflow_deployer.pod_exec import CommandError, PodExec

SUCCESS = b"\3" + json.dumps({"status": "Success"}).encode()
FAILURE = b"\3" + json.dumps({"status": "Failure", "message": "command terminated with exit code 3"}).encode()


class Stream:
    """Frames that came from the API server, and then its end."""

    def __init__(self, *frames: bytes) -> None:
        self._frames = list(frames)

    async def receive(self) -> WSMessage:
        if self._frames:
            return WSMessage(WSMsgType.BINARY, self._frames.pop(0), "")
        return WSMessage(WSMsgType.CLOSED, None, None)


def command(*frames: bytes) -> PodExec:
    stream: Any = Stream(*frames)
    return PodExec(stream)


async def read_all(running: PodExec) -> bytes:
    """What is read until the command has ended well."""
    data = b""
    while part := await running.read():
        data += part
    return data


def test_the_end_of_a_command_that_ended_well() -> None:
    running = command(b"\1one ", b"\2hm", b"\1two", SUCCESS)
    assert asyncio.run(read_all(running)) == b"one two"
    assert running.complaints == ["hm"]


def test_a_command_that_failed_is_told_with_its_last_words() -> None:
    running = command(b"\1half", b"\2first\nlast\n", FAILURE)
    with pytest.raises(CommandError, match=r"ended: command terminated with exit code 3: last$"):
        asyncio.run(read_all(running))
    assert running.complaints == ["first", "last"]


def test_a_stream_that_broke_is_no_end() -> None:
    with pytest.raises(UnavailableError, match="the stream to the pod broke") as caught:
        asyncio.run(read_all(command(b"\1half")))
    assert not isinstance(caught.value, CommandError)


def test_lines() -> None:
    async def lines(running: PodExec) -> list[bytes]:
        return [await running.read_line() for _ in range(3)]

    assert asyncio.run(lines(command(b"\1on", b"\1e\ntwo\n", b"\1\n"))) == [b"one", b"two", b""]
    with pytest.raises(UnavailableError, match="ended: nothing more came"):
        asyncio.run(lines(command(b"\1one\ntw", SUCCESS)))
