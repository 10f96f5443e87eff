"""Single key presses from a real terminal, which is left as it was."""

from __future__ import annotations

import asyncio
import os
import pty
import subprocess
import sys
import termios

import pytest

from airflow_deployer import keyboard

PROGRAM = """
import asyncio, sys
from airflow_deployer import keyboard

async def main():
    done = asyncio.Event()
    def on_key(key):
        print("key", repr(key), flush=True)
        if key == "q":
            done.set()
    with keyboard.keys(on_key) as listening:
        print("listening", listening, flush=True)
        await done.wait()

try:
    asyncio.run(main())
finally:
    print("end", flush=True)
"""


def test_keys_come_without_enter_and_echo_and_the_terminal_is_left_as_it_was() -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    # In a session of its own, so that the terminal is its controlling one.
    program = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{PROGRAM}"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert program.stdout is not None
    with program, program.stdout as output:
        assert output.readline() == "listening True\n"
        os.write(ours, b"rq")
        assert output.read() == "key 'r'\nkey 'q'\nend\n"
    assert program.returncode == 0
    assert termios.tcgetattr(theirs) == before
    os.set_blocking(ours, False)
    with pytest.raises(BlockingIOError):
        os.read(ours, 100)  # nothing was echoed
    os.close(ours)
    os.close(theirs)


def test_without_a_terminal_there_are_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> bool:
        with keyboard.keys(lambda key: None) as listening:
            return listening

    with open(os.devnull) as nothing:  # noqa: PTH123 - a device
        monkeypatch.setattr(sys, "stdin", nothing)
        assert asyncio.run(scenario()) is False
