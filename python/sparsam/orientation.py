"""Weights stored as (in, out), viewed as (out, in), to which patterns, rows and inputs refer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sparsam.masks import Mask

Scalar = TypeVar("Scalar", bound=np.generic)


class Weights(dict[str, NDArray[Any]]):
    """Name -> array as stored; `transposed` names those that are (in, out)."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]], transposed: Iterable[str] = ()) -> None:
        super().__init__(arrays)
        self.transposed = frozenset(transposed)

    def outputs_first(self, name: str) -> NDArray[Any]:
        """Returns a view of a tensor as (out, in)."""
        return outputs_first(self[name]) if name in self.transposed else self[name]


def as_weights(arrays: Mapping[str, NDArray[Any]]) -> Weights:
    """Returns the mapping itself if it is `Weights`, else `Weights` with nothing transposed."""
    return arrays if isinstance(arrays, Weights) else Weights(arrays)


def outputs_first(array: NDArray[Scalar]) -> NDArray[Scalar]:
    """Returns a view (out, in) of (in, out), or (out, in, ...) of (..., in, out); of a vector, itself."""
    return array if array.ndim < 2 else np.moveaxis(array, (-1, -2), (0, 1))


def as_stored(array: NDArray[Scalar]) -> NDArray[Scalar]:
    """Returns the view that `outputs_first` was made from."""
    return array if array.ndim < 2 else np.moveaxis(array, (0, 1), (-1, -2))


def mask_outputs_first(mask: Mask) -> Mask:
    """Returns the mask of the view that `outputs_first` returns."""
    return mask if len(mask.shape) < 2 else Mask.from_array(outputs_first(mask.to_array()))


def mask_as_stored(mask: Mask) -> Mask:
    """Returns the mask of the weights as they are stored, from that of the view."""
    return mask if len(mask.shape) < 2 else Mask.from_array(as_stored(mask.to_array()))
