"""The description of an accelerated model's tensors, as text in the metadata of its file."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from sparsam.checkpoint.json_state import Count, Positive, convert, decode
from sparsam.torch.fused.calls import Call
from sparsam.torch.layers.operators import ACTIVATIONS
from sparsam.torch.layers.packed_parameter import PackedParameter
from sparsam.torch.layers.packed_weight import DTYPES, VALUES, dtype_name
from sparsam.torch.layers.packing import is_one_of_several

__all__ = ["BITS", "MARK", "Layer", "Manifest", "Weight", "dtype_name", "place"]

T = TypeVar("T")

MARK = "accelerated 3"
BITS = "_bits"  # the suffix of the tensor with a weight's bits

_FORMS = tuple(forms for n in (1, 2) for forms in itertools.combinations(("bitmask", "panels", "slots"), n))
_OF_GROUPS = (("bitmask",), ("panels",), ("slots",))
_FORMS += (("rows",),)  # of an embedding
_LATER = ("attention", "modules")  # not in every file, and not in those of earlier versions
_ACTIVATIONS = tuple(filter(None, ACTIVATIONS))
_DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)
_VALUES = tuple(map(dtype_name, VALUES))


class Weight(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor that is stored as values and bits.

    Attributes:
        shape: Its shape, dense.
        dtype: Its dtype, dense; the values may be stored as another.
        transposed: Whether it is (in, out), and the rows of the bits belong to outputs.
    """

    shape: Annotated[tuple[Count, ...], Meta(min_length=2)]
    dtype: str
    transposed: bool

    def describe(self) -> str:
        """Its shape and dtype, for error messages."""
        return f"{'x'.join(map(str, self.shape))} {self.dtype}"


