"""Changes of a fused module that its own forward would see."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from fused_models import fused_names
from torch_cases import Clock, pruned

import torch
from sparsam.torch import accelerate
from sparsam.torch.fused.calls import Call
from sparsam.torch.fused.installation import unfuse
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("clock", "one_thread")


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))


class Other(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * input


def widened(model: Any) -> None:
    model[0].append(nn.Linear(32, 32))


def reclassed(model: Any) -> None:
    model[0].__class__ = Other


CHANGES: dict[str, Callable[[Any], None]] = {"another layer": widened, "another class": reclassed}


def fused(clock: Clock) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    clock.fused = 2.0
    model = pruned(nn.Sequential(mlp(), nn.Tanh()))
    x = torch.randn(4, 32)
    accelerate(model, x, verbose=False)
    assert fused_names(model) == ("0",)
    return model, x


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_seen_at_the_next_call(change: str, clock: Clock) -> None:
    model, x = fused(clock)
    before = model(x)
    CHANGES[change](model)
    found = model(x)
    unfuse(model)
    assert torch.equal(found, model(x))
    assert not torch.equal(found, before)


@torch.no_grad()
def test_another_forward_of_its_class(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = fused(clock)
    before = model(x)
    monkeypatch.setattr(nn.Sequential, "forward", lambda self, x: self[-1](x) if len(self) == 2 else x)
    inner: Any = model.get_submodule("0")
    assert torch.equal(inner(x), x)
    monkeypatch.undo()
    assert torch.equal(model(x), before)


class Own(nn.Module):
    """Does something else with more than eight rows, which no trace with a few would show."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers[2](self.layers[1](self.layers[0](x[:8])))
        return found


@torch.no_grad()
def test_classes_of_others_are_not_fused(clock: Clock) -> None:
    torch.manual_seed(0)
    clock.fused = 2.0
    model = pruned(nn.Sequential(Own(), nn.Tanh()))
    dense = copy.deepcopy(model)
    accelerate(model, torch.randn(4, 32), verbose=False)
    assert fused_names(model) == ()
    x = torch.randn(20, 32)
    torch.testing.assert_close(model(x), dense(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, (1 << 20) + 8), (2, 0), (1,) * 10], ids=str)
def test_calls_beyond_what_files_may_ask_for(shape: tuple[int, ...]) -> None:
    assert Call.of((torch.empty(shape),), {}) is None
    assert Call.of((torch.empty(2, 3), torch.empty((1 << 12, 1 << 13), dtype=torch.int8)), {}) is None


@torch.no_grad()
def test_sums_of_other_widths(clock: Clock, fusing: None) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 1), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.b(x) * self.a(x) + self.a(x))

    del clock, fusing
    torch.manual_seed(0)
    model = pruned(nn.Sequential(Scaled(), nn.Tanh()))
    x = torch.randn(4, 32)
    wanted = model(x)
    accelerate(model, x, verbose=False)
    torch.testing.assert_close(model(x), wanted, atol=1e-5, rtol=1e-4)
