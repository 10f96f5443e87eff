"""How the core tells what it does without knowing who listens: steps with a title, a live detail and a duration.

The core never prints. It reports to a `Progress`; `console` shows it to a person, `Silent` drops it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Step(Protocol):
    """One piece of work that is under way."""

    def update(self, detail: str) -> None:
        """Replace the live detail behind the title: what is being waited for at this moment."""

    def done(self, summary: str) -> None:
        """Set what stands behind the title once the step has ended."""


class Progress(Protocol):
    """Where the core reports. Every method may be called from any thread."""

    def step(self, title: str) -> AbstractContextManager[Step]:
        """Open a step; leaving the block ends it (as failed when an exception passes)."""

    def info(self, message: str) -> None:
        """Tell something worth knowing that is not a step."""

    def warning(self, message: str) -> None:
        """Tell something that is wrong but stops nothing."""

    def debug(self, message: str) -> None:
        """Tell something that only `--verbose` shows."""


class _SilentStep:
    def update(self, detail: str) -> None:
        pass

    def done(self, summary: str) -> None:
        pass


class Silent:
    """A `Progress` that drops everything."""

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        yield _SilentStep()

    def info(self, message: str) -> None:
        pass

    def warning(self, message: str) -> None:
        pass

    def debug(self, message: str) -> None:
        pass