class Layer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A layer whose weight is packed in memory too.

    Attributes:
        groups: The groups of a convolution; otherwise 1.
        activation: The activation that the layer computes, or None.
        forms: The forms that its packed weight has in memory.
        computed: The dtype of the packed values where the weight is computed from other tensors, by
            torch.nn.utils.parametrize or prune; None where it is a tensor of its own.
    """

    groups: Positive
    activation: str | None
    forms: tuple[str, ...]
    computed: str | None

    @classmethod
    def of(cls, weight: PackedParameter, activation: str | None) -> Layer:
        """Describes a layer with that weight."""
        packed = weight.tensor.packed
        computed = None if weight.name in weight.module._parameters else dtype_name(packed.dtype)
        return cls(packed.groups, activation, packed.forms, computed)


@dataclass(frozen=True)
class Manifest:
    """The content of the metadata.

    Attributes:
        weights: The tensors that are stored as values and bits.
        layers: The packed layers by name; projections of nn.MultiheadAttention by that of the Parameter.
        fused: Name of an activation module -> names of the layers that compute it.
        tied: Name of a tensor -> the name under which the same memory is stored.
        buffers: The tensors that are stored though the model's state dict lacks them.
        attention: The names of the Hugging Face models in it that compute with the core's attention.
        modules: Name of a fused module -> the forms of calls that it has steps for.
    """

    weights: dict[str, Weight]
    layers: dict[str, Layer]
    fused: dict[str, tuple[str, ...]]
    tied: dict[str, str]
    buffers: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    modules: dict[str, tuple[Call, ...]] = field(default_factory=dict)

    def stored_weight(self, name: str) -> str:
        """The name under which the weight of a layer is stored."""
        return self.stored(".".join(place(name)))

    def stored(self, name: str) -> str:
        """The name under which a tensor is stored."""
        return self.tied.get(name, name)

    def to_metadata(self) -> dict[str, str]:
        """The metadata of the file."""
        parts = {name: json.dumps(msgspec.to_builtins(part)) for name, part in vars(self).items()}
        for name in _LATER:
            if not vars(self)[name]:
                del parts[name]
        return {"format": "pt", "sparsam": MARK, **parts}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Manifest:
        """Reads and checks metadata.

        Raises:
            ValueError: It is not what `to_metadata` writes.
        """
        if (mark := metadata.get("sparsam")) != MARK:
            msg = f"metadata: expected sparsam={MARK!r}; got {mark!r:.200}; name a file that save() wrote"
            raise ValueError(msg)
        found = _decoded(metadata, "weights", dict[str, Any])
        weights = {name: _weight(name, value) for name, value in found.items()}
        found = _decoded(metadata, "layers", dict[str, Any])
        layers = {name: _layer(name, value) for name, value in found.items()}
        fused = _decoded(metadata, "fused", dict[str, tuple[str, ...]])
        tied = _decoded(metadata, "tied", dict[str, str])
        buffers = _decoded(metadata, "buffers", tuple[str, ...])
        attention = _decoded({"attention": "[]"} | dict(metadata), "attention", tuple[str, ...])
        calls = _decoded({"modules": "{}"} | dict(metadata), "modules", dict[str, tuple[Call, ...]])
        for name, source in tied.items():
            if source in tied or name in weights:
                msg = (
                    f"tensor {name!r}: expected to be tied to one that is stored; got {source!r:.200}; save "
                    "the model again"
                )
                raise ValueError(msg)
        for name, into in fused.items():
            computed = {layers[n].activation if n in layers else None for n in into}
            if len(computed) != 1 or None in computed:
                msg = (
                    f"activation {name!r}: expected the layers that compute it; got {into!r:.200}; save the "
                    "model again"
                )
                raise ValueError(msg)
        manifest = cls(weights, layers, fused, tied, buffers, attention, calls)
        for name in layers:
            manifest._check_layer(name)
        return manifest

    def _check_layer(self, name: str) -> None:
        layer = self.layers[name]
        if layer.computed is not None:
            return
        stored = self.stored_weight(name)
        weight = self.weights.get(stored)
        if weight is None:
            msg = (
                f"layer {name!r}: expected values and bits of its weight; got none under {stored!r:.200}; "
                "save the model again"
            )
            raise ValueError(msg)
        if weight.shape[0] % layer.groups or (weight.transposed and layer.groups > 1):
            msg = (
                f"layer {name!r}: field groups: expected a divisor of its rows; got {layer.groups}; save the "
                "model again"
            )
            raise ValueError(msg)


_REMEDY = "save the model again"


def place(name: str) -> tuple[str, str]:
    """The module and the attribute of a layer's name: `weight`, unless its last part is one of several."""
    module, _, last = name.rpartition(".")
    return (module, last) if is_one_of_several(last) else (name, "weight")


def _decoded(metadata: Mapping[str, str], key: str, kind: type[T]) -> T:
    return decode(metadata.get(key, ""), kind, f"metadata {key!r}", _REMEDY)


def _weight(name: str, value: object) -> Weight:
    weight = convert(value, Weight, source := f"weight {name!r}", _REMEDY)
    if weight.dtype not in _DTYPES:
        msg = (
            f"{source}: field dtype: expected one of {', '.join(_DTYPES)}; got {weight.dtype!r:.60}; save "
            "the model again"
        )
        raise ValueError(msg)
    if weight.transposed and len(weight.shape) > 2:
        msg = (
            f"{source}: field transposed: expected false for {weight.describe()}; got true; save the model "
            "again"
        )
        raise ValueError(msg)
    return weight


def _layer(name: str, value: object) -> Layer:
    layer = convert(value, Layer, source := f"layer {name!r}", _REMEDY)
    field, wanted = "", ""
    if layer.activation is not None and layer.activation not in _ACTIVATIONS:
        field, wanted = "activation", f"null or one of {', '.join(_ACTIVATIONS)}"
    elif layer.forms not in _FORMS or (layer.groups > 1 and layer.forms not in _OF_GROUPS):
        field, wanted = "forms", f"one of {', '.join(map(str, map(list, _FORMS)))}"
    elif layer.computed is not None and layer.computed not in _VALUES:
        field, wanted = "computed", f"null or one of {', '.join(_VALUES)}"
    if field:
        msg = (
            f"{source}: field {field}: expected {wanted}; got {getattr(layer, field)!r:.60}; save the model "
            "again"
        )
        raise ValueError(msg)
    return layer
