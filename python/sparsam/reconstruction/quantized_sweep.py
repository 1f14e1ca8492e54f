"""Pruning and rounding in one sweep: columns not yet visited are updated to compensate for both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsam.inputs.checks import expected
from sparsam.inputs.float_mode import standard_floats
from sparsam.masks import Mask
from sparsam.patterns import Pattern, Unstructured
from sparsam.reconstruction.column_sweep import Choice, check_block, choose_from, inverse_factor, sweep
from sparsam.reconstruction.grid_scales import LARGEST_INTEGER, grid_for
from sparsam.reconstruction.layer_problem import (
    Layer,
    Moments,
    Reconstruction,
    corrected_bias,
    to_damping,
    to_layer,
    to_mean,
)

GROUPS = (32, 64, 128)
"""How many columns may share a scale, if not a whole row does."""


@dataclass(frozen=True)
class Quantization(Reconstruction):
    """What `quantize` returns: a `Reconstruction` whose weights are integers times scales.

    Attributes:
        weights: In the shape and dtype of the given weights: exactly scale times code, 0 where pruned.
        mask: Which weights are kept, those whose code is not 0.
        bias: The corrected bias, in the dtype of the given one; None if none was given.
        damping: The number added to the diagonal of H, relative to its mean.
        codes: int8, in the shape of the weights: from -64 to 64 with 8 bits, from -7 to 7 with 4.
        scales: float32, (out,), or (out, groups) with groups of columns.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]


@standard_floats
def quantize(
    w: ArrayLike,
    h: Moments,
    mask: Mask | None = None,
    *,
    sparsity: float | None = None,
    pattern: Pattern = Unstructured(),  # noqa: B008 - frozen
    bits: int = 8,
    group: int | None = None,
    scope: str = "layer",
    block: int = 128,
    damping: float = 0.01,
    bias: ArrayLike | None = None,
    mean: ArrayLike | None = None,
    name: str = "weights",
) -> Quantization:
    """Prunes a layer as `obs` does and rounds the kept weights to integers times scales, in one sweep.

    Column by column, with U as in `obs`, s_j the scale of the row in the group of column j, and
    most = 64 with 8 bits, 7 with 4:

        q_j = clip(round(w_j / s_j), -most, most) where kept, 0 where pruned
        e = (w_j - s_j q_j) / U_jj,    w_i -= e U_ji for i > j,    w_j = s_j q_j

    so that later columns compensate for both pruning and rounding (Frantar and Alistarh, "SparseGPT", 2023,
    section 3.5; Frantar et al., "GPTQ", 2022). Ties are rounded to even.

    The mask, if none is given, and the scales come from a first sweep without rounding, which is `obs`: a
    scale is max |w_j| / most over the kept weights as that sweep left them. With 4 bits it is multiplied by
    whichever of 1, 0.95, 0.9, 0.85 and 0.8 gives the least sum of ((w_j - s q_j) / U_jj)^2. Scales are
    rounded up to few enough binary digits that each product s_j q_j is exact in the dtype of w: with 8 bits,
    18 digits for float32, 5 for float16, 2 for bfloat16; with 4 bits, 8 digits (5 for bfloat16), which
    bfloat16 holds.

    A weight that rounds to 0 is pruned: the mask keeps what `obs` keeps, without these. Weights of dead
    inputs (H_jj = 0) are rounded to nearest.

    Args:
        w: Weights, (out, in) or (out, in, ...), which is taken as (out, in * ...). float64 is computed in
            float64; float16, bfloat16 and float32 in float32 with U from float64. Not modified.
        h: The sum or mean of x x^T, (in, in), float32 or float64; or an object that has it as `gram`
            (`InputStatistics`).
        mask: Which weights are kept, of the shape of w.
        sparsity: As for `obs`; 0 only rounds. Not with `mask`.
        pattern: As for `obs`: `Unstructured()` or `NM(n, m)`.
        bits: 8 or 4.
        group: Columns that share a scale: 32, 64 or 128, the last group being the remainder; None for one
            scale for each row.
        scope: As for `obs`.
        block: As for `obs`.
        damping: As for `obs`.
        bias: (out,); its correction `corrected_bias(bias, w, new weights, mean)` is returned.
        mean: The mean input, (in,), for the bias; `h.mean` of statistics if left out.
        name: The tensor's name in error messages.

    Returns:
        Weights, mask, bias and damping as of `obs`; codes and scales.
        `SparseMatrix.from_dense(weights, dtype="int8", scales=scales)` packs those of 8 bits without groups,
        of a matrix, exactly.

    Raises:
        ValueError: As for `obs`; other numbers of bits or columns of a group; weights beyond the dtype.
        TypeError: As for `obs`.
    """
    array = np.asarray(w)
    layer = to_layer(array, h, name, np.float64 if array.dtype == np.float64 else np.float32)
    _check_grid(bits, group, name)
    inputs = layer.matrix.shape[1]
    middle = None if bias is None else to_mean(h, mean, inputs, name)
    check_block(block)
    choice = choose_from(layer, sparsity, pattern, mask, scope)
    upper, used = inverse_factor(layer, to_damping(damping))
    fitted = _finite(layer, sweep(layer, upper, choice, block))
    costs = upper.diagonal() ** -2.0
    grid = grid_for(fitted, choice.keep, costs, bits, group or max(inputs, 1), layer.weights.dtype)
    matrix = sweep(layer, upper, Choice(choice.keep), block, grid)
    weights, codes = layer.finish(matrix), grid.codes(matrix)
    corrected = None if bias is None or middle is None else corrected_bias(bias, array, weights, middle)
    scales = grid.scales.astype(np.float32)
    return Quantization(
        weights,
        Mask.from_array((codes != 0).reshape(array.shape)),
        corrected,
        used,
        codes.reshape(array.shape),
        scales if group else scales[:, 0] if inputs else np.ones(len(scales), np.float32),
    )


def _check_grid(bits: int, group: int | None, name: str) -> None:
    if type(bits) is not int or bits not in LARGEST_INTEGER:
        raise ValueError(expected(f"bits for tensor {name!r}", bits, "8 or 4", "pass one of them"))
    if group is not None and (type(group) is not int or group not in GROUPS):
        wanted = "None, 32, 64 or 128 columns"
        raise ValueError(expected(f"group for tensor {name!r}", group, wanted, "pass one of them"))


def _finite(layer: Layer, matrix: NDArray[Any]) -> NDArray[Any]:
    """Returns the matrix; ValueError if its scales would exceed the range of float32."""
    largest = float(np.abs(matrix).max(initial=0))
    if not largest <= float(np.finfo(np.float32).max):
        msg = (
            f"tensor {layer.name!r}: expected new weights within the range of float32, in which scales are; "
            f"got {largest:.3g}; raise damping, or make the weights smaller"
        )
        raise ValueError(msg)
    return matrix
