"""What a task has logged, as Airflow's REST API answers it: one object for each message, or the text of the file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# A message of Airflow 2: `[time] {file.py:line} LEVEL - text`. The API puts two of its own around what it says of the
# log's place, and these have neither time nor file.
_MESSAGE = re.compile(r"(?:\[[^\]]*\] \{[^}]*\})? (DEBUG|INFO|WARNING|ERROR|CRITICAL) - (.*)")
# The process around the task says once more what the task has said, traceback and all.
_REPEATED = re.compile(r"Failed to execute job \d+ for task ")
_TRACEBACK = "Traceback (most recent call last):"
_FRAME = re.compile(r'  File "([^"]+)", line (\d+), in (.*)')
# Between the tracebacks of exceptions that led to one another.
_BETWEEN = ("The above exception was", "During handling of the above exception", _TRACEBACK)


@dataclass(frozen=True)
class TaskLogEntry:
    """One message of a task's log: its text, its level where it has one, and the error it carries, as lines.

    `printed` is what the task wrote to its standard output or error, where Airflow reads that apart from the messages:
    such a line may stand a little before or after the messages that it came between.
    """

    text: str
    level: str
    error: tuple[str, ...]
    printed: bool = False


def from_events(content: Iterable[Any]) -> list[TaskLogEntry]:
    """Take what is for a reader out of `StructuredLogMessage`s, whose fields are those of structlog's events."""
    return [_from_event(entry if isinstance(entry, dict) else {"event": entry}) for entry in content]


def _from_event(entry: dict[str, Any]) -> TaskLogEntry:
    error: list[str] = []
    for cause in entry.get("error_detail") or []:
        for frame in cause.get("frames") or []:
            error.append(f"{frame.get('filename')}:{frame.get('lineno')} in {frame.get('name')}")
        error.append(f"{cause.get('exc_type')}: {cause.get('exc_value')}")
    printed = entry.get("logger") in ("task.stdout", "task.stderr")
    return TaskLogEntry(str(entry.get("event", "")), str(entry.get("level") or ""), tuple(error), printed)


def from_text(text: str) -> list[TaskLogEntry]:
    """Take the text of a log apart: an entry for each line, and one with its error for each traceback."""
    entries: list[TaskLogEntry] = []
    level = ""
    in_traceback = repeated = False
    for line in text.splitlines():
        if match := _MESSAGE.fullmatch(line):
            level, in_traceback = match[1].lower(), False
            repeated = _REPEATED.match(match[2]) is not None
            if not repeated:
                entries.append(TaskLogEntry(match[2], level, ()))
        elif repeated:
            continue
        elif in_traceback or (line == _TRACEBACK and entries):
            in_traceback = True
            if (shown := _of_traceback(line)) is not None:
                entries[-1] = TaskLogEntry(entries[-1].text, level, (*entries[-1].error, shown))
        elif line:
            entries.append(TaskLogEntry(line, level, ()))
    return entries


def _of_traceback(line: str) -> str | None:
    """What a line of a traceback says to a reader of a log: where, or what went wrong."""
    if match := _FRAME.fullmatch(line):
        return f"{match[1]}:{match[2]} in {match[3]}"
    return None if not line or line.startswith((" ", *_BETWEEN)) else line
