"""What a matrix was prepared for: kernels that the user told, and times that were measured on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from sparsam.sparse import calibration
from sparsam.sparse.cost_model import CostModel, bucket
from sparsam.sparse.dispatch import Candidate, KernelChoice, choose, needed_kernels
from sparsam.sparse.forms import Forms
from sparsam.sparse.matmul import KERNELS

__all__ = ["Preparation", "measure"]

_ROUNDS = 2  # in turn, so that what disturbs one kernel disturbs the others too
_PLAUSIBLE = 2.5  # times the least expected cost: beyond it a kernel is not tried


@dataclass(frozen=True)
class Preparation:
    """What `SparseMatrix.prepare` found out; batches of one bucket share it.

    Attributes:
        told: Bucket -> the kernel that the user chose.
        times: Bucket -> seconds that each kernel took on this matrix.
    """

    told: Mapping[int, str] = field(default_factory=dict)
    times: Mapping[int, Mapping[str, float]] = field(default_factory=dict)

    def with_told(self, batches: Sequence[int], kernel: str) -> Preparation:
        """With a kernel that the user chose."""
        return replace(self, told={**self.told, **{bucket(batch): kernel for batch in batches}})

    def with_times(self, times: Mapping[int, Mapping[str, float]]) -> Preparation:
        """With times measured; they replace what the user chose for these batches before."""
        told = {n: kernel for n, kernel in self.told.items() if n not in times}
        return Preparation(told, {**self.times, **times})

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernels whose forms have to stay."""
        return needed_kernels(list(self.times.values()), list(dict.fromkeys(self.told.values())))

    def choice(self, forms: Forms, batch: int, costs: CostModel) -> KernelChoice:
        """The kernel for a batch, among those whose forms are held."""
        expected = choose(forms.weight, batch, costs, kernels=forms.kernels)
        told, times = self.told.get(bucket(batch)), self.times.get(bucket(batch))
        if told in forms.kernels:
            return KernelChoice(str(told), "as prepare() was told", expected.candidates)
        if times is None or not expected.candidates:
            return expected
        held = [kernel for kernel in forms.kernels if kernel in times]
        if not held:
            return expected
        kernel = min(held, key=lambda name: times[name])
        all_expected = {c.kernel: c.expected for c in choose(forms.weight, batch, costs).candidates}
        candidates = sorted(
            (Candidate(k, all_expected.get(k), 1e6 * times[k] if k in times else None) for k in KERNELS),
            key=lambda c: (c.kernel != kernel, c.measured or math.inf, c.expected),
        )
        best = min(times, key=lambda name: times[name])
        why = "measured by prepare() on this matrix"
        if best != kernel:
            why += f": {best} is not faster by enough to hold a further form"
        return KernelChoice(kernel, why, tuple(candidates))


def measure(forms: Forms, batch: int, costs: CostModel) -> tuple[Forms, dict[str, float]]:
    """Times the kernels that may be the fastest for a batch.

    Args:
        forms: What to multiply with.
        batch: Rows of x.
        costs: Tell which kernels need not be tried.

    Returns:
        The forms with what was built for it, and the seconds that each kernel took.
    """
    expected = {k: costs.seconds(k, forms.weight, batch) for k in KERNELS}
    likely = [k for k in KERNELS if expected[k] <= _PLAUSIBLE * min(expected.values())]
    x = np.ones((batch, forms.weight.cols), np.float32)
    y = np.empty((batch, forms.weight.rows), np.float32)
    for kernel in likely:
        forms = forms.with_kernel(kernel)
    found = dict.fromkeys(likely, math.inf)
    for kernel in likely * _ROUNDS:
        seconds = calibration.fastest(lambda name=kernel: forms.multiply(name, x, None, "", y))  # type: ignore[misc]
        found[kernel] = min(found[kernel], seconds)
    return forms, found
