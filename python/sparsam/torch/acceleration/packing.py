"""Packed weights for layers, in the forms that suit the layers' inputs."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from sparsam.sparse.int8 import MAX_COLUMNS, MAX_TAPS
from sparsam.torch.acceleration.candidate_layers import LARGEST_DENSITY, Candidate
from sparsam.torch.layers.packed_parameter import PackedParameter
from sparsam.torch.layers.packed_tensor import PackedTensor
from sparsam.torch.layers.packed_weight import INT4, ROUNDED
from sparsam.torch.layers.packing import (
    CONVOLUTIONS,
    PackedLayer,
    groups,
    is_embedding,
    is_transposed,
    phases_of,
)
from sparsam.torch.layers.phases import Phases
from torch import nn

__all__ = ["needs_examples", "obstacle", "pack"]


def pack(
    found: Iterable[Candidate],
    dtype: torch.dtype | None,
    shapes: Mapping[str, Collection[Sequence[int]]],
    to_itself: Collection[str] = (),
) -> dict[str, PackedLayer]:
    """Packed layers by name, not in the model yet; those whose weights are one Parameter share a packed one.

    Args:
        found: The layers.
        dtype: The dtype of stored values; int8 and int4 only in linear layers and attention (int8 also in
            embeddings and in convolutions that are not transposed).
        shapes: The shapes of the inputs that layers are called with, by name.
        to_itself: Attention layers whose query is always also the key and the value: the three projections
            are then one product.
    """
    layers: dict[str, PackedLayer] = {}
    made: dict[tuple[int, str, bool, int, Phases | None], PackedTensor] = {}
    rows: dict[int, set[int]] = {}
    for candidate in found:
        layer, weights = candidate.layer, []
        for module, name in candidate.weights:
            pieces = 1 if candidate.name in to_itself else groups(layer, name)
            transposed = is_transposed(layer)
            parameter = module._parameters.get(name)
            computed = (id(module), name) if parameter is None else (id(parameter), "")
            key = (*computed, transposed, pieces, phases_of(layer))
            if key not in made:
                made[key] = PackedTensor.pack(
                    getattr(module, name),
                    dtype=_values(candidate, dtype),
                    groups=pieces,
                    transposed=transposed,
                    looked_up=is_embedding(layer),
                    phases=phases_of(layer),
                )
            weights.append(PackedParameter(module, name, made[key]))
            rows.setdefault(id(made[key]), set()).update(
                _rows(layer, name, shape) for shape in shapes.get(candidate.name, ())
            )
        layers[candidate.name] = PackedLayer(layer, weights)
    for weight in made.values():
        if (wanted := rows[id(weight)]) and weight.ndim == 2:
            weight.prepare(sorted(wanted))
    return layers


def obstacle(candidate: Candidate, dtype: torch.dtype | None) -> str:
    """Why the weights of a layer cannot be stored as integers of that dtype; "" if they can, or need not."""
    layer = candidate.layer
    if _values(candidate, dtype) not in ROUNDED or is_embedding(layer):
        return ""
    for module, name in candidate.weights:
        weight = getattr(module, name)
        columns = weight.shape[0] if is_transposed(layer) else weight[:1].numel()
        if columns > MAX_COLUMNS:
            return f"more than {MAX_COLUMNS} weights for each output, too many to round"
        if max(weight.shape[2:], default=0) > MAX_TAPS:
            return f"a kernel longer than {MAX_TAPS}, too long to round"
        if not torch.isfinite(weight).all():
            return "its weight is not finite, which cannot be rounded"
    return ""


def _values(candidate: Candidate, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype of the values of a layer; without zeros int8 takes as much time as int4, and rounds less."""
    layer = candidate.layer
    if dtype is INT4 and candidate.density > LARGEST_DENSITY:
        dtype = torch.int8
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.MultiheadAttention, nn.Embedding)
    if dtype is torch.int8:
        kinds += (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    rounds = isinstance(layer, kinds) or is_transposed(layer)
    return None if dtype in ROUNDED and not rounds else dtype


def _rows(layer: nn.Module, name: str, shape: Sequence[int]) -> int:
    """How many rows a weight is multiplied with at once; a recurrent state has one per sequence."""
    if isinstance(layer, nn.RNNBase) and not name.startswith("weight_ih"):
        return max(1, shape[0 if layer.batch_first else 1]) if len(shape) == 3 else 1
    return max(1, math.prod(shape[:-1]))


def needs_examples(layer: nn.Module) -> bool:
    """Whether the inputs of a layer are unknown; those of a linear layer are, except for their rows."""
    kinds = (*CONVOLUTIONS, nn.Embedding, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
    return isinstance(layer, kinds)
