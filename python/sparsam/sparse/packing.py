"""Packs a matrix of floats with values of the requested dtype."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from sparsam._core import Packed
from sparsam.inputs.float_mode import standard_floats
from sparsam.masks import Mask
from sparsam.sparse.arguments import weights
from sparsam.sparse.int4 import check_no_group, is_int4, pack_int4
from sparsam.sparse.int8 import check_no_scales, is_int8, pack_int8

__all__ = ["pack", "pack_kept"]


@standard_floats
def pack(w: ArrayLike, dtype: DTypeLike | None, scales: ArrayLike | None, group: int | None) -> Packed:
    """Packs the weights that are not 0; arguments as for `SparseMatrix.from_dense`."""
    if not is_int4(dtype):
        check_no_group(group, dtype)
    if is_int8(dtype):
        return pack_int8(w, scales=scales)
    check_no_scales(scales, dtype)
    return pack_int4(w, group=group) if is_int4(dtype) else Packed.pack(weights(w, dtype))


@standard_floats
def pack_kept(w: ArrayLike, mask: Mask | NDArray[np.bool_], dtype: DTypeLike | None) -> Packed:
    """Packs the weights that a mask keeps; arguments as for `SparseMatrix.from_mask`."""
    rounds = is_int8(dtype) or is_int4(dtype)
    values = weights(w, None if rounds else dtype)
    kept = mask if isinstance(mask, Mask) else Mask.from_array(mask)
    if kept.shape != values.shape:
        msg = f"mask: expected shape {values.shape}, as w has; got {kept.shape}; pass the mask of w"
        raise ValueError(msg)
    if not rounds:
        return Packed.from_mask(values, kept._words)
    return pack_int8(values, kept.to_array()) if is_int8(dtype) else pack_int4(values, kept.to_array())
