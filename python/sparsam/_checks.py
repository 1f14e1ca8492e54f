"""What every stage checks its arguments with: the value back, or the error that names it."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any, TypeVar

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
