"""compressed-tensors' `sparse-bitmask`: a bit for each weight, and the nonzero ones in order.

Written as version 0.14.0.1 of that library does, in `compressors/sparse_compressors/sparse_bitmask.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["PARTS", "dense", "parts", "shape_of", "unpacked"]

PARTS = ("shape", "compressed", "bitmask", "row_offsets")

Arrays = Mapping[str, NDArray[Any]]


def parts(array: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Returns the parts of a tensor of one axis or more; elements equal to 0, or -0.0, are left out."""
    kept = array != 0
    counts = kept.sum(-1, dtype=np.int64)
    return {
        "shape": np.array(array.shape, np.int64),
        "compressed": array[kept],
        "bitmask": np.packbits(kept, axis=-1, bitorder="little"),
        "row_offsets": np.asarray(np.cumsum(counts, 0, dtype=np.int64).reshape(counts.shape) - counts),
    }


def dense(name: str, given: Arrays) -> NDArray[Any]:
    """Returns the dense tensor from its parts.

    Args:
        name: The tensor's name in error messages.
        given: The parts; `row_offsets` follow from the others, and are not used.

    Raises:
        ValueError: The parts do not fit together.
    """
    shape = shape_of(name, given["shape"])
    kept = unpacked(name, given["bitmask"], shape)
    values = given["compressed"]
    if values.ndim != 1 or values.size != np.count_nonzero(kept):
        raise misfit(name, f"{np.count_nonzero(kept)} values", f"{list(values.shape)}")
    array = np.zeros(shape, values.dtype)
    array[kept] = values
    return array


def shape_of(name: str, stored: NDArray[Any]) -> tuple[int, ...]:
    """Returns a shape that is stored as a tensor; ValueError if it cannot be one."""
    shape = tuple(int(length) for length in stored.ravel()) if stored.dtype.kind in "iu" else ()
    if not 1 <= len(shape) <= 32 or min(shape) < 0 or math.prod(shape) >= 1 << 46:
        raise misfit(name, "a shape", f"{stored.ravel()[:8].tolist()}")
    return shape


def unpacked(name: str, bits: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Returns bits as booleans of a shape; ValueError if there are others."""
    wanted = (*shape[:-1], -(-shape[-1] // 8))
    if bits.dtype != np.uint8 or bits.shape != wanted:
        raise misfit(name, f"bits of shape {list(wanted)}", f"{bits.dtype} {list(bits.shape)}")
    whole = np.unpackbits(bits, axis=-1, bitorder="little")
    if whole[..., shape[-1] :].any():
        raise misfit(name, "no bits past the last column", "some")
    return whole[..., : shape[-1]].view(np.bool_)


def misfit(name: str, wanted: str, got: str) -> ValueError:
    """Returns the error of parts that do not fit together."""
    return ValueError(f"tensor {name!r}: expected {wanted}; got {got}; get the file again")
