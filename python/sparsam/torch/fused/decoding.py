"""The functions of a decoder layer that computes one position: rotary embedding, attention over a cache.

These stand in the place of some of `functions`, for calls with a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.nn import functional

import torch
from sparsam.torch.fused import caching
from sparsam.torch.fused.caching import Cut
from sparsam.torch.fused.calls import Call
from sparsam.torch.fused.functions import UNDERSTOOD
from sparsam.torch.fused.tracing import Rows, Trace, refuse
from sparsam.torch.layers.attention import attend
from torch import Tensor

__all__ = ["DECODING", "Angles", "CacheRecord", "in_order"]


@dataclass(frozen=True)
class Angles:
    """Cosines or sines.

    Attributes:
        buffer: The buffer.
        places: As of `Rows`; all sequences may have those of the first.
    """

    buffer: int
    places: Tensor


@dataclass(frozen=True)
class _Turned:
    """Rows on the way to their rotation.

    Attributes:
        what: "negative" (of some numbers), "half" (turned by a right angle), "cosines" and "sines" (the
            rows, and these turned, times their angles).
        buffer: The buffer of the rows.
        places: Of the numbers, as of `Rows`; of "half" and "sines" those of the rows that are turned.
        angles: The buffer of the angles; -1 where there are none yet.
    """

    what: str
    buffer: int
    places: Tensor
    angles: int = -1


@dataclass(frozen=True)
class _Cached:
    """All keys, or all values.

    Attributes:
        what: "keys" or "values".
    """

    what: str


class CacheRecord:
    """Stands for the cache while a layer is followed, and notes what the layer hands to it."""

    def __init__(self, trace: Trace, call: Call, values: Sequence[Any]) -> None:
        """Notes which arguments are the cache and the angles, and what these are.

        Args:
            trace: What is known.
            call: The form of the call.
            values: All of its arguments.
        """
        kinds = [slot.kind for slot in call.slots]
        if kinds.count("cache") != 1 or kinds.count("angles") > 1:
            refuse("several caches")
        self._trace = trace
        self._cache = kinds.index("cache")
        self._angles = kinds.index("angles") if "angles" in kinds else -1
        self._arguments = [self if i == self._cache else value for i, value in enumerate(values)]
        self._of_angles: list[int] = []
        for one in values[self._angles] if self._angles >= 0 else ():
            self._of_angles.append(trace.buffer(one.shape[-1]))
            trace.know(one, Angles(self._of_angles[-1], torch.arange(one.numel()).view(one.shape)))
        self._new: list[int] = []
        self._heads = 0
        self._args: tuple[Any, ...] = ()
        self._kwargs: tuple[tuple[str, Any], ...] = ()

    def given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of the call with this in the place of the cache."""
        count = len(args)
        return self._arguments[:count], dict(zip(kwargs, self._arguments[count:], strict=True))

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values."""
        with torch._C.DisableTorchFunction():  # what is read here is no part of the layer
            if self._new:
                refuse("two updates of the cache")
            if keys.ndim != 4 or keys.shape != values.shape or keys.shape[2] != 1:
                refuse("keys and values of another shape")
            self._new = [in_order(self._trace, one) for one in (keys, values)]
            self._heads = keys.shape[1]
            self._args = tuple(caching.describe(one, self._arguments) for one in args)
            self._kwargs = caching.named(kwargs, self._arguments)
            found = caching.ExampleCache().update(keys, values)
            for one, what in zip(found, ("keys", "values"), strict=True):
                self._trace.know(one, _Cached(what))
            return found

    def wanted(self) -> list[int]:
        """The buffers of new keys and values."""
        if not self._new or sum(step[0] == "cached" for step in self._trace.steps) != 1:
            refuse("no attention over the cache")
        return self._new

    def cut(self, buffers: Mapping[int, int]) -> Cut:
        """What was noted, with other numbers of buffers."""
        keys, values = (buffers[one] for one in self._new)
        cosines, sines = (buffers.get(one, -1) for one in self._of_angles or (-1, -1))
        return Cut(
            self._cache,
            self._angles,
            cosines,
            sines,
            keys,
            values,
            self._heads,
            self._args,
            self._kwargs,
        )


def in_order(trace: Trace, tensor: Any) -> int:
    """The buffer that a tensor of one position is, all its numbers in order."""
    known = trace.value(tensor)
    if not isinstance(known, Rows) or not torch.equal(
        known.places.reshape(-1), torch.arange(trace.sequences * trace.widths[known.buffer])
    ):
        refuse("heads in another order")
    return known.buffer


def _move(trace: Trace, func: Any, *args: Any, **kwargs: Any) -> Any:
    known: Any = trace.value(args[0])
    if not isinstance(known, Angles):
        return UNDERSTOOD[func](trace, func, *args, **kwargs)
    found = func(*args, **kwargs)
    if not isinstance(found, Tensor):
        refuse("several views of angles")
    return trace.know(found, Angles(known.buffer, func(known.places, *args[1:], **kwargs)))


def _negative(trace: Trace, func: Any, input: Tensor) -> Tensor:
    known: Any = trace.value(input)
    if not isinstance(known, Rows):
        refuse("a negative")
    return trace.know(func(input), _Turned("negative", known.buffer, known.places))


def _cat(trace: Trace, func: Any, tensors: Any, dim: int = 0) -> Tensor:
    """The second half of heads, negative, before the first one."""
    if len(tensors) != 2 or dim not in (-1, tensors[0].ndim - 1):
        refuse("another concatenation")
    second, first = (trace.value(one) for one in tensors)
    if not isinstance(second, _Turned) or second.what != "negative" or not isinstance(first, Rows):
        refuse("another concatenation")
    if second.buffer != first.buffer or second.places.shape != first.places.shape:
        refuse("halves of other rows")
    places = torch.cat((first.places, second.places), -1)
    return trace.know(func(tensors, dim), _Turned("half", first.buffer, places))


def _mul(trace: Trace, func: Any, input: Any, other: Any) -> Any:
    for one, factor in ((input, other), (other, input)):
        known: Any = trace.value(one)
        angles: Any = trace.value(factor)
        if isinstance(angles, Angles) and isinstance(known, (Rows, _Turned)):
            if isinstance(known, _Turned) and known.what != "half":
                refuse("another rotation")
            found = func(input, other)
            _check_angles(trace, known, angles, found)
            what = "cosines" if isinstance(known, Rows) else "sines"
            return trace.know(found, _Turned(what, known.buffer, known.places, angles.buffer))
    return UNDERSTOOD[func](trace, func, input, other)


def _check_angles(trace: Trace, known: Any, angles: Angles, found: Tensor) -> None:
    """Each number of a head is turned by the angle of its column."""
    if found.shape != known.places.shape:
        refuse("more angles than rows")
    depth, width = trace.widths[angles.buffer], trace.widths[known.buffer]
    rows, columns = known.places // width, known.places % width
    turned = angles.places.broadcast_to(found.shape)
    if width % depth or not torch.equal(turned % depth, columns % depth):
        refuse("angles of other columns")
    if angles.places.numel() > depth and not torch.equal(turned // depth, rows):
        refuse("angles of other rows")


def _add(trace: Trace, func: Any, input: Any, other: Any, *, alpha: float = 1) -> Any:
    known = {one.what: one for one in (trace.value(input), trace.value(other)) if isinstance(one, _Turned)}
    if not known:
        return UNDERSTOOD[func](trace, func, input, other, alpha=alpha)
    if known.keys() != {"cosines", "sines"} or alpha != 1:
        refuse("another rotation")
    straight, turned = known["cosines"], known["sines"]
    depth = trace.widths[straight.angles]
    half = depth // 2
    places = straight.places
    # Each head whole, and its halves the other way round in what is turned.
    heads = places.shape[-1] == depth and torch.equal(
        places - places[..., :1], torch.arange(depth).expand_as(places)
    )
    if not heads or depth % 2 or straight.buffer != turned.buffer:
        refuse("parts of heads")
    if not torch.equal(turned.places, torch.cat((places[..., :half], places[..., half:]), -1)):
        refuse("another rotation")
    width = trace.widths[straight.buffer]
    y = trace.buffer(width)
    step = ("rotary", straight.buffer, straight.angles, turned.angles, y, width // depth)
    if not torch.equal(places.reshape(-1).sort().values, torch.arange(places.numel())):
        refuse("some of the rows")
    trace.steps.append(step)
    return trace.know(func(input, other), Rows(y, places))


def _sdpa(
    trace: Trace,
    func: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Of one query over all positions."""
    cached: tuple[Any, Any] = trace.value(key), trace.value(value)
    if cached != (_Cached("keys"), _Cached("values")):
        refuse("attention over something else than the cache")
    plain = isinstance(scale, (int, float, type(None)))
    if attn_mask is not None or dropout_p or is_causal or query.ndim != 4 or not plain:
        refuse("another attention")
    buffer, depth = in_order(trace, query), query.shape[3]
    width, groups = trace.widths[buffer], key.shape[1]
    # Heads of queries that share keys stand side by side, here or in the function.
    if query.shape[1] != groups and not enable_gqa:
        refuse("other heads than those of the keys")
    if width % (groups * depth) or key.shape[3] != depth or query.shape[1] * query.shape[2] * depth != width:
        refuse("heads of another depth")
    y = trace.buffer(width)
    factor = depth**-0.5 if scale is None else float(scale)
    trace.steps.append(("cached", buffer, y, width // depth, factor))
    found = func(query, key, value, scale=scale, enable_gqa=enable_gqa)
    return trace.know(found, Rows(y, trace.value(query).places))


def _core_attention(*_: Any) -> None:
    """Leaves it to PyTorch's attention."""


def _changed() -> Mapping[Any, Callable[..., Any]]:
    found = dict(UNDERSTOOD)
    move = UNDERSTOOD[Tensor.view]
    found |= {func: _move for func, understand in UNDERSTOOD.items() if understand is move}
    for names, understand in ((("mul", "multiply"), _mul), (("add",), _add)):
        found |= dict.fromkeys((getattr(torch, name) for name in names), understand)
        found |= dict.fromkeys((getattr(Tensor, name) for name in names), understand)
    found |= dict.fromkeys((torch.neg, Tensor.neg, Tensor.__neg__), _negative)
    found |= dict.fromkeys((torch.cat, torch.concat), _cat)
    return found | {functional.scaled_dot_product_attention: _sdpa, attend: _core_attention}


DECODING = _changed()
