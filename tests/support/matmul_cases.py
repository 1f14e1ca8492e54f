"""Pruned matrices, inputs, and the bound that products are held to: for the tests of tests/sparse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from sparsam import SparseMatrix
from sparsam.sparse import matmul

KERNELS = matmul.KERNELS
SPARSE = ("bitmask", "panels", "slots")  # kernels of ours, one for each instruction set
VALUES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
EPS = float(np.finfo(np.float32).eps)

ORACLES: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "relu": lambda z: np.maximum(z, 0),
    "gelu": lambda z: 0.5 * z * (1 + np.vectorize(math.erf, otypes=[float])(z / math.sqrt(2))),
    "gelu_tanh": lambda z: 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "silu": lambda z: z / (1 + np.exp(-z)),
}


def weights(rows: int, cols: int, sparsity: float, seed: int = 0, dtype: Any = np.float32) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, cols), dtype=np.float32)
    w[rng.random(w.shape) < sparsity] = 0
    return w.astype(dtype)


def inputs(*shape: int, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def fixed(w: NDArray[Any], kernel: str, *batches: int) -> SparseMatrix:
    """The matrix, told to use one kernel for these batches."""
    matrix = SparseMatrix.from_dense(w)
    for batch in batches:
        matrix.prepare(batch, kernel=kernel)
    return matrix


def check(
    y: NDArray[Any],
    w: NDArray[Any],
    x: NDArray[Any],
    bias: NDArray[Any] | None = None,
    activation: str | None = None,
) -> None:
    """Against float64: each of a row's nnz additions (and the bias's) rounds once, in float32.

    With u = eps / 2, a sum of n products in any order is off by at most n u / (1 - n u) times the sum of
    their magnitudes. Activations have slopes below 1.13, and are good to some eps of the larger of argument
    and result.
    """
    x64, w64 = x.astype(np.float64), w.astype(np.float64)
    exact = x64 @ w64.T
    size = np.abs(x64) @ np.abs(w64).T
    if bias is not None:
        exact += bias.astype(np.float64)
        size += np.abs(bias.astype(np.float64))
    bound = ((w != 0).sum(axis=1) + 2) * EPS / 2 * size + np.finfo(np.float32).tiny
    if activation is not None:
        result = ORACLES[activation](exact)
        bound = 1.13 * bound + 8 * EPS * np.maximum(np.abs(exact), np.abs(result))
        exact = result
    assert y.dtype == np.float32
    assert y.shape == exact.shape
    assert (np.abs(y - exact) <= bound).all(), float((np.abs(y - exact) / bound).max())
