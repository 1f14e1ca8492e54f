"""Which layers of a model could be packed, and why others could not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.nn.utils import parametrize, prune

import torch
from sparsam.torch.acceleration.report import LayerRow
from sparsam.torch.layers.modules import SparseConv2d, SparseLayer, SparseLinear, is_transposed
from sparsam.torch.layers.packed_weight import DTYPES
from torch import Tensor, nn

__all__ = ["Candidate", "Place", "candidates", "has_hooks", "is_convolution", "pack", "places"]

_MOST = 0.9  # the density up to which a layer is tried
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_WEIGHTY = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.Bilinear,
)

Place = tuple[nn.Module, str]


@dataclass(frozen=True)
class Candidate:
    """A layer that could be packed.

    Attributes:
        name: Its name in the model.
        layer: The layer.
        density: The share of its weights that are not zero.
    """

    name: str
    layer: nn.Module
    density: float

    @property
    def kind(self) -> str:
        """The name of its class."""
        return _kind(self.layer).__name__

    def row(self, reason: str = "") -> LayerRow:
        """What the report says of it."""
        weight: Any = self.layer.weight
        return LayerRow(
            self.name,
            self.kind,
            tuple(weight.shape),
            self.density,
            dense_bytes=weight.nbytes,
            reason=reason,
        )


def candidates(model: nn.Module) -> tuple[list[Candidate], dict[str, LayerRow]]:
    """The layers that could be packed, and rows by name for those that could not; in the model's order."""
    found: list[Candidate] = []
    left: dict[str, LayerRow] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLayer):
            packed = layer.packed
            left[name] = LayerRow(
                name, type(layer).__name__, packed.shape, packed.density, reason="packed already"
            )
        elif _kind(layer) in {nn.Linear, nn.Conv1d, nn.Conv2d} or is_transposed(layer):
            if reason := _obstacle(layer):
                left[name] = LayerRow(name, _kind(layer).__name__, _shape(layer), reason=reason)
                continue
            candidate = Candidate(name, layer, _density(layer))
            if candidate.density > _MOST:
                left[name] = candidate.row("too few zeros")
            else:
                found.append(candidate)
        elif isinstance(layer, _WEIGHTY):
            kind = type(layer).__name__
            left[name] = LayerRow(name, kind, _shape(layer), reason=f"no kernel for {kind}")
        else:
            left |= {f"{name}.{own}": row for own, row in _stacks(name, layer)}
    return found, left


def _stacks(name: str, module: nn.Module) -> Iterator[tuple[str, LayerRow]]:
    """The Parameters of a module that are several matrices in one, as those of experts."""
    for own, weight in module._parameters.items():
        if weight is None or weight.ndim != 3 or min(weight.shape) < 2 or weight.layout is not torch.strided:
            continue
        density = int(torch.count_nonzero(weight)) / weight.numel()
        yield (
            own,
            LayerRow(
                f"{name}.{own}",
                type(module).__name__,
                tuple(weight.shape),
                density,
                dense_bytes=weight.nbytes,
                reason=f"no kernel for {weight.shape[0]} matrices in one Parameter",
            ),
        )


def is_convolution(layer: nn.Module) -> bool:
    """Whether it is a Conv1d or Conv2d, and not linear."""
    return isinstance(layer, (nn.Conv1d, nn.Conv2d))


def pack(found: list[Candidate], dtype: torch.dtype | None) -> dict[str, SparseLayer]:
    """Packed layers by name; those whose weights are one Parameter share one packed weight."""
    packed: dict[str, SparseLayer] = {}
    first: dict[tuple[int, bool, int], SparseLayer] = {}
    for candidate in found:
        layer = candidate.layer
        kind = SparseConv2d if is_convolution(layer) else SparseLinear
        tied = first.get(key := _tie(layer))
        packed[candidate.name] = sparse = kind(layer, dtype=dtype)
        if tied is not None:
            sparse.packed = tied.packed
        elif "weight" in layer._parameters:
            first[key] = sparse
    return packed


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


def _kind(layer: nn.Module) -> type[Any]:
    """Its class before torch.nn.utils.parametrize changed that."""
    return type(layer).__bases__[0] if parametrize.is_parametrized(layer) else type(layer)


def _tie(layer: nn.Module) -> tuple[int, bool, int]:
    return id(layer.weight), is_transposed(layer), getattr(layer, "groups", 1)


def _obstacle(layer: nn.Module) -> str:
    """Why a layer of a kind that can be packed cannot be."""
    if has_hooks(layer):
        return "has hooks"
    for hook in layer._forward_pre_hooks.values():
        hook(layer, ())  # of torch.nn.utils.prune: the weight as the next call would compute it
    weight: Any = layer.weight
    if type(weight) not in {Tensor, nn.Parameter}:
        return f"its weight is a {type(weight).__name__}"
    if weight.device.type != "cpu":
        return f"its weight is on {weight.device}"
    if weight.layout is not torch.strided:
        return f"its weight is {str(weight.layout).removeprefix('torch.')}"
    if weight.dtype not in DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    return "" if weight.numel() else "it has no weights"


def _density(layer: nn.Module) -> float:
    weight: Any = layer.weight
    return int(torch.count_nonzero(weight)) / int(weight.numel())


def _shape(layer: nn.Module) -> tuple[int, ...]:
    weight = getattr(layer, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else ()
