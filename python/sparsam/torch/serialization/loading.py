"""An accelerated model's file, checked against the model that it is loaded into, and what it puts there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import torch
from sparsam._core import Packed
from sparsam.torch.acceleration.fusion import Fused, Fusion, recognise_activation
from sparsam.torch.acceleration.installation import LayerSwap
from sparsam.torch.acceleration.memory import discard
from sparsam.torch.layers.packed_tensor import Content, Layout, PackedTensor
from sparsam.torch.layers.packed_weight import DTYPES, join, to_array
from sparsam.torch.layers.packing import PackedLayer, is_transposed
from sparsam.torch.serialization.manifest import Entry, Manifest, dtype_name
from torch import Tensor, nn

__all__ = ["Loaded"]


@dataclass(frozen=True)
class Loaded:
    """The content of a file that fits a model.

    Attributes:
        manifest: What its metadata says.
        packed: The packed weights, by the layers that they are stored under.
        rest: The tensors of the model's state dict that are not packed.
    """

    manifest: Manifest
    packed: dict[str, Content]
    rest: dict[str, Tensor]

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
        _check_modules(manifest, within)
        state = model.state_dict()
        names = _expected(manifest, state)
        if odd := sorted(names ^ set(handle.keys())):
            which = "lacks" if odd[0] in names else "holds, and the model does not,"
            more = f" and {len(odd) - 1} more" if odd[1:] else ""
            msg = f"the file {which} the tensor {odd[0]!r}{more}"
            raise ValueError(msg)
        tensors = {name: handle.get_tensor(name) for name in sorted(names)}
        packed = {n: _packed(n, e, tensors) for n, e in manifest.layers.items() if e.weight == n}
        rest = {name: tensors[manifest.tied.get(name, name)] for name in _dense_names(manifest, state)}
        _check_state(rest, state)
        return cls(manifest, packed, rest)

    def swap_in(self, model: nn.Module) -> int:
        """Gives the model these weights, and the packed layers; returns how many these are."""
        modules = dict(model.named_modules(remove_duplicate=False))
        swap = LayerSwap(model)
        weights = {name: self._weight(name, content, modules) for name, content in self.packed.items()}
        layers: dict[int, PackedLayer] = {}
        fused: set[int] = set()
        for name, entry in self.manifest.layers.items():
            module = modules[name]
            if id(module) not in layers:
                layer = PackedLayer(module, weights[entry.weight])
                layer.activation = entry.activation
                layers[id(module)] = swap.layers[name] = layer
        for name, into in self.manifest.fused.items():
            module = modules[name]
            if id(module) not in fused:
                fused.add(id(module))
                computing = tuple(layers[id(modules[one])] for one in into)
                replacement = Fused(module, tuple(layer.layer for layer in computing), into)
                places = tuple(swap.where[id(module)])
                swap.fusions.append(Fusion(computing[0].activation or "", computing, replacement, places))
        with torch.inference_mode(False), torch.no_grad():
            swap.show(swap.layers)
            for weight in discard(model, list(weights.values())):
                weight.original.copy_(weight.to_dense())  # type: ignore[union-attr]
                weight._content.changed = False
            model.load_state_dict(self.rest, strict=False)
        return len(swap.layers)

    def _weight(self, name: str, content: Content, modules: Mapping[str, nn.Module]) -> PackedTensor:
        content.original = modules[name]._parameters["weight"]
        content.changed = True
        assert content.original is not None
        content.learns = content.original.requires_grad
        return PackedTensor.of_content(content)


def _packed(name: str, entry: Entry, tensors: Mapping[str, Tensor]) -> Content:
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
    layout = Layout(entry.shape, dtype, entry.groups, entry.transposed)
    return Content(join(parts, entry.forms), layout)


def _check_modules(manifest: Manifest, modules: Mapping[str, nn.Module]) -> None:
    for name, entry in manifest.layers.items():
        module = modules.get(name)
        known = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) or (module and is_transposed(module))
        if not known or module is None or "weight" not in module._parameters:
            came = "missing" if module is None else f"a {type(module).__name__}"
            msg = f"layer {name!r} is {came} in the model: expected a dense layer with a weight of its own"
            if module is not None:
                msg += ", which torch.nn.utils.prune and parametrize do not compute any more"
            raise ValueError(msg)
        weight = module.get_parameter("weight")
        shape, dtype = tuple(weight.shape), dtype_name(weight.dtype)
        groups = getattr(module, "groups", 1)
        own = Entry(shape, dtype, groups, is_transposed(module), entry.activation, entry.forms, entry.weight)
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
