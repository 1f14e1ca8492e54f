"""What a module returns: rows, or a tuple or an output of transformers with these and constants."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["Named", "Value", "buffers", "build", "describe", "renamed"]

Constant = bool | int | float | str | None


@dataclasses.dataclass(frozen=True)
class Value:
    """A constant."""

    value: Constant


@dataclasses.dataclass(frozen=True)
class Named:
    """A dataclass that is a mapping too, as the outputs of transformers are.

    Attributes:
        kind: The class.
        fields: Name and description of each field.
    """

    kind: type[Any]
    fields: tuple[tuple[str, Any], ...]


def describe(returned: Any, leaf: Callable[[Tensor], int]) -> Any:
    """A buffer, a `Value`, a `Named`, or a tuple of these.

    Args:
        returned: What the module returned.
        leaf: The buffer of a tensor.

    Raises:
        TypeError: It is something else.
    """
    if isinstance(returned, Tensor):
        return leaf(returned)
    if returned is None or type(returned) in {bool, int, float, str}:
        return Value(returned)
    if type(returned) is tuple:
        return tuple(describe(one, leaf) for one in returned)
    if dataclasses.is_dataclass(returned) and isinstance(returned, OrderedDict):
        names = [field.name for field in dataclasses.fields(returned)]
        found = ((name, getattr(returned, name)) for name in names)
        return Named(type(returned), tuple((n, describe(one, leaf)) for n, one in found if one is not None))
    msg = f"result: expected tensors and tuples of them; got a {type(returned).__name__}; leave it as it is"
    raise TypeError(msg)


def buffers(described: Any) -> Iterator[int]:
    """The buffers in a description."""
    if type(described) is int:
        yield described
    elif isinstance(described, tuple):
        for one in described:
            yield from buffers(one)
    elif isinstance(described, Named):
        for _, one in described.fields:
            yield from buffers(one)


def renamed(described: Any, numbers: Mapping[int, int]) -> Any:
    """A description with other numbers of its buffers."""
    if type(described) is int:
        return numbers[described]
    if isinstance(described, tuple):
        return tuple(renamed(one, numbers) for one in described)
    if isinstance(described, Named):
        return Named(described.kind, tuple((name, renamed(one, numbers)) for name, one in described.fields))
    return described


def build(described: Any, made: Mapping[int, Tensor]) -> Any:
    """What is described, with these tensors."""
    if type(described) is int:
        return made[described]
    if isinstance(described, tuple):
        return tuple(build(one, made) for one in described)
    if isinstance(described, Named):
        return described.kind(**{name: build(one, made) for name, one in described.fields})
    return described.value
