"""Shares made to fit a total: raised to floors, rounded to whole groups, shifted to a mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


def raise_to_floors(wanted: Mapping[str, float], floors: Mapping[str, int], total: int) -> dict[str, float]:
    """Raises counts to their floors, and lowers the others in proportion to their excess over theirs."""
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
    """Rounds to integers with that total, by largest remainder, ignoring rounding errors below 1e-6."""
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


def split_total(total: int, sizes: Sequence[int]) -> list[int]:
    """Divides a count in proportion to sizes, by largest remainder; among equals the earlier gets more."""
    whole = sum(sizes)
    if not whole:
        return [0 for _ in sizes]
    shares = [divmod(total * size, whole) for size in sizes]
    counts = [count for count, _ in shares]
    order = sorted(range(len(shares)), key=lambda i: (-shares[i][1], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def shift_to_mean(
    values: NDArray[np.float64], sizes: NDArray[np.float64], mean: float
) -> NDArray[np.float64]:
    """Returns clip(values + t, 0, 1), with t such that the mean weighted by sizes is `mean`; by bisection."""
    low, high = -float(values.max()), 1 - float(values.min())
    for _ in range(100):
        shift = (low + high) / 2
        if float((np.clip(values + shift, 0, 1) * sizes).sum()) < mean * float(sizes.sum()):
            low = shift
        else:
            high = shift
    return np.clip(values + high, 0, 1)
