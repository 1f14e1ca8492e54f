"""int8 values: one scale for each row of a matrix, and integers from -64 to 64.

    scale[r] = max |w[r]| / 64        q[r, k] = round(w[r, k] / scale[r]), ties to even

among the weights that are kept. A kept weight that rounds to 0 is pruned: it would multiply nothing. The
error of the others is at most scale / 2, 1/128 of their row's largest weight.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from sparsam._core import Packed
from sparsam.sparse.arguments import weights

__all__ = ["MOST_COLUMNS", "is_int8", "pack_int8", "with_slots"]

MOST = 64
"""Two products with bytes fit 16 bits, in which instructions of AVX2 add them up."""

MOST_COLUMNS = 65536
"""Sums of more products might not fit 32 bits."""

_TINY = np.finfo(np.float32).tiny


def is_int8(dtype: DTypeLike | None) -> bool:
    """Whether a dtype that values are asked to be stored as is int8."""
    return dtype is not None and np.dtype(dtype) == np.int8


def pack_int8(w: ArrayLike, keep: NDArray[np.bool_] | None = None) -> Packed:
    """Rounds a matrix to int8 and packs it, with the slots that its kernels read.

    Args:
        w: (out, in), of floats, finite where it is kept.
        keep: Where a weight is kept; by default where it is not 0.

    Raises:
        ValueError: Another number of dimensions, too many columns, or weights that are not finite.
        TypeError: Another dtype.
    """
    values = weights(w, None)
    if keep is not None:
        values = np.where(keep, values, values.dtype.type(0))
    return pack_rounded(*rounded(values.astype(np.float32, copy=False)))


def rounded(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The integers and the scales of a matrix; see the top of this module."""
    if values.shape[1] > MOST_COLUMNS:
        msg = f"w: expected at most {MOST_COLUMNS} columns for int8; got {values.shape[1]}; use float values"
        raise ValueError(msg)
    largest = np.abs(values).max(axis=1, initial=0)
    if not np.isfinite(largest).all():
        row = int(np.argmin(np.isfinite(largest)))
        msg = f"w: expected finite weights for int8; got {largest[row]} in row {row}; use float values"
        raise ValueError(msg)
    scales = np.where(largest > 0, np.maximum(largest / np.float32(MOST), _TINY), np.float32(1))
    q = np.rint(values / scales[:, None])
    return np.clip(q, -MOST, MOST, out=q).astype(np.int8), scales


def pack_rounded(q: NDArray[np.int8], scales: NDArray[np.float32]) -> Packed:
    """Packs integers from -64 to 64, of which 0 is pruned, and a scale for each row."""
    return with_slots(Packed.pack_int8(q, scales))


def with_slots(packed: Packed) -> Packed:
    """With the form that kernels read, and no other."""
    packed.add("slots")
    packed.keep(("slots",))
    return packed
