"""The cache of keys and values between the steps of a decoder layer: how it is updated, and examples."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Argument", "Cut", "ExampleCache", "describe", "is_cache", "named", "rebuild"]

_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Argument:
    """An argument of the layer that it hands on to the cache.

    Attributes:
        number: Its number.
    """

    number: int


@dataclass(frozen=True)
class Cut:
    """What is between the steps before the cache is updated and those after it.

    Attributes:
        cache: The number of the argument that is the cache.
        angles: The number of the argument that is the pair of cosines and sines; -1 for none.
        cosines: The buffer of the cosines; -1 for none.
        sines: The buffer of the sines; -1 for none.
        keys: The buffer of the new keys.
        values: The buffer of the new values.
        heads: The number of heads of keys and of values.
        args: What `update` gets after these: constants, an `Argument`, and tuples of these.
        kwargs: The same by name.
    """

    cache: int
    angles: int
    cosines: int
    sines: int
    keys: int
    values: int
    heads: int
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class _Names:
    """A mapping of names."""

    items: tuple[tuple[str, Any], ...]


class ExampleCache:
    """A cache that always has the same three positions before the new one."""

    past = 3

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All keys and values."""
        random = torch.Generator().manual_seed(0)
        size = (*keys.shape[:2], self.past, keys.shape[3])
        before = (torch.randn(size, generator=random, device="cpu") for _ in range(2))
        found = tuple(torch.cat((old, new), dim=2) for old, new in zip(before, (keys, values), strict=True))
        return found[0], found[1]


def is_cache(value: Any) -> bool:
    """Whether it is a cache of transformers, or an example of one."""
    module = sys.modules.get("transformers.cache_utils")
    kinds = (ExampleCache,) if module is None else (ExampleCache, module.Cache)
    return isinstance(value, kinds)


def describe(value: Any, arguments: Sequence[Any]) -> Any:
    """What `rebuild` makes the value of, for the arguments of another call.

    Raises:
        TypeError: It is neither an argument nor a constant, nor made of these.
    """
    for i, one in enumerate(arguments):
        if one is value and not isinstance(value, _PLAIN):
            return Argument(i)
    if type(value) in _PLAIN:
        return value
    if type(value) is tuple:
        return tuple(describe(one, arguments) for one in value)
    if type(value) is dict and all(type(name) is str for name in value):
        return _Names(tuple((name, describe(one, arguments)) for name, one in value.items()))
    msg = f"cache: expected arguments and constants; got a {type(value).__name__}; leave the layer as it is"
    raise TypeError(msg)


def rebuild(described: Any, arguments: Sequence[Any]) -> Any:
    """The value for these arguments."""
    kind = type(described)
    if kind is Argument:
        return arguments[described.number]
    if kind is tuple:
        return tuple(rebuild(one, arguments) for one in described)
    if kind is _Names:
        return {name: rebuild(one, arguments) for name, one in described.items}
    return described


def named(described: Mapping[str, Any], arguments: Sequence[Any]) -> tuple[tuple[str, Any], ...]:
    """A description of keyword arguments."""
    return tuple((name, describe(one, arguments)) for name, one in described.items())
