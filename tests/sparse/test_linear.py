"""SparseMatrix.linear: every kernel against float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsam
from matmul_cases import KERNELS, ORACLES, SPARSE, VALUES, check, fixed, inputs, weights
from sparsam import SparseMatrix


@pytest.mark.parametrize("dtype", VALUES)
@pytest.mark.parametrize("kernel", SPARSE)
def test_products_are_exact_to_rounding(isa: str, threads: int, kernel: str, dtype: str) -> None:
    x, bias = inputs(70, 333), inputs(300, seed=2)
    for sparsity in (0.0, 0.5, 0.95, 0.995):
        w = weights(300, 333, sparsity, dtype=VALUES[dtype])
        for batch in (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 70):
            check(fixed(w, kernel, batch).linear(x[:batch], bias), w, x[:batch], bias)


@pytest.mark.parametrize("kernel", SPARSE)
@pytest.mark.parametrize("cols", [0, 1, 2, 7, 8, 9, 31, 63, 64, 65, 127, 129, 255, 257, 513])
def test_sizes_that_no_vector_width_divides(isa: str, kernel: str, cols: int) -> None:
    for rows in (0, 1, 3, 4, 5, 17, 255, 257):
        w = weights(rows, cols, 0.6, seed=rows)
        for batch in (0, 1, 2, 7, 17, 40):
            x = inputs(batch, cols)
            check(fixed(w, kernel, batch).linear(x), w, x)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_no_and_all_nonzeros(isa: str, kernel: str, batch: int) -> None:
    x, bias = inputs(batch, 100), inputs(50, seed=3)
    empty = fixed(np.zeros((50, 100), np.float32), kernel, batch)
    assert (empty.nnz, empty.density, empty.sparsity) == (0, 0.0, 1.0)
    assert np.array_equal(empty.linear(x, bias), np.broadcast_to(bias, (batch, 50)))
    full = weights(50, 100, 0.0)
    matrix = fixed(full, kernel, batch)
    assert (matrix.nnz, matrix.density, matrix.sparsity) == (5000, 1.0, 0.0)
    check(matrix.linear(x, bias), full, x, bias)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(0, 300),
    cols=st.integers(0, 300),
    batch=st.integers(0, 80),
    sparsity=st.floats(0, 1),
    kernel=st.sampled_from(KERNELS),
    dtype=st.sampled_from(sorted(VALUES)),
    activation=st.sampled_from([None, *ORACLES]),
    seed=st.integers(0, 99),
)
def test_any_product(
    rows: int,
    cols: int,
    batch: int,
    sparsity: float,
    kernel: str,
    dtype: str,
    activation: Any,
    seed: int,
) -> None:
    w = weights(rows, cols, sparsity, seed, VALUES[dtype])
    x, bias = inputs(batch, cols, seed=seed), inputs(rows, seed=seed + 1)
    matrix = fixed(w, kernel, batch)
    assert matrix.to_dense().tobytes() == (w + w.dtype.type(0)).tobytes()
    for name in sparsam.available_isas():
        with sparsam.use_isa(name):
            check(matrix.linear(x, bias, activation), w, x, bias, activation)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", VALUES)
@pytest.mark.parametrize("batch", [1, 2, 4, 16, 17, 40])
@pytest.mark.parametrize("blocks", [False, True])
def test_a_pruned_weight_multiplies_nothing(
    isa: str, kernel: str, dtype: str, batch: int, blocks: bool
) -> None:
    w = weights(45, 130, 0.7, dtype=VALUES[dtype])
    if blocks:
        w = np.repeat(w, 4, axis=0)
    x = inputs(batch, 130)
    rng = np.random.default_rng(9)
    for value in (np.inf, -np.inf, np.nan):
        x[rng.random(x.shape) < 0.01] = value
    y = fixed(w, kernel, batch).linear(x)
    for t in range(batch):
        for r in range(len(w)):
            kept = w[r] != 0
            with np.errstate(invalid="ignore"):
                exact = float((x[t, kept].astype(np.float64) * w[r, kept].astype(np.float64)).sum())
            if not math.isfinite(exact):
                assert y[t, r] == exact or (math.isnan(exact) and math.isnan(y[t, r]))
            else:
                assert y[t, r] == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_infinite_and_nan_weights(isa: str, kernel: str) -> None:
    w = np.array([[np.inf, 0, 1], [0, np.nan, 1], [0, 0, 1]], np.float32)
    y = fixed(w, kernel, 1).linear(np.array([[1, 2, 3]], np.float32))
    assert np.array_equal(y, np.array([[np.inf, np.nan, 3]], np.float32), equal_nan=True)
    y = fixed(w, kernel, 1).linear(np.array([[0, 2, 3]], np.float32))
    assert np.array_equal(y, np.array([[np.nan, np.nan, 3]], np.float32), equal_nan=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_numbers_take_the_dense_kernel_nowhere_wrong(kernel: str) -> None:
    w, x = weights(20, 30, 0.5), inputs(3, 30) * np.float32(1e30)  # x^2 overflows
    check(fixed(w, kernel, 3).linear(x), w, x)


def test_minus_zero_is_zero() -> None:
    w = np.array([[-0.0, 1.0], [2.0, -0.0]], np.float32)
    matrix = SparseMatrix.from_dense(w)
    assert matrix.nnz == 2
    assert not np.signbit(matrix.to_dense()).any()
