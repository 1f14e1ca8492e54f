"""Optimal brain surgery by columns: columns not yet visited compensate for each pruned weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsam import _core
from sparsam.inputs.checks import check_sparsity, expected, positive
from sparsam.inputs.float_mode import standard_floats
from sparsam.masks import Mask
from sparsam.patterns import NM, Pattern, Unstructured
from sparsam.reconstruction.layer_problem import (
    Layer,
    Moments,
    Reconstruction,
    corrected_bias,
    mask_and_more,
    mean_diagonal,
    neither_mask_nor_sparsity,
    to_damping,
    to_keep,
    to_layer,
    to_mean,
)
from sparsam.selection import select

_MAX_BLOCK_COLUMNS = 256  # the most columns of a block that the kernel supports
_TRIANGLE = 64  # up to this size, a triangular matrix is inverted as a whole


@standard_floats
def obs(
    w: ArrayLike,
    h: Moments,
    mask: Mask | None = None,
    *,
    sparsity: float | None = None,
    pattern: Pattern = Unstructured(),  # noqa: B008 - frozen
    scope: str = "layer",
    block: int = 128,
    damping: float = 0.01,
    bias: ArrayLike | None = None,
    mean: ArrayLike | None = None,
    name: str = "weights",
) -> Reconstruction:
    """Prunes a layer column by column, each time updating the columns that follow (SparseGPT).

    With H damped and U the upper Cholesky factor of its inverse, H^-1 = U^T U, column j is visited from left
    to right. Where a weight is pruned:

        e = w_j / U_jj,    w_i -= e U_ji for i > j,    w_j = 0

    which is the exact answer of optimal brain surgery for the columns not yet visited. The weights with the
    least cost (w_j / U_jj)^2 are pruned (Frantar and Alistarh, "SparseGPT", 2023, algorithm 1).

    Unstructured: for each block of columns, weights are chosen before its sweep, from the values updated so
    far, over all rows. `round(sparsity * n)` weights of the layer are pruned in all; after each block the
    number so far is the total times the share of live columns so far, rounded half up. NM: each group is
    chosen when the sweep reaches it, from the current values. Ties keep the lower index (in a block: lower
    row, then lower column).

    Weights of dead inputs (H_jj = 0) have no cost: they are pruned first (if only some are, the lower indices
    are kept), and kept ones do not change.

    Args:
        w: Weights, (out, in) or (out, in, ...), which is taken as (out, in * ...). float64 is computed in
            float64; float16, bfloat16 and float32 in float32 with U from float64. Not modified.
        h: The sum or mean of x x^T, (in, in), float32 or float64; or an object that has it as `gram`
            (`InputStatistics`).
        mask: Which weights are kept, of the shape of w; the sweep then only updates values.
        sparsity: In [0, 1]. For NM 1 - n/m or 0, and 1 - n/m if left out. Not with `mask`.
        pattern: `Unstructured()` or `NM(n, m)`. For other patterns, choose a mask with `select` and pass it.
        scope: "layer", or "row": every row prunes `round(sparsity * in)` weights, divided among blocks in the
            same way. Unstructured only.
        block: Columns for which weights are chosen together, 1 to 256; for NM rounded down to a multiple of
            m, at least m.
        damping: Added to the diagonal of H, relative to its mean over live inputs. Where the factorisation
            fails it is tried again with ten times as much (after 0 with 1e-8) while it is at most 1; the
            result says what was used.
        bias: (out,); its correction `corrected_bias(bias, w, new weights, mean)` is returned.
        mean: The mean input, (in,), for the bias; `h.mean` of statistics if left out.
        name: The tensor's name in error messages.

    Returns:
        New weights of the shape and dtype of w, the mask, the corrected bias, the damping.

    Raises:
        ValueError: Shapes that do not fit together; numbers that are not finite; an h that is not symmetric
            or not positive semidefinite; a sparsity or pattern that the weights or the method do not support.
        TypeError: Another dtype, or a mask that is not a `Mask`.
    """
    array = np.asarray(w)
    layer = to_layer(array, h, name, np.float64 if array.dtype == np.float64 else np.float32)
    inputs = layer.matrix.shape[1]
    middle = None if bias is None else to_mean(h, mean, inputs, name)
    check_block(block)
    choice = choose_from(layer, sparsity, pattern, mask, scope)
    upper, used = inverse_factor(layer, to_damping(damping))
    matrix = sweep(layer, upper, choice, block)
    weights = layer.finish(matrix)
    corrected = None if bias is None or middle is None else corrected_bias(bias, array, weights, middle)
    return Reconstruction(weights, Mask.from_array(choice.keep.reshape(array.shape)), corrected, used)


sparsegpt = obs
"""`obs`, under the name of the paper."""


@dataclass(frozen=True)
class Grid:
    """The grid of rounded weights: integers from -`most` to `most` times the scale of their row and group.

    Attributes:
        scales: (out, groups), in the dtype of the computation; their products with these integers are exact.
        group: Columns of a group, at least 1; the last group may be shorter.
        most: The largest integer.
    """

    scales: NDArray[Any]
    group: int
    most: int

    def codes(self, w: NDArray[Any]) -> NDArray[np.int8]:
        """The integers whose products with the scales are nearest to `w`, ties to even, (out, in)."""
        scales = np.repeat(self.scales, self.group, axis=1)[:, : w.shape[1]]
        codes: NDArray[np.int8] = np.clip(np.rint(w / scales), -self.most, self.most).astype(np.int8)
        return codes

    def weights(self, codes: NDArray[np.int8]) -> NDArray[Any]:
        """The products, (out, in)."""
        scales = np.repeat(self.scales, self.group, axis=1)[:, : codes.shape[1]]
        product: NDArray[Any] = scales * codes
        return product


def check_block(block: int) -> None:
    """Raises ValueError for a number of columns that the kernel does not support."""
    if positive("block", block) > _MAX_BLOCK_COLUMNS:
        raise ValueError(expected("block", block, f"1 to {_MAX_BLOCK_COLUMNS} columns", "pass 128, say"))


@dataclass
class Choice:
    """Which weights are kept: `keep` (out, in) is filled in by the sweep.

    `pruned` is how many weights of live inputs are to be pruned, in the layer or in each row; None if nothing
    is left to choose, or `groups` do.
    """

    keep: NDArray[np.bool_]
    pruned: int | None = None
    by_row: bool = False
    groups: NM | None = None


def choose_from(
    layer: Layer, sparsity: float | None, pattern: Pattern, mask: Mask | None, scope: str
) -> Choice:
    """What `sweep` has to choose, from checked arguments of `obs`."""
    if scope not in ("layer", "row"):
        do = "prune layers with a global scope by sparsam.prune, then call refit"
        raise ValueError(expected("scope", scope, "'layer' or 'row'", do))
    if mask is not None:
        if sparsity is not None or pattern != Unstructured() or scope != "layer":
            raise mask_and_more(layer.name, sparsity, pattern, scope)
        return Choice(to_keep(mask, layer))
    keep = np.ones(layer.matrix.shape, np.bool_)
    if isinstance(pattern, NM):
        return Choice(keep, groups=_groups(layer, sparsity, pattern))
    if not isinstance(pattern, Unstructured):
        do = "choose with select(w, sparsity, pattern), and pass mask="
        raise TypeError(
            expected(f"pattern for tensor {layer.name!r}", pattern, "Unstructured() or NM(n, m)", do)
        )
    if sparsity is None:
        raise neither_mask_nor_sparsity(layer.name)
    share, by_row = check_sparsity("sparsity", sparsity), scope == "row"
    rows = keep[:1] if by_row else keep
    pruned, dead = round(share * rows.size), rows[:, ~layer.live]
    gone = min(pruned, dead.size)
    dead = np.arange(dead.size).reshape(dead.shape) < dead.size - gone
    keep[:, ~layer.live] = dead
    return Choice(keep, pruned - gone, by_row)


def _groups(layer: Layer, sparsity: float | None, pattern: NM) -> NM | None:
    share = pattern.sparsity if sparsity is None else check_sparsity("sparsity", sparsity)
    if share == 0:
        return None
    if not math.isclose(share, pattern.sparsity, rel_tol=1e-9):
        wanted = f"{pattern.sparsity:g} (or 0), as {pattern!r} keeps {pattern.n} of every {pattern.m}"
        do = "leave sparsity out, or pass another pattern"
        raise ValueError(expected(f"sparsity for tensor {layer.name!r}", sparsity, wanted, do))
    columns = layer.matrix.shape[1]
    if columns % pattern.m:
        msg = (
            f"tensor {layer.name!r}: expected rows of a multiple of {pattern.m} weights, for {pattern!r}; "
            f"got {columns}, of shape {layer.weights.shape}; exclude the tensor, or use another pattern"
        )
        raise ValueError(msg)
    return pattern


def sweep(
    layer: Layer, upper: NDArray[np.float64], choice: Choice, block: int, grid: Grid | None = None
) -> NDArray[Any]:
    """Goes through the blocks from left to right and completes `choice.keep`; returns new weights.

    With a grid nothing is left to choose, and what is kept is rounded to it as it is reached.
    """
    w, original = layer.matrix.copy(), layer.matrix[:, ~layer.live]
    w[:, ~layer.live] = 0
    upper = upper.astype(w.dtype, copy=False)
    rows, columns = w.shape
    n, m = (choice.groups.n, choice.groups.m) if choice.groups is not None else (0, 0)
    step = max(block // m, 1) * m if m else block
    errors = np.zeros_like(w)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, columns, step) if rows else ():
            stop = min(start + step, columns)
            _core.propagate_errors(w, upper, choice.keep, errors, start, stop - start)
            if choice.pruned is not None:
                _choose_block(layer, w, upper.diagonal(), choice, start, stop)
            if grid is None:
                _core.sweep(w, upper, choice.keep, errors, start, stop - start, n, m)
            else:
                _core.rounding_sweep(
                    w, upper, choice.keep, errors, start, stop - start, grid.scales, grid.group, grid.most
                )
    w[:, ~layer.live] = np.where(choice.keep[:, ~layer.live], original, 0)
    return w if grid is None or layer.live.all() else grid.weights(grid.codes(w))


def _choose_block(
    layer: Layer, w: NDArray[Any], diagonal: NDArray[Any], choice: Choice, start: int, stop: int
) -> None:
    assert choice.pruned is not None
    seen = np.cumsum(layer.live)
    live = int(seen[-1])
    before = int(seen[start - 1]) if start else 0
    counts = [(2 * choice.pruned * seen_live + live) // (2 * live) if live else 0
              for seen_live in (before, int(seen[stop - 1]))]  # fmt: skip
    columns: slice | NDArray[np.int64] = slice(start, stop)
    if not layer.live[columns].all():
        columns = np.flatnonzero(layer.live[start:stop]) + start
    count = counts[1] - counts[0]
    if not count:
        return
    scores = w[:, columns] / diagonal[columns]
    if not np.isfinite(scores).all():
        layer.finish(scores)
    if choice.by_row:
        words = _core.nm_mask(scores, scores.shape[1] - count, scores.shape[1])
        assert words is not None
        kept = Mask(words, scores.shape)
    else:
        kept = select(scores, count / scores.size, name=layer.name)
    choice.keep[:, columns] = kept.to_array()


def inverse_factor(layer: Layer, damping: float) -> tuple[NDArray[np.float64], float]:
    """U, upper triangular with U^T U = (H / c + damping I)^-1, c the mean of H's diagonal; the damping used.

    Scaling H changes neither the mask nor the updates.
    """
    gram = layer.gram / mean_diagonal(layer)
    diagonal = np.where(layer.live, gram.diagonal(), 1.0)
    gram[~layer.live] = 0
    gram[:, ~layer.live] = 0
    while True:
        gram.flat[:: len(gram) + 1] = diagonal + damping
        try:
            return _factor(gram), damping
        except np.linalg.LinAlgError:
            damping = max(10 * damping, 1e-8)
            if damping > 1:
                msg = (
                    f"h for tensor {layer.name!r}: expected a positive semidefinite matrix; got one that is "
                    "not positive definite even with its mean diagonal added; pass the sum or mean of x x^T"
                )
                raise ValueError(msg) from None


def _factor(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """U for a positive definite matrix, by halves, so that nearly all work is in products.

    With gram = R R^T, R upper triangular, U is the inverse of R. [[A, B], [B^T, C]] has R22 from C, then
    R12 = B U22^T, then R11 from A - R12 R12^T; and U12 = -U11 R12 U22.
    """
    n = len(gram)
    if n <= _TRIANGLE:
        upper = np.linalg.cholesky(gram[::-1, ::-1])[::-1, ::-1]
        return np.triu(np.linalg.inv(upper))
    half = n // 2
    right = _factor(gram[half:, half:])
    link = gram[:half, half:] @ right.T
    left = _factor(gram[:half, :half] - link @ link.T)
    inverse = np.zeros_like(gram)
    inverse[:half, :half] = left
    inverse[half:, half:] = right
    inverse[:half, half:] = -(left @ link) @ right
    return inverse
