"""A progress bar on standard error, with the remaining time."""

from __future__ import annotations

import sys
import time

__all__ = ["ProgressBar"]

_WIDTH = 24


class ProgressBar:
    """Shows how many steps are done, if `show` is true.

    On a terminal one line is rewritten; elsewhere each step prints a line.
    """

    def __init__(self, total: int, *, show: bool) -> None:
        """A bar of `total` equal steps."""
        self._total, self._done, self._show = max(total, 1), 0, show
        self._start = time.monotonic()
        self._skipped = 0

    def step(self, what: str, count: int, *, skipped: bool = False) -> None:
        """Counts steps; `skipped` ones are left out of the estimate of time."""
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
