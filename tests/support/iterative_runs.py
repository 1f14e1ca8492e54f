"""What an iterative run of the tests gives: a score of its weights, and its history without masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam.masks import Mask
from sparsam.training.iterative import HistoryRow

Arrays = dict[str, NDArray[Any]]


Masks = dict[str, Mask]


def kept(arrays: Mapping[str, NDArray[Any]]) -> float:
    """A score: the share of weights that are not zero."""
    return sum(np.count_nonzero(a) for a in arrays.values()) / sum(a.size for a in arrays.values())


def outcome(rows: list[HistoryRow]) -> list[tuple[int, float, float]]:
    return [row[:3] for row in rows]
