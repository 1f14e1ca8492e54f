"""The content of a model's file: its tensors (pruned ones as values and bits) and the manifest."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from sparsam.inputs.float_mode import standard_floats
from sparsam.torch.acceleration.fusion import Fused
from sparsam.torch.fused.calls import Call
from sparsam.torch.fused.installation import fused_modules
from sparsam.torch.layers.packed_parameter import packed_parameters
from sparsam.torch.layers.packed_tensor import PackedTensor
from sparsam.torch.layers.packed_weight import DTYPES, dtype_name
from sparsam.torch.layers.packing import PackedLayer
from sparsam.torch.layers.unpacked_tensor import is_foreign
from sparsam.torch.serialization.encoding import Encoded, encode, encode_packed, encode_rows
from sparsam.torch.serialization.manifest import BITS, Layer, Manifest, Weight
from sparsam.torch.transformers_switch import core_attention
from torch import Tensor, nn

__all__ = ["Contents"]


@dataclass(frozen=True)
class Contents:
    """The content of a file for a model.

    Attributes:
        tensors: The tensors of the file. No two of them share memory.
        manifest: The metadata that describes them.
    """

    tensors: dict[str, Tensor]
    manifest: Manifest

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        ignored: Collection[str] = (),
        ties: Mapping[str, str] | None = None,
        buffers: bool = True,
    ) -> Contents:
        """Collects the content of a model's file.

        Args:
            model: The model.
            ignored: Names in its state dict that are not stored.
            ties: Pairs of names, as keys and values, whose tensors the reader shares by itself; other shared
                tensors are stored twice. None: the reader shares tensors as the manifest says.
            buffers: Whether to store buffers that are not in the state dict, for models on the meta device.

        Raises:
            TypeError: The state dict holds something other than dense tensors.
            ValueError: The model is itself a packed layer, or lacks the layers that compute an activation.
        """
        layers = {
            name: found for name, module in _every(model) if (found := PackedLayer.find(module)) is not None
        }
        if "" in layers:
            got = type(model).__name__
            msg = f"save: expected a model that holds layers; got a packed {got}; wrap it in nn.Sequential"
            raise ValueError(msg)
        fused = _fused(model, {id(layer.layer): name for name, layer in layers.items()})
        activations = {name for into in fused.values() for name in into}
        state = _state(model, ignored)
        tensors: dict[str, Tensor] = {}
        weights: dict[str, Weight] = {}
        tied: dict[str, str] = {}
        first: dict[Any, str] = {}
        packed, keys = _identities(state)
        for name, tensor in state.items():
            key = keys[name]
            if key in first and (ties is None or _are_tied(name, first[key], ties)):
                tied[name] = first[key]
                continue
            again = first.setdefault(key, name) != name
            if (encoded := _encoded(tensor, packed.get(key))) is None:
                tensors[name] = tensor.detach().clone() if again else _alone(tensor)
                continue
            tensors |= {name: encoded.values, name + BITS: encoded.bits}
            transposed = packed[key]._content.layout.transposed if key in packed else False
            weights[name] = Weight(tuple(tensor.shape), dtype_name(tensor.dtype), transposed)
        if clash := sorted(name for name in weights if name + BITS in state):
            msg = f"{clash[0] + BITS}: expected no tensor beside the bits of that weight; got one; rename it"
            raise ValueError(msg)
        stand_in = {id(layer) for m in model.modules() if isinstance(m, Fused) for layer in m.layers}
        entries = {}
        for name, layer in layers.items():
            alone = name in activations or id(layer.layer) not in stand_in
            for weight in packed_parameters(layer.layer):
                entry = name if weight.name == "weight" else f"{name}.{weight.name}"
                entries[entry] = Layer.of(weight, layer.activation if alone else None)
        more = dict(_hidden_buffers(model, state)) if buffers else {}
        manifest = Manifest(weights, entries, fused, tied, tuple(more), core_attention(model), _calls(model))
        return cls(tensors | more, manifest)


def _every(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules under all their names."""
    yield from model.named_modules(remove_duplicate=False)


