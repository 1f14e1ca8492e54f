"""A progress bar on standard error, with the time that is left."""

from __future__ import annotations

import sys
import time

__all__ = ["ProgressBar"]

_WIDTH = 24


class ProgressBar:
    """Shows how many of the weights are done; silent unless asked for.

    On a terminal it is one line that is written over; elsewhere each step is a line.
    """

    def __init__(self, total: int, *, show: bool) -> None:
        """Of so many steps, each counting alike."""
        self._total, self._done, self._show = max(total, 1), 0, show
        self._start = time.monotonic()
        self._skipped = 0

    def step(self, what: str, count: int, *, skipped: bool = False) -> None:
        """Counts steps; those that were `skipped` took no time."""
        self._done += count
        self._skipped += count if skipped else 0
        if not self._show:
            return
        passed = time.monotonic() - self._start
        worked = self._done - self._skipped
        left = passed / worked * (self._total - self._done) if worked else 0.0
        filled = _WIDTH * self._done // self._total
        bar = "#" * filled + "." * (_WIDTH - filled)
        line = f"[{bar}] {self._done}/{self._total} {what[:48]:48} {_clock(left)} left"
        end = "\r" if sys.stderr.isatty() and self._done < self._total else "\n"
        sys.stderr.write(line + end)
        sys.stderr.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
