"""The socket by which the content agent wakes the DAG processor up."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

WAKE_SOCKET = Path("/run/airflow-deployer/dag-processor.sock")

_DATAGRAM = 64


def listen(path: Path = WAKE_SOCKET) -> socket.socket:
    """Open the DAG processor's end, a non-blocking datagram socket that only this user can write to."""
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.setblocking(False)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    # No moment at which others could write to it.
    before = os.umask(0o177)
    try:
        receiver.bind(str(path))
    finally:
        os.umask(before)
    return receiver


def drain(receiver: socket.socket) -> None:
    """Take all messages."""
    with contextlib.suppress(BlockingIOError):
        while True:
            receiver.recv(_DATAGRAM)


def wake(path: Path = WAKE_SOCKET) -> None:
    """Have the DAG processor look for a new version at once; without it, it does so within a second."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
        sender.setblocking(False)
        sender.sendto(b"refresh", str(path))
