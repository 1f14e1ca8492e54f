"""The timing of every benchmark."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def median_seconds(
    run: Callable[..., object],
    *arguments: Any,
    before: Callable[[], object] = lambda: None,
    budget: float = 0.3,
) -> float:
    """The median time of `run(*arguments)` over 5 to 101 runs, as many as the budget allows, after a warm-up.

    Args:
        run: What to time.
        *arguments: What it is called with.
        before: Called before each run, not timed.
        budget: Seconds after which no run beyond the fifth is started.
    """
    times: list[float] = []
    for i in range(102):
        before()
        start = time.perf_counter()
        run(*arguments)
        if i > 0:
            times.append(time.perf_counter() - start)
        if len(times) >= 5 and sum(times) > budget:
            break
    return statistics.median(times)
