"""Which kernel multiplies a batch, and which forms batches need: pure functions of the kernels' costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsam.report import Readable
from sparsam.sparse.cost_model import Expectation
from sparsam.sparse.matmul import KERNELS

__all__ = ["Candidate", "Explanation", "KernelChoice", "choose", "needed_kernels"]

SECOND_FORM = 1.25
"""A weight gets a second form if some batch would take this many times longer with the first alone."""


@dataclass(frozen=True)
class Candidate:
    """A kernel that could multiply, and its cost.

    Attributes:
        kernel: "dense", "bitmask", "panels" or "slots".
        expected: Microseconds by the cost model.
        measured: Microseconds that it took on this weight; None where it was not measured.
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
class Explanation(Readable):
    """Which kernel multiplies a batch, and why. Prints as text.

    Attributes:
        matrix: A description of the matrix, its repr.
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


def choose(expected: Expectation, batch: int, held: Sequence[str]) -> KernelChoice:
    """The cheapest kernel for a batch; the same arguments give the same choice.

    Args:
        expected: The expected times of products with the weight.
        batch: Rows of x.
        held: The kernels whose forms are held, one of which is chosen.

    Returns:
        The choice. Its candidates are all kernels, for comparison.
    """
    seconds = expected.times(batch, KERNELS)
    chosen = min(held, key=lambda kernel: seconds[kernel])
    order = sorted(KERNELS, key=lambda kernel: (kernel != chosen, seconds[kernel]))
    candidates = tuple(Candidate(kernel, 1e6 * seconds[kernel]) for kernel in order)
    among = "the cheapest" if min(seconds.values()) == seconds[chosen] else "the cheapest form that is held"
    return KernelChoice(chosen, f"{among} by {expected.source}", candidates)


def needed_kernels(
    times: Sequence[Mapping[str, float]],
    required: Sequence[str] = (),
    *,
    tolerance: float = SECOND_FORM,
    most: int = len(KERNELS),
) -> tuple[str, ...]:
    """The fewest kernels with which every batch takes at most `tolerance` times its best time.

    Args:
        times: For each batch, the seconds that each kernel takes; one that is missing cannot be used.
        required: Kernels that are needed in any case.
        tolerance: How much slower than its best kernel a batch may be.
        most: How many kernels there may be in addition to the required ones.

    Returns:
        `required` and the kernels to add. Of several sets of one size, the one with the least sum of times
        relative to the best of each batch; the best set of `most` if more would be needed.
    """

    def slowdowns(kernels: tuple[str, ...]) -> list[float]:
        return [min(t.get(kernel, math.inf) for kernel in kernels) / min(t.values()) for t in times]

    others = [kernel for kernel in KERNELS if kernel not in required]
    found: tuple[str, ...] = tuple(required)
    for size in range(0 if required else 1, min(most, len(others)) + 1):
        sets = [(*required, *more) for more in itertools.combinations(others, size)]
        slow = {kernels: slowdowns(kernels) for kernels in sets}
        good = [kernels for kernels in sets if all(each <= tolerance for each in slow[kernels])]
        found = min(good or sets, key=lambda kernels: sum(slow[kernels]))
        if good:
            break
    return found
