"""Which kernel multiplies a batch: by the calibrated costs, and by trial where they cannot tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from sparsam._core import Packed
from sparsam.sparse import cost_model
from sparsam.sparse.matmul import Floats, multiply

__all__ = ["Candidate", "Explanation", "KernelChoice", "choose", "unpack"]

_TRIALS = 3
_ODD = 1.5  # times longer than the calibration holds possible


@dataclass(frozen=True)
class Candidate:
    """A kernel that could multiply, and what that costs.

    Attributes:
        kernel: "dense", "bitmask" or "panels".
        expected: Microseconds that the calibration predicts; None where nothing is calibrated.
        low: The least that it may be, as far as the calibration can tell.
        high: The most.
        measured: Microseconds that it took on this very matrix; None where it was not tried.
    """

    kernel: str
    expected: float | None = None
    low: float | None = None
    high: float | None = None
    measured: float | None = None

    def __str__(self) -> str:
        parts = []
        if self.measured is not None:
            parts.append(f"{self.measured:,.1f} us measured on this matrix")
        if self.expected is not None:
            parts.append(f"{self.expected:,.1f} us expected ({self.low:,.1f} to {self.high:,.1f})")
        return f"{self.kernel:8} {'; '.join(parts) or 'not measured'}"


@dataclass(frozen=True)
class KernelChoice:
    """The kernel for a batch, why, and what was considered, the likeliest first."""

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


def choose(packed: Packed, dense: Floats | None, batch: int) -> tuple[KernelChoice, Floats | None]:
    """The plan for a batch, and the dense copy if there was one or a trial made one.

    Args:
        packed: The matrix; a trial leaves in it the layouts that it built.
        dense: Its dense copy, if there is one.
        batch: The number of rows of x.
    """
    if batch == 0 or packed.nnz == 0:
        return KernelChoice("panels", "for there is nothing to multiply"), dense
    if cost_model.is_off():
        expected: Mapping[str, cost_model.Estimate] = {}
        close: Sequence[str] = cost_model.candidates(batch)
        why = "nothing is calibrated (SPARSAM_CALIBRATION=off)"
    else:
        fitted = cost_model.calibrate(packed.dtype)
        blocked = packed.blocked > 0
        expected = fitted.estimates((packed.rows, packed.cols), packed.nnz, batch, blocked=blocked)
        close = cost_model.contenders(expected)
        why = f"the calibration of this machine ({fitted.machine}) cannot tell"
    measured: dict[str, float] = {}
    if len(close) > 1:
        if "dense" in close and dense is None:
            dense = unpack(packed)
        measured = _try(close, packed, dense, batch, expected)
        # A time that stays impossible was that of other work, and says no more than the calibration does.
        close = sorted(close, key=lambda kernel: min(measured[kernel], _most(expected.get(kernel))))
        reason = f"the fastest of {len(close)} tried on this matrix, as {why}"
    else:
        reason = f"by the calibration of this machine ({fitted.machine})"
    others = sorted(expected.keys() - set(close), key=lambda kernel: expected[kernel].expected)
    found = tuple(_candidate(k, expected.get(k), measured.get(k)) for k in (*close, *others))
    return KernelChoice(close[0], reason, found), dense


def unpack(packed: Packed) -> Floats:
    """The dense copy that "dense" multiplies with."""
    dense: Floats = packed.unpack().astype(np.float32, copy=False)
    return dense


def _try(
    kernels: Sequence[str],
    packed: Packed,
    dense: Floats | None,
    batch: int,
    expected: Mapping[str, cost_model.Estimate],
) -> dict[str, float]:
    """Seconds that the kernels take; measured again where other work on the machine seems to interfere."""
    x, y = np.ones((batch, packed.cols), np.float32), np.empty((batch, packed.rows), np.float32)
    found = dict.fromkeys(kernels, math.inf)
    for form in set(kernels) - {"dense"}:
        packed.add(form)
    for _ in range(_TRIALS):
        for kernel in kernels:
            run = partial(multiply, kernel, packed, dense, x, None, "", y)
            found[kernel] = min(found[kernel], cost_model.fastest(run))
        if all(found[kernel] <= _most(expected.get(kernel)) for kernel in kernels):
            break
    return found


def _most(estimate: cost_model.Estimate | None) -> float:
    return math.inf if estimate is None else _ODD * estimate.high


def _candidate(kernel: str, estimate: cost_model.Estimate | None, measured: float | None) -> Candidate:
    low, expected, high = (None,) * 3 if estimate is None else (1e6 * seconds for seconds in estimate)
    return Candidate(kernel, expected, low, high, None if measured is None else 1e6 * measured)
