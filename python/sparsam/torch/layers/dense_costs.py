"""The costs of PyTorch's dense linear layers, for the cost model; convolutions have none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch.nn import functional

import torch
from sparsam.sparse import calibration
from sparsam.sparse.calibration import Measured
from sparsam.torch.layers.packed_weight import torch_dense

__all__ = ["DTYPES", "calibrate", "measure"]

DTYPES = ("float32", "bfloat16")  # of x and the weight; float16 is taken to cost what float32 does


def calibrate() -> list[Measured]:
    """Measure `torch.nn.functional.linear` on this machine, and keep the costs in the cache directory.

    `PackedTensor.explain` uses them for the time of the dense layer. A fit that other work on the machine
    disturbed is not kept.

    Returns:
        The costs for each of DTYPES, with PyTorch's threads as they are now.
    """
    return [replace(found, stored=calibration.store(found)) for found in map(measure, DTYPES)]


def measure(dtype: str) -> Measured:
    """Times the dense products for a dtype of x and the weight, and fits."""
    with torch.inference_mode():
        return calibration.measure_dense(torch_dense(dtype), partial(_product, dtype))


def _product(dtype: str, w: NDArray[np.float32], x: NDArray[np.float32]) -> Callable[[], object]:
    kind = getattr(torch, dtype)
    return partial(functional.linear, torch.from_numpy(x).to(kind), torch.from_numpy(w).to(kind))