def _fused(model: nn.Module, names: Mapping[int, str]) -> dict[str, tuple[str, ...]]:
    """Activations by name, and the packed layers that compute them."""
    inside = {id(module) for module in model.modules()}
    fused: dict[str, tuple[str, ...]] = {}
    for name, module in _every(model):
        if isinstance(module, Fused):
            if any(id(layer) not in inside for layer in module.layers):
                wanted = "the layers that compute it in the same model"
                msg = f"{name}: expected {wanted}; got an activation without them; save the whole model"
                raise ValueError(msg)
            if all(id(layer) in names for layer in module.layers):
                fused[name] = tuple(names[id(layer)] for layer in module.layers)
    return fused


def _calls(model: nn.Module) -> dict[str, tuple[Call, ...]]:
    """Fused modules by name, and the forms of calls that they have steps for."""
    return {n: tuple(p.call for p in fused.programs) for n, fused in fused_modules(model).items()}


def _state(model: nn.Module, ignored: Collection[str]) -> dict[str, Tensor]:
    """The state dict, with packed weights unchanged."""
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if name not in ignored}
    for name, value in state.items():
        foreign = not isinstance(value, Tensor) or is_foreign(value)
        if foreign or value.layout is not torch.strided or value.is_quantized:
            got = type(value).__name__ if foreign else f"one that is {value.layout}"
            msg = f"{name}: expected a dense tensor in the state dict; got {got}; save it apart"
            raise TypeError(msg)
        if value.is_meta:
            msg = f"{name}: expected a tensor with numbers; got one on the meta device; load the model first"
            raise ValueError(msg)
    return state


def _identities(state: Mapping[str, Tensor]) -> tuple[dict[Any, PackedTensor], dict[str, Any]]:
    """Key -> packed tensor, and name -> key, where tensors that share their memory have equal keys."""
    keys = {name: _identity(value) for name, value in state.items()}
    owners = {id(value): keys[name] for name, value in state.items() if not isinstance(value, PackedTensor)}
    packed: dict[Any, PackedTensor] = {}
    for name, value in state.items():
        if isinstance(value, PackedTensor):
            dense = value.original
            if id(dense) in owners and _stands_for(value, dense):
                keys[name] = owners[id(dense)]
            packed.setdefault(keys[name], value)
    return packed, keys


def _identity(value: Tensor) -> Any:
    if isinstance(value, PackedTensor):
        return id(value._content)
    if not value.numel():
        return object()
    return value.data_ptr(), value.shape, value.stride(), value.dtype, value.device


@standard_floats
def _stands_for(packed: PackedTensor, dense: Tensor | None) -> bool:
    """Whether a packed weight and the dense one that was packed have the same encoding."""
    exact = packed.packed.dtype == packed.dtype and not packed._content.layout.transposed
    return dense is not None and exact and torch.equal(packed.to_dense(), dense.detach())


def _are_tied(name: str, stored: str, ties: Mapping[str, str]) -> bool:
    known = ties.keys() | ties.values()
    return name in known and stored in known and ties.get(name, name) == ties.get(stored, stored)


def _encoded(tensor: Tensor, packed: PackedTensor | None) -> Encoded | None:
    if packed is not None:
        if packed._content.layout.phases is not None:  # whose rows are not those of the dense weight
            return encode_rows(packed.to_dense().to(packed.packed.dtype))
        return encode_packed(packed.packed)
    return encode(tensor) if tensor.dtype in DTYPES and tensor.device.type == "cpu" else None


def _alone(tensor: Tensor) -> Tensor:
    """The tensor with memory of its own, as the file format requires."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor.detach() if whole else tensor.detach().contiguous().clone()


def _hidden_buffers(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The buffers that the state dict lacks, without which a model on the meta device would not run."""
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name not in state and not buffer.is_meta and buffer.layout is torch.strided:
            yield name, buffer.detach().contiguous().clone()
