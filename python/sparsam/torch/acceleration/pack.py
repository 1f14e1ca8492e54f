"""Packed layers for dense ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from sparsam.torch.acceleration.candidates import Candidate
from sparsam.torch.layers.modules import SparseConv2d, SparseLayer, SparseLinear, is_transposed
from torch import nn

__all__ = ["is_convolution", "pack"]


def pack(found: Iterable[Candidate], dtype: torch.dtype | None) -> dict[str, SparseLayer]:
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


def is_convolution(layer: nn.Module) -> bool:
    """Whether it is a Conv1d or Conv2d, and not linear."""
    return isinstance(layer, (nn.Conv1d, nn.Conv2d))


def _tie(layer: nn.Module) -> tuple[int, bool, int]:
    return id(layer.weight), is_transposed(layer), getattr(layer, "groups", 1)
