"""What every stage checks its arguments with: the value back, or the error that names it."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any


def check_sparsity(what: str, value: object) -> float:
    """Returns `value` as a float in [0, 1], or raises the ValueError that names `what`."""
    if not isinstance(value, bool) and isinstance(value, Real):
        number = float(value)
        if 0 <= number <= 1:
            return number
    raise ValueError(expected(what, value, "a number from 0 (dense) to 1 (all pruned)"))


def integer(what: str, value: Any) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(expected(what, value, "an integer"))


def positive(what: str, value: object) -> int:
    number = integer(what, value)
    if number < 1:
        raise ValueError(expected(what, value, "an integer of at least 1"))
    return number


def expected(what: str, got: object, wanted: str) -> str:
    return f"{what}: expected {wanted}; got {got!r}"


def set_fields(instance: object, **fields: object) -> None:
    """Stores checked values on a frozen dataclass."""
    for name, value in fields.items():
        object.__setattr__(instance, name, value)
