"""A layer's inputs, weights and errors, and least squares on the inputs themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def moments(inputs: int, samples: int, seed: int = 0, strength: float = 0.9) -> tuple[Matrix, Matrix]:
    """Inputs with a mean, neighbours correlated, and the sum of x x^T."""
    rng = np.random.default_rng(seed)
    mix = strength ** np.abs(np.subtract.outer(np.arange(inputs), np.arange(inputs)))
    x = rng.standard_normal((samples, inputs)) @ mix + rng.standard_normal(inputs)
    return x, x.T @ x


def weights(rows: int, cols: int, seed: int = 1) -> Matrix:
    return np.random.default_rng(seed).standard_normal((rows, cols))


def bare_error(w: NDArray[Any], new: NDArray[Any], x: Matrix) -> float:
    """The relative squared error of the outputs themselves."""
    w, new = (a.astype(np.float64).reshape(len(a), -1) for a in (w, new))
    return float((((w - new) @ x.T) ** 2).sum() / ((w @ x.T) ** 2).sum())
