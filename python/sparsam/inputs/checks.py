"""Checks of arguments for every stage: each returns the value, or raises an error that names it."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any, TypeGuard, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsam.inputs.tensors import is_model, is_tensor, to_numpy

ValueT_co = TypeVar("ValueT_co", covariant=True)


class ReadOnly(Mapping[str, ValueT_co]):
    """A mapping without a way to change it; hashable if its values are."""

    def __init__(self, content: Mapping[str, ValueT_co]) -> None:
        self._content = dict(content)

    def __getitem__(self, key: str) -> ValueT_co:
        return self._content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def __hash__(self) -> int:
        return hash(frozenset(self._content.items()))

    def __repr__(self) -> str:
        return repr(self._content)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number, NaN and infinities too; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_sparsity(what: str, value: object) -> float:
    """Returns `value` as a float in [0, 1], or raises the ValueError that names `what`."""
    if type(value) is float and 0 <= value <= 1:  # The check against an abstract class takes longer.
        return value
    if is_number(value):
        number = float(value)
        if 0 <= number <= 1:
            return number
    do = "pass a fraction such as 0.5, not a percentage"
    raise ValueError(expected(what, value, "a number from 0 (dense) to 1 (all pruned)", do))


def integer(what: str, value: Any) -> int:
    """Returns `value` as an int, or raises the ValueError that names `what`."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(expected(what, value, "an integer", "convert it with int()"))


def positive(what: str, value: object) -> int:
    """Returns `value` as an int of at least 1, or raises the ValueError that names `what`."""
    number = integer(what, value)
    if number < 1:
        raise ValueError(expected(what, value, "an integer of at least 1", "raise it"))
    return number


def check_function(what: str, value: object, *, optional: bool = False) -> None:
    """Raises the TypeError that names `what` for a value that cannot be called; None passes if `optional`."""
    if not callable(value) and not (optional and value is None):
        raise TypeError(expected(what, value, "a function", "pass one"))


def expected(what: str, got: object, wanted: str, do: str) -> str:
    """Returns the one form of an error's message: `what: expected wanted; got 'got'; do`.

    Args:
        what: The argument, tensor, option or file that is wrong, as the user knows it.
        got: What came, shown by its repr. Where the repr is not helpful (an array, a whole mapping), write
            the message as an f-string of the same form, with the relevant shape or name.
        wanted: What is accepted.
        do: What to change, as an imperative.
    """
    return f"{what}: expected {wanted}; got {got!r}; {do}"


def set_fields(instance: object, **fields: object) -> None:
    """Stores checked values on a frozen dataclass."""
    for name, value in fields.items():
        object.__setattr__(instance, name, value)


def to_array(name: str, value: ArrayLike) -> NDArray[Any]:
    """Returns the tensor as a plain array without copying one; integers outside arrays become float64.

    Torch tensors become arrays on their memory.
    """
    return array_of(f"tensor {name!r}", value)


def array_of(what: str, value: ArrayLike) -> NDArray[Any]:
    """Like `to_array`, for a value that is not a named tensor: errors begin with `what`."""
    if type(value) is np.ndarray:
        return value
    if is_tensor(value):
        return to_numpy(what, value)
    if is_model(value):
        msg = (
            f"{what}: expected arrays or tensors by name; got the model {type(value).__name__}; pass its "
            "state_dict(), or use sparsam.torch, which takes models"
        )
        raise TypeError(msg)
    if type(value).__module__.startswith("scipy.sparse"):
        msg = (
            f"{what}: expected a dense array; got scipy.sparse's {type(value).__name__}; convert it "
            "with .toarray()"
        )
        raise TypeError(msg)
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        msg = (
            f"{what}: expected what NumPy can make an array of; got {type(value).__name__} ({error}); pass "
            "an array, a tensor or nested lists of numbers"
        )
        raise ValueError(msg) from error
    if not hasattr(value, "__array__") and array.dtype.kind in "biu":
        return array.astype(np.float64)
    return array


def to_arrays(weights: object, what: str = "weights") -> dict[str, NDArray[Any]]:
    """Returns the values of a mapping from names as plain arrays; TypeError for anything else."""
    if is_model(weights):
        array_of(what, weights)  # type: ignore[arg-type]
    if not isinstance(weights, Mapping):
        got = type(weights).__name__
        msg = f"{what}: expected a mapping from names to arrays; got {got}; pass {{'name': array}}"
        raise TypeError(msg)
    for name in weights:
        if not isinstance(name, str):
            got = f"{name!r} of type {type(name).__name__}"
            msg = f"{what}: expected names as keys; got {got}; convert them with str()"
            raise TypeError(msg)
    return {
        name: value if type(value) is np.ndarray else to_array(name, value) for name, value in weights.items()
    }
