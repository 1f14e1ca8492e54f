"""Which layers of a model could be packed, and why others could not."""

from __future__ import annotations

import fnmatch
import itertools
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

import torch
from sparsam.torch.acceleration.layer_row import LayerRow
from sparsam.torch.layers.packed_weight import DTYPES
from sparsam.torch.layers.packing import (
    PackedLayer,
    dense_class,
    is_embedding,
    is_packed,
    packable,
    packed_together,
)
from sparsam.torch.layers.unpacked_tensor import UnpackedTensor
from torch import Tensor, nn

__all__ = ["LARGEST_DENSITY", "Candidate", "Place", "candidates", "has_hooks", "places"]

LARGEST_DENSITY = 0.9  # the density up to which a layer is tried
_SCALE = 4  # bytes of the scale of a row of int8
_HEADER = 320  # the most bytes that surround the rows
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_UNSUPPORTED = (nn.modules.conv._ConvNd, nn.Bilinear)

Place = tuple[nn.Module, str]


@dataclass(frozen=True)
class Candidate:
    """A layer that could be packed.

    Attributes:
        name: Its name in the model.
        layer: The layer.
        weights: The modules and names of its weights that have enough zeros.
        density: The share of these that are not zero.
    """

    name: str
    layer: nn.Module
    weights: tuple[Place, ...]
    density: float

    @property
    def kind(self) -> str:
        """The name of its class."""
        return dense_class(self.layer).__name__

    def row(self, reason: str = "") -> LayerRow:
        """Its row in the report."""
        weights = [_weight(place) for place in self.weights]
        return LayerRow(
            self.name,
            self.kind,
            tuple(weights[0].shape),
            self.density,
            dense_bytes=sum(weight.numel() * weight.itemsize for weight in weights),
            reason=reason,
        )


def candidates(
    model: nn.Module, exclude: Sequence[str] = (), *, embeddings: bool = False, outputs: bool = False
) -> tuple[list[Candidate], dict[str, LayerRow]]:
    """The layers that could be packed, and rows by name for those that could not; in the model's order.

    Args:
        model: The model.
        exclude: Patterns of names of layers that stay dense.
        embeddings: Whether embeddings may be packed.
        outputs: Whether linear layers that have the weight of an embedding are tried without zeros too.
    """
    found, left = _every_candidate(model, embeddings=embeddings, outputs=outputs)
    names = {one.name for one in found} | left.keys()
    for pattern in exclude:
        if not fnmatch.filter(names, pattern):
            message = (
                f"exclude: expected patterns of layer names; got {pattern!r}, which matches none of this "
                "model's; correct it, or leave it out"
            )
            warnings.warn(message, stacklevel=3)
    excluded = [one for one in found if any(fnmatch.fnmatchcase(one.name, pattern) for pattern in exclude)]
    left |= {one.name: one.row("excluded") for one in excluded}
    return [one for one in found if one not in excluded], left


def _every_candidate(
    model: nn.Module, *, embeddings: bool, outputs: bool
) -> tuple[list[Candidate], dict[str, LayerRow]]:
    found: list[Candidate] = []
    left: dict[str, LayerRow] = {}
    within: set[int] = set()  # layers that belong to others
    users = _users(model)
    for name, layer in model.named_modules():
        kind = dense_class(layer).__name__
        if id(layer) in within or (is_embedding(layer) and not embeddings and not is_packed(layer)):
            continue
        own = packable(layer)
        within.update(id(module) for module, _ in own)
        if (packed := PackedLayer.find(layer)) is not None:
            left[name] = LayerRow(
                name, kind, tuple(packed.weight.shape), packed.density, reason="packed already"
            )
        elif own:
            if reason := _obstacle(own):
                left[name] = LayerRow(name, kind, _shape(own), reason=reason)
                continue
            if is_embedding(layer):
                candidate = Candidate(name, layer, own, _density(own))
                if reason := _obstacle_of_embedding(layer, users):
                    left[name] = candidate.row(reason)
                else:
                    found.append(candidate)
                continue
            parts = [own] if packed_together(layer) else [(place,) for place in own]
            most = 1.0 if outputs and _is_output(layer, users) else LARGEST_DENSITY
            pruned = tuple(itertools.chain(*(part for part in parts if _density(part) <= most)))
            candidate = Candidate(name, layer, pruned or own, _density(pruned or own))
            if pruned:
                found.append(candidate)
            else:
                left[name] = candidate.row("too few zeros")
        elif isinstance(layer, _UNSUPPORTED):
            left[name] = LayerRow(name, kind, _shape([(layer, "weight")]), reason=f"no kernel for {kind}")
        elif not isinstance(layer, parametrize.ParametrizationList):  # whose Parameters are no weights yet
            left |= {row.name: row for row in _stacks(name, layer)}
    return found, left


