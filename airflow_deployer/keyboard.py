"""Single key presses from the terminal, while lines are being printed to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def keys(on_key: Callable[[str], None]) -> Iterator[bool]:
    """Tell each key that is pressed during the block; yields False where nobody can press any.

    Ctrl-C and Ctrl-Z keep their meaning, and the terminal is left as it was. Needs a running event loop.

    Args:
        on_key: called with the character.
    """
    if not _has_the_terminal():
        yield False
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    loop = asyncio.get_running_loop()

    def read() -> None:
        pressed = os.read(terminal, 64)
        if not pressed:
            loop.remove_reader(terminal)
        for key in pressed.decode(errors="ignore"):
            on_key(key)

    def listen() -> None:
        # No waiting for Enter and no echo; signals stay.
        if _has_the_terminal():
            tty.setcbreak(terminal, termios.TCSANOW)

    listen()
    loop.add_reader(terminal, read)
    # The shell took the terminal back while we were stopped.
    loop.add_signal_handler(signal.SIGCONT, listen)
    try:
        yield True
    finally:
        loop.remove_signal_handler(signal.SIGCONT)
        loop.remove_reader(terminal)
        with contextlib.suppress(termios.error):
            termios.tcsetattr(terminal, termios.TCSANOW, before)


def _has_the_terminal() -> bool:
    """True when standard input is a terminal and we are in its foreground: changing it from behind would stop us."""
    try:
        return sys.stdin.isatty() and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False
