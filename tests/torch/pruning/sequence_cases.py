"""A small network with branches, and the state of it pruned in sequence."""

from __future__ import annotations

from pruning_models import normal

import torch
from torch import Tensor, nn


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 20)
        self.gate = nn.Linear(12, 20, bias=False)
        self.down = nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        result: Tensor = x + self.down(torch.tanh(self.up(y)) * self.gate(y))
        return result


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(6, 12)
        self.blocks = nn.ModuleList([Branch(), Branch()])
        self.end = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.end(x)
        return result


def net() -> tuple[Net, list[Tensor]]:
    torch.manual_seed(0)
    return Net().double().eval(), [normal(i, 10, 5, 6).double() for i in range(8)]
