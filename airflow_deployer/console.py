"""What a person sees: steps, warnings, errors and summaries on stderr, results and events on stdout.

The only module that knows Rich. On a terminal a running step is a live line; anywhere else each step is one plain line
when it ends, with a sign of life now and then while it lasts. `NO_COLOR` is honoured (https://no-color.org).
"""

from __future__ import annotations

import datetime
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from airflow_deployer.errors import DeployerError

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.live import Live
    from rich.text import Text

_SIGN_OF_LIFE_SECONDS = 15.0
_MARK_STYLES = {"✓": "green", "x": "bold red", "!": "yellow", ">": "cyan"}
_LEVEL_STYLES = {"debug": "dim", "warning": "yellow", "error": "red", "critical": "bold red"}
# Red and yellow are for what is wrong.
_COMPONENT_STYLES = {
    "scheduler": "cyan",
    "dag-processor": "magenta",
    "triggerer": "blue",
    "api-server": "green",
    "supervisor": "bright_white",
    "migration": "bright_cyan",
    "postgres": "bright_blue",
}
_OTHER_COMPONENT_STYLE = "bright_magenta"
_COMPONENT_WIDTH = 13


class _ConsoleStep:
    """A step under way: its title, what it waits for, and since when."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.detail = ""
        self.summary = ""
        self.began = time.monotonic()
        self.told = self.began

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def update(self, detail: str) -> None:
        self.detail = " ".join(detail.split())

    def done(self, summary: str) -> None:
        self.summary = summary


class Console:
    """Shows progress and results; implements `progress.Progress`.

    Args:
        verbose: show debug messages.
        quiet: show only warnings, errors and results.
        json_output: results are one JSON document on stdout.
    """

    def __init__(self, *, verbose: bool = False, quiet: bool = False, json_output: bool = False) -> None:
        self.verbose = verbose
        self.quiet = quiet
        self.json_output = json_output
        self._terminal = sys.stderr.isatty()
        self._lock = threading.RLock()
        self._active: list[_ConsoleStep] = []
        self._live: Live | None = None
        self._watcher: threading.Thread | None = None
        self._rich: RichConsole | None = None

    # -- progress.Progress --------------------------------------------------------------------------------------

    @contextmanager
    def step(self, title: str) -> Iterator[_ConsoleStep]:
        """Show a step while the block runs; its outcome and duration stay."""
        step = _ConsoleStep(title)
        self._open(step)
        try:
            yield step
        except KeyboardInterrupt:
            self._close(step, "interrupted", "yellow", "!")
            raise
        except BaseException:
            self._close(step, "failed", "red", "x")
            raise
        self._close(step, step.summary, "green", "✓")

    def info(self, message: str) -> None:
        """Print a line, unless quiet."""
        if not self.quiet:
            self._print("", "", message)

    def warning(self, message: str) -> None:
        """Print a warning; quiet or not."""
        self._print("warning: ", "yellow", message)

    def debug(self, message: str) -> None:
        """Print a line when verbose."""
        if self.verbose:
            self._print("", "dim", message)

    # -- results ------------------------------------------------------------------------------------------------

    def error(self, error: DeployerError) -> None:
        """Print an error: what, the evidence, and what to do next."""
        self._print("error: ", "bold red", error.message)
        for detail in error.details:
            self._print("  ", "", detail)
        if error.hint:
            self._print("next: ", "bold", error.hint)

    def result(self, document: dict[str, Any], lines: list[tuple[str, str]]) -> None:
        """Print a command's result on stdout.

        Args:
            document: the whole result, printed as JSON with `--output json`.
            lines: label and value, for a person.
        """
        if self.json_output:
            sys.stdout.write(json.dumps(document, indent=2) + "\n")
        else:
            width = max((len(label) for label, _ in lines), default=0)
            for label, value in lines:
                first, *rest = value.split("\n")
                sys.stdout.write(f"{label:<{width}}  {first}".rstrip() + "\n")
                sys.stdout.writelines(f"{'':<{width}}  {line}\n" for line in rest)
        sys.stdout.flush()

    def text(self, text: str) -> None:
        """Print text on stdout as it is."""
        sys.stdout.write(text)
        sys.stdout.flush()

    # -- events of a command that goes on -------------------------------------------------------------------------

    def event(self, kind: str, message: str, *, mark: str = "", details: Sequence[str] = (), **fields: object) -> None:
        """Print what happened, with the time; with `--output json` it is one JSON object in a line of its own.

        Args:
            kind: what it is, for programs (`live`, `import_errors`, ...).
            message: what it is, for a person.
            mark: "✓" done, "x" wrong, "!" to be done by the user, ">" begun; other events are left out when quiet.
            details: further lines.
            fields: JSON-able facts, for programs.
        """
        if self.json_output:
            document = {"event": kind, "time": _rfc3339_now(), "message": message, "details": [*details], **fields}
            sys.stdout.write(json.dumps(document) + "\n")
            sys.stdout.flush()
        elif mark or not self.quiet:
            first, *rest = message.split("\n")
            lines = [(f"{mark} ".lstrip(), _MARK_STYLES.get(mark, ""), first)]
            lines += [("  ", "", line) for line in (*rest, *details)]
            self._print_timed(lines)

    def log(self, component: str, level: str, text: str) -> None:
        """Print a line of a log, coloured by who wrote it; left out when quiet.

        Args:
            component: who wrote it.
            level: `debug`, `info`, `warning`, `error` or `critical`.
        """
        if self.quiet:
            return
        if self.json_output:
            document = {"event": "log", "time": _rfc3339_now(), "component": component, "level": level, "text": text}
            sys.stdout.write(json.dumps(document) + "\n")
            sys.stdout.flush()
            return
        style = _COMPONENT_STYLES.get(component, _OTHER_COMPONENT_STYLE)
        self._print_timed([(f"{component:<{_COMPONENT_WIDTH}} ", style, text)], _LEVEL_STYLES.get(level, ""))

    def _print_timed(self, lines: Sequence[tuple[str, str, str]], text_style: str = "") -> None:
        """Print lines of mark, its style, and text; the time stands before the first one."""
        now = time.strftime("%H:%M:%S")
        stamps = [now, *[" " * len(now)] * (len(lines) - 1)]
        with self._lock:
            if not (self._terminal and sys.stdout.isatty()):
                text = "".join(f"{stamp} {mark}{line}\n" for stamp, (mark, _, line) in zip(stamps, lines, strict=True))
                encoding = sys.stdout.encoding or "utf-8"
                sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
                sys.stdout.flush()
                return
            from rich.text import Text

            # Through the console that draws the live line, or the two would tear each other.
            for stamp, (mark, style, line) in zip(stamps, lines, strict=True):
                rich_line = Text(f"{stamp} ", style="dim")
                rich_line.append(mark, style=f"not dim {style}".strip())
                rich_line.append(_printable(line), style=f"not dim {text_style}".strip())
                self._console().print(rich_line, soft_wrap=True)

    # -- how it is drawn ----------------------------------------------------------------------------------------

    def _tell_signs_of_life(self) -> None:
        """In a pipe, tell now and then what each long step is doing, whether or not it reports anything new."""
        while True:
            time.sleep(1.0)
            with self._lock:
                if not self._active:
                    self._watcher = None
                    return
                due = [step for step in self._active if time.monotonic() - step.told >= _SIGN_OF_LIFE_SECONDS]
            for step in due:
                step.told = time.monotonic()
                self._print("", "", f"  {step.title}: {step.detail or 'still working'} ({step.seconds:.0f} s)")

    def _open(self, step: _ConsoleStep) -> None:
        if self.quiet:
            return
        with self._lock:
            self._active.append(step)
            if not self._terminal and self._watcher is None:
                self._watcher = threading.Thread(target=self._tell_signs_of_life, name="signs of life", daemon=True)
                self._watcher.start()
            if self._terminal and self._live is None:
                from rich.live import Live

                self._live = Live(
                    console=self._console(), get_renderable=self._frame, refresh_per_second=10, transient=True
                )
                self._live.start()

    def _close(self, step: _ConsoleStep, summary: str, style: str, mark: str) -> None:
        if self.quiet:
            return
        with self._lock:
            self._active.remove(step)
            if self._live is not None and not self._active:
                self._live.stop()
                self._live = None
        outcome = f"{step.title}: {summary}" if summary else step.title
        self._print(f"{mark} ", style, f"{outcome} ({step.seconds:.1f} s)")

    def _frame(self) -> Text:
        from rich.text import Text

        spinner = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"[int(time.monotonic() * 10) % 10]
        text = Text(no_wrap=True, overflow="ellipsis")
        with self._lock:
            active = list(self._active)
        for index, step in enumerate(active):
            text.append("\n" if index else "")
            text.append(f"{spinner} ", "cyan")
            text.append(step.title)
            text.append(f"  {step.seconds:.0f} s", "dim")
            text.append(f"  {step.detail}" if step.detail else "", "dim")
        return text

    def _print(self, mark: str, style: str, message: str) -> None:
        with self._lock:
            if not self._terminal:
                # Characters that the stream cannot show (an ASCII locale) must not end the run.
                encoding = sys.stderr.encoding or "utf-8"
                line = f"{mark}{message}\n".encode(encoding, "replace").decode(encoding)
                sys.stderr.write(line)
                sys.stderr.flush()
                return
            from rich.text import Text

            line_text = Text(mark, style=style)
            line_text.append(message, style="dim" if style == "dim" else "not bold default")
            self._console().print(line_text, soft_wrap=True)

    def _console(self) -> RichConsole:
        if self._rich is None:
            from rich.console import Console as RichConsole

            self._rich = RichConsole(stderr=True, highlight=False)
        return self._rich


def _rfc3339_now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")


def _printable(line: str) -> str:
    """The line without what would make a terminal do something: logs hold whatever a task prints."""
    return "".join(char if char.isprintable() or char == "\t" else "\N{REPLACEMENT CHARACTER}" for char in line)
