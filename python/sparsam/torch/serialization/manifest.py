"""What the file of an accelerated model says about its tensors, as text in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sparsam.torch.layers.operators import ACTIVATIONS
from sparsam.torch.layers.packed_weight import DTYPES

__all__ = ["Entry", "Manifest", "dtype_name"]

_MARK = "accelerated 1"
_DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)


@dataclass(frozen=True)
class Entry:
    """A packed layer.

    Attributes:
        shape: The shape of its dense weight.
        dtype: The dtype of that, by name; the values may be stored as another.
        groups: The groups of a convolution; otherwise 1.
        transposed: Whether the dense weight is (in, out).
        activation: What is applied to its sums, or None.
        weight: The layer under whose name the weight is stored: itself, or one that shares it.
    """

    shape: tuple[int, ...]
    dtype: str
    groups: int
    transposed: bool
    activation: str | None
    weight: str

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
        layers = {name: asdict(entry) for name, entry in self.layers.items()}
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
            msg = f"expected the metadata sparsam={_MARK!r}, got {mark!r:.200}"
            raise ValueError(msg)
        layers = {name: _entry(name, value) for name, value in _object(metadata, "layers").items()}
        for name, entry in layers.items():
            first = layers.get(entry.weight)
            if first is None or first.weight != entry.weight or _stored(first) != _stored(entry):
                msg = f"layer {name!r}: expected its weight under a like layer, got {entry.weight!r:.200}"
                raise ValueError(msg)
        fused: dict[str, tuple[str, ...]] = {}
        for name, into in _object(metadata, "fused").items():
            known = isinstance(into, list) and all(isinstance(n, str) and n in layers for n in into)
            computed = {layers[n].activation for n in into} if known else set()
            if len(computed) != 1 or None in computed:
                msg = f"activation {name!r}: expected the layers that compute it, got {into!r:.200}"
                raise ValueError(msg)
            fused[name] = tuple(into)
        tied = _object(metadata, "tied")
        if any(not isinstance(first, str) or first in tied for first in tied.values()):
            msg = "expected tied tensors to name one that is stored, got others"
            raise ValueError(msg)
        return cls(layers, fused, tied)


def dtype_name(dtype: object) -> str:
    """`float32` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def _stored(entry: Entry) -> tuple[object, ...]:
    return entry.shape, entry.dtype, entry.groups, entry.transposed


def _object(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError) as error:
        msg = f"expected JSON in the metadata {key!r}, got none ({error})"
        raise ValueError(msg) from error
    if not isinstance(value, dict):
        msg = f"expected an object in the metadata {key!r}, got a {type(value).__name__}"
        raise ValueError(msg)
    return value


def _entry(name: str, value: Any) -> Entry:
    fields = value if isinstance(value, dict) else {}
    shape: Any = fields.get("shape")
    groups: Any = fields.get("groups")
    good = (
        fields.keys() == Entry.__dataclass_fields__.keys()
        and isinstance(shape, list)
        and len(shape) >= 2
        and all(type(size) is int and size >= 0 for size in shape)
        and type(groups) is int
        and groups >= 1
        and shape[0] % groups == 0
        and fields["dtype"] in _DTYPES
        and type(fields["transposed"]) is bool
        and not (fields["transposed"] and (groups > 1 or len(shape) > 2))
        and fields["activation"] in (None, *filter(None, ACTIVATIONS))
        and isinstance(fields["weight"], str)
    )
    if not good:
        msg = f"layer {name!r}: expected its shape, dtype, groups and so on, got {value!r:.200}"
        raise ValueError(msg)
    return Entry(**{**fields, "shape": tuple(shape)})
