"""Shared by all methods: a layer's matrix, the moments of its inputs, and the error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsam.inputs.checks import array_of, expected, is_number, to_array
from sparsam.inputs.dtypes import is_weight_dtype
from sparsam.inputs.float_mode import standard_floats
from sparsam.masks import Mask
from sparsam.patterns import Pattern


class HasGram(Protocol):
    """Statistics of inputs, as `InputStatistics`: `gram` is the sum or mean of x x^T, (in, in)."""

    @property
    def gram(self) -> NDArray[Any]:
        """The sum or mean of x x^T."""


Moments: TypeAlias = ArrayLike | HasGram


@dataclass(frozen=True)
class Reconstruction:
    """What `obs` and `admm` return.

    Attributes:
        weights: In the shape and dtype of the given weights, 0 where pruned.
        mask: Which weights are kept.
        bias: The corrected bias, in the dtype of the given one; None if none was given.
        damping: The number added to the diagonal of H, relative to its mean.
    """

    weights: NDArray[Any]
    mask: Mask
    bias: NDArray[Any] | None
    damping: float


@dataclass(frozen=True)
class Layer:
    """Checked arguments: `matrix` (out, in) is a new array, `gram` (in, in) float64 may be the caller's.

    `live` (in,): which inputs were ever nonzero, by the diagonal of `gram`.
    """

    name: str
    weights: NDArray[Any]
    matrix: NDArray[Any]
    gram: NDArray[np.float64]
    live: NDArray[np.bool_]

    def finish(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """The matrix in the shape and dtype of the weights; ValueError where it is out of its range."""
        with np.errstate(over="ignore"):
            result = matrix.astype(self.weights.dtype, copy=False).reshape(self.weights.shape)
        if not np.isfinite(result.astype(np.float32) if result.itemsize < 4 else result).all():
            msg = (
                f"tensor {self.name!r}: expected new weights within the range of {self.weights.dtype}; got "
                f"{np.abs(matrix).max():.3g}; raise damping, or pass the weights in a wider dtype"
            )
            raise ValueError(msg)
        return result


def to_layer(weights: ArrayLike, h: Moments, name: str, dtype: Any = np.float64) -> Layer:
    """Checks weights and moments; `dtype` is that of the matrix."""
    array = to_array(name, weights)
    if not is_weight_dtype(array.dtype):
        raise TypeError(_dtype_error(f"tensor {name!r}", array.dtype))
    if array.ndim < 2:
        msg = (
            f"tensor {name!r}: expected a matrix (out, in), or (out, in, ...); got shape {array.shape}; "
            "leave out tensors that no input is multiplied with, such as biases"
        )
        raise ValueError(msg)
    matrix = np.array(array, dtype, order="C").reshape(array.shape[0], math.prod(array.shape[1:]))
    if not np.isfinite(matrix).all():
        row, column = (int(i) for i in np.argwhere(~np.isfinite(matrix))[0])
        at = tuple(int(i) for i in np.unravel_index(row * matrix.shape[1] + column, array.shape))
        msg = f"tensor {name!r}: expected finite weights; got {matrix[row, column]} at index {at}; repair it"
        raise ValueError(msg)
    gram = to_gram(h, matrix.shape[1], name)
    return Layer(name, array, matrix, gram, gram.diagonal() > 0)


def to_gram(h: Moments, inputs: int, name: str) -> NDArray[np.float64]:
    """H as float64 in C order, checked: shape, finite, symmetric, no negative diagonal."""
    what = f"h for tensor {name!r}"
    if getattr(h, "count", None) == 0:
        msg = f"{what}: expected statistics of some inputs; got none; call update(x) first"
        raise ValueError(msg)
    given = array_of(what, _gram(h))
    if given.dtype not in (np.float32, np.float64):
        msg = f"{what}: expected dtype float32 or float64; got {given.dtype}; convert it with .astype()"
        raise TypeError(msg)
    if given.shape != (inputs, inputs):
        msg = (
            f"{what}: expected shape {(inputs, inputs)}, the sum of x x^T over its inputs; got "
            f"{given.shape}; pass statistics of this layer's inputs (of a convolution: its im2col patches)"
        )
        raise ValueError(msg)
    gram = np.ascontiguousarray(given, np.float64)
    if not inputs:
        return gram
    # Products with random signs from both sides show numbers that are not finite, and differ if the matrix is
    # not symmetric.
    signs = np.random.default_rng(0).choice([-1.0, 1.0], inputs)
    with np.errstate(invalid="ignore", over="ignore"):
        down, across = gram @ signs, signs @ gram
    if not np.isfinite(down).all():
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(gram))[0]) if not np.isfinite(gram).all() else ()
        got = f"{gram[at]} at index {at}" if at else "sums beyond float64"
        msg = f"{what}: expected finite numbers; got {got}; leave out the inputs that caused it"
        raise ValueError(msg)
    diagonal = gram.diagonal()
    if (np.abs(down - across) > 1e-4 * math.sqrt(inputs) * np.abs(diagonal).max()).any():
        msg = (
            f"{what}: expected a symmetric matrix; got one that is not; pass the sum or mean of x x^T, both "
            "triangles of it"
        )
        raise ValueError(msg)
    if (diagonal < 0).any():
        at = (int(np.argmax(diagonal < 0)),) * 2
        msg = (
            f"{what}: expected sums of squares, at least 0, on the diagonal; got {gram[at]} at index {at}; "
            "pass InputStatistics.centred where a mean was subtracted"
        )
        raise ValueError(msg)
    return gram


def _gram(h: Moments) -> ArrayLike:
    return h.gram if hasattr(h, "gram") else h


def _dtype_error(what: str, dtype: np.dtype[Any]) -> str:
    return (
        f"{what}: expected dtype float16, bfloat16, float32 or float64 in native byte order; got {dtype}; "
        "convert it with .astype()"
    )


def tolerance(h: Moments, inputs: int) -> float:
    """The share of its diagonal below which a pivot is noise: 4 sqrt(in) times the rounding unit of h."""
    precision = getattr(h, "precision", None)
    if precision is None:
        precision = np.finfo(np.asarray(_gram(h)).dtype).eps
    return float(4 * math.sqrt(inputs) * precision)


def to_keep(mask: Mask, layer: Layer) -> NDArray[np.bool_]:
    """The mask as a new boolean matrix (out, in)."""
    if not isinstance(mask, Mask):
        msg = (
            f"mask for tensor {layer.name!r}: expected a Mask; got {type(mask).__name__}; use "
            "Mask.from_array() or sparsity="
        )
        raise TypeError(msg)
    if mask.shape != layer.weights.shape:
        msg = (
            f"mask for tensor {layer.name!r}: expected shape {layer.weights.shape}; got {mask.shape}; pass "
            "the mask of this tensor"
        )
        raise ValueError(msg)
    return mask.to_array().reshape(layer.matrix.shape)


def mask_and_more(name: str, sparsity: float | None, pattern: Pattern, scope: str = "layer") -> ValueError:
    """The error for a mask that is given together with sparsity, pattern or scope."""
    got = f"sparsity={sparsity!r}, pattern={pattern!r} and scope={scope!r}"
    msg = (
        f"mask for tensor {name!r}: expected it alone, as it says what is kept; got {got} with it; pass the "
        "mask or the others"
    )
    return ValueError(msg)


def neither_mask_nor_sparsity(name: str) -> ValueError:
    """The error for a call with neither mask nor sparsity."""
    return ValueError(f"tensor {name!r}: expected a mask or a sparsity; got neither; pass mask= or sparsity=")


def to_damping(damping: object) -> float:
    """Damping as a float of at least 0."""
    if is_number(damping):
        number = float(damping)
        if 0 <= number < math.inf:
            return number
    raise ValueError(expected("damping", damping, "a finite number of at least 0", "pass 0.01, say"))


def mean_diagonal(layer: Layer) -> float:
    """The mean of H's diagonal over live inputs; 1 if there are none."""
    diagonal = layer.gram.diagonal()[layer.live]
    return float(diagonal.mean()) if diagonal.size else 1.0


