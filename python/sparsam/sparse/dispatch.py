"""Which kernel multiplies a batch: a pure function of the weight, the batch, and what kernels cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsam.sparse.cost_model import CostModel, Weight
from sparsam.sparse.matmul import KERNELS

__all__ = ["Candidate", "Explanation", "KernelChoice", "choose", "needed_kernels"]

FURTHER_FORM = 1.1
"""A kernel that needs a further form of the weight must be faster by this factor to be worth its memory."""

SECOND_FORM = 1.25
"""So much slower than the fastest may the one form that is kept be, for any batch that was prepared."""


@dataclass(frozen=True)
class Candidate:
    """A kernel that could multiply, and what that costs.

    Attributes:
        kernel: "dense", "bitmask" or "panels".
        expected: Microseconds by the cost model.
        measured: Microseconds that it took on this very weight; None where it was not tried.
    """

    kernel: str
    expected: float | None = None
    measured: float | None = None

    def __str__(self) -> str:
        parts = []
        if self.measured is not None:
            parts.append(f"{self.measured:,.1f} us measured on this matrix")
        if self.expected is not None:
            parts.append(f"{self.expected:,.1f} us expected")
        return f"{self.kernel:8} {'; '.join(parts)}"


@dataclass(frozen=True)
class KernelChoice:
    """The kernel for a batch, why, and what was considered: the one that runs first, then by time."""

    kernel: str
    reason: str
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """Which kernel multiplies a batch, and why. Prints as text.

    Attributes:
        matrix: The matrix in words.
        batch: The batch asked about.
        kernel: The kernel that runs for it.
        reason: Why.
        candidates: The kernels that were considered, the one that runs first.
    """

    matrix: str
    batch: int
    kernel: str
    reason: str
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        head = f"{self.matrix}, batch {self.batch}: {self.kernel}, {self.reason}"
        return "\n  ".join((head, *map(str, self.candidates)))


def choose(
    weight: Weight,
    batch: int,
    costs: CostModel,
    *,
    kernels: Sequence[str] = KERNELS,
    held: Sequence[str] | None = None,
) -> KernelChoice:
    """The cheapest kernel for a batch; the same arguments give the same choice.

    Args:
        weight: What is multiplied with.
        batch: Rows of x.
        costs: See `cost_model.current_costs`.
        kernels: Those that may run.
        held: Those whose form is there whatever is chosen. Others must be faster by `FURTHER_FORM`; by
            default none must.
    """
    if batch == 0 or weight.nnz == 0:
        return KernelChoice((*(held or ()), *kernels)[0], "since there is nothing to multiply")
    seconds = {kernel: costs.seconds(kernel, weight, batch) for kernel in kernels}
    free = kernels if held is None else held
    chosen = min(kernels, key=lambda kernel: seconds[kernel] * (1.0 if kernel in free else FURTHER_FORM))
    order = sorted(kernels, key=lambda kernel: (kernel != chosen, seconds[kernel]))
    candidates = tuple(Candidate(kernel, 1e6 * seconds[kernel]) for kernel in order)
    among = "" if len(kernels) == len(KERNELS) else f" among {', '.join(kernels)}"
    return KernelChoice(chosen, f"the cheapest{among} by {costs}", candidates)


def needed_kernels(
    times: Sequence[Mapping[str, float]], required: Sequence[str] = (), *, tolerance: float = SECOND_FORM
) -> tuple[str, ...]:
    """The fewest kernels with which every batch takes at most `tolerance` times its best time.

    Args:
        times: For each batch, the seconds that each kernel takes; one that is missing cannot be used.
        required: Kernels that are needed in any case.
        tolerance: See there.

    Returns:
        `required` and what is needed beside. Among as many kernels those whose times, relative to the best
        of each batch, sum up to the least.
    """

    def slowdowns(kernels: tuple[str, ...]) -> list[float]:
        return [min(t.get(kernel, math.inf) for kernel in kernels) / min(t.values()) for t in times]

    others = [kernel for kernel in KERNELS if kernel not in required]
    for size in range(0 if required else 1, len(others) + 1):
        sets = [(*required, *more) for more in itertools.combinations(others, size)]
        if good := [kernels for kernels in sets if all(slow <= tolerance for slow in slowdowns(kernels))]:
            return min(good, key=lambda kernels: sum(slowdowns(kernels)))
    return KERNELS
