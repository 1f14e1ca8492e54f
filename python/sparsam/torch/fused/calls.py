"""The forms of calls of a module: which arguments are tensors, of which shape, and all the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

import torch
from sparsam.torch.fused.caching import ExampleCache, is_cache
from torch import Tensor

__all__ = ["Call", "Constant", "Slot", "key_of"]

Constant = bool | int | float | str | None
_KINDS = {"angles": tuple, "cache": ExampleCache}  # of slots whose kind is told by `key_of`
_CONSTANTS = (bool, int, float, str, type(None))
_MASKS = {torch.bool: "bool", torch.float32: "float32"}
_MASK = "attention_mask"  # the name of the argument in Hugging Face models
_SIZES, _ONE_POSITION = ((2, 5), (3, 4), (1, 1)), ((2, 1), (3, 1), (1, 1))
_ANY = -1  # a size that differs from call to call
# What a file may ask for: far more than modules are called with, and little to make an example of.
_MOST_AXES, _WIDEST, _MOST_HEADS, _LARGEST = 8, 1 << 20, 1 << 10, 1 << 24


class Slot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One argument.

    Attributes:
        kind: "rows", float32 (..., width); "mask", (sequences or 1, heads or 1, positions or 1, positions);
            "angles", cosines and sines (sequences or 1, positions, depth); "cache", of keys and values;
            "other", a tensor that nothing is computed from; "constant".
        shape: Of a tensor; -1 for a number of sequences or positions.
        dtype: Of a mask, "bool" or "float32"; of another tensor its name.
        value: Of a constant.
    """

    kind: Literal["rows", "mask", "angles", "cache", "other", "constant"]
    shape: tuple[int, ...] = ()
    dtype: str = ""
    value: Constant = None

    def __post_init__(self) -> None:
        """Checks what a file says.

        Raises:
            ValueError: There is no such argument.
        """
        shape, named = self.shape, type(getattr(torch, self.dtype, None)) is torch.dtype
        good = {
            "constant": not shape and not self.dtype,
            "cache": not shape and not self.dtype,
            "angles": len(shape) == 3 and {*shape[:2]} <= {1, _ANY} and 0 < shape[2] <= _WIDEST,
            "rows": 1 < len(shape) <= _MOST_AXES and {*shape[:-1]} == {_ANY} and 0 < shape[-1] <= _WIDEST,
            "mask": len(shape) == 4
            and self.dtype in _MASKS.values()
            and shape[0] in {1, _ANY}
            and 0 < shape[1] <= _MOST_HEADS
            and shape[2] in {1, _ANY}
            and shape[3] == _ANY,
            "other": named and all(n >= 0 for n in shape) and math.prod(shape) <= _LARGEST,
        }
        if not good[self.kind] or (self.kind != "constant" and self.value is not None):
            msg = f"argument: expected a form of one; got {self.kind} {shape} {self.dtype}; save it again"
            raise ValueError(msg)

    def example(self, sizes: Sequence[int], random: torch.Generator) -> Any:
        """An argument of that form.

        Args:
            sizes: The sizes of all axes of rows but the last.
            random: Draws the numbers.
        """
        if self.kind == "constant":
            return self.value
        if self.kind == "rows":
            return torch.randn(*sizes, self.shape[-1], generator=random, device="cpu")
        if self.kind == "cache":
            return ExampleCache()
        if self.kind == "angles":
            own = [n if n != _ANY else size for n, size in zip(self.shape, sizes, strict=False)]
            angles = 6 * torch.rand(*own, self.shape[2], generator=random, device="cpu")
            return angles.cos(), angles.sin()
        if self.kind == "other":
            return torch.zeros(self.shape, dtype=getattr(torch, self.dtype), device="cpu")
        own = [n if n != _ANY else sizes[0 if i == 0 else 1] for i, n in enumerate(self.shape)]
        hidden = torch.rand(*own, generator=random, device="cpu") < 0.3
        hidden[..., 0] = False
        return ~hidden if self.dtype == "bool" else hidden * torch.tensor(torch.finfo(torch.float32).min)


class Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The form of a call.

    Attributes:
        positional: The positional arguments.
        keywords: The names and forms of the others, in order.
    """

    positional: tuple[Slot, ...]
    keywords: tuple[tuple[str, Slot], ...]

    def __post_init__(self) -> None:
        """Checks what a file says.

        Raises:
            ValueError: No argument has rows.
        """
        if all(slot.kind != "rows" for slot in self.slots):
            msg = "call: expected an argument with rows; got none; save the model again"
            raise ValueError(msg)

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
        """The form of these arguments; None for what no fused module is called with."""
        values = (*args, *kwargs.values())
        rows = next((v.shape for v in values if _is_rows(v)), None)
        if rows is None:
            return None
        try:
            slots = [_slot(value, rows) for value in values]
            named = tuple(zip(kwargs, slots[len(args) :], strict=True))
            return None if None in slots else cls(tuple(slots[: len(args)]), named)  # type: ignore[arg-type]
        except ValueError:  # larger than what files may ask for
            return None

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All arguments in order."""
        return (*self.positional, *(slot for _, slot in self.keywords))

    @property
    def axes(self) -> int:
        """The number of axes of rows."""
        return next(len(slot.shape) for slot in self.slots if slot.kind == "rows")

    @property
    def cached(self) -> bool:
        """Whether an argument is a cache of keys and values."""
        return any(slot.kind == "cache" for slot in self.slots)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Sequences and positions of the calls that are followed: what depends on them would differ."""
        if not self.cached:
            return _SIZES
        one = all(slot.shape[1] == 1 for slot in self.slots if slot.kind == "angles")
        return _ONE_POSITION if one else ()  # what would many positions see of each other?

    @property
    def key(self) -> tuple[Any, ...]:
        """What `key_of` returns for the arguments of such a call."""
        kinds = (
            _constant(slot.value) if slot.kind == "constant" else _KINDS.get(slot.kind, Tensor)
            for slot in self.slots
        )
        return (len(self.positional), *(name for name, _ in self.keywords), *kinds)

    def variants(self) -> tuple[Call, ...]:
        """This call, and the same without its mask, or with one where it could have one."""
        if self.cached:
            return (self,)
        others = (self._masked(), self._unmasked())
        return (self, *(other for other in others if other is not None and other != self))

    def example(self, sizes: Sequence[int]) -> tuple[list[Any], dict[str, Any]]:
        """Arguments of that form, always the same."""
        random = torch.Generator().manual_seed(0)
        args = [slot.example(sizes, random) for slot in self.positional]
        return args, {name: slot.example(sizes, random) for name, slot in self.keywords}

    def _unmasked(self) -> Call:
        none = Slot("constant")
        positional = tuple(none if slot.kind == "mask" else slot for slot in self.positional)
        return Call(positional, tuple((n, none if s.kind == "mask" else s) for n, s in self.keywords))

    def _masked(self) -> Call | None:
        """With a mask as Hugging Face makes it."""
        mask = Slot("mask", (_ANY, 1, _ANY, _ANY), "bool")
        if self.axes != 3 or any(slot.kind == "mask" for slot in self.slots):
            return None
        if any(name == _MASK and slot == Slot("constant") for name, slot in self.keywords):
            return Call(self.positional, tuple((n, mask if n == _MASK else s) for n, s in self.keywords))
        first, *rest = self.positional or (mask,)
        if first.kind == "rows" and rest and rest[0] == Slot("constant"):  # the second argument of its layers
            return Call((first, mask, *rest[1:]), self.keywords)
        return None


def key_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Equal for calls of one form, up to the shapes of tensors."""
    return (len(args), *kwargs, *map(_kind, args), *map(_kind, kwargs.values()))


def _constant(value: Constant) -> Any:
    """Equal for equal constants of one type: 1 is not True."""
    return value if value is None or type(value) is str else (type(value), value)


def _kind(value: Any) -> Any:
    kind = type(value)
    if kind in _CONSTANTS:
        return _constant(value)
    if kind is Tensor or kind is tuple:
        return kind
    return _KINDS["cache"] if is_cache(value) else value


def _is_rows(value: Any) -> bool:
    return type(value) is Tensor and value.dtype is torch.float32 and value.ndim > 1


def _slot(value: Any, rows: Sequence[int]) -> Slot | None:
    if type(value) in _CONSTANTS:
        return Slot("constant", value=value)
    if is_cache(value):
        return Slot("cache")
    if type(value) is tuple and len(value) == 2 and len(rows) == 3 and all(map(_is_rows, value)):
        first, positions, depth = (*value[0].shape, 0, 0, 0)[:3]
        alike = value[0].ndim == 3 and value[1].shape == value[0].shape
        if alike and first in {1, rows[0]} and positions == rows[1]:
            return Slot("angles", (1 if first == 1 else _ANY, 1 if positions == 1 else _ANY, depth))
    if type(value) is not Tensor:
        return None
    if _is_rows(value) and value.shape[:-1] == rows[:-1]:
        return Slot("rows", (*(_ANY for _ in rows[:-1]), value.shape[-1]))
    if len(rows) == 3 and value.ndim == 4 and value.dtype in _MASKS:
        sequences, positions = rows[:2]
        first, heads, queries, keys = value.shape
        if first in {1, sequences} and queries in {1, positions} and keys == positions:
            shape = (1 if first == 1 else _ANY, heads, 1 if queries == 1 else _ANY, _ANY)
            return Slot("mask", shape, _MASKS[value.dtype])
    return Slot("other", tuple(value.shape), str(value.dtype).removeprefix("torch."))
