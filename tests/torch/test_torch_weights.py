"""sparsam.prune on torch tensors, without sparsam.torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import sparsam
import torch
from sparsam.pruner import MagnitudePruner
from sparsam.training.iterative import IterativePruner

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))


def as_numpy(tensor: torch.Tensor) -> Any:
    return tensor.detach().double().numpy()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_come_back_as_tensors(dtype: torch.dtype) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in model().state_dict().items()}
    before = {name: tensor.clone() for name, tensor in weights.items()}
    result = sparsam.prune(weights, target_sparsity=0.75, scope="global")
    plain = sparsam.prune({k: as_numpy(v) for k, v in weights.items()}, target_sparsity=0.75, scope="global")
    assert list(result.weights) == list(weights)
    for name, tensor in result.weights.items():
        assert isinstance(tensor, torch.Tensor)
        assert tensor.dtype == dtype
        assert np.array_equal(as_numpy(tensor), plain.weights[name])
        assert torch.equal(weights[name], before[name])
    assert result.masks == plain.masks
    assert result.weights["0.bias"] is weights["0.bias"]
    twin = model().to(dtype)
    twin.load_state_dict(result.weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_and_single_tensors(dtype: torch.dtype) -> None:
    parameter = torch.nn.Parameter(torch.arange(1.0, 13.0).reshape(3, 4).to(dtype))
    for value in (parameter, parameter.detach(), parameter.detach().T):
        result = sparsam.prune(value)
        assert isinstance(result.weights, torch.Tensor)
        assert (result.weights.dtype, result.weights.requires_grad) == (dtype, False)
        assert int((result.weights == 0).sum()) == 6
    named = sparsam.prune(dict(model().to(dtype).named_parameters()))
    assert all(type(named.weights[name]) is torch.Tensor for name in named.masks)
    pruned, stats = MagnitudePruner().prune_layer("w", parameter)
    assert isinstance(pruned, torch.Tensor)
    assert stats.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(dtype: torch.dtype) -> None:
    network: Any = model().to(dtype)
    result = sparsam.prune(dict(network.named_parameters()), inplace=True)
    assert result.weights["0.weight"] is network[0].weight
    assert int((network[0].weight == 0).sum()) == 64
    expanded = torch.ones(1, 4).expand(3, 4)
    with pytest.raises(ValueError, match=r"tensor 'w': expected a writeable array .* expanded"):
        sparsam.prune({"w": expanded}, inplace=True)


def test_tied_weights_of_a_state_dict_stay_tied() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(10, 8)
            self.head = torch.nn.Linear(8, 10, bias=False)
            self.head.weight = self.embedding.weight

    network = Tied()
    result = sparsam.prune(network.state_dict())
    assert result.weights["embedding.weight"] is result.weights["head.weight"]
    assert result.report.total.total_params == 80
    network.load_state_dict(result.weights)
    assert int((network.head.weight == 0).sum()) == 40


def test_buffers_of_integers_are_left_alone() -> None:
    weights: dict[str, Any] = {"position_ids": torch.arange(8).reshape(1, 8), "w": torch.randn(4, 4)}
    assert sparsam.prune(weights).weights["position_ids"] is weights["position_ids"]


def test_what_cannot_be_pruned_says_why() -> None:
    with pytest.raises(TypeError, match=r"weights': expected .* the model Sequential; .* sparsam\.torch"):
        sparsam.prune(model())  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"init_weights'?: expected .* the model Sequential"):
        sparsam.find_ticket(model(), lambda *_: None, lambda _: 1.0)  # type: ignore[arg-type]
    graph = torch.ones(2, 2, requires_grad=True)
    for value, message in (
        (graph, r"requires_grad=True; call \.detach"),
        (graph * 2, r"requires_grad=True; call \.detach"),
        (torch.ones(2, 2).to_sparse(), r"got layout torch\.sparse_coo; .*to_dense"),
        (torch.ones(2, 2, device="meta"), r"got device meta"),
        (torch.ones(2, 2).to(torch.float8_e4m3fn), r"got Tensor of torch\.float8_e4m3fn"),
    ):
        with pytest.raises(TypeError, match=rf"tensor 'fc': expected .*{message}"):
            sparsam.prune({"fc": value})


def test_runs_take_tensors() -> None:
    weights = {name: tensor.bfloat16() for name, tensor in model().state_dict().items()}
    result = IterativePruner(num_iterations=2).run(weights, lambda arrays: float(arrays["0.weight"].size))
    assert result.weights["0.weight"].dtype == ml_dtypes.bfloat16
    assert result.masks["0.weight"].sparsity == round(0.8 * 128) / 128


def test_torch_is_not_imported() -> None:
    program = (
        "import sys, numpy, sparsam; sparsam.prune(numpy.ones((4, 4))); sparsam.prune({'a': [[1.0, 2.0]]}); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
