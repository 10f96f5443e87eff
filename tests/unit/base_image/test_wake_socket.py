"""How the DAG processor is woken up."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from airflow_deployer_pod import wake_socket


def test_all_messages_are_taken_at_once(tmp_path: Path) -> None:
    path = tmp_path / "wake.sock"
    # A socket of a process that is no more is replaced.
    wake_socket.listen(path).close()
    with wake_socket.listen(path) as receiver:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        wake_socket.wake(path)
        wake_socket.wake(path)
        assert receiver.recv(64) == b"refresh"
        wake_socket.drain(receiver)
        with pytest.raises(BlockingIOError):
            receiver.recv(64)


def test_a_processor_that_does_not_listen_is_not_woken(tmp_path: Path) -> None:
    wake_socket.wake(tmp_path / "none.sock")
