"""int4 values in layers, models and files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rounded_layers import network, pruned, weight_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sparsam.torch
import torch
from sparsam import SparseMatrix
from sparsam.torch.layers.packed_weight import INT4
from torch import Tensor, nn


def packed_network() -> nn.Sequential:
    model = network()
    for layer in (model[0], model[2]):
        sparsam.torch.pack(layer, dtype=INT4)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_computes_what_a_matrix_does(isa: str, dtype: torch.dtype) -> None:
    layer = pruned(nn.Linear(100, 60)).to(dtype)
    matrix = SparseMatrix.from_dense(layer.weight.detach().float().numpy(), dtype="int4")
    x = torch.randn(3, 7, 100, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = matrix.linear(x.float().numpy(), layer.bias.detach().float().numpy(), "relu")
    sparsam.torch.pack(layer, dtype=INT4, activation="relu")
    with torch.no_grad():
        y = layer(x)
    assert torch.equal(y, torch.from_numpy(expected).to(dtype))
    assert weight_of(layer).packed.dtype is INT4
    assert weight_of(layer).packed.forms == matrix._state.forms.kernels
    assert str(weight_of(layer).explain(4)).endswith(f"{matrix.explain(4).kernel}, the form of int4 values")


def test_conversions_and_changes() -> None:
    layer = pruned(nn.Linear(40, 24))
    sparsam.torch.pack(layer, dtype=INT4, batches=[1, 64])
    again = copy.deepcopy(layer)
    assert torch.equal(again.weight.to_dense(), layer.weight.to_dense())
    assert weight_of(again.bfloat16()).packed.dtype is INT4
    before = layer.weight.to_dense().clone()
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(layer.weight.to_dense(), 2 * before)  # what has been rounded is not rounded again
    sparsam.torch.restore(again)
    assert type(again.weight) is nn.Parameter
    with pytest.raises(
        TypeError, match=r"dtype: expected int8 or float values for a convolution; got torch\..*4.*; use"
    ):
        sparsam.torch.pack(nn.Conv2d(8, 8, 3), dtype=INT4)


def test_attention_whose_projections_are_on_different_grids(tmp_path: Path) -> None:
    """One of them is on a grid of 128 columns, the others on none: all have groups of 64."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(256, 4, batch_first=True).eval()
    with torch.no_grad():
        attention.in_proj_weight[:256] = torch.randint(-7, 8, (256, 256)) / 64
    x = torch.randn(2, 5, 256)
    sparsam.torch.pack(attention, dtype=INT4)
    y, _ = attention(x, x, x, need_weights=False)
    weight: Any = attention.in_proj_weight
    assert [part.width for part in weight.packed.parts] == [64, 64, 64]
    assert torch.equal(attention.in_proj_weight.to_dense()[:256] * 64 % 1, torch.zeros(256, 256))
    sparsam.torch.save(nn.Sequential(attention), tmp_path)
    loaded = nn.Sequential(nn.MultiheadAttention(256, 4, batch_first=True)).eval()
    sparsam.torch.load(tmp_path, loaded)
    assert torch.equal(loaded[0](x, x, x, need_weights=False)[0], y)


@pytest.mark.usefixtures("clock")
def test_a_model_is_accelerated() -> None:
    model, x = network(), torch.randn(5, 256, generator=torch.Generator().manual_seed(3))
    dense = model(x).detach()
    report = sparsam.torch.accelerate(model, x, values="int4", tolerance=0.3, min_gain=1e-6, verbose=False)
    swapped = [row for row in report.layers if row.swapped]
    assert len(swapped) == 2
    assert report.difference is not None
    assert 0 < report.difference <= 0.3
    assert (model(x) - dense).abs().max() <= 0.3 * dense.abs().max()


def test_a_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model, x = packed_network(), torch.randn(5, 256, generator=torch.Generator().manual_seed(3))
    y = model(x).detach()
    sparsam.torch.save(model, tmp_path)
    file = tmp_path / "sparsam.safetensors"
    assert file.stat().st_size < 0.11 * sum(p.numel() * 4 for p in network().parameters())
    with torch.device("meta"):
        loaded = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 128), nn.ReLU())
    assert sparsam.torch.load(tmp_path, loaded) == 2
    assert torch.equal(loaded.eval()(x), y)
    assert torch.equal(weight_of(loaded[0]).to_dense(), weight_of(model[0]).to_dense())


def test_what_is_in_a_file(tmp_path: Path) -> None:
    """docs/formats.md: levels, then codes; each row of bits ends with its scales."""
    model: Any = nn.Sequential(nn.Linear(9, 2, bias=False))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[0, 0], model[0].weight[0, 8], model[0].weight[1, 3] = -7 / 16, 5 / 16, 7 / 8
    sparsam.torch.pack(model[0], dtype=INT4)
    sparsam.torch.save(model, tmp_path)
    tensors = load_file(tmp_path / "sparsam.safetensors")
    values = tensors["0.weight"].numpy().tobytes()
    assert values == bytes.fromhex("00 f9fafbfcfdfeff 0102030405060708  c1 0e")
    assert tensors["0.weight_bits"].numpy().tobytes() == bytes.fromhex("01 01 803d  08 00 003e")


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("0.weight_bits", lambda t: t[:, :-1].contiguous(), "bits: expected uint8"),
        ("0.weight_bits", lambda t: t[:, :-2].contiguous(), "bits: expected uint8"),
        ("0.weight_bits", lambda t: t & 254, r"values: expected \d+ bytes for \d+ bits; got"),
        ("0.weight_bits", lambda t: torch.cat([t[:, :-1], t[:, -1:] | 128], 1), "scales: expected positive"),
        ("0.weight", lambda t: t[1:].clone(), r"values: expected \d+ bytes for \d+ bits; got"),
        ("0.weight", lambda t: torch.cat([t[:16] * 0, t[16:]]), "levels: expected 0, then 15 that rise"),
        ("0.weight", lambda t: torch.cat([t[:16], t[16:] & 15]), "values: expected levels but 0"),
        ("0.weight", lambda t: t.to(torch.int16), "bits: expected uint8 .512, 32.; got"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, change: object, what: str) -> None:
    sparsam.torch.save(packed_network(), tmp_path)
    file = tmp_path / "sparsam.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors: dict[str, Tensor] = load_file(file)
    tensors[name] = change(tensors[name])  # type: ignore[operator]
    save_file(tensors, file, metadata)
    model: Any = network()
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=what):
        sparsam.torch.load(tmp_path, model)
    assert np.array_equal(model[0].weight.detach().numpy(), before.numpy())


def test_what_prune_rounded_is_packed_as_it_is() -> None:
    model: Any = nn.Sequential(nn.Linear(256, 96), nn.GELU(), nn.Linear(96, 32))
    batches = [torch.randn(128, 256) for _ in range(8)]
    sparsam.torch.prune(model, calibration=batches, target_sparsity=0.5, values="int4", group=64)
    dense = [layer.weight.detach().clone() for layer in (model[0], model[2])]
    for layer, weight in zip((model[0], model[2]), dense, strict=True):
        sparsam.torch.pack(layer, dtype=INT4)
        assert torch.equal(weight_of(layer).to_dense(), weight)
