"""sparsam.torch: products of packed layers against PyTorch's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from packed_layers import ACTIVATIONS, fix, packed_copy, pruned
from torch.nn import functional

import torch
from sparsam.torch import PackedTensor, pack
from torch import nn


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kernel", ["bitmask", "panels", "slots"])
@pytest.mark.parametrize("shape", [(70,), (1, 70), (3, 70), (2, 5, 70), (130, 70), (0, 70)])
def test_linear(isa: str, threads: int, kernel: str, shape: tuple[int, ...]) -> None:
    linear, x = pruned(nn.Linear(70, 300)), torch.randn(shape)
    y = fix(linear, kernel)(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, linear(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["bitmask", "panels", "slots"])
def test_linear_dtypes(isa: str, dtype: torch.dtype, values: torch.dtype | None, kernel: str) -> None:
    linear = pruned(nn.Linear(65, 129)).to(dtype)
    layer = fix(linear, kernel, dtype=values)
    assert layer.weight.packed.dtype == (values or dtype)
    x = torch.randn(5, 65).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    # The exact product of what is stored, rounded once; the bias may have been rounded before that.
    exact = x.double() @ layer.weight.to_dense().double().T + linear.bias.double()
    eps = torch.finfo(dtype).eps
    limit = 2 * eps * (x.double().abs() @ layer.weight.to_dense().double().abs().T + 1)
    assert ((y.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("kernel", ["bitmask", "panels", "slots"])
def test_activations(isa: str, name: str, kernel: str) -> None:
    linear, x = pruned(nn.Linear(64, 48)), 5 * torch.randn(7, 64)
    y = fix(linear, kernel, activation=name)(x)
    torch.testing.assert_close(y, ACTIVATIONS[name](linear(x)).detach(), rtol=1e-5, atol=1e-5)


def test_strides_and_bfloat16_rounding(isa: str) -> None:
    linear = pruned(nn.Linear(64, 48))
    x = torch.randn(64, 7).T
    torch.testing.assert_close(packed_copy(linear)(x), linear(x).detach(), rtol=1e-5, atol=1e-5)
    # The identity returns each bfloat16, NaN, infinities and denormals included; sums are rounded to even.
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    eye = nn.Linear(1, 1, bias=False)
    nn.init.ones_(eye.weight)
    layer = fix(eye.bfloat16(), "panels")
    y = layer(every[:, None])[:, 0]
    torch.testing.assert_close(y, every, rtol=0, atol=0, equal_nan=True)
    half = fix(pruned(nn.Linear(1, 1), 0.0), "panels")
    half.bias = nn.Parameter(torch.tensor([1 / 512]))
    ties = (1 + torch.arange(64)[:, None] / 128).bfloat16()
    assert torch.equal(half(ties), (ties.float() + 1 / 512).bfloat16())


@pytest.mark.parametrize("seed", range(60))
def test_conv(isa: str, threads: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = int(rng.choice([1, 1, 1, 2, 3]))
    channels, outs = (groups * int(n) for n in rng.integers(1, 24, 2))
    kernel, stride, padding, dilation = (
        (int(rng.integers(low, high)), int(rng.integers(low, high)))
        for low, high in ((1, 4), (1, 4), (0, 3), (1, 3))
    )
    if rng.random() < 0.3:
        kernel, stride, padding = (1, 1), (1, 1), (0, 0)
    if rng.random() < 0.1:
        outs *= 40
    reach = [d * (k - 1) + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    height, width = (max(1, n) + int(rng.integers(0, 40)) for n in reach)
    conv = pruned(
        nn.Conv2d(channels, outs, kernel, stride, padding, dilation, groups, bias=bool(rng.random() < 0.5)),
        float(rng.choice([0.3, 0.8, 0.95])),
        seed,
    )
    x = torch.randn(int(rng.integers(1, 4)), channels, height, width)
    layer = packed_copy(conv, activation="relu")
    expected = functional.relu(conv(x)).detach()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_conv_of_many_images(threads: int) -> None:
    conv = pruned(nn.Conv2d(64, 96, 3, padding=1), 0.9)  # padded images of more than the 4 MiB held at a time
    x = torch.randn(9, 64, 60, 61)
    y = packed_copy(conv)(x)
    torch.testing.assert_close(y, conv(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv2d(6, 9, 3, padding="same", dilation=2), (2, 6, 15, 17)),
        (nn.Conv2d(6, 9, (2, 3), padding="same"), (2, 6, 15, 17)),
        (nn.Conv2d(6, 9, 3, padding="valid"), (2, 6, 15, 17)),
        (nn.Conv2d(6, 9, (3, 1), padding=(1, 0), padding_mode="reflect"), (2, 6, 15, 17)),
        (nn.Conv2d(6, 9, 3, padding=2, padding_mode="circular"), (6, 15, 17)),
        (nn.Conv1d(6, 9, 5, padding=2, stride=3), (2, 6, 40)),
        (nn.Conv1d(6, 9, 4, padding="same", groups=3), (6, 40)),
        (nn.Conv2d(6, 6, 3, groups=6), (0, 6, 15, 17)),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_conv_paddings(conv: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    expected = pruned(conv)(x).detach()
    layer = packed_copy(conv)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_infinities_do_not_reach_pruned_weights() -> None:
    conv = nn.Conv2d(2, 2, 3, padding=1, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[0, 0, 1, 1] = 1.0
    x = torch.randn(1, 2, 20, 20)
    x[0, 1] = torch.inf
    y = packed_copy(conv)(x)
    assert torch.equal(y[0, 0], x[0, 0])
    assert torch.equal(y[0, 1], torch.zeros(20, 20))


def test_errors() -> None:
    layer = packed_copy(pruned(nn.Linear(20, 30)))
    conv = packed_copy(nn.Conv2d(4, 6, 3))
    empty = torch.empty(0, dtype=torch.uint8)
    for call, error, text in (
        (lambda: layer(torch.ones(3, 21)), ValueError, r"x: expected shape \(..., 20\); got \(3, 21\)"),
        (lambda: layer(torch.tensor(1.0)), ValueError, "x: expected shape"),
        (
            lambda: layer(torch.ones(3, 20, dtype=torch.float64)),
            TypeError,
            "x: expected one of .*; got torch.float64",
        ),
        (
            lambda: layer(torch.ones(3, 20, device="meta")),
            ValueError,
            "x: expected a tensor on the CPU.*; got one on meta",
        ),
        (lambda: conv(torch.ones(4, 8)), ValueError, "expected 3 axes, or 4 with a batch"),
        (lambda: conv(torch.ones(2, 5, 8, 8)), ValueError, r"expected shape \(n, 4, height, width\)"),
        (lambda: conv(torch.ones(2, 4, 2, 8)), ValueError, "at least the size of the kernel"),
        (
            lambda: pack(nn.Bilinear(1, 1, 1)),
            TypeError,
            "MultiheadAttention or recurrent layer; got a",
        ),
        (lambda: pack(layer), TypeError, "layer: expected a dense one; got a packed Linear"),
        (lambda: PackedTensor.pack(layer.weight), TypeError, "weight: expected a dense tensor; got a Packed"),
        (
            lambda: PackedTensor.pack(torch.eye(3).to_sparse()),
            TypeError,
            "weight: expected a dense tensor; got torch.sparse_coo",
        ),
        (lambda: pack(nn.Linear(2, 2).double()), TypeError, "weight: expected .*; got torch.float64"),
        (lambda: pack(nn.Linear(2, 2), dtype=torch.int16), TypeError, "dtype: expected .*; got torch.int16"),
        (lambda: pack(nn.Linear(2, 2, device="meta")), ValueError, "weight: expected .*; got one on meta"),
        (lambda: pack(nn.Linear(2, 2), activation="tanh"), ValueError, "activation: expected None .*'tanh'"),
        (
            lambda: torch.ops.sparsam.linear(torch.ones(1, 2), empty, None, 3, ""),
            ValueError,
            "packed weight: expected whole forms; got 0 bytes",
        ),
    ):
        with pytest.raises(error, match=text):
            call()


def test_no_weights() -> None:
    linear = nn.Linear(6, 5)
    nn.init.zeros_(linear.weight)
    assert torch.equal(packed_copy(linear)(torch.ones(2, 6)), linear.bias.detach().expand(2, 5))
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(0, 5)
    assert torch.equal(packed_copy(empty)(torch.ones(2, 0)), empty.bias.detach().expand(2, 5))
    assert repr(pack(nn.Conv2d(1, 2, 3))) == repr(nn.Conv2d(1, 2, 3))
    assert repr(pack(nn.Conv2d(1, 2, 3)).weight) == "PackedTensor(2x1x3x3, density=1, dtype=torch.float32)"
