"""Models are pruned and packed alike whether or not PyTorch flushes subnormal numbers to zero."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import torch
from float_modes import bits, same_in_both, subnormal_only
from sparsam.torch import pack, prune
from torch import Tensor, nn


def network() -> nn.Sequential:
    """All weights of the first layer are below the normal range."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(torch.from_numpy(subnormal_only((16, 32))))
    return model


def arrays(model: nn.Module) -> list[Any]:
    return [parameter.detach().numpy().copy() for parameter in model.parameters()]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "obs"])
def test_pruning_a_model(method: Any) -> None:
    model = network()
    calibration: list[Tensor] | None = [torch.randn(256, 32, generator=torch.Generator().manual_seed(1))]
    if method == "magnitude":
        calibration = None

    def pruned() -> list[Any]:
        mine = copy.deepcopy(model)
        report = prune(mine, target_sparsity=0.25, method=method, calibration=calibration)
        return [*arrays(mine), [row.pruned_params for row in report.layers]]

    same_in_both(pruned, upwards=False)  # PyTorch's own products round as the caller says


def test_a_model_of_subnormal_weights_only_is_pruned() -> None:
    model = nn.Sequential(nn.Linear(32, 16, bias=False))
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(torch.from_numpy(subnormal_only((16, 32))))
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormals")
    try:
        report = prune(model, target_sparsity=0.25)
    finally:
        torch.set_flush_denormal(False)
    assert report.layers[0].pruned_params == 128
    assert int((model.get_parameter("0.weight") == 0).sum()) == 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_packing_a_layer(dtype: torch.dtype) -> None:
    layer = nn.Linear(32, 16)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(subnormal_only((16, 32))))

    def packed() -> Any:
        made: Any = pack(copy.deepcopy(layer), dtype=dtype)
        return made.weight.packed_data.numpy().copy()

    same_in_both(packed)
    assert bits(packed())
