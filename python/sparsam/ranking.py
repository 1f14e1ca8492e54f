"""Scores for selection: computed by a method and checked, and adjusted so that pruned weights stay pruned."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam.config import Scorer
from sparsam.inputs.dtypes import DTYPES
from sparsam.masks import Mask
from sparsam.orientation import as_stored, outputs_first
from sparsam.scores import traits


def score_tensor(
    method: Scorer, name: str, tensor: NDArray[Any], *, transposed: bool = False
) -> NDArray[Any]:
    """Returns the scores of a tensor, after checking their shape, dtype and sign.

    A `transposed` tensor is passed as (out, in) if the method needs that; its scores are returned as it is
    stored.
    """
    if transposed and traits(method).needs_rows_as_outputs:
        ranked = as_stored(np.asarray(method.score(name, outputs_first(tensor))))
    else:
        ranked = np.asarray(method.score(name, tensor))
    if ranked is tensor:
        return tensor
    if ranked.shape != tensor.shape or ranked.dtype.name not in DTYPES:
        msg = (
            f"tensor {name!r}: expected scores of shape {tensor.shape} and one of the dtypes "
            f"{', '.join(DTYPES)} from {method!r}; got shape {ranked.shape} and dtype {ranked.dtype}; return "
            "a score for each weight"
        )
        raise ValueError(msg)
    if not traits(method).ranks_by_magnitude and (ranked < 0).any():
        msg = (
            f"tensor {name!r}: expected scores of at least 0 from {method!r}; got {ranked.min()}; shift "
            "them, or set ranks_by_magnitude"
        )
        raise ValueError(msg)
    return ranked


def pruned_last(ranked: NDArray[Any], previous: Mask, norm: int) -> NDArray[np.float64]:
    """Returns scores in which a kept zero ranks above pruned weights, so that ties at zero revive nothing.

    A kept zero scores the smallest positive float64, or its square root where groups sum up squares.
    """
    keep = previous.to_array()
    least = 2.0 ** (-1074 if norm == 1 else -537)
    return np.where(keep, np.maximum(np.abs(ranked.astype(np.float64)), least), 0.0)
