"""The activations of products: against their formulas, far out, and of what is not finite."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from matmul_cases import EPS, KERNELS, ORACLES, check, fixed, inputs, weights
from sparsam._core import Packed


@pytest.mark.parametrize("activation", ORACLES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("batch", [1, 5, 33])
def test_activations(isa: str, kernel: str, activation: Any, batch: int) -> None:
    w = weights(131, 64, 0.5)
    x = inputs(batch, 64) * np.geomspace(1e-3, 3, batch, dtype=np.float32)[:, None]
    bias = inputs(131, seed=5)
    matrix = fixed(w, kernel, batch)
    check(matrix.linear(x, bias, activation), w, x, bias, activation)
    check(matrix.linear(x, activation=activation), w, x, None, activation)


@pytest.mark.parametrize("activation", ORACLES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_activations_far_out(isa: str, kernel: str, activation: str) -> None:
    """Where exp and tanh overflow or vanish, results are still right; NaN stays NaN."""
    z = np.array([[-1e4, -100, -20, -5, -1e-30, 0, 1e-30, 5, 20, 100, 1e4]], np.float32)
    matrix = fixed(np.eye(z.size, dtype=np.float32), kernel, 1)
    with np.errstate(over="ignore"):
        exact = ORACLES[activation](z.astype(np.float64))
    y = matrix.linear(z, activation=activation)  # type: ignore[arg-type]
    assert (np.abs(y - exact) <= 8 * EPS * np.maximum(1, np.abs(z))).all()
    assert np.isnan(matrix.linear(np.full_like(z, np.nan), activation=activation)).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("batch", [1, 5, 40])
@pytest.mark.parametrize("narrow", [False, True])
def test_activations_of_infinities_and_nan(isa: str, kernel: str, batch: int, narrow: bool) -> None:
    """As torch has them: -inf times a gate of 0 is NaN; everywhere in y."""
    special = np.array([-np.inf, np.inf, np.nan, -3e38, 3e38, -1e4, 0.0], np.float32)
    expected: dict[str, list[float]] = {
        "": special.tolist(),
        "relu": [0, np.inf, np.nan, 0, 3e38, 0, 0],
        "gelu": (gated := [np.nan, np.inf, np.nan, 0, 3e38, 0, 0]),
        "gelu_tanh": gated,
        "silu": gated,
    }
    w = np.eye(67, dtype=np.float32)
    x = np.resize(special, (batch, 67))
    for activation, values in expected.items():
        wanted = np.resize(np.array(values, np.float32), (batch, 67))
        if narrow:
            if kernel == "dense":
                continue
            packed = Packed.pack(w)
            packed.add(kernel)
            x16, y16 = x.astype(ml_dtypes.bfloat16), np.empty((batch, 67), ml_dtypes.bfloat16)
            packed.linear_at(kernel, x16.ctypes.data, True, batch, 0, activation, y16.ctypes.data)
            y = y16.astype(np.float32)
        else:
            y = fixed(w, kernel, batch).linear(x, activation=activation or None)  # type: ignore[arg-type]
        np.testing.assert_allclose(y, wanted, rtol=1e-2 if narrow else 1e-6, atol=1e-30)
