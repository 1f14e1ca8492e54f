"""Exact choice of one level for each item: the least total cost at which enough weights are pruned.

The multiple-choice knapsack problem. States are pairs (weights pruned so far, cost so far); a state that
another one beats in both is dropped, and so is a state whose cost, with the least that the remaining items
can add by the linear relaxation, exceeds that of a choice already known (Dyer, Riha and Walker, "A hybrid
dynamic programming/branch-and-bound algorithm for the multiple-choice knapsack problem", 1995). Neither drops
an optimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

_COST_BITS = 40
_TIE_BITS = 20
_LARGE_COST, _SHRINK = 2.0**896, 2.0**-128  # sums of costs must stay finite; a power of two changes no choice
_SLACK = 2.0**-40  # relative: the bounds on costs are float64 sums


@dataclass(frozen=True)
class Level:
    """A level of an item: how many weights it prunes, and what that costs, at least 0 and finite."""

    pruned: int
    cost: float


def choose(items: Sequence[Sequence[Level]], needed: int) -> list[int] | None:
    """Returns the index of the level chosen for each item; None if no choice prunes enough.

    The total cost is the least possible, costs being compared to 2^-40 of it. Among choices of equal cost
    that with the least sum of pruned^2 / size (size: the most that the item can prune) is taken, compared to
    2^-20 of its largest value: the most even choice, so that no item is pruned further than necessary.

    Args:
        items: Levels of each, in rising order of `pruned` and of `cost`; the first prunes nothing.
        needed: The least number of weights to prune.
    """
    if sum(levels[-1].pruned for levels in items) < needed:
        return None
    sizes = [levels[-1].pruned for levels in items]
    if max((levels[-1].cost for levels in items), default=0.0) > _LARGE_COST:
        items = [[Level(level.pruned, level.cost * _SHRINK) for level in levels] for levels in items]
    items, known = _affordable(items, needed)
    pruned = [np.array([level.pruned for level in levels], np.int64) for levels in items]
    costs = _scaled(items, sizes, known)
    bounds = _Bounds(pruned, costs)
    limit = bounds.rounded_up(needed) * (1 + _SLACK)
    reachable = np.cumsum([0, *(int(p[-1]) for p in reversed(pruned))])[::-1]

    total, cost = np.zeros(1, np.int64), np.zeros(1, np.int64)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for i, (p, c) in enumerate(zip(pruned, costs, strict=True)):
        level = np.tile(np.arange(len(p)), len(total))
        parent = np.repeat(np.arange(len(total)), len(p))
        # More than enough is no better than enough.
        total = np.minimum((total[:, None] + p).ravel(), needed)
        cost = (cost[:, None] + c).ravel()
        missing = needed - total
        good = missing <= reachable[i + 1]
        good &= cost + bounds.least(i + 1, missing) <= limit
        chosen = np.flatnonzero(good)
        chosen = chosen[_undominated(total[chosen], cost[chosen])]
        total, cost = total[chosen], cost[chosen]
        trail.append((parent[chosen], level[chosen]))
    # Of the states with enough weights only the cheapest is left, in first place.
    state, choice = 0, []
    for parent, level in reversed(trail):
        choice.append(int(level[state]))
        state = int(parent[state])
    return choice[::-1]


def give_back(
    items: Sequence[Sequence[Level]], choice: Sequence[int], needed: int, all_or_nothing: Sequence[bool]
) -> list[int]:
    """Returns how many weights each item prunes after the surplus of `choice` over `needed` is returned.

    It goes to the item whose last step, from the level below the chosen one, costs most per weight (the
    earlier one among equals): the largest saving, costs being linear in between. An item that is all or
    nothing takes only what is as large as its step.
    """
    chosen = list(choice)
    counts = [levels[i].pruned for levels, i in zip(items, chosen, strict=True)]
    surplus = sum(counts) - needed

    def saving(i: int) -> float:
        above, below = items[i][chosen[i]], items[i][chosen[i] - 1]
        return (above.cost - below.cost) / (above.pruned - below.pruned)

    while surplus > 0:
        steps = {i: counts[i] - items[i][level - 1].pruned for i, level in enumerate(chosen) if level > 0}
        able = [i for i, step in steps.items() if step <= surplus or not all_or_nothing[i]]
        if not able:
            break
        best = max(able, key=lambda i: (saving(i), -i))
        back = min(surplus, steps[best])
        counts[best] -= back
        surplus -= back
        chosen[best] -= 1
    return counts


def _undominated(total: NDArray[np.int64], cost: NDArray[np.int64]) -> NDArray[np.intp]:
    """The states that no other state beats in both; the first among equal ones."""
    order = np.lexsort((np.arange(len(total)), cost, -total))
    least = np.minimum.accumulate(cost[order])
    better = np.ones(len(order), np.bool_)
    better[1:] = cost[order][1:] < least[:-1]
    return order[better]


def _affordable(items: Sequence[Sequence[Level]], needed: int) -> tuple[list[list[Level]], float]:
    """The levels that cost no more than a known choice, and the cost of that choice.

    The known choice takes the cheapest steps per weight along the lower convex hulls until enough weights are
    pruned.
    """
    pruned = [np.array([level.pruned for level in levels], np.float64) for levels in items]
    costs = [np.array([level.cost for level in levels], np.float64) for levels in items]
    known = _Bounds(pruned, costs).rounded_up(needed) * (1 + _SLACK)
    return [[level for level in levels if level.cost <= known] for levels in items], known


def _scaled(items: Sequence[Sequence[Level]], sizes: Sequence[int], known: float) -> list[NDArray[np.int64]]:
    """Costs as integers: the cost itself in the upper bits, what decides between equal costs in the lower."""
    unit = known / 2**_COST_BITS or 1.0
    whole = sum(sizes) or 1
    scaled = []
    for levels, size in zip(items, sizes, strict=True):
        ties = [round(2**_TIE_BITS * level.pruned**2 / ((size or 1) * whole)) for level in levels]
        main = [round(level.cost / unit) << (_TIE_BITS + 1) for level in levels]
        scaled.append(np.array([m + t for m, t in zip(main, ties, strict=True)], np.int64))
    return scaled


class _Bounds:
    """The linear relaxation: the least cost at which the items from i on can prune a number of weights."""

    def __init__(self, pruned: Sequence[NDArray[Any]], costs: Sequence[NDArray[Any]]) -> None:
        steps: list[tuple[float, float, float]] = []
        self._curves = [_merged(steps)]
        for p, c in zip(reversed(pruned), reversed(costs), strict=True):
            steps = sorted([*steps, *_hull_steps(p, c)])
            self._curves.append(_merged(steps))
        self._curves.reverse()

    def least(self, i: int, needed: NDArray[np.int64]) -> NDArray[np.float64]:
        """A lower bound on the cost of the items from i on, for numbers that they can reach."""
        return np.interp(needed, *self._curves[i])

    def rounded_up(self, needed: int) -> float:
        """The cost of a choice that prunes enough: whole steps, cheapest first."""
        weights, costs = self._curves[0]
        return float(costs[min(int(np.searchsorted(weights, needed)), len(costs) - 1)])


def _hull_steps(pruned: NDArray[Any], costs: NDArray[Any]) -> list[tuple[float, float, float]]:
    """The steps (cost per weight, weights, cost) along the lower convex hull of a curve."""
    points = list(zip(map(float, pruned), map(float, costs), strict=True))
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-1][0]) >= (y - hull[-1][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return [((d - b) / (c - a), c - a, d - b) for (a, b), (c, d) in pairwise(hull)]


def _merged(steps: Sequence[tuple[float, float, float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The curve that the steps make, one after the other."""
    weights = np.cumsum([0.0, *(step[1] for step in steps)])
    costs = np.cumsum([0.0, *(step[2] for step in steps)])
    return weights, costs
