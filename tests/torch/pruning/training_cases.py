"""Small trainings that the tests of sparsam.torch's pruning share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import torch
from sparsam import NM, Block
from sparsam.torch import Pruner
from sparsam.training.regrowth import RigL
from torch import Tensor, nn

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(
        parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.5),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.5, fused=True),
}

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "random": {"method": "random", "scope": "global"},
    "lamp": {"allocation": "lamp"},
    "rows": {"scope": "row"},
    "saliency": {"method": "saliency"},
    "fisher": {"method": "fisher", "scope": "global"},
    "movement": {"method": "movement"},
    "set": {"regrow": "set", "method": "random", "allocation": "erk"},
    "rigl": {"regrow": RigL(0.4)},
    "gradual rigl": {"regrow": "rigl", "schedule": "cubic"},
    "nm": {"pattern": NM(2, 4), "target_sparsity": None, "begin": 10},
    "block": {"pattern": Block(4, 4)},
}


def mlp(seed: int = 0) -> nn.Sequential:
    """20 -> 32 -> 8."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 8))


def batch(step: int, rows: int = 16) -> tuple[Tensor, Tensor]:
    """The inputs and targets of a step."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(rows, 20, generator=generator)
    return inputs, inputs[:, :8].sin()


def loss_of(model: nn.Module, step: int) -> Any:
    """The loss of a step."""
    inputs, targets = batch(step)
    return (model(inputs) - targets).square().mean()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pruner: Pruner,
    steps: Iterable[int],
    after: Callable[[int], Any] = lambda _: None,
    *,
    mask_gradients: bool = False,
) -> None:
    """Trains as a user would."""
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if mask_gradients:
            pruner.mask_gradients()
        optimizer.step()
        pruner.step()
        after(step)


def weights_of(model: nn.Module) -> dict[str, NDArray[Any]]:
    """Copies of the weights of two axes and more."""
    return {n: p.detach().numpy().copy() for n, p in model.named_parameters() if p.ndim > 1}


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models are the same bit for bit."""
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)


def smallest_pruned(scores: NDArray[Any], keep: NDArray[np.bool_], k: int) -> NDArray[np.bool_]:
    """The slow oracle: the k least scores go, what is pruned first, of equal ones the higher index."""
    order = sorted(range(scores.size), key=lambda i: (keep.flat[i], scores.flat[i], -i))
    new = np.ones(scores.size, np.bool_)
    new[order[:k]] = False
    return new.reshape(scores.shape)


def made(kind: str = "adamw", **options: Any) -> tuple[nn.Sequential, torch.optim.Optimizer, Pruner]:
    model = mlp()
    opt = OPTIMIZERS[kind](model.parameters())
    settings = {"target_sparsity": 0.8, "end": 30, "every": 5} | options
    arguments: dict[str, Any] = {"optimizer": opt} | settings
    return model, opt, Pruner(model, **arguments)
