"""What `sparsam.torch.Pruner.step` adds to a step of the optimizer: 10.6 million weights in 18 layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import torch
from sparsam.torch import Pruner
from torch import nn


def trained(updates: bool) -> tuple[torch.optim.Optimizer, Pruner, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(384, 1536, bias=False) for _ in range(18)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    schedule: dict[str, Any] = {"schedule": "linear", "end": 10**6, "every": 1} if updates else {}
    pruner = Pruner(model, target_sparsity=0.8, **({"schedule": "one_shot"} | schedule), initial_sparsity=0.5)
    pruner.step()
    return optimizer, pruner, model


@pytest.mark.benchmark(group="training step")
@pytest.mark.parametrize("what", ["optimizer", "hold zeros", "new masks"])
def test_step(benchmark: Any, what: str) -> None:
    optimizer, pruner, model = trained(what == "new masks")
    benchmark.pedantic(optimizer.step if what == "optimizer" else pruner.step, rounds=20, warmup_rounds=2)
    pruner.step()
    for name, mask in pruner.masks.items():
        weight = model.get_parameter(name).detach().numpy()
        assert not weight[~mask.to_array()].any()
        wanted = 0.5 if what == "new masks" else 0.8
        assert np.isclose(mask.sparsity, wanted, atol=0.01)
