"""Packed weights for layers, in the forms that suit what the layers are called with."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from sparsam.torch.acceleration.candidate_layers import Candidate
from sparsam.torch.layers.packing import PackedLayer, is_transposed
from torch import nn

__all__ = ["is_convolution", "pack"]


def pack(
    found: Iterable[Candidate], dtype: torch.dtype | None, batches: Mapping[str, Collection[int]]
) -> dict[str, PackedLayer]:
    """Packed layers by name, not in the model yet; those whose weights are one Parameter share a packed one.

    Args:
        found: The layers.
        dtype: What to store values as.
        batches: The numbers of rows that linear layers are called with, by name.
    """
    packed: dict[str, PackedLayer] = {}
    first: dict[tuple[int, bool, int], PackedLayer] = {}
    rows: dict[int, set[int]] = {}
    for candidate in found:
        layer = candidate.layer
        key = _tie(layer)
        if key in first and "weight" in layer._parameters:
            made = PackedLayer(layer, first[key].weight)
        else:
            made = first[key] = PackedLayer.of(layer, dtype=dtype)
        packed[candidate.name] = made
        rows.setdefault(id(made.weight), set()).update(batches.get(candidate.name, ()))
    for made in first.values():
        if (wanted := rows[id(made.weight)]) and not is_convolution(made.layer):
            made.weight.prepare(sorted(wanted))
    return packed


def is_convolution(layer: nn.Module) -> bool:
    """Whether it is a Conv1d or Conv2d, and not linear."""
    return isinstance(layer, (nn.Conv1d, nn.Conv2d))


def _tie(layer: nn.Module) -> tuple[int, bool, int]:
    weight: Any = layer._parameters.get("weight")
    return id(layer if weight is None else weight), is_transposed(layer), getattr(layer, "groups", 1)
