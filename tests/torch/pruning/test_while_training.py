"""`Pruner`: its schedule, masks and state, and the model, optimizer and devices that it meets."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
from training_cases import (
    METHODS,
    OPTIMIZERS,
    batch,
    equal_states,
    loss_of,
    made,
    mlp,
    smallest_pruned,
    train,
    weights_of,
)
from transformers.pytorch_utils import Conv1D

import torch
from sparsam import NM, Block, PruningConfig, Random, Slices, Tied, Unstructured
from sparsam.schedules import Polynomial
from sparsam.torch import Pruner
from sparsam.torch.pruning import masked_weights
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


def test_moves_along_the_schedule_and_selects_as_the_oracle() -> None:
    model, optimizer, pruner = made(begin=3, end=25, every=4, schedule=Polynomial(3), initial_sparsity=0.1)
    keep = {name: np.ones(w.shape, np.bool_) for name, w in weights_of(model).items()}
    updates = []
    for step in range(30):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        before = weights_of(model)
        updated = pruner.step()
        if updated:
            updates.append(step)
            s = 0.8 + (0.1 - 0.8) * (1 - (step - 3) / 22) ** 3
            for name, w in before.items():
                scores = np.where(keep[name], np.abs(w), 0)
                keep[name] = smallest_pruned(scores, keep[name], round(s * w.size))
        for name, w in before.items():
            np.testing.assert_array_equal(pruner.masks[name].to_array(), keep[name])
            np.testing.assert_array_equal(weights_of(model)[name], np.where(keep[name], w, 0))
    assert updates == [3, 7, 11, 15, 19, 23, 25]
    assert pruner.finished
    assert pruner.report().total.pruned_params == round(0.8 * 640) + round(0.8 * 256)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("masked", [False, True])
def test_zeros_stay_zero_whatever_the_optimizer(optimizer: str, masked: bool) -> None:
    model, opt, pruner = made(optimizer, end=12)
    moved = False

    def check(step: int) -> None:
        nonlocal moved
        for name, w in weights_of(model).items():
            pruned = ~pruner.masks[name].to_array()
            assert not w[pruned].any()
            assert not np.signbit(w[pruned]).any()
            moved = moved or bool(w.any())

    train(model, opt, pruner, range(20), check, mask_gradients=masked)
    assert moved
    assert pruner.sparsity == pytest.approx(0.8, abs=1e-3)


def test_masked_gradients_are_those_of_the_kept_weights() -> None:
    model, opt, pruner = made("sgd", schedule="one_shot", end=0)
    train(model, opt, pruner, range(2))
    opt.zero_grad()
    loss_of(model, 3).backward()
    full = {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}
    pruner.mask_gradients()
    for name, parameter in model.named_parameters():
        mask = pruner.masks.get(name)
        assert parameter.grad is not None
        wanted = full[name] if mask is None else np.where(mask.to_array(), full[name], 0)
        np.testing.assert_array_equal(parameter.grad.numpy(), wanted)


def test_masked_gradients_leave_no_momentum_at_zeros() -> None:
    model, opt, pruner = made("sgd", schedule="one_shot", end=0)
    train(model, opt, pruner, range(1))
    pruned = ~pruner.masks["0.weight"].to_array()
    opt.state[model.get_parameter("0.weight")]["momentum_buffer"].zero_()
    for group in opt.param_groups:
        group["weight_decay"] = 0.0
    train(model, opt, pruner, range(1, 5), mask_gradients=True)
    buffer = opt.state[model.get_parameter("0.weight")]["momentum_buffer"].numpy()
    assert not buffer[pruned].any()
    assert buffer[~pruned].any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [2, 10, 17])
def test_a_run_goes_on_as_if_it_had_not_stopped(method: str, stop: int) -> None:
    options = METHODS[method]
    model, opt, pruner = made(**options)
    train(model, opt, pruner, range(36))

    first, first_opt, first_pruner = made(**options)
    train(first, first_opt, first_pruner, range(stop))
    file = io.BytesIO()
    torch.save([first.state_dict(), first_opt.state_dict(), first_pruner.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    train(first, first_opt, first_pruner, range(stop, stop + 4))  # States are copies.

    second, second_opt, second_pruner = made(**options)
    second_pruner.load_state_dict(states[2])  # The order does not matter.
    second.load_state_dict(states[0])
    second_opt.load_state_dict(states[1])
    assert second_pruner.steps == stop
    train(second, second_opt, second_pruner, range(stop, 36))
    assert equal_states(model, second)
    assert pruner.masks == second_pruner.masks
    assert not equal_states(model, mlp())


def test_patterns_scopes_overrides_and_ties() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    tie = Tied({"0.weight": Slices(0), "0.bias": Slices(0), "2.weight": Slices(1)})
    config = PruningConfig(target_sparsity=0.5, ties=tie, overrides={"4.weight": NM(2, 4)})
    pruner = Pruner(model, config, schedule="one_shot")
    opt = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(3):
        opt.zero_grad()
        model(torch.randn(8, 16, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        opt.step()
        pruner.step()
    first, bias, second = (model.get_parameter(name).detach() for name in ("0.weight", "0.bias", "2.weight"))
    dead = (first == 0).all(dim=1)
    assert dead.sum() == 16
    assert torch.equal(bias == 0, dead)
    assert torch.equal((second == 0).all(dim=0), dead)
    last = model.get_parameter("4.weight").detach()
    assert ((last.reshape(-1, 4) != 0).sum(dim=1) == 2).all()


def test_convolutions_and_weights_stored_the_other_way() -> None:
    torch.manual_seed(0)
    kind: Any = Conv1D
    conv1d = kind(8, 16)
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 8, 3, groups=2), "hf": conv1d, "norm": nn.LayerNorm(8)})
    pruner = Pruner(model, pattern=NM(2, 4), overrides={"conv.weight": (0.25, Block(2, 3))})
    assert pruner.dense == {}
    opt = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    model["conv"](torch.ones(1, 4, 5, 5)).sum().backward()
    model["hf"](torch.ones(1, 16)).sum().backward()
    opt.step()
    pruner.step()
    weight = conv1d.weight.detach()
    assert weight.shape == (16, 8)
    assert ((weight.T.reshape(-1, 4) != 0).sum(dim=1) == 2).all()
    assert pruner.masks["conv.weight"].sparsity == 0.25


def test_what_is_dense_by_default_and_what_a_name_in_overrides_does() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(30, 8)
            self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    pruner = Pruner(Tagger(), target_sparsity=0.5, end=9)
    assert list(pruner.masks) == ["layers.0.weight", "layers.1.weight"]
    assert "embedding" in pruner.dense["embed.weight"]
    pruner = Pruner(Tagger(), target_sparsity=0.5, end=9, overrides={"embed.weight": 0.5}, exclude="layers.0")
    assert list(pruner.masks) == ["layers.1.weight", "embed.weight"]
    assert pruner.dense == {"layers.0.weight": "excluded"}


def test_zeros_that_are_there_are_held_but_not_those_of_a_start_at_zero() -> None:
    model = mlp()
    with torch.no_grad():
        model.get_parameter("0.weight")[:, ::2] = 0
        model.get_parameter("2.weight").zero_()
    opt = OPTIMIZERS["adamw"](model.parameters())
    pruner = Pruner(model, target_sparsity=0.25, schedule="one_shot", begin=10)
    train(model, opt, pruner, range(12))
    weights = weights_of(model)
    assert (weights["0.weight"][:, ::2] == 0).all()
    assert np.count_nonzero(weights["0.weight"]) == 320
    assert np.count_nonzero(weights["2.weight"]) == 192
    free = Pruner(model, target_sparsity=0.25, schedule="one_shot", begin=10, hold_zeros=False)
    assert free.sparsity == 0


def test_the_model_stays_an_ordinary_model() -> None:
    model, opt, pruner = made(end=8)
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]

    def check(step: int) -> None:
        assert list(model.state_dict()) == keys
        assert [type(m) for m in model.modules()] == kinds
        for module in model.modules():
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks"):
                assert not getattr(module, kind)
            assert not module._buffers
        assert all(type(p) is nn.Parameter and not p._backward_hooks for p in model.parameters())

    train(model, opt, pruner, range(10), check)
    twin = copy.deepcopy(model)
    assert equal_states(model, twin)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert equal_states(model, torch.load(file, weights_only=False))
    clone = mlp(1)
    clone.load_state_dict(model.state_dict())
    assert equal_states(model, clone)
    train(twin, OPTIMIZERS["adam"](twin.parameters()), Pruner(twin, target_sparsity=0.8, end=5), range(6))


def test_a_compiled_model_is_pruned_by_the_names_of_the_plain_one() -> None:
    plain, plain_opt, plain_pruner = made(end=8)
    train(plain, plain_opt, plain_pruner, range(10))
    model = mlp()
    compiled: Any = torch.compile(model, backend="eager")
    opt = OPTIMIZERS["adamw"](model.parameters())
    pruner = Pruner(compiled, target_sparsity=0.8, end=8, every=5)
    train(compiled, opt, pruner, range(10))
    assert list(pruner.masks) == ["0.weight", "2.weight"]
    assert equal_states(plain, model)


def test_narrow_weights_are_pruned_as_they_are() -> None:
    model = mlp().to(torch.bfloat16)
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = Pruner(model, target_sparsity=0.5, end=4)
    for step in range(6):
        opt.zero_grad()
        model(batch(step)[0].to(torch.bfloat16)).square().mean().backward()
        opt.step()
        pruner.step()
    assert torch.count_nonzero(model.get_parameter("0.weight")) == 320
    assert model.get_parameter("0.weight").dtype == torch.bfloat16


def test_other_devices_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, opt, pruner = made(end=4, every=2)
    train(model, opt, pruner, range(6), mask_gradients=True)
    monkeypatch.setattr(masked_weights, "_on_host", lambda _: False)
    moved, moved_opt, moved_pruner = made(end=4, every=2)
    train(moved, moved_opt, moved_pruner, range(6), mask_gradients=True)
    assert moved_pruner._weights._elsewhere
    assert equal_states(model, moved)


def test_a_scorer_object_and_every_default() -> None:
    model = mlp()
    pruner = Pruner(model, PruningConfig(0.5, method=Random(3), pattern=Unstructured()), end=1000)
    opt = OPTIMIZERS["sgd"](model.parameters())
    train(model, opt, pruner, range(25))
    assert [pruner._table.updates_at(step) for step in (0, 11, 22, 5, 990, 1000)] == [
        True, True, True, False, True, True,
    ]  # fmt: skip
    assert 0 < pruner.sparsity < 0.1
