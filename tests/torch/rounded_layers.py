"""Pruned layers and a network whose weights are packed as int8 or int4."""

from __future__ import annotations

import sparsam.torch
import torch
from torch import nn


def pruned(layer: nn.Linear, sparsity: float = 0.7) -> nn.Linear:
    with torch.no_grad():
        weight = layer.weight
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < sparsity] = 0
    return layer


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        pruned(nn.Linear(256, 512)), nn.GELU(), pruned(nn.Linear(512, 128)), nn.ReLU()
    ).eval()


def weight_of(layer: nn.Module) -> sparsam.torch.PackedTensor:
    assert isinstance(layer.weight, sparsam.torch.PackedTensor)
    return layer.weight
