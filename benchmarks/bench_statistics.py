"""Second moments of a layer's inputs beside one float64 product: `pytest benchmarks/bench_statistics.py`.

1024 inputs of 8192 float32 features, added to statistics that exist. The peer is what a user would write,
H += X^T X in float64. SPARSAM_BENCH_MAX caps the number of inputs' elements, for CI.
"""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from sparsam import InputStatistics

LIMIT = int(os.environ.get("SPARSAM_BENCH_MAX", "100_000_000"))
FEATURES = min(8192, math.isqrt(8 * LIMIT))
ROWS = FEATURES // 8


def inputs() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((ROWS, FEATURES), dtype=np.float32)


@pytest.mark.benchmark(group="second moments")
@pytest.mark.parametrize("how", ["sparsam", "numpy float64"])
def test_second_moments(benchmark: BenchmarkFixture, how: str) -> None:
    x = inputs()
    statistics = InputStatistics(FEATURES)
    gram, count = np.zeros((FEATURES, FEATURES)), 0

    def numpy() -> None:
        nonlocal gram, count
        wide = x.astype(np.float64)
        gram, count = wide.T @ wide + gram, count + ROWS

    benchmark((lambda: statistics.update(x)) if how == "sparsam" else numpy)
    got = statistics.gram / statistics.count if how == "sparsam" else gram / count
    some = x[:, :100].astype(np.float64)
    np.testing.assert_allclose(got[:100, :100], some.T @ some / ROWS, atol=1e-5)
