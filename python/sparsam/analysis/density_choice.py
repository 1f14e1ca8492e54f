"""The fastest choice of densities within an error budget, from the time and error of each layer at each.

Frantar and Alistarh, "SPDY: Accurate pruning with speedup guarantees", 2022, minimise the error within a
budget of time; this is the same problem from the other side, solved exactly by the same dynamic programming.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsam.analysis.knapsack import Level, choose

__all__ = ["Step", "fastest"]

_UNITS = 1 << 20  # into which the error above the budget is divided; savings are rounded down to whole ones


@dataclass(frozen=True)
class Step:
    """A layer at one sparsity.

    Attributes:
        sparsity: In [0, 1].
        seconds: The measured time of the layer, at least 0.
        error: The loss of quality, at least 0; adds up over layers.
    """

    sparsity: float
    seconds: float
    error: float


def fastest(steps: Mapping[str, Sequence[Step]], max_error: float) -> dict[str, Step]:
    """Returns the step of each layer with the least total time within a total error.

    Args:
        steps: Name -> the time and error of the layer at each sparsity.
        max_error: The largest allowed sum of errors.

    Raises:
        ValueError: No choice is within the budget; a layer has no steps, or numbers below 0 or not finite.
    """
    if not 0 <= max_error < math.inf:
        msg = f"max_error: expected a number of at least 0; got {max_error!r}; pass a uniform choice's, say"
        raise ValueError(msg)
    for name, found in steps.items():
        if not found or any(not 0 <= x < math.inf for step in found for x in (step.seconds, step.error)):
            wanted = "finite times and errors of at least 0"
            msg = f"steps of {name!r}: expected {wanted}; got {found!r}; measure again"
            raise ValueError(msg)
    fronts = {name: _front(found) for name, found in steps.items()}
    least = sum(front[-1].error for front in fronts.values())
    if least > max_error * (1 + 1e-9):
        msg = (
            f"max_error: expected at least {least:.6g}, which the densest steps cost; got {max_error:.6g}; "
            "raise it"
        )
        raise ValueError(msg)
    excess = sum(front[0].error for front in fronts.values()) - max_error
    if excess <= 0:
        return {name: front[0] for name, front in fronts.items()}
    # Relative to the fastest steps: how much error a denser step saves, and how much more time it takes.
    unit = excess / _UNITS
    rising = {name: _levels(front, unit) for name, front in fronts.items()}
    needed = min(_UNITS, sum(levels[-1][0].pruned for levels in rising.values()))
    choice = choose([[level for level, _ in levels] for levels in rising.values()], needed)
    assert choice is not None
    return {name: levels[i][1] for (name, levels), i in zip(rising.items(), choice, strict=True)}


def _levels(front: Sequence[Step], unit: float) -> list[tuple[Level, Step]]:
    """The steps as levels that rise; of those that save the same in whole units, the fastest."""
    levels = [(Level(0, 0.0), front[0])]
    for step in front[1:]:
        saved = math.floor((front[0].error - step.error) / unit)
        if saved > levels[-1][0].pruned:
            levels.append((Level(saved, step.seconds - front[0].seconds), step))
    return levels


def _front(steps: Sequence[Step]) -> list[Step]:
    """The steps that no other beats in both, by rising time and falling error."""
    front: list[Step] = []
    for step in sorted(steps, key=lambda step: (step.seconds, step.error, -step.sparsity)):
        if not front or step.error < front[-1].error:
            front.append(step)
    return front
