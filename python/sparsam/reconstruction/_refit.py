"""Least squares on a support: the best weights that a mask allows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsam import _core
from sparsam.masks import Mask
from sparsam.reconstruction._layer import (
    Layer,
    Moments,
    mean_diagonal,
    to_damping,
    to_keep,
    to_layer,
    tolerance,
)

# Rows of one support that share a factorisation: a bound, so that threads find tasks.
_SHARED = 64


def refit(
    w: ArrayLike, h: Moments, mask: Mask, *, damping: float = 0.0, name: str = "weights"
) -> NDArray[Any]:
    """The kept weights that minimise tr((W - W') H (W - W')^T), row by row.

    With S the columns that a row keeps and P those that it prunes:

        W'_S = W_S + W_P H_PS (H_SS)^-1,    W'_P = 0

    by a Cholesky factorisation per row, of rows with equal supports one for up to 64 of them, all in float64.
    With `damping` 0 no other weights on the same mask have a smaller error, up to rounding. W must be the
    weights before pruning: of weights that are pruned already, W_P is 0 and nothing changes.

    An input that depends linearly on kept inputs before it (its pivot is less than 4 sqrt(in) eps of its
    diagonal, eps that of the dtype of h) keeps its weight, as do dead inputs (H_jj = 0): the minimum is
    reached without it, so an H without full rank needs no damping. It may ask for large weights that fit the
    calibration inputs only; `damping` draws the weights back to W.

    Args:
        w: Dense weights, (out, in) or (out, in, ...), which is taken as (out, in * ...); float16, bfloat16,
            float32 or float64. Not modified.
        h: The sum or mean of x x^T, (in, in), float32 or float64; or what has it as `gram`
            (`InputStatistics`).
        mask: Which weights are kept, of the shape of w.
        damping: Minimise tr(D (H + c I) D^T) instead, c being damping times the mean of H's diagonal over
            live inputs.
        name: What errors call the tensor.

    Returns:
        New weights, of the shape and dtype of w, 0 where pruned.

    Raises:
        ValueError: Shapes that do not fit together; numbers that are not finite; an h that is not symmetric
            or has a negative diagonal; new weights beyond the dtype.
        TypeError: Another dtype, or a mask that is no `Mask`.
    """
    layer = to_layer(w, h, name)
    keep = to_keep(mask, layer)
    return layer.finish(solve(layer, keep, to_damping(damping), tolerance(h, len(layer.gram))))


def solve(layer: Layer, keep: NDArray[np.bool_], damping: float, bound: float) -> NDArray[np.float64]:
    """The new weights as a matrix."""
    gram = layer.gram
    if damping:
        gram = gram.copy()
        gram.flat[:: len(gram) + 1] += np.where(layer.live, damping * mean_diagonal(layer), 0.0)
    kept: NDArray[np.float64] = np.where(keep, layer.matrix, 0.0)
    changes = (layer.matrix - kept) @ gram
    order, starts = _groups(keep)
    idle = np.ones(len(keep), np.bool_)
    idle[order] = False
    changes[idle] = 0
    _core.solve_on_support(gram, keep, changes, order, starts, bound)
    kept += changes
    return kept


def _groups(keep: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows that both keep and prune something, in runs of equal supports, and where each run starts."""
    rows = np.flatnonzero(keep.any(axis=1) & ~keep.all(axis=1))
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
