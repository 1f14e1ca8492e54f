"""Accelerated models on disk: one safetensors file with packed weights (docs/formats.md)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import save_file

import torch
from sparsam.checkpoint import FILE_NAME, safetensors_format
from sparsam.checkpoint.atomic import publish
from sparsam.torch.acceleration.fusion import Fused
from sparsam.torch.layers.packed_weight import PackedWeight, from_array
from sparsam.torch.layers.packing import PackedLayer, is_packed
from sparsam.torch.serialization.loading import Loaded
from sparsam.torch.serialization.manifest import Entry, Manifest
from torch import Tensor, nn

__all__ = ["load", "save"]

StrPath: TypeAlias = "str | os.PathLike[str]"


def save(model: nn.Module, directory: StrPath) -> None:
    """Writes `model.safetensors` into a directory: packed weights, and the rest of the state dict as it is.

    Tensors that share their memory, or their packed weight, are written once. The file is replaced whole or
    not at all.

    Args:
        model: A model, accelerated or with packed layers placed by hand.
        directory: Is made if it is missing.

    Raises:
        TypeError: The state dict holds something else than dense tensors.
        ValueError: The model is itself a packed layer, or lacks the layers that compute a fused activation.
        OSError: The file cannot be written.
    """
    layers = {name: found for name, module in _every(model) if (found := _own_packed(module)) is not None}
    if "" in layers:
        msg = "save: expected a model that holds packed layers; got one layer; wrap it in torch.nn.Sequential"
        raise ValueError(msg)
    fused = _fused(model, {id(layer.layer): name for name, layer in layers.items()})
    activations = {name for into in fused.values() for name in into}
    entries: dict[str, Entry] = {}
    tensors: dict[str, Tensor] = {}
    stored: dict[int, str] = {}
    for name, layer in layers.items():
        first = stored.setdefault(id(layer.weight), name)
        if first == name:
            tensors |= _packed_tensors(name, layer.packed)
        activation = layer.activation if name in activations or not _fuses(model, layer) else None
        entries[name] = Entry.of(layer, activation, first)
    rest, tied = _once(_rest(model.state_dict(keep_vars=True), layers))
    if clash := sorted(rest.keys() & tensors.keys()):
        msg = f"{clash[0]}: expected no tensor of that name beside the packed weights; rename it"
        raise ValueError(msg)
    tensors |= rest
    metadata = Manifest(entries, fused, tied).to_metadata()
    folder = Path(directory)
    folder.mkdir(exist_ok=True)

    def write(file: Path) -> None:
        try:
            save_file(tensors, file, metadata)
        except SafetensorError as error:
            msg = f"{folder}: expected to write {len(tensors)} tensors there, got: {error}"
            raise OSError(msg) from error

    publish({folder / FILE_NAME: write})


def load(directory: StrPath, model: nn.Module) -> int:
    """Reads what `save` wrote into a dense model of the same architecture, and swaps its packed layers in.

    Everything is checked before anything changes. `restore(model)` gives the dense model with these weights.

    Args:
        directory: Holds `model.safetensors`.
        model: The dense model, on the CPU, of the dtypes that were saved.

    Returns:
        The number of packed layers.

    Raises:
        ValueError: The file is damaged or something else, or belongs to another model.
        OSError: It cannot be read.
    """
    file = Path(directory) / FILE_NAME
    if any(is_packed(module) or isinstance(module, Fused) for module in model.modules()):
        msg = f"{file}: expected a dense model to load into, got one with packed layers; restore() it first"
        raise ValueError(msg)
    with safetensors_format.open_file(file, "pt") as handle:
        try:
            loaded = Loaded.read(handle, model)
        except (ValueError, SafetensorError, OverflowError) as error:
            msg = (
                f"{file}: expected an accelerated model as save() writes it, for this model: {error}; "
                "load it into the model it was made from, or save it again"
            )
            raise ValueError(msg) from error
    return loaded.swap_in(model)


def _every(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules under all their names."""
    yield from model.named_modules(remove_duplicate=False)


def _own_packed(module: nn.Module) -> PackedLayer | None:
    """A layer with a packed weight of its own: one that is computed from Parameters is saved as these are."""
    return PackedLayer.find(module) if "weight" in module._parameters else None


def _fused(model: nn.Module, names: Mapping[int, str]) -> dict[str, tuple[str, ...]]:
    """Activations by name, and the layers that compute them, all of which are saved packed."""
    inside = {id(module) for module in model.modules()}
    fused: dict[str, tuple[str, ...]] = {}
    for name, module in _every(model):
        if isinstance(module, Fused):
            if any(id(layer) not in inside for layer in module.layers):
                msg = f"{name}: expected the layers that compute it in the same model; save the whole model"
                raise ValueError(msg)
            if all(id(layer) in names for layer in module.layers):
                fused[name] = tuple(names[id(layer)] for layer in module.layers)
    return fused


def _fuses(model: nn.Module, layer: PackedLayer) -> bool:
    """Whether the activation of a layer stands for a module of the model."""
    return any(
        layer.layer is one for module in model.modules() if isinstance(module, Fused) for one in module.layers
    )


def _rest(state: Mapping[str, Any], layers: Mapping[str, PackedLayer]) -> dict[str, Tensor]:
    """The state dict without the weights of packed layers."""
    packed = {f"{name}.weight" for name in layers}
    rest = {name: value for name, value in state.items() if name not in packed}
    for name, value in rest.items():
        if not isinstance(value, Tensor) or value.is_sparse or value.is_quantized or value.is_nested:
            got = type(value).__name__
            msg = f"{name}: expected a dense tensor in the state dict, got {got}; save it apart"
            raise TypeError(msg)
    return rest


def _once(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that have memory of their own, and under which names they come again."""
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and key in first:
            tied[name] = first[key]
            continue
        first[key] = name
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        kept[name] = tensor.detach() if whole else tensor.detach().contiguous().clone()
    return kept, tied


def _packed_tensors(name: str, packed: PackedWeight) -> dict[str, Tensor]:
    bits = np.concatenate([part.bits() for part in packed.parts])
    values = torch.cat([from_array(part.values()) for part in packed.parts])
    return {f"{name}.weight.bits": torch.from_numpy(bits), f"{name}.weight.values": values}
