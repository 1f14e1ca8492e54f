"""Checks and conversions of the arguments of SparseMatrix."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from sparsam.inputs.checks import expected
from sparsam.sparse.cost_model import Weight
from sparsam.sparse.matmul import ACTIVATIONS, Floats, kernels_of

__all__ = [
    "DTYPES",
    "STORED",
    "Activation",
    "check_activation",
    "check_kernel",
    "check_out",
    "inputs",
    "numbers",
    "vector",
    "weights",
]

Activation: TypeAlias = Literal["relu", "gelu", "gelu_tanh", "silu"]

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
STORED = {**DTYPES, "int8": np.dtype(np.int8), "int4": np.dtype(ml_dtypes.int4)}
_CONVERTED = "float32 (bfloat16, float16 and float64 are converted)"


def weights(w: ArrayLike, dtype: DTypeLike | None) -> NDArray[Any]:
    """A matrix in the dtype that its values will have."""
    w = np.asarray(w)
    if w.ndim != 2:
        msg = f"w: expected a matrix (out, in); got shape {w.shape}; reshape it to (shape[0], -1)"
        raise ValueError(msg)
    if not _is_float(w.dtype):
        msg = f"w: expected dtype float16, bfloat16, float32 or float64; got {w.dtype}; use .astype"
        raise TypeError(msg)
    name = np.dtype(dtype).name if dtype is not None else w.dtype.name
    if dtype is None and name == "float64":
        name = "float32"
    if name not in DTYPES:
        raise TypeError(expected("dtype", dtype, f"one of {', '.join(STORED)}", "pass one of them"))
    return w.astype(DTYPES[name], copy=False)


def inputs(x: ArrayLike, matrix: tuple[int, int]) -> Floats:
    """Returns x (..., in) as float32 in C order, without a copy if it is that already."""
    array = _floats("x", x)
    if array.ndim < 1 or array.shape[-1] != matrix[1]:
        msg = (
            f"x: expected shape (..., {matrix[1]}) for a matrix of shape {matrix}; got {array.shape}; "
            "transpose it, or use another matrix"
        )
        raise ValueError(msg)
    return array


def vector(bias: ArrayLike, matrix: tuple[int, int]) -> Floats:
    """A bias (out,) as float32."""
    array = _floats("bias", bias)
    if array.shape != matrix[:1]:
        msg = (
            f"bias: expected shape {matrix[:1]} for a matrix of shape {matrix}; got {array.shape}; pass one "
            "number for each row of the matrix"
        )
        raise ValueError(msg)
    return array


def check_activation(activation: object) -> None:
    """Raises ValueError for a name that is not one of ACTIVATIONS."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(
            expected("activation", activation, f"None or one of {', '.join(ACTIVATIONS)}", "pass one of them")
        )


def check_kernel(kernel: object, weight: Weight) -> None:
    """Raises ValueError for a name that is not None or one of the kernels of a weight."""
    kernels = kernels_of(weight)
    if kernel is not None and kernel not in kernels:
        msg = f"kernel: expected one of {', '.join(kernels)}; got {kernel!r}; pass one of them, or None"
        raise ValueError(msg)


def numbers(name: str, value: int | Sequence[int], *, at_least: int) -> list[int]:
    """One number or several, such as batches, as a list."""
    found = [operator.index(n) for n in (value if isinstance(value, Sequence) else [value])]
    for number in found:
        if number < at_least:
            msg = f"{name}: expected numbers of at least {at_least}; got {number}; pass numbers of rows of x"
            raise ValueError(msg)
    return found


def check_out(out: NDArray[Any], shape: tuple[int, ...], x: ArrayLike, bias: ArrayLike | None) -> None:
    """Raises where a result of that shape cannot be written into `out` while x and bias are read."""
    if not isinstance(out, np.ndarray) or not _is_float(out.dtype):
        msg = (
            f"out: expected an array of floats; got {getattr(out, 'dtype', type(out).__name__)}; pass "
            "np.empty(shape, dtype)"
        )
        raise TypeError(msg)
    if out.shape != shape:
        msg = f"out: expected shape {shape}; got {out.shape}; pass an array of that shape, or leave it out"
        raise ValueError(msg)
    if not out.flags.writeable:
        msg = "out: expected a writeable array; got a read-only one; pass a copy"
        raise ValueError(msg)
    for name, other in (("x", x), ("bias", bias)):
        if other is None:
            continue
        if np.shares_memory(out, other if type(other) is np.ndarray else np.asarray(other)):
            msg = f"out: expected separate memory; got an overlap with {name}; omit out, or copy {name}"
            raise ValueError(msg)


def _is_float(dtype: np.dtype[Any]) -> bool:
    return (dtype.kind == "f" and dtype.itemsize in {2, 4, 8}) or dtype.name == "bfloat16"


def _floats(name: str, value: ArrayLike) -> Floats:
    """The argument as float32 in C order."""
    array = np.asarray(value)
    if not _is_float(array.dtype):
        msg = f"{name}: expected dtype {_CONVERTED}; got {array.dtype}; convert it with .astype"
        raise TypeError(msg)
    return np.asarray(array, np.float32, order="C")
