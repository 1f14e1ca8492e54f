"""Weights to prune whose magnitudes all differ."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def untied(*shape: int, seed: int = 0, dtype: Any = np.float32) -> NDArray[Any]:
    """Values whose magnitudes all differ, with random signs."""
    rng = np.random.default_rng(seed)
    n = int(np.prod(shape))
    values = rng.permutation(np.arange(1, n + 1)) * rng.choice([-1, 1], n) / n
    return np.asarray(values.reshape(shape), dtype)


def model() -> dict[str, NDArray[Any]]:
    return {
        "fc1.weight": untied(16, 12, seed=1),
        "fc1.bias": untied(16, seed=2),
        "fc2.weight": untied(4, 16, seed=3) * np.float32(0.1),
        "scale": np.array(2.0, np.float32),
    }


def zeros(array: NDArray[Any]) -> int:
    return int(np.count_nonzero(array == 0))
