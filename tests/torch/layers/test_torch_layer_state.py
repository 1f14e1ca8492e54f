"""Packed layers as modules: state, copies, moves, release and restore, gradients."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
from packed_layers import packed_copy, pruned
from torch.nn import functional

import torch
from sparsam.torch import pack, restore
from sparsam.torch.layers.packing import PackedLayer
from torch import nn


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_state() -> None:
    linear = pruned(nn.Linear(20, 30))
    layer = packed_copy(linear, activation="relu").eval()
    x = torch.randn(3, 20)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (twin, pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), expected)  # bit for bit
        assert torch.equal(other.weight.to_dense(), linear.weight)
        assert isinstance(other, nn.Linear)
        assert isinstance(other.weight, nn.Parameter)
        assert not other.training
        assert other(x).min() == 0  # the activation
    assert twin.weight.packed_data is layer.weight.packed_data
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    state = layer.state_dict()
    assert state.keys() == {"weight", "bias"}
    assert torch.equal(state["weight"], linear.weight)
    assert layer.state_dict(keep_vars=True)["weight"] is layer.weight
    plain = nn.Linear(20, 30)
    plain.load_state_dict(state)
    assert torch.equal(plain.weight, linear.weight)

    new = pruned(nn.Linear(20, 30), 0.5, seed=1)
    layer.load_state_dict(new.state_dict())
    torch.testing.assert_close(layer(x), functional.relu(new(x)).detach())
    assert layer.weight.packed.nnz == new.weight.count_nonzero()
    assert torch.equal(twin(x), expected)
    layer.load_state_dict(linear.state_dict(), assign=True)  # the very tensors: dense, and still activated
    assert type(layer.weight) is nn.Parameter
    assert torch.equal(layer(x), functional.relu(linear(x)))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        twin.load_state_dict({"weight": torch.zeros(2, 2), "bias": torch.zeros(30)})
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        twin.load_state_dict({"bias": torch.zeros(30)})


def test_release_and_restore() -> None:
    linear = pruned(nn.Linear(20, 30))
    before, parameter = linear.weight.detach().clone(), linear.weight
    layer = PackedLayer.find(pack(linear))
    assert layer is not None
    assert layer.weights[0].release()
    assert layer.weights[0].release()
    assert parameter.nelement() == 0
    twin: Any = copy.deepcopy(linear).eval()
    assert restore(linear) == 1
    assert linear.weight is parameter
    assert torch.equal(linear.weight, before)
    assert restore(twin) == 1
    assert twin.weight is not parameter
    assert not twin.training
    assert torch.equal(twin.weight, before)
    rounded = PackedLayer.find(pack(linear, dtype=torch.bfloat16))
    assert rounded is not None
    assert not rounded.weights[0].release()
    assert restore(linear) == 1
    assert linear.weight is parameter
    assert torch.equal(linear.weight, before)


def test_moves() -> None:
    linear = pruned(nn.Linear(20, 30))
    parameter = linear.weight
    model: Any = nn.Sequential(packed_copy(linear))
    x = torch.randn(3, 20)
    weight = model[0].weight
    model.bfloat16()
    assert model[0].weight is weight
    assert weight.dtype == weight.packed.dtype == model[0].bias.dtype == torch.bfloat16
    assert model(x.bfloat16()).dtype == torch.bfloat16
    model.float()
    torch.testing.assert_close(model(x), linear(x).detach(), rtol=2e-2, atol=2e-2)
    for move in (lambda: model.to("meta"), model.double):
        with pytest.raises(RuntimeError, match=r"expected the CPU and .*; call sparsam.torch.restore"):
            move()
    torch.testing.assert_close(model(x), linear(x).detach(), rtol=2e-2, atol=2e-2)
    model.share_memory()
    assert weight.is_shared()
    restore(model)
    assert torch.equal(model[0].weight, parameter.bfloat16().float())


def test_gradients_are_refused() -> None:
    for layer, shape in (
        (packed_copy(pruned(nn.Linear(5, 4))), (3, 5)),
        (packed_copy(nn.Conv2d(5, 4, 1)), (1, 5, 2, 2)),
    ):
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        assert y.requires_grad
        with pytest.raises(RuntimeError, match=r"restore\(model\) before training"):
            y.sum().backward()
        bias = layer.bias
        for source in (x, bias):
            with pytest.raises(RuntimeError, match=r"restore\(model\) before training"):
                torch.autograd.grad(layer(x).sum(), source, allow_unused=True)
        with pytest.raises(RuntimeError, match=r"restore\(model\) before training"):
            torch.autograd.grad(layer(x.detach()).sum(), bias, allow_unused=True)
        with torch.no_grad():
            assert not layer(x).requires_grad
        with torch.inference_mode():
            assert layer(x).is_inference()
        with pytest.raises(RuntimeError, match=r"no gradient; call sparsam\.torch\.restore"):
            layer.requires_grad_(requires_grad=True)
