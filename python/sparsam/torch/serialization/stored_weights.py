"""Loading of a file's pruned weights into a model."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch.nn.utils import prune

import torch
from sparsam._core import Packed
from sparsam.torch.acceleration.fused_modules import fuse_by_name
from sparsam.torch.acceleration.fusion import Fused, Fusion
from sparsam.torch.acceleration.installation import LayerSwap
from sparsam.torch.acceleration.memory import discard
from sparsam.torch.layers.packed_content import Content, Layout, pack_dense, taps_of
from sparsam.torch.layers.packed_parameter import PackedParameter
from sparsam.torch.layers.packed_tensor import PackedTensor
from sparsam.torch.layers.packed_weight import INT4, forms_here, join
from sparsam.torch.layers.packing import (
    PackedLayer,
    is_embedding,
    is_transposed,
    packed_layers,
    phases_of,
)
from sparsam.torch.layers.phases import Phases
from sparsam.torch.serialization.encoding import Encoded, matrix_shape
from sparsam.torch.serialization.manifest import Layer, Manifest, place
from sparsam.torch.transformers_models import announce
from sparsam.torch.transformers_switch import switch_by_name
from torch import Tensor, nn

__all__ = ["StoredWeights"]

_Use: TypeAlias = "tuple[str, int, tuple[str, ...]]"  # stored name, groups, forms; () for a dense tensor


class StoredWeights:
    """The weights that a file holds as values and bits.

    `add` each, then `pack`, `unpack` and `install`, in this order: packed weights are put in before dense
    ones, so that a model on the meta device never needs memory for both.

    Attributes:
        manifest: The file's description of them.
    """

    def __init__(self, manifest: Manifest) -> None:
        """Starts without weights."""
        self.manifest = manifest
        self._parts: dict[_Use, list[Packed]] = {}
        self._layers: dict[tuple[int, str], PackedLayer] = {}  # by the id of the module, and the attribute
        self._own = {".".join(place(n)) for n, layer in manifest.layers.items() if layer.computed is None}

    def add(self, name: str, encoded: Encoded) -> None:
        """Adds one weight.

        Raises:
            ValueError: Values and bits do not fit together.
        """
        weight = self.manifest.weights[name]
        rows, cols = matrix_shape(weight.shape, transposed=weight.transposed)
        layers = self.manifest.layers.items()
        uses = {self._use(n, layer) for n, layer in layers if self._uses(n, layer, name)}
        for use in uses or {(name, 1, ())}:
            kind = encoded.rounded
            if (kind and "panels" in use[2]) or (kind != "int8" and "rows" in use[2]):
                kinds = f"others than 'panels' for {kind or 'int8'} values"
                kinds += ", and than 'rows' for others" if "rows" in use[2] else ""
                msg = f"weight {name!r}: field forms: expected {kinds}; got {[*use[2]]}; save the model again"
                raise ValueError(msg)
            if "slots" in use[2] and len(weight.shape) > 2 and kind != "int8":
                values = "int8 values for ['slots'] of a convolution"
                msg = f"weight {name!r}: expected {values}; got {kind or 'floats'}; save the model again"
                raise ValueError(msg)
            self._parts[use] = encoded.parts(name, rows, cols, use[1], taps_of(weight.shape))

    def missing(self) -> list[str]:
        """The names of the weights that were not added."""
        return sorted(self.manifest.weights.keys() - {use[0] for use in self._parts})

    def pack(self, model: nn.Module) -> None:
        """Puts packed weights into layers whose weight is a tensor of its own, and frees their dense ones."""
        modules = dict(model.named_modules(remove_duplicate=False))
        claims = self._claims(model)
        users: dict[tuple[_Use, Phases | None], dict[tuple[int, str], tuple[nn.Module, Layer]]] = {}
        for name, layer in self.manifest.layers.items():
            if layer.computed is None:
                path, attribute = place(name)
                module = modules[path]
                packed_as = self._use(name, layer), phases_of(module)
                users.setdefault(packed_as, {})[id(module), attribute] = module, layer
        for (use, phases), found in users.items():
            (_, attribute), (module, _) = next(iter(found.items()))
            weight = self._packed_tensor(use, phases, module._parameters[attribute], claims)
            for key, (module, layer) in found.items():
                one = PackedParameter(module, key[1], weight)
                packed = self._layers[key] = PackedLayer(module, [one])
                packed.activation = layer.activation
                packed.install()
            for kept in discard(model, [weight]):
                if kept.original is not None and not kept.original.is_meta:
                    kept.original.copy_(kept.to_dense())

    def unpack(self, model: nn.Module) -> None:
        """Fills the tensors of the model that are dense in memory and pruned in the file."""
        found: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
        found |= dict(model.named_parameters(remove_duplicate=False))
        other: dict[str, Tensor] = {}
        filled: set[int] = set()
        for name in model.state_dict(keep_vars=True):
            stored = self.manifest.stored(name)
            if stored not in self.manifest.weights or name in self._own:
                continue
            if name not in found:
                other[name] = self._dense(stored)
            elif id(found[name]) not in filled:
                filled.add(id(found[name]))
                found[name].copy_(self._dense(stored))
        if other:
            model.load_state_dict(other, strict=False)
        self._parts.clear()

    def install(self, model: nn.Module) -> int:
        """Packs the weights that are computed, puts activations into their layers, and fuses modules.

        Returns:
            The number of packed layers.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        swap = LayerSwap(model)
        for name, layer in self.manifest.layers.items():
            path, attribute = place(name)
            module = modules[path]
            key = id(module), attribute
            if key not in self._layers:
                self._layers[key] = _pack_computed(module, attribute, layer)
            if self._layers[key] not in swap.layers.values():
                swap.layers[name] = self._layers[key]
        seen: set[int] = set()
        for name, into in self.manifest.fused.items():
            module = modules[name]
            if id(module) in seen:
                continue
            seen.add(id(module))
            computing = tuple(self._layers[id(modules[one]), "weight"] for one in into)
            replacement = Fused(module, tuple(layer.layer for layer in computing), into)
            places = tuple(swap.where[id(module)])
            swap.fusions.append(Fusion(computing[0].activation or "", computing, replacement, places))
        named = {id(layer): name for name, layer in swap.layers.items()}
        for fusion in swap.fusions:
            fusion.replacement.into = tuple(named[id(layer)] for layer in fusion.layers)
        swap.show(swap.layers)
        switch_by_name(model, self.manifest.attention)
        fuse_by_name(model, self.manifest.modules)
        announce(model)
        return len(packed_layers(model))

    def _uses(self, name: str, layer: Layer, stored: str) -> bool:
        return layer.computed is None and self.manifest.stored_weight(name) == stored

    def _use(self, name: str, layer: Layer) -> _Use:
        return self.manifest.stored_weight(name), layer.groups, layer.forms

    def _claims(self, model: nn.Module) -> dict[int, set[str]]:
        """Id of a Parameter of the model -> the names under which the file stores it."""
        claims: dict[int, set[str]] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            claims.setdefault(id(tensor), set()).add(self.manifest.stored(name))
        return claims

    def _packed_tensor(
        self, use: _Use, phases: Phases | None, dense: Any, claims: dict[int, set[str]]
    ) -> PackedTensor:
        stored, groups, forms = use
        weight = self.manifest.weights[stored]
        looked_up = forms == ("rows",)
        layout = Layout(tuple(weight.shape), dense.dtype, groups, weight.transposed, looked_up, phases)
        one = len(claims[id(dense)]) == 1  # else restoring must not give one Parameter two values
        if phases is None:
            parts = self._parts[use]
            data = join(parts, forms_here(parts, forms))
        else:
            values = self._dense(stored)
            data = pack_dense(values, layout, values.dtype, forms)
        content = Content(data, layout, dense if one else None)
        content.trainable = dense.requires_grad
        return PackedTensor.of_content(content)

    def _dense(self, stored: str) -> Tensor:
        parts = next(parts for use, parts in self._parts.items() if use[0] == stored)
        weight = self.manifest.weights[stored]
        rows, cols = matrix_shape(weight.shape, transposed=weight.transposed)
        matrix = Encoded.unpacked(parts, (rows, cols))
        return matrix.T if weight.transposed else matrix.reshape(weight.shape)


def _pack_computed(module: nn.Module, attribute: str, layer: Layer) -> PackedLayer:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            hook(module, ())
    dtype, transposed = getattr(torch, layer.computed or ""), is_transposed(module)
    dense = getattr(module, attribute)
    weight = PackedTensor.pack(
        dense,
        dtype=dtype,
        groups=layer.groups,
        transposed=transposed,
        looked_up=is_embedding(module),
        phases=phases_of(module),
    )
    packed = PackedLayer(module, [PackedParameter(module, attribute, weight)])
    packed.activation = layer.activation
    if packed.packed.dtype is not INT4 and packed.packed.forms != layer.forms:
        weight._content.data = packed.packed.with_forms(layer.forms)
    return packed
