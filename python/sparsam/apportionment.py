"""Shares made to fit a total: raised to floors, rounded to whole groups, shifted to a mean."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray


def raise_to_floors(wanted: Mapping[str, float], floors: Mapping[str, int], total: int) -> dict[str, float]:
    """At least the floors; the surplus is taken in proportion from what exceeds them."""
    if not any(floors.values()):
        return dict(wanted)
    base = {name: float(floors[name]) for name in wanted}
    extra = {name: max(count - base[name], 0.0) for name, count in wanted.items()}
    spare = sum(extra.values())
    scale = min(max((total - sum(base.values())) / spare, 0.0), 1.0) if spare else 0.0
    return {name: base[name] + extra[name] * scale for name in wanted}


def round_to_total(
    wanted: Mapping[str, float], sizes: Mapping[str, int], floors: Mapping[str, int], total: int
) -> dict[str, int]:
    """Whole counts with that total, by largest remainder; rounding errors are no remainders."""
    counts = {name: min(math.floor(count + 1e-6), sizes[name]) for name, count in wanted.items()}
    fractions = {name: wanted[name] - counts[name] for name in counts}
    left = total - sum(counts.values())
    step = 1 if left > 0 else -1
    order = sorted(counts, key=lambda name: -step * fractions[name])
    while left:
        before = left
        for name in order:
            if left and floors[name] <= counts[name] + step <= sizes[name]:
                counts[name] += step
                left -= step
        if left == before:
            break
    return counts


def shift_to_mean(
    values: NDArray[np.float64], sizes: NDArray[np.float64], mean: float
) -> NDArray[np.float64]:
    """clip(values + t, 0, 1) with the t that gives it this mean, weighted by sizes; by bisection."""
    low, high = -float(values.max()), 1 - float(values.min())
    for _ in range(100):
        shift = (low + high) / 2
        if float((np.clip(values + shift, 0, 1) * sizes).sum()) < mean * float(sizes.sum()):
            low = shift
        else:
            high = shift
    return np.clip(values + high, 0, 1)
