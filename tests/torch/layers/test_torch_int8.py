"""int8 values in layers, models and files."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from rounded_layers import network, pruned, weight_of

import sparsam.torch
import torch
from sparsam import SparseMatrix
from torch import Tensor, nn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_computes_what_a_matrix_does(isa: str, dtype: torch.dtype) -> None:
    layer = pruned(nn.Linear(100, 60)).to(dtype)
    matrix = SparseMatrix.from_dense(layer.weight.detach().float().numpy(), dtype="int8")
    x = torch.randn(3, 7, 100, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = matrix.linear(x.float().numpy(), layer.bias.detach().float().numpy(), "relu")
    sparsam.torch.pack(layer, dtype=torch.int8, activation="relu")
    with torch.no_grad():
        y = layer(x)
    assert y.dtype is dtype
    assert torch.equal(y, torch.from_numpy(expected).to(dtype))
    assert "values=torch.int8" in repr(layer.weight)
    assert weight_of(layer).packed.forms == ("slots",)
    assert np.array_equal(
        layer.weight.to_dense().float().numpy(), torch.from_numpy(matrix.to_dense()).to(dtype).float().numpy()
    )
    assert str(weight_of(layer).explain(4)).endswith("slots, the kernel of int8 values")


def test_conversions_and_changes() -> None:
    layer = pruned(nn.Linear(40, 24))
    dense = layer.weight
    sparsam.torch.pack(layer, dtype=torch.int8, batches=[1, 64])
    again = copy.deepcopy(layer)
    assert torch.equal(again.weight.to_dense(), layer.weight.to_dense())
    assert weight_of(again.bfloat16()).packed.dtype is torch.int8
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.allclose(
        layer.weight.to_dense(), 2 * dense.detach(), atol=float(dense.detach().abs().max()) / 30
    )
    assert weight_of(layer).packed.dtype is torch.int8
    sparsam.torch.restore(again)
    assert type(again.weight) is nn.Parameter


def test_transposed_weights() -> None:
    """The Conv1D of GPT-2 has (in, out)."""
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415 - takes seconds

    layer = Conv1D(48, 40)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        layer.weight[torch.rand(40, 48, generator=torch.Generator().manual_seed(1)) < 0.7] = 0
    matrix = SparseMatrix.from_dense(layer.weight.detach().numpy().T, dtype="int8")
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    expected = matrix.linear(x.numpy(), layer.bias.detach().numpy())
    sparsam.torch.pack(layer, dtype=torch.int8)
    with torch.no_grad():
        assert torch.equal(layer(x), torch.from_numpy(expected))
    assert np.array_equal(layer.weight.to_dense().numpy(), matrix.to_dense().T)


@pytest.mark.usefixtures("clock")
def test_a_model_is_accelerated_saved_and_loaded(tmp_path: Path) -> None:
    model, x = network(), torch.randn(5, 256, generator=torch.Generator().manual_seed(3))
    dense = model(x).detach()
    report = sparsam.torch.accelerate(model, x, values="int8", tolerance=0.05, min_gain=1e-6, verbose=False)
    swapped = [row for row in report.layers if row.swapped]
    assert len(swapped) == 2
    assert report.difference is not None
    assert 0 < report.difference <= 0.05
    y = model(x).detach()
    assert (y - dense).abs().max() <= 0.05 * dense.abs().max()
    sparsam.torch.save(model, tmp_path)
    file = tmp_path / "sparsam.safetensors"
    assert file.stat().st_size < 0.2 * sum(p.numel() * 4 for p in network().parameters())
    with torch.device("meta"):
        loaded = network_on_meta()
    assert sparsam.torch.load(tmp_path, loaded) == len(swapped)
    assert torch.equal(loaded.eval()(x), y)
    unpacked = [layer.weight.to_dense() for layer in loaded if isinstance(layer, nn.Linear)]
    for layer, weight in zip((m for m in model if isinstance(m, nn.Linear)), unpacked, strict=True):
        assert torch.equal(as_dense(layer.weight), weight)


def network_on_meta() -> nn.Sequential:
    return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 128), nn.ReLU())


def as_dense(weight: Tensor) -> Tensor:
    return weight.to_dense() if isinstance(weight, sparsam.torch.PackedTensor) else weight


def test_layers_that_take_outputs_too_far_stay_dense() -> None:
    model, x = network(), torch.randn(5, 256, generator=torch.Generator().manual_seed(3))
    report = sparsam.torch.accelerate(model, x, values="int8", tolerance=1e-5, min_gain=1e-6, verbose=False)
    assert not any(row.swapped for row in report.layers)
    assert all("outputs differ by" in row.reason for row in report.layers)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("values", ["int8", "int4"])
def test_layers_that_cannot_be_rounded_stay_dense(values: Literal["int8", "int4"]) -> None:
    """Too wide ones and infinite ones; the others are packed."""
    for x in (torch.randn(2, 65600), None):
        model = nn.Sequential(
            pruned(nn.Linear(65600, 16)), pruned(nn.Linear(16, 16)), pruned(nn.Linear(16, 16))
        )
        with torch.no_grad():
            model[1].weight[0, 0] = torch.inf  # type: ignore[operator]
        report = sparsam.torch.accelerate(model, x, values=values, min_gain=1e-6, verbose=False)
        assert [row.reason for row in report.layers][:2] == [
            "more than 65536 weights for each output, too many to round",
            "its weight is not finite, which cannot be rounded",
        ]
        assert report.layers[2].swapped or x is not None


def test_what_is_refused() -> None:
    with pytest.raises(
        ValueError, match='values: expected None, or "int8" or "int4" and no dtype; got \'int3\'; pass'
    ):
        sparsam.torch.accelerate(network(), values="int3")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r'values: expected None, or "int8" or "int4" and no dtype; got .*bfloat16; pass'
    ):
        sparsam.torch.accelerate(network(), values="int8", dtype=torch.bfloat16)
    x = torch.randn(2, 256)
    for tolerance in (-1, 0, 0.0, math.nan, math.inf, True, "1e-3"):
        wanted = f"tolerance: expected a number above 0; got {tolerance!r}; leave it out"
        with pytest.raises(ValueError, match=re.escape(wanted)):
            sparsam.torch.accelerate(network(), x, values="int8", tolerance=tolerance)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"example_inputs: expected inputs, .* got none; leave out"):
        sparsam.torch.accelerate(network(), tolerance=0.1)
