"""Weights before a ReLU: fitted to what it lets through, against a slow reference in float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pruning_models import normal
from torch.nn import functional

import torch
from sparsam.reconstruction import sequential
from sparsam.torch import prune
from sparsam.torch.pruning import rectified_fits
from torch import Tensor, nn

Array = NDArray[np.float64]
BATCHES = 6


class Plain(nn.Module):
    """Linear, ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(10, 6)
        self.relu = nn.ReLU()

    def before(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.relu(self.before(x))
        return result


class Normed(nn.Module):
    """Convolution, batch normalisation with scales of both signs, ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 5, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(5)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([1.0, -2, 0.5, -1, 3]))
            self.norm.bias.copy_(normal(3, 5))
            self.norm.running_mean.copy_(normal(4, 5))  # type: ignore[union-attr]

    def before(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.layer(x))
        return result

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.before(x), inplace=True)


class Added(Normed):
    """The same, added to a part of the input before the ReLU."""

    def before(self, x: Tensor) -> Tensor:
        return super().before(x) + x[:, [0, 1, 0, 1, 0]]


class UsedTwice(Plain):
    """What the ReLU is given is wanted as it is, too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        return torch.cat([torch.relu(y), y.tanh()], -1)


def inputs(model: nn.Module) -> list[Tensor]:
    shape = (30, 10) if isinstance(model, Plain) else (3, 2, 7, 6)
    return [normal(10 + i, *shape).double() for i in range(BATCHES)]


def rows(model: Any, x: Tensor) -> Array:
    """The inputs of the layer as rows."""
    if isinstance(model, Plain):
        return x.numpy()
    return functional.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 18).numpy()


def flat(tensor: Tensor) -> Array:
    """Outputs as rows."""
    return tensor.numpy() if tensor.ndim == 2 else tensor.flatten(2).transpose(1, 2).reshape(-1, 5).numpy()


@torch.no_grad()
def fitted_again(dense: Any, model: Any, x: Tensor, damping: float) -> None:
    """One round: targets in the ReLU's input, taken back to the layer's output one by one."""
    wanted, given = dense.before(x), model.before(x)
    target = torch.where(wanted > 0, wanted, given.clamp(max=0))
    change = target - given
    if not isinstance(dense, Plain):
        norm = model.norm
        change = change / (norm.weight / torch.sqrt(norm.running_var + norm.eps)).reshape(1, -1, 1, 1)
    weights = model.layer.weight
    old = weights.reshape(len(weights), -1).numpy()
    a = rows(model, x)
    y = a @ old.T + flat(change)  # a shift of y changes only the bias
    h = (a - a.mean(0)).T @ (a - a.mean(0))
    c = (y - y.mean(0)).T @ (a - a.mean(0))
    new = np.zeros_like(old)
    for i, row in enumerate(old != 0):
        system = h[np.ix_(row, row)] + damping * h.diagonal().mean() * np.eye(int(row.sum()))
        new[i, row] = np.linalg.solve(system, c[i, row] + damping * h.diagonal().mean() * old[i, row])
    shift = torch.from_numpy(y.mean(0) - a.mean(0) @ new.T)
    weights.copy_(torch.from_numpy(new).reshape(weights.shape))
    if isinstance(dense, Plain):
        model.layer.bias += shift
    else:
        model.norm.running_mean -= shift


def pruned(model: nn.Module, rounds: int, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(rectified_fits, "_ROUNDS", rounds)
    monkeypatch.setattr(sequential, "DAMPINGS", (1e-2,))
    result = copy.deepcopy(model)
    prune(result, None, inputs(model), target_sparsity=0.5)
    return result


def error(dense: Any, model: Any) -> float:
    with torch.no_grad():
        return sum(
            float((functional.relu(dense.before(x)) - functional.relu(model.before(x))).square().sum())
            for x in inputs(dense)
        )


@pytest.mark.parametrize("kind", [Plain, Normed, Added])
def test_targets_are_what_the_relu_lets_through(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    dense = kind().double().eval()
    plain = pruned(dense, 0, monkeypatch)
    found = pruned(dense, 3, monkeypatch)
    want = copy.deepcopy(plain)
    for _ in range(3):
        fitted_again(dense, want, torch.cat(inputs(dense)), 1e-2)
    for (name, a), b in zip(found.state_dict().items(), want.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=name)
    assert error(dense, found) < 0.995 * error(dense, plain)


def test_what_is_used_otherwise_as_well_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    dense = UsedTwice().double().eval()
    states = [pruned(dense, rounds, monkeypatch).state_dict() for rounds in (0, 3)]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
