"""Layers with zeros, and packed copies of them."""

from __future__ import annotations

import copy
from typing import Any

from torch.nn import functional

import torch
from sparsam.torch import pack

ACTIVATIONS: dict[str, Any] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}


def pruned(layer: Any, sparsity: float = 0.8, seed: int = 0) -> Any:
    """The layer with that share of its weights zero, but for the first, which is not."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(layer.weight.shape, generator=generator) >= sparsity)
        layer.weight.view(-1)[0] = 1.0
    return layer


def packed_copy(layer: Any, **options: Any) -> Any:
    """A packed copy of the layer, the layer itself left as it is."""
    return pack(copy.deepcopy(layer), **options)


def fix(layer: Any, *forms: str, **options: Any) -> Any:
    """A packed copy of the layer, in those forms."""
    twin = packed_copy(layer, **options)
    twin.weight._content.data = twin.weight.packed.with_forms(forms)
    assert twin.weight.packed.forms == forms
    return twin
