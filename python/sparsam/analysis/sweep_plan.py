"""Which evaluations a sensitivity sweep makes, round after round; those of a round are independent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from sparsam.analysis.sensitivity_curve import SensitivityPoint

_ROUND = 4
"""Each round of a sweep on a budget spends a quarter of what is left of it."""


class Task(NamedTuple):
    """One evaluation: the curve, and how far it is pruned."""

    name: str
    sparsity: float


DENSE = Task("", 0.0)


def rounds(
    grids: Mapping[str, tuple[float, ...]], known: Mapping[Task, SensitivityPoint], budget: int
) -> Iterator[list[Task]]:
    """What to measure, round after round; each is looked at only once the one before is known."""
    everything = [Task(name, sparsity) for name, grid in grids.items() for sparsity in grid]
    if budget > len(everything):
        yield [DENSE]
        yield everything
        return
    chosen = {name: [0.0, grid[-1]] for name, grid in grids.items() if grid}
    yield [DENSE]
    yield [Task(name, at[-1]) for name, at in chosen.items()]
    left = budget - 1 - len(chosen)
    while left > 0:
        bends = sorted(
            bend
            for place, (name, at) in enumerate(chosen.items())
            for bend in _bends(place, name, grids[name], at, known)
        )
        size = math.ceil(left / _ROUND)
        tasks = [Task(name, middle) for *_, middle, name in bends[:size]]
        yield tasks
        for name, middle in tasks:
            chosen[name] = sorted([*chosen[name], middle])
        left -= len(tasks)


def _bends(
    place: int,
    name: str,
    grid: tuple[float, ...],
    at: Sequence[float],
    known: Mapping[Task, SensitivityPoint],
) -> Iterator[tuple[float, float, int, float, str]]:
    """For each interval that can be halved: the sort key, most urgent first, with the place to measure."""

    def score(sparsity: float) -> float:
        return known[Task(name, sparsity) if sparsity else DENSE].score

    for low, high in pairwise(at):
        inside = [sparsity for sparsity in grid if low < sparsity < high]
        if inside:
            middle = min(inside, key=lambda sparsity: abs(2 * sparsity - low - high))
            gap = 0.0 if score(low) == score(high) else abs(score(low) - score(high))
            largest = gap * max(middle - low, high - middle) / (high - low)
            yield -largest, low - high, place, middle, name
