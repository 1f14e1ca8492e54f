"""compressed-tensors' `sparse-24-bitmask`: two of every four weights of a row, and a bit for each weight.

Written as version 0.14.0.1 of that library does, in `compressors/sparse_compressors/sparse_24_bitmask.py`.
Where fewer than two of four are nonzero, it does not define which zeros are stored: here the first ones are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam.checkpoint.exchange.bitmask import misfit, shape_of, unpacked

__all__ = ["PARTS", "dense", "fits", "parts"]

PARTS = ("shape", "compressed", "bitmask")


def fits(array: NDArray[Any]) -> bool:
    """Returns whether a tensor is a matrix of which each aligned four weights of a row have two zeros."""
    if array.ndim != 2 or array.shape[1] % 4 or not array.size:
        return False
    return bool((np.count_nonzero(array.reshape(-1, 4), axis=1) <= 2).all())


def parts(array: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Returns the parts of a matrix that `fits`."""
    kept = (array != 0).reshape(-1, 4)
    # The nonzero ones first, then the zeros, each in order: the first two of those are stored.
    order = np.argsort(~kept, axis=1, kind="stable")[:, :2]
    kept = np.zeros_like(kept)
    np.put_along_axis(kept, order, values=True, axis=1)
    mask = kept.reshape(array.shape)
    rows, cols = array.shape
    return {
        "shape": np.array([[rows], [cols]], np.int64),
        "compressed": array[mask].reshape(rows, cols // 2),
        "bitmask": np.packbits(mask, axis=-1, bitorder="little"),
    }


def dense(name: str, given: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """Returns the dense matrix from its parts; ValueError if they do not fit together."""
    shape = shape_of(name, given["shape"])
    if len(shape) != 2 or shape[1] % 4:
        raise misfit(name, "a matrix of rows of a multiple of four", f"{list(shape)}")
    kept = unpacked(name, given["bitmask"], shape)
    values = given["compressed"]
    if values.shape != (shape[0], shape[1] // 2):
        raise misfit(name, f"values of shape {[shape[0], shape[1] // 2]}", f"{list(values.shape)}")
    if (np.count_nonzero(kept.reshape(-1, 4), axis=1) != 2).any():
        raise misfit(name, "two bits in every four", "others")
    array = np.zeros(shape, values.dtype)
    array[kept] = values.ravel()
    return array
