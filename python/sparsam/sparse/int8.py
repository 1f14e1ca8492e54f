"""int8 values: one scale for each row of a matrix, and integers from -64 to 64.

    scale[r] = max |w[r]| / 64        q[r, k] = round(w[r, k] / scale[r]), ties to even

over the kept weights of row r. A kept weight that rounds to 0 is pruned, since it would contribute nothing.
The error of the others is at most scale / 2, 1/128 of their row's largest weight.

A row of integers times one step, as `sparsam.quantize` makes them, is not rounded again: scale[r] =
max |w[r]| / n for the largest n from 64 to 1 with which q times scale equals w exactly everywhere.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from sparsam._core import Packed
from sparsam.inputs.checks import array_of
from sparsam.sparse.arguments import weights

__all__ = ["MAX_COLUMNS", "MAX_TAPS", "check_no_scales", "is_int8", "pack_int8", "with_slots"]

LARGEST_CODE = 64
"""The sum of two products with bytes then fits 16 bits, in which AVX2 instructions accumulate them."""

MAX_COLUMNS = 65536
"""Sums of more products might not fit 32 bits."""

MAX_TAPS = 65535
"""Of the height and the width of a convolution's kernel, which a form holds in 16 bits each."""

_TINY = np.finfo(np.float32).tiny

_PROBES = 8  # weights of a row that are checked first: if they are not on a grid, the others need not be


def is_int8(dtype: DTypeLike | None) -> bool:
    """Whether the requested dtype of the values is int8."""
    return dtype is not None and np.dtype(dtype) == np.int8


def check_no_scales(scales: ArrayLike | None, dtype: DTypeLike | None) -> None:
    """Raises ValueError for scales together with a dtype other than int8."""
    if scales is not None:
        msg = f"scales: expected none for dtype {dtype!r}; got some; pass dtype='int8', or leave them out"
        raise ValueError(msg)


def pack_int8(
    w: ArrayLike,
    keep: NDArray[np.bool_] | None = None,
    scales: ArrayLike | None = None,
    *,
    form: str = "slots",
    taps: tuple[int, int] = (0, 0),
) -> Packed:
    """Rounds a matrix to int8 and packs it in one form.

    Args:
        w: (out, in), of floats, finite where it is kept.
        keep: Where a weight is kept; by default where it is not 0.
        scales: (out,), positive; by default as in the module's docstring.
        form: "slots", for multiplication, or "rows", for looking up rows (embeddings).
        taps: Height and width of the kernel of a convolution, in whose order the columns of a channel are.

    Raises:
        ValueError: Not two dimensions, too many columns, weights that are not finite, or above 64.5 times
            their given scale; given scales that are not positive, normal float32 numbers.
        TypeError: Another dtype.
    """
    values = weights(w, None)
    if keep is not None:
        values = np.where(keep, values, values.dtype.type(0))
    q, steps = rounded(values.astype(np.float32, copy=False), scales)
    return _in_form(Packed.pack_int8(np.ascontiguousarray(q), steps, taps), form)


def rounded(
    values: NDArray[np.float32], scales: ArrayLike | None = None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Returns the integers and the scales of a matrix; see the module's docstring."""
    if values.shape[1] > MAX_COLUMNS:
        msg = f"w: expected at most {MAX_COLUMNS} columns for int8; got {values.shape[1]}; use float values"
        raise ValueError(msg)
    largest = np.abs(values).max(axis=1, initial=0)
    if not np.isfinite(largest).all():
        row = int(np.argmin(np.isfinite(largest)))
        msg = f"w: expected finite weights for int8; got {largest[row]} in row {row}; use float values"
        raise ValueError(msg)
    steps = _steps(values, largest) if scales is None else _checked(scales, largest)
    q = np.rint(values / steps[:, None])
    return np.clip(q, -LARGEST_CODE, LARGEST_CODE, out=q).astype(np.int8), steps


def _steps(values: NDArray[np.float32], largest: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scale of each row of finite weights; 1 for a row of zeros."""
    steps: NDArray[np.float32] = np.where(
        largest > 0, np.maximum(largest / np.float32(LARGEST_CODE), _TINY), np.float32(1)
    )
    rows = np.flatnonzero(largest >= LARGEST_CODE * _TINY)
    probes = _first_of_rows(values[rows])
    for most in range(LARGEST_CODE, 0, -1):
        tried = largest[rows] / np.float32(most)
        maybe = np.flatnonzero(_on_grid(probes, tried))
        found = maybe[_on_grid(values[rows[maybe]], tried[maybe])]
        steps[rows[found]] = tried[found]
        rows, probes = np.delete(rows, found), np.delete(probes, found, axis=0)
    return steps


def _first_of_rows(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The first nonzero weights of each row, and zeros in rows that have fewer."""
    nonzero = values != 0
    places = np.cumsum(nonzero, axis=1, dtype=np.int32)
    row, column = np.nonzero(nonzero & (places <= _PROBES))
    first = np.zeros((len(values), _PROBES), np.float32)
    first[row, places[row, column] - 1] = values[row, column]
    return first


def _on_grid(values: NDArray[np.float32], steps: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which rows are integers times their step, each product rounded to float32."""
    result: NDArray[np.bool_] = (np.rint(values / steps[:, None]) * steps[:, None] == values).all(axis=1)
    return result


def _checked(scales: ArrayLike, largest: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the given scales as float32; ValueError if they do not fit the weights."""
    given = array_of("scales", scales)
    with np.errstate(over="ignore"):
        steps = given.astype(np.float32) if given.dtype.kind == "f" else np.zeros(0, np.float32)
    if steps.shape != largest.shape:
        msg = (
            f"scales: expected floats of shape {largest.shape}, one for each row of w; got {given.dtype} "
            f"{given.shape}; pass those that quantize gives without groups"
        )
        raise ValueError(msg)
    good = np.isfinite(steps) & (steps >= _TINY)
    with np.errstate(over="ignore"):
        good &= largest <= (LARGEST_CODE + np.float32(0.5)) * np.where(good, steps, np.float32(1))
    if not good.all():
        row = int(np.argmin(good))
        msg = (
            f"scales: expected positive, normal numbers, and weights of at most {LARGEST_CODE} times those "
            f"of their rows; got {steps[row]} in row {row}, whose largest weight is {largest[row]}; leave "
            "scales out"
        )
        raise ValueError(msg)
    return steps


def with_slots(packed: Packed) -> Packed:
    """Returns the matrix in the one form that kernels read."""
    return _in_form(packed, "slots")


def _in_form(packed: Packed, form: str) -> Packed:
    packed.add(form)
    packed.keep((form,))
    return packed
