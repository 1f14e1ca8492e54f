"""Evaluation functions and configurations that the tests of sensitivity sweeps share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import network
from sparsam.training.callbacks import Arrays

MATRICES = ("in.weight", "mid.weight", "out.weight")
GRID = (0.25, 0.5, 0.75, 0.9)
TENTHS = tuple(i / 10 for i in range(1, 10))


def by_hand(tensors: Arrays, name: str, sparsity: float) -> Arrays:
    """The weights with one tensor's round(s * n) smallest magnitudes zeroed, of equals the later ones."""
    flat = tensors[name].ravel().copy()
    ranked = sorted(range(flat.size), key=lambda i: (abs(float(flat[i])), -i))
    flat[ranked[: round(sparsity * flat.size)]] = 0
    return {**tensors, name: flat.reshape(tensors[name].shape)}


class Counting:
    """An eval_fn that remembers how often it was called, and spoils what it was given."""

    def __init__(self, eval_fn: Callable[[Arrays], float] = network.accuracy) -> None:
        self.eval_fn = eval_fn
        self.calls = 0
        self.dense = 0

    def __call__(self, tensors: Arrays) -> float:
        self.calls += 1
        self.dense += all(np.count_nonzero(tensors[name]) == tensors[name].size for name in MATRICES)
        score = self.eval_fn(tensors)
        for array in tensors.values():
            array[...] = 7
        return score
