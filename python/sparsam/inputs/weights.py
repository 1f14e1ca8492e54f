"""Checks of a caller's weights beyond shape and dtype."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam.inputs.tensors import is_tensor

__all__ = ["check_writeable", "warn_of_flags"]


def warn_of_flags(arrays: Mapping[str, NDArray[Any]], names: Collection[str], *, stacklevel: int) -> None:
    """Warns of tensors that hold only zeros and ones, such as attention masks: probably not weights."""
    for name in names:
        array = arrays[name]
        if array.ndim < 2 or not array.size or array.item(0) not in {0.0, 1.0}:
            continue
        ones = np.count_nonzero(array == 1)
        if 0 < ones < array.size and ones == np.count_nonzero(array):
            msg = (
                f"tensor {name!r}: expected weights; got zeros and ones only, as in an attention mask; "
                "exclude it if it is a buffer"
            )
            warnings.warn(msg, UserWarning, stacklevel=stacklevel + 1)


def check_writeable(name: str, value: object, array: NDArray[Any]) -> None:
    """Raises ValueError for a tensor that cannot be pruned in place."""
    if not (isinstance(value, np.ndarray) or is_tensor(value)):
        got = f"one of type {type(value).__name__}"
    elif not array.flags.writeable:
        got = "one that is read-only"
    elif any(stride == 0 and length > 1 for stride, length in zip(array.strides, array.shape, strict=True)):
        got = "one that is expanded, whose elements share memory"
    else:
        return
    msg = (
        f"tensor {name!r}: expected a writeable array with inplace=True; got {got}; pass a copy, or leave "
        "inplace out"
    )
    raise ValueError(msg)
