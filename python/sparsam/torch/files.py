"""Accelerated models on disk: one safetensors file with packed weights (docs/formats.md)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsam import _safetensors
from sparsam._atomic import publish
from sparsam._core import Packed
from sparsam.checkpoint import FILE_NAME
from sparsam.torch.candidates import is_convolution, places
from sparsam.torch.exchange import Exchange
from sparsam.torch.fusion import Fused, Fusion, recognise_activation
from sparsam.torch.manifest import Entry, Manifest, dtype_name
from sparsam.torch.memory import release
from sparsam.torch.modules import SparseConv2d, SparseLayer, SparseLinear, is_transposed
from sparsam.torch.weight import DTYPES, PackedWeight, from_array, to_array

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
    if isinstance(model, SparseLayer):
        msg = "save: expected a model that holds packed layers; got one layer; wrap it in torch.nn.Sequential"
        raise ValueError(msg)
    layers = {name: module for name, module in _every(model) if isinstance(module, SparseLayer)}
    names = {id(layer): name for name, layer in layers.items()}
    fused: dict[str, tuple[str, ...]] = {}
    for name, module in _every(model):
        if isinstance(module, Fused):
            if any(id(layer) not in names for layer in module.layers):
                msg = f"{name}: expected the layers that compute it in the same model; save the whole model"
                raise ValueError(msg)
            fused[name] = tuple(names[id(layer)] for layer in module.layers)
    entries: dict[str, Entry] = {}
    tensors: dict[str, Tensor] = {}
    stored: dict[int, str] = {}
    for name, layer in layers.items():
        packed = layer.packed
        first = stored.setdefault(id(packed), name)
        if first == name:
            tensors |= _packed_tensors(name, packed)
        dtype = dtype_name(packed.dtype)
        entries[name] = Entry(packed.shape, dtype, packed.groups, packed.transposed, layer.activation, first)
    rest, tied = _once(_rest(model.state_dict(), layers))
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
    if isinstance(model, SparseLayer) or any(isinstance(m, (SparseLayer, Fused)) for m in model.modules()):
        msg = f"{file}: expected a dense model to load into, got one with packed layers; restore() it first"
        raise ValueError(msg)
    with _safetensors.open_file(file, "pt") as handle:
        try:
            manifest = Manifest.from_metadata(handle.metadata() or {})
            modules = dict(_every(model))
            _check_modules(manifest, modules)
            state = model.state_dict()
            names = _expected(manifest, state)
            if odd := sorted(names ^ set(handle.keys())):
                here = "lacks" if odd[0] in names else "has, and the model not,"
                msg = f"the file {here} the tensor {odd[0]!r}" + (
                    f" and {len(odd) - 1} more" if odd[1:] else ""
                )
                raise ValueError(msg)
            tensors = {name: handle.get_tensor(name) for name in names}
            packed = {n: _packed(n, e, tensors) for n, e in manifest.layers.items() if e.weight == n}
            rest = {name: tensors[manifest.tied.get(name, name)] for name in _dense_names(manifest, state)}
            _check_state(rest, state)
        except (ValueError, SafetensorError, OverflowError) as error:
            msg = (
                f"{file}: expected an accelerated model as save() writes it, for this model: {error}; load it "
                "into the model it was made from, or save it anew"
            )
            raise ValueError(msg) from error
    _swap_in(model, modules, manifest, packed, rest)
    return len(manifest.layers)


def _swap_in(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    manifest: Manifest,
    packed: Mapping[str, PackedWeight],
    rest: Mapping[str, Tensor],
) -> None:
    exchange = Exchange(model, where := places(model))
    sparse: dict[int, SparseLayer] = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, entry in manifest.layers.items():
            modules[name].get_parameter("weight").copy_(packed[entry.weight].unpack())
        model.load_state_dict(dict(rest), strict=False)
        for name, entry in manifest.layers.items():
            module, weight = modules[name], packed[entry.weight]
            if id(module) not in sparse:
                kind = SparseConv2d if is_convolution(module) else SparseLinear
                sparse[id(module)] = kind(module, dtype=weight.value_dtype, activation=entry.activation)
                sparse[id(module)].packed = weight
                exchange.layers[name] = sparse[id(module)]
        for name, into in manifest.fused.items():
            module = modules[name]
            layers = tuple(sparse[id(modules[n])] for n in into)
            activation = manifest.layers[into[0]].activation or ""
            exchange.fusions.append(Fusion(activation, Fused(module, layers, into), tuple(where[id(module)])))
        exchange.install()
        release(model, list(exchange.layers.values()))


def _every(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules under all their names."""
    yield from model.named_modules(remove_duplicate=False)


