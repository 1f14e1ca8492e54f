"""Scales of integer weights, with few enough binary digits for exact products in the weights' dtype."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from sparsam.reconstruction.column_sweep import Grid

__all__ = ["LARGEST_INTEGER", "grid_for"]

LARGEST_INTEGER = {8: 64, 4: 7}
"""The largest integer for each number of bits; with 8 bits, the largest that the int8 kernels support."""

_CLIPS = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8)}
"""The scales that are tried, relative to the one that maps the largest weight to the largest integer."""

_BFLOAT16_DIGITS = 8
"""The most digits of the scales of 4-bit integers, which are packed as bfloat16."""

_TINY = float(np.finfo(np.float32).tiny)


def grid_for(
    w: NDArray[Any], keep: NDArray[np.bool_], costs: NDArray[np.float64], bits: int, group: int, dtype: Any
) -> Grid:
    """The grid for the kept weights of a matrix (out, in).

    The scale of each row and group is max |w| / most, or with 4 bits that multiple of it from 0.8 to 1 which
    gives the least sum of costs_j (w_j - rounded)^2, rounded up to few enough digits for exact products. A
    group without kept weights has the scale 1.

    Args:
        w: Finite, (out, in), float32 or float64.
        keep: Which weights are kept.
        costs: (in,), the cost of a squared error in each column.
        bits: 8 or 4.
        group: Columns that share a scale, at least 1.
        dtype: The dtype in which products must be exact: float16, bfloat16, float32 or float64.
    """
    most, (rows, columns) = LARGEST_INTEGER[bits], w.shape
    groups = -(-columns // group)
    kept = np.where(keep, w, 0)
    padded = np.zeros((rows, groups * group), w.dtype)
    padded[:, :columns] = kept
    largest = np.abs(padded.reshape(rows, groups, group)).max(axis=2, initial=0).astype(np.float64)
    best: NDArray[np.float64] | None = None
    for share in _CLIPS[bits]:
        scales = _rounded_up(np.where(largest > 0, largest * (share / most), 1.0), most, dtype)
        grid = Grid(scales.astype(w.dtype), group, most)
        if len(_CLIPS[bits]) == 1:
            return grid
        padded[:, :columns] = (kept - grid.weights(grid.codes(kept))) ** 2 * costs
        errors = padded.reshape(rows, groups, group).sum(axis=2, dtype=np.float64)
        if best is None:
            best, chosen = errors, scales
        else:
            chosen = np.where(errors < best, scales, chosen)
            best = np.minimum(errors, best)
    return Grid(chosen.astype(w.dtype), group, most)


def _rounded_up(scales: NDArray[np.float64], most: int, dtype: Any) -> NDArray[np.float64]:
    """Rounds up to few enough digits that all products with integers up to `most` are exact."""
    info = ml_dtypes.finfo(np.float32 if dtype == np.float64 else dtype)  # type: ignore[no-untyped-call]
    digits = info.nmant + 1 - (most - 1).bit_length()
    if most == LARGEST_INTEGER[4]:
        digits = min(digits, _BFLOAT16_DIGITS)
    scales = np.maximum(scales, _TINY)
    _, exponents = np.frexp(scales)
    least = int(np.log2(float(info.smallest_subnormal)))
    exponents = np.maximum(exponents - digits, least)
    rounded: NDArray[np.float64] = np.ldexp(np.ceil(np.ldexp(scales, -exponents)), exponents)
    return rounded
