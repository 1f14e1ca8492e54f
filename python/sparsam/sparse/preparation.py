"""Results of `prepare`: kernels that the user chose, and times measured on the matrix."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from sparsam.sparse import calibration
from sparsam.sparse.cost_model import Expectation, bucket
from sparsam.sparse.dispatch import KernelChoice, needed_kernels
from sparsam.sparse.forms import Forms
from sparsam.sparse.matmul import KERNELS

__all__ = ["Preparation", "measure_all"]

_ROUNDS = 2  # of measurement, in which kernels take turns, so that a disturbance affects them all
_PLAUSIBLE = 2.5  # kernels expected to take longer than this many times the fastest are not measured


@dataclass(frozen=True)
class Preparation:
    """The results of `SparseMatrix.prepare`; batches of one bucket share them.

    Attributes:
        told: Bucket -> the kernel that the user chose.
        times: Bucket -> seconds that each kernel took on this matrix.
        settings: Instruction set and threads that the times were measured with; None where there are none.
    """

    told: Mapping[int, str] = field(default_factory=dict)
    times: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    settings: tuple[str, int] | None = None

    def with_told(self, batches: Sequence[int], kernel: str) -> Preparation:
        """Returns a copy with the kernel that the user chose for these batches."""
        return replace(self, told={**self.told, **{bucket(batch): kernel for batch in batches}})

    def with_times(self, times: Mapping[int, Mapping[str, float]], settings: tuple[str, int]) -> Preparation:
        """Returns a copy with measured times, which replace the user's earlier choices for these batches."""
        told = {n: kernel for n, kernel in self.told.items() if n not in times}
        return Preparation(told, {**self.under(settings).times, **times}, settings)

    def under(self, settings: tuple[str, int]) -> Preparation:
        """Returns the part that is valid under these settings."""
        return self if self.settings in {None, settings} else Preparation(self.told)

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernels whose forms have to be kept; empty if nothing was prepared."""
        required = list(dict.fromkeys(self.told.values()))
        return needed_kernels(list(self.times.values()), required) if self.told or self.times else ()

    def choice(self, expected: KernelChoice, batch: int, held: Sequence[str]) -> KernelChoice:
        """The kernel for a batch, among those whose forms are held.

        Args:
            expected: The choice of the cost model.
            batch: Rows of x.
            held: The kernels that can run.
        """
        told, times = self.told.get(bucket(batch)), self.times.get(bucket(batch), {})
        if told in held:
            return KernelChoice(str(told), "as requested with prepare()", expected.candidates)
        measured = [kernel for kernel in held if kernel in times]
        if not measured:
            return expected
        kernel = min(measured, key=lambda name: times[name])
        timed = [replace(c, measured=_microseconds(times, c.kernel)) for c in expected.candidates]
        candidates = sorted(timed, key=lambda c: (c.kernel != kernel, c.measured or math.inf, c.expected))
        best = min(times, key=lambda name: times[name])
        why = "measured by prepare() on this matrix"
        if best != kernel:
            why += f": {best} is not faster by enough to hold another form"
        return KernelChoice(kernel, why, tuple(candidates))


def _microseconds(times: Mapping[str, float], kernel: str) -> float | None:
    return 1e6 * times[kernel] if kernel in times else None


def measure_all(
    forms: Forms, batches: Sequence[int], expected: Expectation
) -> tuple[Forms, dict[int, dict[str, float]]]:
    """Times, for every bucket of the batches, the kernels that may be the fastest for it.

    Dense products are timed after all others: the threads of their library wait actively for more work, for
    a tenth of a second or longer, and meanwhile those of our kernels may share one processor.

    Args:
        forms: The forms of the weight.
        batches: Rows of x; 0 is left out.
        expected: The expected times, which rule out slow kernels.

    Returns:
        The forms, with those that had to be built, and for each bucket the seconds that each kernel took.
    """
    found: dict[int, dict[str, float]] = {}
    arrays = {}
    for size in dict.fromkeys(bucket(batch) for batch in batches if batch):
        seconds = expected.times(size, KERNELS)
        likely = [k for k in KERNELS if seconds[k] <= _PLAUSIBLE * min(seconds.values())]
        found[size] = dict.fromkeys(likely, math.inf)
        x = np.ones((size, forms.weight.cols), np.float32)
        arrays[size] = (x, np.empty((size, forms.weight.rows), np.float32))
        for kernel in likely:
            forms = forms.with_kernel(kernel)
    if found:
        calibration.wait_for_idle_threads()
    for dense, _, (size, times) in itertools.product((False, True), range(_ROUNDS), found.items()):
        x, y = arrays[size]
        for kernel in times:
            if (kernel == "dense") == dense:
                took = calibration.fastest(
                    lambda name=kernel, x=x, y=y: forms.multiply(name, x, None, "", y)  # type: ignore[misc]
                )
                times[kernel] = min(times[kernel], took)
    return forms, found
