"""A small network with functions that other processes can import, for sweeps, searches and tickets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_INPUTS = np.random.default_rng(1).standard_normal((200, 12))


def weights(seed: int = 0) -> dict[str, NDArray[Any]]:
    """Three matrices, a bias, and integers that no configuration prunes."""
    rng = np.random.default_rng(seed)
    return {
        "in.weight": rng.standard_normal((16, 12)).astype(np.float32),
        "in.bias": rng.standard_normal(16).astype(np.float32),
        "mid.weight": rng.standard_normal((8, 16)),
        "out.weight": rng.standard_normal((5, 8)).astype(np.float16),
        "version": np.array([1, 2]),
    }


def outputs(tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """What the network says to 200 fixed inputs, in float64 throughout."""
    w = {name: array.astype(np.float64) for name, array in tensors.items()}
    hidden = np.maximum(_INPUTS @ w["in.weight"].T + w["in.bias"], 0)
    found: NDArray[np.float64] = np.maximum(hidden @ w["mid.weight"].T, 0) @ w["out.weight"].T
    return found


_LABELS = outputs(weights()).argmax(axis=1)


def accuracy(tensors: Mapping[str, NDArray[Any]]) -> float:
    """How often the network says what it says with `weights()`."""
    return float((outputs(tensors).argmax(axis=1) == _LABELS).mean())


def fragile(tensors: Mapping[str, NDArray[Any]]) -> float:
    """`accuracy`, which fails where half or more of mid.weight is gone."""
    if np.count_nonzero(tensors["mid.weight"]) <= 64:
        name = "mid.weight"
        raise Odd(name, 0.5)
    return accuracy(tensors)


class Odd(Exception):
    """An error that does not survive pickling: it is made of two arguments, and keeps one."""

    def __init__(self, name: str, sparsity: float) -> None:
        super().__init__(f"{name} fell below {sparsity}")
