"""Weights with zeros, and packed weights in one form alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sparsam._core import Packed

FORMS = ("bitmask", "panels")


def weights(rows: int, cols: int, sparsity: float, *, tall: int = 1, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    pattern = np.repeat(rng.random((-(-rows // tall), cols)) >= sparsity, tall, axis=0)[:rows]
    return np.where(pattern, rng.standard_normal((rows, cols), dtype=np.float32), np.float32(0))


def only(packed: Packed, form: str) -> Packed:
    """The weight in that form alone."""
    packed.add(form)
    packed.keep([form])
    assert packed.forms == (form,)
    return packed
