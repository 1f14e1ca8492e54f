"""What the file of an accelerated model says about its tensors, as text in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from sparsam.checkpoint.json_state import Count, Positive, convert, decode
from sparsam.torch.layers.operators import ACTIVATIONS
from sparsam.torch.layers.packed_weight import DTYPES
from sparsam.torch.layers.packing import PackedLayer

__all__ = ["Entry", "Manifest", "dtype_name"]

T = TypeVar("T")

_MARK = "accelerated 2"
_FORMS = (("bitmask",), ("panels",), ("bitmask", "panels"))
_ACTIVATIONS = tuple(filter(None, ACTIVATIONS))
_DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A packed layer.

    Attributes:
        shape: The shape of its dense weight.
        dtype: The dtype of that, by name; the values may be stored as another.
        groups: The groups of a convolution; otherwise 1.
        transposed: Whether the dense weight is (in, out).
        activation: What is applied to its sums, or None.
        forms: The forms that its packed weight has in memory.
        weight: The layer under whose name the weight is stored: itself, or one that shares it.
    """

    shape: Annotated[tuple[Count, ...], Meta(min_length=2)]
    dtype: str
    groups: Positive
    transposed: bool
    activation: str | None
    forms: tuple[str, ...]
    weight: str

    @classmethod
    def of(cls, layer: PackedLayer, activation: str | None, weight: str) -> Entry:
        """What there is to say of a layer."""
        layout = layer.weight._content.layout
        shape, dtype, groups, transposed = layout.shape, layout.dtype, layout.groups, layout.transposed
        return cls(shape, dtype_name(dtype), groups, transposed, activation, layer.packed.forms, weight)

    def describe(self) -> str:
        """What identifies the layer to a reader of an error."""
        shape = "x".join(map(str, self.shape))
        return f"{shape} {self.dtype}" + (f" in {self.groups} groups" if self.groups > 1 else "")


@dataclass(frozen=True)
class Manifest:
    """All that the metadata says.

    Attributes:
        layers: The packed layers by name.
        fused: Name of an activation module -> names of the layers that compute it.
        tied: Name of a tensor -> the name under which the same memory is stored.
    """

    layers: dict[str, Entry]
    fused: dict[str, tuple[str, ...]]
    tied: dict[str, str]

    def to_metadata(self) -> dict[str, str]:
        """The metadata of the file."""
        layers = msgspec.to_builtins(self.layers)
        parts = {"layers": layers, "fused": self.fused, "tied": self.tied}
        return {"format": "pt", "sparsam": _MARK, **{key: json.dumps(part) for key, part in parts.items()}}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Manifest:
        """Reads metadata, and believes nothing.

        Raises:
            ValueError: It is not what `to_metadata` writes.
        """
        mark = metadata.get("sparsam")
        if mark != _MARK:
            msg = f"metadata: expected sparsam={_MARK!r}; got {mark!r:.200}"
            raise ValueError(msg)
        found = _decoded(metadata, "layers", dict[str, Any])
        layers = {name: _entry(name, value) for name, value in found.items()}
        for name, entry in layers.items():
            first = layers.get(entry.weight)
            if first is None or first.weight != entry.weight or _stored(first) != _stored(entry):
                got = f"{entry.weight!r:.200}"
                msg = f"layer {name!r}: expected its weight under a like layer; got {got}"
                raise ValueError(msg)
        fused = _decoded(metadata, "fused", dict[str, tuple[str, ...]])
        for name, into in fused.items():
            computed = {layers[n].activation if n in layers else None for n in into}
            if len(computed) != 1 or None in computed:
                msg = f"activation {name!r}: expected the layers that compute it; got {into!r:.200}"
                raise ValueError(msg)
        tied = _decoded(metadata, "tied", dict[str, str])
        if unstored := [name for name, source in tied.items() if source in tied]:
            got = f"{tied[unstored[0]]!r:.200}"
            msg = f"tensor {unstored[0]!r}: expected to be tied to one that is stored; got {got}"
            raise ValueError(msg)
        return cls(layers, fused, tied)


def dtype_name(dtype: object) -> str:
    """`float32` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def _stored(entry: Entry) -> tuple[object, ...]:
    return entry.shape, entry.dtype, entry.groups, entry.transposed, entry.forms


def _decoded(metadata: Mapping[str, str], key: str, kind: type[T]) -> T:
    return decode(metadata.get(key, ""), kind, f"metadata {key!r}")


def _entry(name: str, value: object) -> Entry:
    source = f"layer {name!r}"
    entry = convert(value, Entry, source)
    field, wanted = "", ""
    if entry.dtype not in _DTYPES:
        field, wanted = "dtype", f"one of {', '.join(_DTYPES)}"
    elif entry.shape[0] % entry.groups:
        field, wanted = "groups", f"a divisor of {entry.shape[0]} rows"
    elif entry.transposed and (entry.groups > 1 or len(entry.shape) > 2):
        field, wanted = "transposed", f"false for the weight {entry.describe()}"
    elif entry.activation is not None and entry.activation not in _ACTIVATIONS:
        field, wanted = "activation", f"null or one of {', '.join(_ACTIVATIONS)}"
    elif entry.forms not in _FORMS or (entry.groups > 1 and entry.forms != ("panels",)):
        field, wanted = "forms", f"one of {', '.join(map(str, map(list, _FORMS)))}"
    if field:
        msg = f"{source}: field {field}: expected {wanted}; got {getattr(entry, field)!r:.60}"
        raise ValueError(msg)
    return entry
