"""Tensors to share a sparsity out over, and the ways to do it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam import prune
from sparsam.allocation import ERK, OWL, Global
from sparsam.config import ALLOCATIONS, AllocationLike
from sparsam.scores import Random
from sparsam.statistics import InputStatistics

Arrays = dict[str, NDArray[Any]]


def draw(seed: int = 0, **shapes: tuple[int, ...]) -> Arrays:
    """Tensors of different scales, so that global allocations differ from uniform ones."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) * (i + 1) for i, (name, shape) in enumerate(shapes.items())}


NETWORK = draw(conv=(8, 3, 3, 3), fc1=(20, 30), bias=(20,), fc2=(30, 6), head=(2, 6))
WEIGHTS = {name: array for name, array in NETWORK.items() if array.ndim > 1}


def seen(weights: Arrays) -> dict[str, InputStatistics]:
    rng = np.random.default_rng(3)
    sizes = {name: array[0].size for name, array in weights.items()}
    return {name: InputStatistics(n).update(rng.exponential(size=(9, n))) for name, n in sizes.items()}


METHODS: list[AllocationLike] = [
    *ALLOCATIONS,
    ERK(power=0.5, include_kernel=False),
    Global(Random(3)),
    OWL(seen(WEIGHTS), multiple=1.5, spread=0.4),
    {"fc*": 0.5},
]


def mask_of_ones(array: NDArray[Any]) -> Any:
    return prune({"w": array}, target_sparsity=0.0).masks["w"]
