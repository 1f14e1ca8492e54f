"""What state dicts, copies and other libraries get of packed weights."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from test_torch_packed_tensor import CHANGES
from torch_cases import pruned

import torch
from sparsam.torch import pack, restore
from sparsam.torch.acceleration.memory import parameter_bytes
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pair() -> tuple[Any, Any]:
    """A packed layer and the dense one."""
    dense = pruned(nn.Linear(8, 6))
    return pack(copy.deepcopy(dense)), dense


def test_tied_weights_are_packed_once() -> None:
    model: Any = pruned(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)))
    model[2].weight = model[0].weight
    twin: Any = copy.deepcopy(model)
    pack(model[0])
    half: Any = copy.deepcopy(model)  # one of the tied layers is packed, the other is not
    pack(model[2])
    pack(half[2])
    assert model[0].weight is model[2].weight
    assert len(list(model.parameters())) == 5
    assert half[0].weight.packed_data is half[2].weight.packed_data
    assert parameter_bytes(model) == parameter_bytes(half)
    assert parameter_bytes(model) == parameter_bytes(twin) + model[0].weight.nbytes
    for copied in (half, copy.deepcopy(half), pickle.loads(pickle.dumps(half))):
        before = copied[2].weight.to_dense()
        with torch.no_grad():
            copied[0].weight.mul_(2)
        assert torch.equal(copied[2].weight.to_dense(), 2 * before)
        assert restore(copied) == 2
        assert copied[0].weight is copied[2].weight


def test_tied_weights_that_differ_are_packed_twice() -> None:
    model: Any = pruned(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    model[1].weight = model[0].weight
    x = torch.randn(3, 8)
    rounded = pack(copy.deepcopy(model)[0], dtype=torch.bfloat16)
    pack(model[0])
    with torch.no_grad():
        model[1].weight.add_(1)  # not what the other layer has packed
    wanted = model[1](x)
    torch.testing.assert_close(pack(model[1])(x), wanted)
    assert model[0].weight.packed_data is not model[1].weight.packed_data
    assert rounded.weight.packed.dtype == torch.bfloat16  # type: ignore[union-attr]


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_state_dict_has_is_the_weight(change: str) -> None:
    layer, dense = pair()
    state = layer.state_dict()
    with torch.no_grad():
        CHANGES[change](state["weight"])
        CHANGES[change](dense.weight)
        assert torch.equal(layer.weight.to_dense(), dense.weight)
        layer.weight.neg_()
    assert torch.equal(state["weight"], -dense.weight)
    assert state["weight"].tolist() == (-dense.weight).tolist()
    assert repr(state["weight"]) == repr(layer.weight.to_dense())


def test_a_state_dict_is_plain_once_it_leaves() -> None:
    layer, dense = pair()
    state, file = layer.state_dict(), io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loads = safetensors.torch.load(safetensors.torch.save(dict(state)))
    for other in (torch.load(file, weights_only=True), copy.deepcopy(state), loads):
        assert type(other["weight"]) is Tensor
        assert torch.equal(other["weight"], dense.weight)
        other["weight"].zero_()
    assert torch.equal(layer.weight.to_dense(), dense.weight)
    with pytest.raises(ValueError, match="read-only"):
        state["weight"].numpy()[0, 0] = 2.0


@pytest.mark.parametrize("keep_vars", [False, True])
def test_states_of_packed_layers_in_dense_ones_and_back(keep_vars: bool) -> None:
    layer, dense = pair()
    x, other = torch.randn(3, 8), nn.Linear(8, 6)
    other.load_state_dict(layer.state_dict(keep_vars=keep_vars), strict=True)
    assert type(other.weight) is nn.Parameter
    assert torch.equal(other.weight, dense.weight)
    again: Any = pack(nn.Linear(8, 6))
    again.load_state_dict(layer.state_dict(keep_vars=keep_vars), strict=True)
    assert again.weight.packed.nnz == layer.weight.packed.nnz
    assert torch.equal(again(x), layer(x))


def test_a_state_that_is_assigned_is_the_weight() -> None:
    layer, dense = pair()
    other = nn.Linear(8, 6)
    other.load_state_dict(layer.state_dict(), strict=True, assign=True)
    other(torch.randn(3, 8)).sum().backward()
    assert other.weight.grad is not None
    torch.optim.SGD([other.weight], lr=0.1).step()
    assert torch.equal(layer.weight.to_dense(), other.weight)
    assert not torch.equal(layer.weight.to_dense(), dense.weight)
    assert type(copy.deepcopy(other).weight) is nn.Parameter


def test_other_libraries_get_a_copy() -> None:
    layer, dense = pair()
    for weight in (layer.weight, layer.state_dict()["weight"]):
        for found in (torch.from_dlpack(weight), torch.from_numpy(np.from_dlpack(weight).copy())):  # type: ignore[attr-defined]
            assert torch.equal(found, dense.weight)
        array = np.array(weight, copy=True)
        array[0, 0] = 3.0
    assert torch.equal(layer.weight.to_dense(), dense.weight)
