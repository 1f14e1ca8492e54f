"""Checks of the results of the caller's functions: scores are numbers, weights keep names and shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sparsam.masks import Mask
from sparsam.selection import _refuse_nan

Arrays: TypeAlias = dict[str, NDArray[Any]]
Masks: TypeAlias = dict[str, Mask]


def evaluate(eval_fn: Callable[[Arrays], float], arrays: Mapping[str, NDArray[Any]]) -> float:
    """Returns the score of a copy of the arrays.

    Raises:
        TypeError: `eval_fn` did not return a number.
    """
    score = eval_fn({name: array.copy() for name, array in arrays.items()})
    try:
        return float(score)
    except (TypeError, ValueError) as error:
        msg = f"eval_fn: expected a number; got {score!r}; return the score as a float"
        raise TypeError(msg) from error


def evaluate_finite(
    eval_fn: Callable[[Arrays], float], arrays: Mapping[str, NDArray[Any]], what: str
) -> float:
    """`evaluate`, which refuses NaN; `what` says in the ValueError which weights were evaluated."""
    score = evaluate(eval_fn, arrays)
    if math.isnan(score):
        msg = f"{what}: expected a score from eval_fn; got NaN, which compares with none; return a number"
        raise ValueError(msg)
    return score


def validate_returned_weights(
    by: str, given: Arrays, returned: object, arrays: Arrays, masks: Mapping[str, Mask], where: str = ""
) -> Arrays:
    """Returns the weights from a function, checked and masked, in new arrays.

    Args:
        by: The name of the function, for errors.
        given: The mapping that was passed to it, which is used if it returned None.
        returned: What it returned; tensors missing from it stay as they are in `arrays`.
        arrays: The weights before.
        masks: The masks, whose pruned weights are zeroed again.
        where: The place in the run, for errors.

    Raises:
        ValueError: An unknown name, another shape, or a NaN in a masked tensor.
        TypeError: It is neither a mapping nor None.
    """
    source = given if returned is None else returned
    if not isinstance(source, Mapping):
        msg = (
            f"{by}: expected a mapping from names to arrays, or None; got {source!r}; return the weights, or "
            "change them in place and return None"
        )
        raise TypeError(msg)
    unknown = [name for name in source if name not in arrays]
    if unknown:
        msg = f"{by}: expected only the tensors {list(arrays)!r}; got {unknown!r} too; leave these out"
        raise ValueError(msg)
    accepted = {}
    for name, array in arrays.items():
        value = np.asarray(source.get(name, array))
        if value.shape != array.shape:
            msg = (
                f"{by}: tensor {name!r}: expected shape {array.shape}; got {value.shape}; return the weights "
                "as they came, at full size"
            )
            raise ValueError(msg)
        accepted[name] = value.astype(array.dtype, copy=value is not array)
        if name in masks:
            masks[name].apply(accepted[name], out=accepted[name])
    _refuse_nan([accepted[name] for name in masks], list(masks), by=f"{by}{where}: ")
    return accepted


def sparsity_of(masks: Mapping[str, Mask]) -> float:
    """The share of weights that the masks prune; 0.0 without weights."""
    size = sum(mask.size for mask in masks.values())
    return (size - sum(mask.count for mask in masks.values())) / size if size else 0.0
