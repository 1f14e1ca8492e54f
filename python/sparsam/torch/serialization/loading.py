"""An accelerated model's file, checked against the model that it is loaded into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune

import torch
from sparsam.torch.acceleration.fusion import recognise_activation
from sparsam.torch.layers.packed_weight import DTYPES
from sparsam.torch.layers.packing import (
    CONVOLUTIONS,
    PROJECTIONS,
    groups,
    is_embedding,
    is_transposed,
    packable,
    phases_of,
)
from sparsam.torch.layers.unpacked_tensor import is_foreign
from sparsam.torch.serialization.encoding import Encoded
from sparsam.torch.serialization.manifest import BITS, Layer, Manifest, dtype_name, place
from sparsam.torch.serialization.meta_device import compute, materialize, tie, unsaved_tensors
from sparsam.torch.serialization.stored_weights import StoredWeights
from torch import Tensor, nn

__all__ = ["Loaded", "check_layers"]


_DO = "load it into the model that was saved"


@dataclass(frozen=True)
class Loaded:
    """The content of a file that fits a model.

    Attributes:
        weights: The pruned weights of the file.
        rest: The tensors of the model's state dict that are stored as they are.
        buffers: Buffers that the state dict lacks, for a model on the meta device.
    """

    weights: StoredWeights
    rest: dict[str, Tensor]
    buffers: dict[str, Tensor]

    @classmethod
    def read(cls, handle: Any, model: nn.Module) -> Loaded:
        """Reads an open file and changes nothing.

        Args:
            handle: The file, as the library of the format opens it for torch.
            model: A dense model.

        Raises:
            ValueError: The file is damaged, or does not fit the model.
        """
        manifest = Manifest.from_metadata(handle.metadata() or {})
        within = {name: m for name, m in model.named_modules(remove_duplicate=False) if name}
        check_layers(manifest, within)
        state = model.state_dict(keep_vars=True)
        _check_names(manifest, state, set(handle.keys()))
        weights = StoredWeights(manifest)
        rest: dict[str, Tensor] = {}
        for name in dict.fromkeys(map(manifest.stored, state)):
            tensor = handle.get_tensor(name)
            if name in manifest.weights:
                weights.add(name, Encoded(tensor, handle.get_tensor(name + BITS)))
            else:
                rest[name] = tensor
        for name, own in state.items():
            _check_tensor(name, own, manifest, rest)
        buffers = {name: handle.get_tensor(name) for name in _missing_buffers(model, manifest, state)}
        rest = {name: rest[stored] for name in state if (stored := manifest.stored(name)) in rest}
        return cls(weights, rest, buffers)

    def swap_in(self, model: nn.Module) -> int:
        """Installs the weights and packed layers in the model; returns the number of packed layers."""
        with torch.inference_mode(False), torch.no_grad():
            tie(model, self.weights.manifest.tied)
            self.weights.pack(model)
            materialize(model)
            model.load_state_dict(self.rest, strict=False)
            buffers = dict(model.named_buffers(remove_duplicate=False))
            for name, value in self.buffers.items():
                buffers[name].copy_(value)
            self.weights.unpack(model)
            installed = self.weights.install(model)
            compute(model)
            return installed


def check_layers(manifest: Manifest, modules: Mapping[str, nn.Module]) -> None:
    """Raises ValueError if layers or activations of a file are missing or different in the model."""
    for name, layer in manifest.layers.items():
        path, attribute = place(name)
        module = modules.get(path)
        if module is None or (module, attribute) not in packable(module):
            came = "none" if module is None else f"a {type(module).__name__}"
            kinds = "a linear layer, an embedding or a convolution"
            msg = f"layer {name!r}: expected {kinds} in the model; got {came}; {_DO}"
            raise ValueError(msg)
        if (layer.forms == ("rows",)) != is_embedding(module):
            wanted_forms = "['rows'] for an embedding, and for nothing else"
            msg = f"layer {name!r}: field forms: expected {wanted_forms}; got {[*layer.forms]}; {_DO}"
            raise ValueError(msg)
        computed = attribute not in module._parameters
        if computed != (layer.computed is not None) or (computed and not _can_compute(module, attribute)):
            ways = (
                "a weight of its own",
                "one that torch.nn.utils.prune or parametrize computes, as in the model that was saved",
            )
            wanted, came = ways if layer.computed is None else ways[::-1]
            msg = f"layer {name!r}: expected {wanted}; got {came}; {_DO}"
            raise ValueError(msg)
        wanted_groups = groups(module, attribute)
        if layer.groups != wanted_groups and not (attribute in PROJECTIONS and layer.groups == 1):
            msg = f"layer {name!r}: expected {layer.groups} groups in the model; got {wanted_groups}; {_DO}"
            raise ValueError(msg)
        if isinstance(module, CONVOLUTIONS):
            _check_convolution(name, layer, transposed=phases_of(module) is not None)
        if layer.computed is None:
            transposed = manifest.weights[manifest.stored_weight(name)].transposed
            if transposed != is_transposed(module):
                layouts = (
                    "a layer with a weight (out, in)",
                    "a Conv1D of transformers, with a weight (in, out)",
                )
                msg = f"layer {name!r}: expected {layouts[transposed]}; got {layouts[not transposed]}; {_DO}"
                raise ValueError(msg)
    for name, into in manifest.fused.items():
        module, activation = modules.get(name), manifest.layers[into[0]].activation
        plain = module is not None and not any(True for _ in module.children())
        got = recognise_activation(module) if module is not None and plain else None
        if got != activation:
            msg = (
                f"activation {name!r}: expected {activation} in the model; got {got or 'another or none'}; "
                f"{_DO}"
            )
            raise ValueError(msg)


def _check_convolution(name: str, layer: Layer, *, transposed: bool) -> None:
    """Raises ValueError if a convolution cannot compute with the forms of a layer.

    The values of a weight that is a tensor of its own are checked once it is read.
    """
    good = {"panels": DTYPES} if transposed else {"panels": DTYPES, "slots": (torch.int8,)}
    values = layer.computed
    for form, dtypes in good.items():
        if layer.forms == (form,) and (values is None or values in map(dtype_name, dtypes)):
            return
    wanted = "['panels'], or with int8 values ['slots'], for a convolution"
    wanted = "['panels'] for a transposed convolution" if transposed else wanted
    of = "" if values is None else f" of {values}"
    msg = f"layer {name!r}: field forms: expected {wanted}; got {[*layer.forms]}{of}; {_DO}"
    raise ValueError(msg)


def _can_compute(module: nn.Module, attribute: str) -> bool:
    hooks = module._forward_pre_hooks.values()
    return parametrize.is_parametrized(module, attribute) or any(
        isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == attribute for hook in hooks
    )


def _check_names(manifest: Manifest, state: Mapping[str, Any], found: set[str]) -> None:
    """Raises ValueError if the names of the tensors are not those that the model needs."""
    if strange := sorted(manifest.tied.keys() - state.keys()):
        msg = f"metadata 'tied': expected tensors that the model has; got {strange[0]!r}; {_DO}"
        raise ValueError(msg)
    names = {manifest.stored(name) for name in state} | set(manifest.buffers)
    names |= {name + BITS for name in manifest.weights} | manifest.weights.keys()
    if odd := sorted((names ^ found) | (manifest.weights.keys() - state.keys())):
        more = f" and {len(odd) - 1} more" if odd[1:] else ""
        one = f"a file without {odd[0]!r}" if odd[0] not in found else f"{odd[0]!r}, which it lacks"
        msg = f"tensors: expected those of the model; got {one}{more}; {_DO}"
        raise ValueError(msg)


def _check_tensor(name: str, own: Any, manifest: Manifest, rest: Mapping[str, Tensor]) -> None:
    """Raises ValueError if a tensor of the model does not match the one in the file."""
    stored = manifest.stored(name)
    if (weight := manifest.weights.get(stored)) is not None:
        shape, dtype = weight.shape, weight.dtype
    else:
        shape, dtype = tuple(rest[stored].shape), dtype_name(rest[stored].dtype)
    if is_lazy(own):
        msg = f"{name}: expected a model that ran before; got one without a shape; call it once before"
        raise ValueError(msg)
    if not isinstance(own, Tensor) or (tuple(own.shape), dtype_name(own.dtype)) != (shape, dtype):
        came = f"{tuple(own.shape)} {dtype_name(own.dtype)}" if isinstance(own, Tensor) else "no tensor"
        msg = f"tensor {name!r}: expected {shape} {dtype} in the model; got {came}; {_DO}"
        raise ValueError(msg)
    if is_foreign(own):
        msg = f"tensor {name!r}: expected a dense one in the model; got a {type(own).__name__}; {_DO}"
        raise ValueError(msg)
    if weight is not None and own.device.type not in {"cpu", "meta"}:
        msg = f"tensor {name!r}: expected it on the CPU; got it on {own.device}; move the model with .cpu()"
        raise ValueError(msg)
    if weight is not None and own.dtype not in DTYPES:
        msg = (
            f"tensor {name!r}: expected one of {', '.join(map(dtype_name, DTYPES))}; got {own.dtype}; "
            "convert the model with .to()"
        )
        raise ValueError(msg)


def _missing_buffers(model: nn.Module, manifest: Manifest, state: Mapping[str, Any]) -> list[str]:
    """The buffers on the meta device that the state dict lacks."""
    wanted = []
    for name in unsaved_tensors(model):
        if name in state:
            continue
        if name not in manifest.buffers:
            msg = (
                f"{name}: expected a tensor with numbers, or a buffer of the file; got one on the meta "
                "device; make the model on the CPU"
            )
            raise ValueError(msg)
        wanted.append(name)
    return wanted