def _stacks(name: str, module: nn.Module) -> Iterator[LayerRow]:
    """The Parameters of a module that are several matrices in one, as those of experts."""
    for own, weight in module._parameters.items():
        if weight is None or weight.ndim != 3 or min(weight.shape) < 2 or weight.layout is not torch.strided:
            continue
        yield LayerRow(
            f"{name}.{own}".removeprefix("."),
            type(module).__name__,
            tuple(weight.shape),
            int(torch.count_nonzero(weight)) / weight.numel(),
            dense_bytes=weight.nbytes,
            reason=f"no kernel for {weight.shape[0]} matrices in one Parameter",
        )


def places(model: nn.Module) -> Mapping[int, list[Place]]:
    """Where in the model each module is, by its id: (parent, attribute)."""
    found: dict[int, list[Place]] = defaultdict(list)
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                found[id(child)].append((parent, attribute))
    return found


def has_hooks(module: nn.Module) -> bool:
    """Whether calls of it do more than its forward: hooks (those of torch's pruning aside) or a patch."""
    hooks = [hook for kind in _HOOKS for hook in getattr(module, kind).values()]
    return "forward" in vars(module) or any(not isinstance(hook, prune.BasePruningMethod) for hook in hooks)


def _obstacle(places: Sequence[Place]) -> str:
    """Why the weights of a layer cannot be packed although its kind can; "" if they can."""
    for module, name in places:
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (WeightNorm, SpectralNorm)) and hook.name == name:
                return f"its weight is computed by a hook of torch.nn.utils, {type(hook).__name__}"
        if has_hooks(module):
            return "has hooks"
        for hook in module._forward_pre_hooks.values():
            hook(module, ())  # of torch.nn.utils.prune: the weight as the next call would compute it
        if isinstance(module, nn.RNNBase) and parametrize.is_parametrized(module, name):
            return "its weights are computed by torch.nn.utils.parametrize"
        weight = _weight((module, name))
        if type(weight) not in {Tensor, nn.Parameter, UnpackedTensor}:
            return f"its weight is a {type(weight).__name__}"
        if weight.device.type != "cpu":
            return f"its weight is on {weight.device}"
        if weight.layout is not torch.strided:
            return f"its weight is {str(weight.layout).removeprefix('torch.')}"
        if weight.dtype not in DTYPES:
            return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
        if not weight.numel():
            return "it has no weights"
    return ""


def _users(model: nn.Module) -> Mapping[int, list[tuple[str, nn.Module]]]:
    """The modules that have a Parameter, by its id, with their names in the model."""
    found: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                found[id(parameter)].append((name, module))
    return found


def _obstacle_of_embedding(layer: nn.Module, users: Mapping[int, list[tuple[str, nn.Module]]]) -> str:
    """Why an embedding should not be stored as rows of int8; "" if it can be."""
    if layer.max_norm is not None:
        return "max_norm changes its weight as it is used"
    weight = _weight((layer, "weight"))
    if weight.numel() + _SCALE * len(weight) + _HEADER >= weight.numel() * weight.itemsize:
        return "rows of int8 would take no less memory"
    for name, user in users.get(id(layer._parameters.get("weight")), ()):
        if not is_embedding(user):
            return f"its weight is also that of {name}"
    return ""


def _is_output(layer: nn.Module, users: Mapping[int, list[tuple[str, nn.Module]]]) -> bool:
    """Whether it is a linear layer with the weight of an embedding, as the last one of a language model."""
    others = users.get(id(layer._parameters.get("weight")), ())
    return isinstance(layer, nn.Linear) and any(is_embedding(user) for _, user in others)


def _density(places: Sequence[Place]) -> float:
    weights = [_weight(place) for place in places]
    return sum(int(torch.count_nonzero(weight)) for weight in weights) / sum(w.numel() for w in weights)


def _shape(places: Sequence[Place]) -> tuple[int, ...]:
    weight = getattr(*places[0], None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else ()


def _weight(place: Place) -> Tensor:
    return getattr(*place)  # type: ignore[no-any-return]