def to_mean(h: Moments, mean: ArrayLike | None, inputs: int, name: str) -> NDArray[np.float64]:
    """The mean input: as given, or that of the statistics."""
    found = getattr(h, "mean", None) if mean is None and hasattr(h, "gram") else mean
    if found is None:
        msg = (
            f"mean for tensor {name!r}: expected the mean of the inputs, which the bias needs; got None; "
            "pass mean=, or InputStatistics for h, or leave bias out"
        )
        raise ValueError(msg)
    return _to_mean(f"mean for tensor {name!r}", found, inputs)


def _to_mean(what: str, mean: ArrayLike, inputs: int) -> NDArray[np.float64]:
    values = to_floats(what, mean)
    if values.shape != (inputs,):
        msg = (
            f"{what}: expected shape ({inputs},), one number per input; got {values.shape}; pass "
            "x.mean(axis=0)"
        )
        raise ValueError(msg)
    if not np.isfinite(values).all():
        at = int(np.argmin(np.isfinite(values)))
        msg = (
            f"{what}: expected finite numbers; got {values[at]} at index {at}; leave out the inputs that "
            "caused it"
        )
        raise ValueError(msg)
    return values


def to_floats(what: str, value: ArrayLike) -> NDArray[np.float64]:
    """The value as a float64 array; TypeError unless it consists of real numbers."""
    given = array_of(what, value)
    if not is_weight_dtype(given.dtype) and given.dtype.kind not in "iuf":
        raise TypeError(_dtype_error(what, given.dtype))
    return given.astype(np.float64)


