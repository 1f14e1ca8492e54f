"""Weight updates by the alternating direction method of multipliers, with the mask given or found."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsam.inputs.checks import expected, is_number, positive
from sparsam.inputs.float_mode import standard_floats
from sparsam.masks import Mask
from sparsam.patterns import NM, Pattern, Unstructured
from sparsam.reconstruction.layer_problem import (
    Layer,
    Moments,
    Reconstruction,
    corrected_bias,
    mask_and_more,
    neither_mask_nor_sparsity,
    to_damping,
    to_keep,
    to_layer,
    to_mean,
    tolerance,
)
from sparsam.reconstruction.least_squares import solve
from sparsam.selection import select

_POLISH = 100  # the most steps of conjugate gradients
_GAIN = 1e-5  # they end with the first step that reduces the error by less than this share
_RESTARTS = 5


@standard_floats
def admm(
    w: ArrayLike,
    h: Moments,
    mask: Mask | None = None,
    *,
    sparsity: float | None = None,
    pattern: Pattern = Unstructured(),  # noqa: B008 - frozen
    iterations: int | None = None,
    rho: float | None = None,
    damping: float = 0.0,
    bias: ArrayLike | None = None,
    mean: ArrayLike | None = None,
    name: str = "weights",
) -> Reconstruction:
    """Minimises tr((W - W') H (W - W')^T) over sparse W', on a mask or together with it.

    Inputs are scaled first, so that H has a diagonal of 1: G_ij = H_ij / (d_i d_j), W_j d_j, with
    d_j = sqrt(H_jj); at the end the weights are divided by d.

    With a mask (Boza, "Fast and effective weight update for pruned large language models", 2024): one
    inverse of G + rho I serves all iterations Z = mask (W' + U), U += W' - Z,
    W' = (W G + rho (Z - U)) (G + rho I)^-1. Up to 100 steps of conjugate gradients on the support follow,
    until one reduces the error by less than 1e-5 of it. All steps are products of whole matrices; the error
    is within 1 % of that of `refit`, which factorises a system for each row. Only if errors are below a
    millionth of the outputs' energy and G is nearly singular (condition number 1e9) can it be several times
    as large.

    Without a mask, `admm_mask` finds it, and the weights are then fitted on it as `refit` does.

    Args:
        w: Dense weights, (out, in) or (out, in, ...), which is taken as (out, in * ...); float16, bfloat16,
            float32 or float64. Computed in float64. Not modified.
        h: The sum or mean of x x^T, (in, in), float32 or float64; or an object that has it as `gram`
            (`InputStatistics`).
        mask: Which weights are kept, of the shape of w.
        sparsity: Without a mask: in [0, 1], exactly `round(sparsity * n)` groups of the pattern are pruned;
            for NM 1 - n/m or 0, and 1 - n/m if left out.
        pattern: Without a mask: any.
        iterations: The maximum number; if left out 20 with a mask, 300 without.
        rho: The initial penalty; if left out 1 with a mask, 0.1 without.
        damping: Added to the diagonal of G, which pulls the weights towards W.
        bias: (out,); its correction `corrected_bias(bias, w, new weights, mean)` is returned.
        mean: The mean input, (in,), for the bias; `h.mean` of statistics if left out.
        name: The tensor's name in error messages.

    Returns:
        New weights of the shape and dtype of w, the mask, the corrected bias, the damping. Weights of dead
        inputs (H_jj = 0) are pruned first, and stay as they were where kept.

    Raises:
        ValueError: Shapes that do not fit together; numbers that are not finite; an h that is not symmetric
            or has a negative diagonal; both or neither of mask and sparsity; new weights beyond the dtype.
        TypeError: Another dtype, or a mask that is not a `Mask`.
    """
    layer = to_layer(w, h, name)
    inputs = layer.matrix.shape[1]
    middle = None if bias is None else to_mean(h, mean, inputs, name)
    added = to_damping(damping)
    scaled, scale = _scaled(layer)
    if mask is None:
        search = _search(name, sparsity, pattern, iterations, rho)
        found = _find_mask(scaled, *search, added)
        result = solve(scaled, to_keep(found, layer), added, tolerance(h, inputs))
    else:
        if sparsity is not None or pattern != Unstructured():
            raise mask_and_more(name, sparsity, pattern)
        rounds, penalty = positive("iterations", 20 if iterations is None else iterations), _rho(rho, 1.0)
        found, keep = mask, to_keep(mask, layer)
        gram = scaled.gram + added * np.eye(inputs)
        result = _polish(scaled.matrix, gram, keep, _update(scaled.matrix, gram, keep, rounds, penalty))
        result[:, ~layer.live] = np.where(keep, layer.matrix, 0)[:, ~layer.live]
    weights = layer.finish(result / scale)
    corrected = None if bias is None or middle is None else corrected_bias(bias, w, weights, middle)
    return Reconstruction(weights, found, corrected, added)


@standard_floats
def admm_mask(
    w: ArrayLike,
    h: Moments,
    *,
    sparsity: float | None = None,
    pattern: Pattern = Unstructured(),  # noqa: B008 - frozen
    iterations: int | None = None,
    rho: float | None = None,
    damping: float = 0.0,
    name: str = "weights",
) -> Mask:
    """The mask that `admm` finds, without new weights.

    By growing penalties (Meng et al., "ALPS", 2024), on inputs scaled as in `admm`:
    B = (W G - V + rho D) (G + rho I)^-1, D = what `select` keeps of B + V / rho, V += rho (B - D), by one
    eigendecomposition of G. Every third iteration rho grows, by 1.3 where more than 10 % of the support
    changed since the third before, by 1.2 above 0.5 %, by 1.1 above 0, until nothing changes; if nothing
    changed from the start, it begins again with a fifth of rho, 5 times at most. Weights of dead inputs
    (H_jj = 0) are pruned first.

    Args:
        w: Dense weights, (out, in) or (out, in, ...), which is taken as (out, in * ...); float16, bfloat16,
            float32 or float64. Computed in float32, or in float64 if w is. Not modified.
        h: The sum or mean of x x^T, (in, in), float32 or float64; or an object that has it as `gram`
            (`InputStatistics`).
        sparsity: In [0, 1], exactly `round(sparsity * n)` groups of the pattern are pruned; for NM 1 - n/m or
            0, and 1 - n/m if left out.
        pattern: Any; groups are compared by the sum of squares of B + V / rho.
        iterations: The maximum number; 300 if left out.
        rho: The initial penalty; 0.1 if left out.
        damping: Added to the diagonal of G, which pulls the weights towards W.
        name: The tensor's name in error messages.

    Returns:
        The mask, of the shape of w: that of `admm` with the same arguments.

    Raises:
        ValueError: Shapes that do not fit together; numbers that are not finite; an h that is not symmetric
            or has a negative diagonal; no sparsity.
        TypeError: Another dtype.
    """
    layer, added = to_layer(w, h, name), to_damping(damping)
    return _find_mask(_scaled(layer)[0], *_search(name, sparsity, pattern, iterations, rho), added)


def _scaled(layer: Layer) -> tuple[Layer, NDArray[np.float64]]:
    """The layer scaled so that H has diagonal 1, and the factors of its columns, up to a constant."""
    roots = np.sqrt(np.where(layer.live, layer.gram.diagonal(), 1.0))
    # Dividing by the largest changes no choice, and keeps all inputs within the range of float32.
    scale = np.where(layer.live, roots / (roots.max(initial=0, where=layer.live) or 1.0), 1.0)
    return replace(layer, matrix=layer.matrix * scale, gram=layer.gram / np.outer(roots, roots)), scale


def _search(
    name: str, sparsity: float | None, pattern: Pattern, iterations: int | None, rho: float | None
) -> tuple[float, Pattern, int, float]:
    """The checked arguments of `_find_mask`."""
    share = pattern.sparsity if sparsity is None and isinstance(pattern, NM) else sparsity
    if share is None:
        raise neither_mask_nor_sparsity(name)
    return share, pattern, positive("iterations", 300 if iterations is None else iterations), _rho(rho, 0.1)


def _rho(rho: float | None, default: float) -> float:
    if rho is None:
        return default
    if is_number(rho) and 0 < float(rho) < math.inf:
        return float(rho)
    raise ValueError(expected("rho", rho, "a finite number above 0", "leave it out for the default"))


def _update(
    w: NDArray[np.float64],
    gram: NDArray[np.float64],
    keep: NDArray[np.bool_],
    iterations: int,
    rho: float,
) -> NDArray[np.float64]:
    inverse = np.linalg.inv(gram + rho * np.eye(len(gram)))
    target, new, dual = w @ gram, w, np.zeros_like(w)
    for _ in range(iterations):
        dual = new + dual
        sparse = np.where(keep, dual, 0.0)
        dual -= sparse
        new = (target + rho * (sparse - dual)) @ inverse
    result: NDArray[np.float64] = np.where(keep, new + dual, 0.0)
    return result


def _polish(
    w: NDArray[np.float64],
    gram: NDArray[np.float64],
    keep: NDArray[np.bool_],
    start: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Conjugate gradients on each row's support from `start`; no step raises the error."""
    new: NDArray[np.float64] = start.copy()
    error = float(np.vdot((w - new) @ gram, w - new))
    residual = np.where(keep, (w - new) @ gram, 0.0)
    direction, size = residual.copy(), np.einsum("ij,ij->i", residual, residual)
    for _ in range(_POLISH):
        curved = np.where(keep, direction @ gram, 0.0)
        curvature = np.einsum("ij,ij->i", direction, curved)
        length = np.divide(size, curvature, out=np.zeros_like(size), where=curvature > 0)
        new += length[:, None] * direction
        residual -= length[:, None] * curved
        gain = float(length @ size)
        error -= gain
        if gain <= _GAIN * max(error, 0.0):
            break
        last, size = size, np.einsum("ij,ij->i", residual, residual)
        direction *= np.divide(size, last, out=np.zeros_like(size), where=last > 0)[:, None]
        direction += residual
    return new


def _find_mask(
    layer: Layer, sparsity: float, pattern: Pattern, iterations: int, rho: float, damping: float
) -> Mask:
    """The support to which growing penalties converge; `layer` is scaled."""
    dtype: Any = np.float64 if layer.weights.dtype == np.float64 else np.float32
    shape, w = layer.weights.shape, np.where(layer.live, layer.matrix, 0).astype(dtype)
    mask = select(w.reshape(shape), sparsity, pattern, norm=2, name=layer.name)
    if w.size == 0 or mask.count in (0, mask.size):
        return mask
    values, vectors = np.linalg.eigh(layer.gram)
    values, vectors = np.maximum(values, 0).astype(dtype) + dtype(damping), vectors.astype(dtype)
    target = ((w @ vectors) * values) @ vectors.T
    begin, restarts = rho, 0
    sparse, dual, earlier = w, np.zeros_like(w), None
    for iteration in range(1, iterations + 1):
        new = ((target - dual + dtype(rho) * sparse) @ vectors / (values + dtype(rho))) @ vectors.T
        wanted = new + dual / dtype(rho)
        mask = select(wanted.reshape(shape), sparsity, pattern, norm=2, name=layer.name)
        sparse = mask.apply(wanted.reshape(shape)).reshape(w.shape)
        dual += dtype(rho) * (new - sparse)
        if iteration % 3:
            continue
        changed = mask.size if earlier is None else _differ(mask, earlier).count
        earlier = mask
        if changed > 0.1 * mask.count:
            rho *= 1.3
        elif changed > 0.005 * mask.count:
            rho *= 1.2
        elif changed:
            rho *= 1.1
        elif rho == 1.3 * begin and restarts < _RESTARTS:
            restarts += 1
            rho = begin = begin / 5
            sparse, dual, earlier = w, np.zeros_like(w), None
        else:
            break
    return mask


def _differ(a: Mask, b: Mask) -> Mask:
    return (a & ~b) | (b & ~a)
