"""The data that scorers need besides the weights, by tensor name: checks whose errors name the scorer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsam.inputs.checks import expected
from sparsam.statistics import InputStatistics

Value = TypeVar("Value")


def check_mapping(scorer: object, what: str, value: object, content: str) -> None:
    """Raises ValueError for anything but a mapping."""
    if not isinstance(value, Mapping):
        kind = type(scorer).__name__
        raise ValueError(
            expected(
                f"{kind}: {what}", value, f"a mapping from tensor names to {content}", "pass {name: value}"
            )
        )


def _entry(scorer: object, what: str, data: Mapping[str, Value], name: str) -> Value:
    if name not in data:
        msg = (
            f"{type(scorer).__name__}: {what}: expected an entry for tensor {name!r}; got {list(data)[:5]!r}"
            f"{' and others' if len(data) > 5 else ''}; add it, or exclude the tensor"
        )
        raise ValueError(msg)
    return data[name]


def array_for(
    scorer: object, what: str, data: Mapping[str, ArrayLike], name: str, weights: NDArray[Any]
) -> NDArray[np.float64]:
    """Returns the entry of `data` for a tensor, in its shape, as float64."""
    array = to_numbers(scorer, what, name, _entry(scorer, what, data, name))
    if array.shape != weights.shape:
        msg = (
            f"{type(scorer).__name__}: {what} of tensor {name!r}: expected the shape of the tensor, "
            f"{weights.shape}; got {array.shape}; compute it for this tensor"
        )
        raise ValueError(msg)
    return array


def to_numbers(scorer: object, what: str, name: str, value: ArrayLike) -> NDArray[np.float64]:
    """Returns the value as float64; ValueError unless it consists of finite real numbers."""
    array = np.asarray(value)
    subject = f"{type(scorer).__name__}: {what} of tensor {name!r}"
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise ValueError(
            expected(f"{subject}: dtype", str(array.dtype), "real numbers", "convert it with .astype()")
        )
    numbers = array.astype(np.float64)
    refuse_not_finite(subject, numbers)
    return numbers


def refuse_not_finite(subject: str, numbers: NDArray[np.float64]) -> None:
    """Raises ValueError for NaN and infinities."""
    finite = np.isfinite(numbers)
    if not finite.all():
        at = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(
            expected(
                subject,
                float(numbers[at]),
                f"a finite number at index {at}",
                "correct them, or exclude the tensor",
            )
        )


def input_rms(
    scorer: object, data: Mapping[str, InputStatistics], name: str, weights: NDArray[Any]
) -> NDArray[np.float64]:
    """Returns the root mean square of each input of a tensor: one for each column of its matrix."""
    kind = type(scorer).__name__
    statistics = _entry(scorer, "statistics", data, name)
    if not isinstance(statistics, InputStatistics):
        raise ValueError(
            expected(
                f"{kind}: statistics of tensor {name!r}",
                statistics,
                "InputStatistics",
                "pass InputStatistics(in_features).update(x)",
            )
        )
    if weights.ndim < 2:
        msg = (
            f"{kind}: tensor {name!r}: expected shape (out, in) or (out, in, kh, kw); got {weights.shape}; "
            "exclude it, or score it by another method"
        )
        raise ValueError(msg)
    columns = math.prod(weights.shape[1:])
    if columns != statistics.in_features:
        msg = (
            f"{kind}: statistics of tensor {name!r}: expected those of {columns} inputs for its shape "
            f"{weights.shape}; got {statistics.in_features}; list the tensor in transposed if it is (in, out)"
        )
        raise ValueError(msg)
    if statistics.count == 0:
        msg = f"{kind}: statistics of tensor {name!r}: expected some inputs; got none; call update(x) first"
        raise ValueError(msg)
    return statistics.rms
