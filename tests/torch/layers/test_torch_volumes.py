"""Packed Conv3d layers, with float values against PyTorch's own and with int8 values to the last bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from packed_layers import packed_copy, pruned
from torch.nn import functional

import torch
from rounded_matmul import int8_convolution
from sparsam.sparse.int8 import rounded
from sparsam.torch import pack, restore
from sparsam.torch.layers import convolution_operators
from sparsam.torch.layers.packed_weight import INT4
from torch import Tensor, nn


@st.composite
def geometries(draw: Any) -> tuple[Any, Tensor]:
    """A layer of small whole numbers, whose sums are exact in any order, and an input."""

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(3))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    ins, outs = groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 5))
    kernel, stride, padding, dilation, sizes = each(1, 3), each(1, 3), each(0, 2), each(1, 2), each(1, 8)
    idle = draw(
        st.sampled_from([(), (), (0,), (0, 1), (1, 2), (0, 1, 2)])
    )  # axes along which nothing happens
    kernel, stride = (tuple(1 if i in idle else n for i, n in enumerate(one)) for one in (kernel, stride))
    padding = tuple(0 if i in idle else n for i, n in enumerate(padding))
    ends = zip(sizes, kernel, padding, dilation, strict=True)
    assume(all(n + 2 * p >= d * (k - 1) + 1 for n, k, p, d in ends))
    make: Any = nn.Conv3d
    layer = make(ins, outs, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape, generator=generator))
            parameter.mul_(torch.rand(parameter.shape, generator=generator) < 0.4).add_(0.0)
    x = torch.randint(-4, 5, (draw(st.integers(1, 3)), ins, *sizes), generator=generator).float()
    return layer.requires_grad_(False), x


@given(case=geometries())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_geometry(threads: int, case: tuple[Any, Tensor]) -> None:
    layer, x = case
    packed = packed_copy(layer)
    assert torch.equal(packed.weight.to_dense(), layer.weight)
    expected = layer(x)
    assert torch.equal(packed(x), expected)
    assert torch.equal(packed(x[0]), expected[0])
    assert torch.equal(packed(x.to(memory_format=torch.channels_last_3d)), expected)


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "padding": (nn.Conv3d(16, 40, 3, padding=1), (2, 16, 5, 12, 13)),
    "stride": (nn.Conv3d(16, 24, (3, 2, 3), (2, 1, 2), (0, 2, 1), groups=4, bias=False), (3, 16, 7, 9, 10)),
    "dilation": (nn.Conv3d(8, 8, 3, dilation=(2, 1, 3), groups=8), (1, 8, 9, 10, 11)),
    "pixels": (nn.Conv3d(16, 8, 1), (2, 16, 3, 8, 9)),
    "pixels, stride": (nn.Conv3d(16, 8, 1, 2), (2, 16, 4, 8, 9)),
    "depth": (nn.Conv3d(16, 8, (3, 1, 1), padding=(1, 0, 0)), (2, 16, 4, 8, 9)),
    "slices": (nn.Conv3d(16, 8, (1, 3, 3), padding=(0, 1, 1)), (2, 16, 4, 8, 9)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers(isa: str, threads: int, case: str) -> None:
    layer, shape = LAYERS[case]
    layer, x = pruned(copy.deepcopy(layer)), torch.randn(shape)
    expected = functional.relu(layer(x)).detach()
    y = packed_copy(layer, activation="relu")(x).detach()
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_volumes_that_are_computed_by_some_depths_at_a_time(threads: int, stride: int) -> None:
    """Padded, they take more than 16 MiB; and small ones, several of which are padded together."""
    layer = pruned(nn.Conv3d(64, 5, 3, stride, (3, 1, 1)), 0.95)
    for shape in ((2, 64, 21, 60, 61), (9, 64, 3, 20, 21)):
        x = torch.randn(shape)
        expected = layer(x).detach()
        torch.testing.assert_close(packed_copy(layer)(x).detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv3d(3, 6, 3, padding="same", dilation=2),
        nn.Conv3d(3, 6, (2, 3, 4), padding="same"),
        nn.Conv3d(3, 6, 3, padding="valid"),
        nn.Conv3d(3, 6, 3, padding=(1, 2, 1), padding_mode="reflect"),
        nn.Conv3d(3, 6, 3, padding=1, padding_mode="circular"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_paddings(layer: Any) -> None:
    x = torch.randn(2, 3, 6, 7, 8)
    expected = pruned(layer)(x).relu().detach()
    torch.testing.assert_close(packed_copy(layer)(x).relu().detach(), expected, rtol=1e-5, atol=1e-5)
    found = packed_copy(layer, activation="relu")(x[0]).detach()
    torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-5)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            y = packed_copy(layer)(x)
        assert y.dtype == dtype
        assert (y.float().relu() - expected).abs().max() < 0.02


def expected_int8(layer: Any, x: Tensor) -> Tensor:
    """What `conv3d` says: each depth of the result is a convolution of an image with one scale."""
    weight = layer.weight.detach().float().numpy()
    volumes = np.pad(x.detach().float().numpy(), ((0, 0), (0, 0), (layer.padding[0],) * 2, (0, 0), (0, 0)))
    (taps, rows, columns), reach = weight.shape[2:], layer.dilation[0] * (weight.shape[2] - 1) + 1
    bias = None if layer.bias is None else layer.bias.detach().float().numpy()
    outs, ins = weight.shape[0] // layer.groups, weight.shape[1]
    geometry: Any = (layer.stride[1:], layer.padding[1:], layer.dilation[1:])
    depths = []
    for top in range(0, volumes.shape[2] - reach + 1, layer.stride[0]):
        groups = []
        for group in range(layer.groups):
            mine = slice(group * outs, (group + 1) * outs)
            q, scales = rounded(weight[mine].reshape(outs, -1))
            own = volumes[:, group * ins : (group + 1) * ins, top : top + reach : layer.dilation[0]]
            images = own.reshape(len(own), ins * taps, *own.shape[3:])
            q = q.reshape(outs, ins * taps, rows, columns)
            groups.append(int8_convolution(q, scales, images, geometry, None if bias is None else bias[mine]))
        depths.append(np.concatenate(groups, axis=1))
    return torch.from_numpy(np.stack(depths, axis=2)).to(x.dtype)


@pytest.mark.parametrize(
    ("dtype", "piece"), [(torch.float32, 1 << 20), (torch.bfloat16, 1), (torch.float32, 6000)]
)
@pytest.mark.parametrize("case", LAYERS)
def test_int8_values(
    isa: str, monkeypatch: pytest.MonkeyPatch, case: str, dtype: torch.dtype, piece: int
) -> None:
    """Whatever a piece holds: one depth of a volume, some, or several volumes."""
    monkeypatch.setattr(convolution_operators, "_PIECE", piece)
    layer, shape = LAYERS[case]
    layer, x = pruned(copy.deepcopy(layer), 0.7).to(dtype).requires_grad_(False), torch.randn(shape).to(dtype)
    x[:, :, 0] *= 100  # depths whose scales differ
    expected = expected_int8(layer, x)
    packed = packed_copy(layer, dtype=torch.int8)
    assert torch.equal(packed(x), expected)
    assert torch.equal(packed(x[0]), expected[0])
    assert torch.equal(packed(x.to(memory_format=torch.channels_last_3d)), expected)
    assert packed.weight.packed.forms == ("slots",)


def test_an_infinity_reaches_the_depths_that_see_it() -> None:
    layer = packed_copy(pruned(nn.Conv3d(2, 3, 3)), dtype=torch.int8).requires_grad_(False)
    x = torch.randn(1, 2, 7, 5, 5)
    finite = layer(x)
    x[0, 0, 1, 2, 2] = torch.inf
    y = layer(x)
    assert y[:, :, :2].isnan().all()
    assert torch.equal(y[:, :, 2:], finite[:, :, 2:])


def test_changes_and_errors() -> None:
    layer = pruned(nn.Conv3d(4, 6, 3))
    dense, before = layer.weight, layer.weight.detach().clone()
    pack(layer, dtype=torch.int8)
    rounded_once = layer.weight.to_dense()
    assert torch.equal(copy.deepcopy(layer).weight.to_dense(), rounded_once)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(layer.weight.to_dense(), 2 * rounded_once)
    assert layer.weight.packed.dtype is torch.int8
    restore(layer)
    assert layer.weight is dense
    assert (dense - 2 * before).abs().max() <= before.abs().max() / 40
    packed = packed_copy(layer)
    with pytest.raises(ValueError, match=r"x: expected shape \(n, 4, depth, height, width\); got"):
        packed(torch.ones(1, 5, 3, 3, 3))
    with pytest.raises(
        ValueError, match=r"x: expected volumes of at least the size of the kernel \(3, 3, 3\)"
    ):
        packed(torch.ones(1, 4, 2, 3, 3))
    with pytest.raises(ValueError, match="x: expected 4 axes, or 5 with a batch; got shape"):
        packed(torch.ones(4, 3, 3))
    with pytest.raises(TypeError, match="dtype: expected int8 or float values for a convolution"):
        pack(nn.Conv3d(4, 6, 3), dtype=INT4)
    with pytest.raises(RuntimeError, match="backward or forward-mode differentiation: expected dense layers"):
        packed(torch.ones(1, 4, 3, 3, 3, requires_grad=True)).sum().backward()
    assert packed(torch.ones(0, 4, 3, 3, 3)).shape == (0, 6, 1, 1, 1)


@pytest.mark.parametrize("values", [None, torch.int8])
def test_operator(values: torch.dtype | None) -> None:
    packed = packed_copy(pruned(nn.Conv3d(4, 6, 3, (2, 1, 1), 1, groups=2)), dtype=values)
    geometry = [packed.kernel_size, packed.stride, packed.padding, packed.dilation]
    arguments = (
        torch.randn(2, 4, 6, 5, 4),
        packed.weight.packed_data,
        packed.bias.detach(),
        6,
        *geometry,
        "gelu",
    )
    torch.library.opcheck(torch.ops.sparsam.conv3d.default, arguments)


class Hourglass(nn.Module):
    """Down and up again, of volumes, images and signals."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv3d(2, 8, 3, 2, 1)
        self.up = nn.ConvTranspose3d(8, 4, 4, 2, 1)
        self.images = nn.ConvTranspose2d(4, 4, 3, 2, groups=2)
        self.signals = nn.ConvTranspose1d(4, 3, 5, 3, 1, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        volumes = self.up(self.down(x).relu()).relu()
        images = self.images(volumes.mean(2)).relu()
        return self.signals(images.mean(2))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_exported_compiled_and_traced(tmp_path: Path) -> None:
    model: Any = Hourglass().eval().requires_grad_(False)
    dense_model = copy.deepcopy(model)
    for name, layer in model.named_children():
        pruned(layer)
        dense_model.get_submodule(name).load_state_dict(layer.state_dict())
        pack(layer)
    x, other = torch.randn(2, 2, 6, 8, 10), torch.randn(2, 2, 6, 8, 10)
    with torch.no_grad():
        expected = model(other)
        torch.testing.assert_close(expected, dense_model(other), rtol=1e-4, atol=1e-4)
        program = torch.export.export(model, (x,))
        torch.export.save(program, tmp_path / "model.pt2")
        loaded: Any = torch.export.load(tmp_path / "model.pt2").module()
        assert torch.equal(loaded(other), expected)
        any_batch = torch.export.export(
            model, (x,), dynamic_shapes=({0: torch.export.Dim("n"), 3: torch.export.Dim("h", min=4)},)
        )
        wide: Any = any_batch.module()
        more = torch.randn(3, 2, 6, 9, 10)
        assert torch.equal(wide(more), model(more))
        compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(other), expected)
        traced: Any = torch.jit.trace(model, x)  # type: ignore[no-untyped-call]
        assert torch.equal(traced(other), expected)
    torch._dynamo.reset()