@standard_floats
def corrected_bias(bias: ArrayLike, w: ArrayLike, w_new: ArrayLike, mean: ArrayLike) -> NDArray[Any]:
    """The bias that keeps the mean output unchanged: b' = b + (W - W') mean(x).

    It removes the mean from the error, whichever method computed W'. The remaining error is that with H
    centred: with `statistics.centred` as h, a method minimises the part that the bias cannot correct.

    Args:
        bias: (out,); float16, bfloat16, float32 or float64.
        w: Weights before, (out, in) or (out, in, ...).
        w_new: Weights after, of the same shape.
        mean: The mean input, (in,); of a convolution that of its im2col patches.

    Returns:
        A new array of the dtype of `bias`; sums are float64.

    Raises:
        ValueError: Shapes that do not fit together, or numbers that are not finite.
        TypeError: Another dtype.
    """
    old, new, array = to_floats("w", w), to_floats("w_new", w_new), array_of("bias", bias)
    if not is_weight_dtype(array.dtype):
        raise TypeError(_dtype_error("bias", array.dtype))
    if old.ndim < 2 or old.shape != new.shape or array.shape != old.shape[:1]:
        msg = (
            "bias, w and w_new: expected shapes (out,), and twice (out, in) or (out, in, ...); got "
            f"{array.shape}, {old.shape} and {new.shape}; pass the weights before and after, and their bias"
        )
        raise ValueError(msg)
    difference = (old - new).reshape(old.shape[0], math.prod(old.shape[1:]))
    result = array.astype(np.float64) + difference @ _to_mean("mean", mean, difference.shape[1])
    if not np.isfinite(result).all():
        at = int(np.argmin(np.isfinite(result)))
        msg = (
            f"bias, w and w_new: expected finite numbers; got a correction of {result[at]} for output {at}; "
            "repair that row"
        )
        raise ValueError(msg)
    return result.astype(array.dtype)


@standard_floats
def reconstruction_error(w: ArrayLike, w_new: ArrayLike, h: Moments) -> float:
    """The layer-wise error of new weights: tr(D H D^T) / tr(W H W^T) with D = W - W'.

    The squared change of the outputs relative to their squared norm: 0 for no change, 1 if all weights are 0.

    Args:
        w: Weights before, (out, in) or (out, in, ...); float16, bfloat16, float32 or float64.
        w_new: Weights after, of the same shape.
        h: The sum or mean of x x^T, (in, in), float32 or float64; or an object that has it as `gram`.

    Returns:
        The ratio, at least 0, in float64; 0 where both are 0, infinite where only the denominator is.

    Raises:
        ValueError: Shapes that do not fit together, numbers that are not finite, an h that is not symmetric.
        TypeError: Another dtype.
    """
    old = to_layer(w, h, "w")
    new = to_layer(w_new, old.gram, "w_new")
    if old.weights.shape != new.weights.shape:
        msg = (
            f"w_new: expected the shape of w, {old.weights.shape}; got {new.weights.shape}; pass the new "
            "weights of the same layer"
        )
        raise ValueError(msg)
    error = quadratic(old.matrix - new.matrix, old.gram)
    energy = quadratic(old.matrix, old.gram)
    if energy > 0:
        return error / energy
    return math.inf if error > 0 else 0.0


def quadratic(d: NDArray[np.float64], gram: NDArray[np.float64]) -> float:
    """tr(D H D^T), at least 0."""
    return max(float(np.vdot(d @ gram, d)), 0.0)
