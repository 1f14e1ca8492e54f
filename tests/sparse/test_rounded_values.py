"""What int8 and int4 values have in common, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from matmul_cases import inputs, weights
from rounded_matmul import F32, ROWS, grid_of, int4_product, int8_product, rounded, row
from sparsam import SparseMatrix

DTYPES = ("int8", "int4")


@pytest.fixture(params=ROWS, ids="-".join)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every row of kernels for int8 values."""
    with row(*request.param):
        yield request.param[1]


def product(
    matrix: SparseMatrix, w: NDArray[Any], x: NDArray[Any], bias: NDArray[Any]
) -> NDArray[np.float32]:
    """The exact product with a matrix that was rounded from w."""
    if matrix.dtype == np.int8:
        return int8_product(*rounded(w), x, bias)
    return int4_product(*grid_of(matrix), x, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_very_different_lengths(isa: str, dtype: str) -> None:
    """They are sorted, and results return to their places."""
    rng = np.random.default_rng(0)
    w = inputs(301, 400) * (rng.random((301, 400)) < rng.random((301, 1)) ** 4)
    matrix = SparseMatrix.from_dense(w.astype(F32), dtype=dtype)
    bias = inputs(301, seed=5)
    for batch in (1, 12):
        x = inputs(batch, 400)
        assert np.array_equal(matrix.linear(x, bias), product(matrix, w, x, bias))
    assert np.array_equal(matrix.to_dense(), SparseMatrix.from_dense(matrix.to_dense()).to_dense())


@pytest.mark.parametrize("columns", [64, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_rows_of_x(isa: str, dtype: str, columns: int) -> None:
    w, bias = weights(20, columns, 0.5), inputs(20, seed=3)
    matrix = SparseMatrix.from_dense(w, dtype=dtype)
    x = inputs(7, columns)
    x[1, 63] = np.inf
    x[2, 0] = np.nan
    x[3] = 0
    x[4] *= F32(1e-30)
    x[5] *= F32(1e37)
    x[6] *= F32(1e-35)
    y = matrix.linear(x, bias)
    assert np.isnan(y[1:3]).all()
    good = [0, 3, 4, 5, 6]
    assert np.array_equal(y[good], product(matrix, w, x[good], bias))
    assert np.array_equal(y[3], bias)
    assert np.array_equal(y[6], bias)
