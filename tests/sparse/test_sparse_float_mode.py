"""Packing does not depend on the caller's floating-point mode: what is not zero stays, rounded to nearest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from float_modes import partly_subnormal, same_in_both, subnormal_only
from sparsam import SparseMatrix, select

WEIGHTS = {
    "float32": partly_subnormal((40, 96)),
    "float64": partly_subnormal((40, 96), "float64"),
    "subnormal in float32": subnormal_only((40, 96)).astype(np.float64),
    "scales near the least normal number": (
        1e-37 * np.random.default_rng(0).standard_normal((40, 96))
    ).astype(np.float32),
}


@pytest.mark.parametrize("w", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "int4"])
def test_packed_values(w: Any, dtype: str) -> None:
    mask = select(w, 0.3)

    def packed() -> list[Any]:
        matrices = [SparseMatrix.from_dense(w, dtype=dtype), SparseMatrix.from_mask(w, mask, dtype=dtype)]
        return [value for one in matrices for value in (one.nnz, one.to_dense(), one.T.to_dense())]

    same_in_both(packed)


def test_scipy() -> None:
    pytest.importorskip("scipy")
    matrix = SparseMatrix.from_dense(subnormal_only((30, 50)))
    csr = matrix.to_scipy()

    def converted() -> list[Any]:
        there = matrix.to_scipy()
        return [there.data, there.indices, SparseMatrix.from_scipy(csr).to_dense()]

    same_in_both(converted)
