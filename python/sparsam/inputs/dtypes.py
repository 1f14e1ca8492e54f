"""The dtypes of weights that the kernels take."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES = ("float16", "bfloat16", "float32", "float64")


def is_weight_dtype(dtype: np.dtype[Any]) -> bool:
    """Whether the kernels take it: float16, bfloat16, float32 or float64 in native byte order."""
    return dtype.isnative and (
        (dtype.kind == "f" and dtype.itemsize in (2, 4, 8)) or dtype.name == "bfloat16"
    )


def check_dtype(name: str, array: NDArray[Any]) -> None:
    """Raises TypeError with the tensor's name for dtypes that the kernels do not accept."""
    if not is_weight_dtype(array.dtype):
        msg = (
            f"tensor {name!r}: expected float16, bfloat16, float32 or float64 in native byte order; got "
            f"{array.dtype}; convert it with .astype()"
        )
        raise TypeError(msg)
