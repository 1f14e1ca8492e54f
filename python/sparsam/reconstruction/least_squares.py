"""Least squares on a support: the best weights that a mask allows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsam import _core
from sparsam.inputs.checks import array_of
from sparsam.inputs.float_mode import standard_floats
from sparsam.masks import Mask
from sparsam.reconstruction.layer_problem import (
    Layer,
    Moments,
    mean_diagonal,
    to_damping,
    to_keep,
    to_layer,
    tolerance,
)

# The most rows with equal supports that share a factorisation; a larger number would leave threads idle.
_SHARED = 64


@standard_floats
def refit(
    w: ArrayLike,
    h: Moments,
    mask: Mask,
    *,
    cross: ArrayLike | None = None,
    damping: float = 0.0,
    name: str = "weights",
) -> NDArray[Any]:
    """The kept weights that minimise tr((W - W') H (W - W')^T), row by row.

    With S the columns that a row keeps and P those that it prunes:

        W'_S = W_S + W_P H_PS (H_SS)^-1,    W'_P = 0

    by a Cholesky factorisation per row (one for up to 64 rows with equal supports), all in float64.
    With `damping` 0 no other weights on the same mask have a smaller error, up to rounding. W must be the
    weights before pruning: if they are already pruned, W_P is 0 and nothing changes.

    An input that depends linearly on kept inputs before it (its pivot is less than 4 sqrt(in) eps of its
    diagonal, eps that of the dtype of h) keeps its weight, as do dead inputs (H_jj = 0): the minimum is
    reached without it, so an H without full rank needs no damping. The result may have large weights that fit
    only the calibration inputs; `damping` pulls the weights towards W.

    With `cross` = C, the sum of y x^T over inputs x and target outputs y, the kept weights minimise the sum
    of (y - W' x)^2 instead:

        W'_S = C_S (H_SS)^-1,    W'_P = 0

    With x from the pruned network and y from the dense one, a layer so compensates for the layers before it.
    C = W H gives the same result as leaving it out. On a mask that keeps everything the result is the optimum
    W* of plain least squares, and the sum differs from tr((W* - W') H (W* - W')^T) by a constant: `obs` and
    `admm` choose a mask for target outputs when they are called with W*.

    Args:
        w: Dense weights, (out, in) or (out, in, ...), which is taken as (out, in * ...); float16, bfloat16,
            float32 or float64. Not modified.
        h: The sum or mean of x x^T, (in, in), float32 or float64; or an object that has it as `gram`
            (`InputStatistics`).
        mask: Which weights are kept, of the shape of w.
        cross: The sum of y x^T, (out, in), float32 or float64, over the same inputs as h (or the mean, if h
            is the mean).
        damping: Add c tr(D D^T) to what is minimised, with D = W - W' and c damping times the mean of H's
            diagonal over live inputs.
        name: The tensor's name in error messages.

    Returns:
        New weights, of the shape and dtype of w, 0 where pruned.

    Raises:
        ValueError: Shapes that do not fit together; numbers that are not finite; an h that is not symmetric
            or has a negative diagonal; new weights beyond the dtype.
        TypeError: Another dtype, or a mask that is not a `Mask`.
    """
    layer = to_layer(w, h, name)
    keep = to_keep(mask, layer)
    wanted = None if cross is None else to_cross(cross, layer)
    return layer.finish(solve(layer, keep, to_damping(damping), tolerance(h, len(layer.gram)), wanted))


def to_cross(cross: ArrayLike, layer: Layer) -> NDArray[np.float64]:
    """The cross moments as float64, checked: shape and finite."""
    what = f"cross for tensor {layer.name!r}"
    given = array_of(what, cross)
    if given.dtype not in (np.float32, np.float64):
        msg = f"{what}: expected dtype float32 or float64; got {given.dtype}; convert it with .astype()"
        raise TypeError(msg)
    if given.shape != layer.matrix.shape:
        msg = (
            f"{what}: expected shape {layer.matrix.shape}; got {given.shape}; pass the sum of y x^T over "
            "outputs y and inputs x"
        )
        raise ValueError(msg)
    if not np.isfinite(given).all():
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(given))[0])
        msg = f"{what}: expected finite numbers; got {given[at]} at index {at}; leave out what caused it"
        raise ValueError(msg)
    return given.astype(np.float64, order="C")


def solve(
    layer: Layer,
    keep: NDArray[np.bool_],
    damping: float,
    bound: float,
    cross: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """The new weights as a matrix."""
    gram = layer.gram
    kept: NDArray[np.float64] = np.where(keep, layer.matrix, 0.0)
    # What is minimised is -2 tr(changes^T D) + tr(D H D^T) in the change D of the kept weights; the term of
    # the damping starts at its minimum for them, so it only adds to H.
    changes = (layer.matrix - kept) @ gram if cross is None else cross - kept @ gram
    if damping:
        gram = gram.copy()
        gram.flat[:: len(gram) + 1] += np.where(layer.live, damping * mean_diagonal(layer), 0.0)
    order, starts = _groups(keep, skip_dense=cross is None)
    idle = np.ones(len(keep), np.bool_)
    idle[order] = False
    changes[idle] = 0
    _core.masked_least_squares(gram, keep, changes, order, starts, bound)
    kept += changes
    return kept


def _groups(
    keep: NDArray[np.bool_], *, skip_dense: bool = True
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows with something to solve for, in runs of equal supports, and where each run starts.

    Rows that keep nothing are left out; with `skip_dense`, so are rows that prune nothing.
    """
    rows = np.flatnonzero(keep.any(axis=1) & ~(keep.all(axis=1) & skip_dense))
    if not rows.size:
        return np.zeros(0, np.int64), np.zeros(1, np.int64)
    _, support = np.unique(np.packbits(keep[rows], axis=1), axis=0, return_inverse=True)
    support = support.reshape(-1)
    order = np.argsort(support, kind="stable")
    sizes = np.bincount(support)
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    starts = [range(a, a + n, _SHARED) for a, n in zip(first.tolist(), sizes.tolist(), strict=True)]
    flat = [start for run in starts for start in run]
    return rows[order].astype(np.int64), np.array([*flat, rows.size], np.int64)