def _rest(state: Mapping[str, Any], layers: Mapping[str, SparseLayer]) -> dict[str, Tensor]:
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


def _packed(name: str, entry: Entry, tensors: Mapping[str, Tensor]) -> PackedWeight:
    """The packed weight of a layer; whatever does not fit together is a ValueError."""
    bits, values = tensors[f"{name}.weight.bits"], tensors[f"{name}.weight.values"]
    rows, cols = entry.shape[0], math.prod(entry.shape[1:])
    if entry.transposed:
        rows, cols = cols, rows
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (rows, (cols + 7) // 8):
        got = f"{dtype_name(bits.dtype)} {tuple(bits.shape)}"
        msg = f"layer {name!r}: expected bits as uint8 {(rows, (cols + 7) // 8)}, got {got}"
        raise ValueError(msg)
    if values.dtype not in DTYPES or values.ndim != 1:
        msg = f"layer {name!r}: expected a vector of floats as values, got {dtype_name(values.dtype)}"
        raise ValueError(msg)
    parts = []
    for lines in np.split(bits.numpy(), entry.groups):
        count = int(np.unpackbits(lines).sum(dtype=np.int64))
        parts.append(Packed.from_parts(len(lines), cols, lines, to_array(values[:count])))
        values = values[count:]
    if len(values):
        msg = f"layer {name!r}: expected a value for each bit, got {len(values)} more"
        raise ValueError(msg)
    dtype: torch.dtype = getattr(torch, entry.dtype)
    return PackedWeight(tuple(parts), entry.shape, dtype, transposed=entry.transposed)


def _check_modules(manifest: Manifest, modules: Mapping[str, nn.Module]) -> None:
    for name, entry in manifest.layers.items():
        module = modules.get(name)
        known = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) or (module and is_transposed(module))
        if not known or module is None or "weight" not in module._parameters:
            came = "missing" if module is None else f"a {type(module).__name__}"
            msg = f"layer {name!r} is {came} in the model: expected a dense layer with a weight of its own"
            raise ValueError(msg)
        weight = module.get_parameter("weight")
        shape, dtype = tuple(weight.shape), dtype_name(weight.dtype)
        groups = getattr(module, "groups", 1)
        own = Entry(shape, dtype, groups, is_transposed(module), entry.activation, entry.weight)
        if own != entry or weight.device.type != "cpu":
            msg = (
                f"layer {name!r} is {entry.describe()}, and in the model {own.describe()} on {weight.device}"
            )
            raise ValueError(msg)
    for name, into in manifest.fused.items():
        module, activation = modules.get(name), manifest.layers[into[0]].activation
        if (
            module is None
            or any(True for _ in module.children())
            or recognise_activation(module) != activation
        ):
            msg = f"activation {name!r} is {activation}, and in the model another"
            raise ValueError(msg)


def _dense_names(manifest: Manifest, state: Mapping[str, Any]) -> list[str]:
    packed = {f"{name}.weight" for name in manifest.layers}
    return [name for name in state if name not in packed]


def _expected(manifest: Manifest, state: Mapping[str, Any]) -> set[str]:
    """The names of the tensors that the file must hold."""
    own = {entry.weight for entry in manifest.layers.values()}
    names = {f"{name}.weight.{part}" for name in own for part in ("bits", "values")}
    dense = _dense_names(manifest, state)
    if strange := sorted(manifest.tied.keys() - set(dense)):
        msg = f"the file ties the tensor {strange[0]!r}, which the model has not"
        raise ValueError(msg)
    return names | {manifest.tied.get(name, name) for name in dense}


def _check_state(rest: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    for name, tensor in rest.items():
        own = state[name]
        if not isinstance(own, Tensor) or own.shape != tensor.shape or own.dtype != tensor.dtype:
            got = f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}"
            wanted = f"{dtype_name(own.dtype)} {tuple(own.shape)}" if isinstance(own, Tensor) else "none"
            msg = f"tensor {name!r} is {got} in the file, and {wanted} in the model"
            raise ValueError(msg)
