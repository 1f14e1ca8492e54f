"""Packed ConvTranspose1d, 2d and 3d layers against PyTorch's own."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from packed_layers import ACTIVATIONS, packed_copy, pruned
from torch.nn import functional

import torch
from sparsam._core import interleave_at
from sparsam.torch import pack, restore
from sparsam.torch.layers.packed_tensor import PackedTensor
from sparsam.torch.layers.phases import Phases
from torch import Tensor, nn

KINDS: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def whole_numbers(layer: Any, seed: int = 0) -> Any:
    """The layer with small whole numbers, most of them 0, so that its sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            values = torch.randint(-3, 4, parameter.shape, generator=generator)
            parameter.copy_(values * (torch.rand(parameter.shape, generator=generator) < 0.4))
    return layer.requires_grad_(False)


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


@st.composite
def geometries(draw: Any) -> tuple[Any, Tensor]:
    """A layer of whole numbers, and an input."""
    rank = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    ins, outs = groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 5))
    kernel, stride, padding, dilation = each(1, 5), each(1, 4), each(0, 4), each(1, 3)
    more = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    sizes = each(1, 12 if rank < 3 else 6)
    ends = zip(sizes, kernel, stride, padding, dilation, more, strict=True)
    assume(all((n - 1) * s - 2 * p + d * (k - 1) + m + 1 > 0 for n, k, s, p, d, m in ends))
    layer = KINDS[rank - 1](
        ins, outs, kernel, stride, padding, more, groups, bias=draw(st.booleans()), dilation=dilation
    )
    seed = draw(st.integers(0, 1000))
    return whole_numbers(layer, seed), numbers(draw(st.integers(1, 3)), ins, *sizes, seed=seed)


@given(case=geometries())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_geometry(threads: int, case: tuple[Any, Tensor]) -> None:
    layer, x = case
    packed = packed_copy(layer)
    assert torch.equal(packed.weight.to_dense(), layer.weight)
    assert packed.weight.packed.nnz == torch.count_nonzero(layer.weight)
    expected = layer(x)
    assert torch.equal(packed(x), expected)
    assert torch.equal(packed(x[0]), expected[0])


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "signals": (nn.ConvTranspose1d(32, 24, 16, 8, 4), (2, 32, 50)),
    "stride 2": (nn.ConvTranspose2d(32, 40, 4, 2, 1), (3, 32, 17, 19)),
    "kernel and stride": (nn.ConvTranspose2d(24, 33, 2, 2, groups=3), (2, 24, 65, 70)),
    "stride 3": (nn.ConvTranspose2d(8, 16, 5, (3, 1), 2, (1, 0), bias=False), (2, 8, 33, 40)),
    "dilation": (nn.ConvTranspose2d(8, 16, 3, 2, 2, 1, dilation=3), (1, 8, 20, 20)),
    "volumes": (nn.ConvTranspose3d(16, 20, 2, 2), (2, 16, 6, 9, 11)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers(isa: str, threads: int, case: str) -> None:
    layer, shape = LAYERS[case]
    layer = pruned(copy.deepcopy(layer))
    x = torch.randn(shape)
    expected = layer(x).detach()
    packed = packed_copy(layer)
    for given_x in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):  # another memory layout
        y = packed(given_x).detach()
        assert y.is_contiguous()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    layer, x = pruned(nn.ConvTranspose2d(6, 9, 4, 2, 1)), torch.randn(2, 6, 7, 8)
    packed = packed_copy(layer, activation=activation).requires_grad_(False)
    expected = ACTIVATIONS[activation](layer(x)).detach()
    torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-5)
    wider = ACTIVATIONS[activation](layer(x, output_size=[15, 17])).detach()
    torch.testing.assert_close(packed(x, output_size=[15, 17]), wider, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(4, 6, 3, 2), nn.ConvTranspose3d(4, 6, 2, 2)])
def test_narrow_floats_and_autocast(layer: Any, dtype: torch.dtype) -> None:
    layer = whole_numbers(copy.deepcopy(layer))
    x = numbers(2, 4, *(5,) * (layer.weight.ndim - 2))
    expected = layer(x).to(dtype)  # sums of whole numbers, rounded once
    assert torch.equal(packed_copy(layer)(x.to(dtype)), expected)
    assert torch.equal(pack(copy.deepcopy(layer).to(dtype))(x.to(dtype)), expected)
    assert torch.equal(packed_copy(layer, dtype=dtype)(x), layer(x))
    with torch.autocast("cpu", dtype):
        assert torch.equal(packed_copy(layer)(x), expected)


def test_another_geometry_than_the_packed_one_is_computed_densely() -> None:
    layer = whole_numbers(nn.ConvTranspose2d(4, 6, 3, 2, 1))
    weight, x = packed_copy(layer).weight, numbers(2, 4, 5, 6)
    for options in ({"stride": 3}, {"stride": 2, "padding": 1, "dilation": 2}, {"stride": 2}):
        found = functional.conv_transpose2d(x, weight, **options)  # type: ignore[arg-type]
        assert torch.equal(found, functional.conv_transpose2d(x, layer.weight, **options))  # type: ignore[arg-type]
    assert torch.equal(
        functional.conv2d(numbers(1, 6, 9, 9), weight), functional.conv2d(numbers(1, 6, 9, 9), layer.weight)
    )
    plain = whole_numbers(nn.Conv2d(4, 6, 3))
    found = functional.conv_transpose2d(numbers(1, 6, 4, 4), packed_copy(plain).weight)
    assert torch.equal(found, functional.conv_transpose2d(numbers(1, 6, 4, 4), plain.weight))


def test_conversions_and_changes() -> None:
    layer = pruned(nn.ConvTranspose2d(8, 6, 4, 2, 1, groups=2))
    dense = layer.weight
    before = dense.detach().clone()
    pack(layer)
    again = copy.deepcopy(layer)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    sent = torch.load(file, weights_only=False)
    for other in (again, sent):
        assert torch.equal(other.weight.packed_data, layer.weight.packed_data)
    assert torch.equal(layer.state_dict()["weight"], before)
    assert repr(layer.weight).startswith("PackedTensor(8x3x4x4, density=0.2")
    assert torch.equal(again.bfloat16().weight.to_dense(), before.bfloat16())
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(layer.weight.to_dense(), 2 * before)
    restore(layer)
    assert layer.weight is dense
    assert torch.equal(dense, 2 * before)


def test_errors_in_words() -> None:
    layer = packed_copy(nn.ConvTranspose2d(4, 6, 3, 2, 1))
    with pytest.raises(ValueError, match=r"x: expected 3 axes, or 4 with a batch; got shape \(2, 4\)"):
        layer(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"x: expected shape \(n, 4, height, width\); got \(1, 5, 3, 3\)"):
        layer(torch.ones(1, 5, 3, 3))
    small = packed_copy(nn.ConvTranspose2d(4, 6, 1, 1, 2))
    with pytest.raises(ValueError, match="x: expected more pixels than the padding cuts off; got"):
        small(torch.ones(1, 4, 3, 3))
    with pytest.raises(
        TypeError, match="dtype: expected float values for a transposed convolution; got torch"
    ):
        pack(nn.ConvTranspose2d(4, 6, 3), dtype=torch.int8)
    with pytest.raises(RuntimeError, match="backward or forward-mode differentiation: expected dense layers"):
        layer(torch.ones(1, 4, 3, 3, requires_grad=True)).sum().backward()
    assert layer(torch.ones(0, 4, 3, 3)).shape == (0, 6, 5, 5)


def test_infinities_do_not_reach_pruned_weights() -> None:
    layer = nn.ConvTranspose2d(2, 2, 2, 2, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, 1, 0, 1] = 2.0
    x = torch.ones(1, 2, 2, 2)
    x[0, 1] = torch.inf
    y = packed_copy(layer).requires_grad_(False)(x)
    assert not y[0, 0].any()
    assert torch.equal(y[0, 1], torch.tensor([[0.0, 2.0], [0.0, 0.0]]).tile(2, 2))


@pytest.mark.parametrize(
    "layer", [nn.ConvTranspose1d(4, 6, 3, 2), nn.ConvTranspose2d(4, 6, (3, 2), (2, 1), 1)]
)
def test_operator(layer: Any) -> None:
    packed = packed_copy(pruned(copy.deepcopy(layer)))
    x = torch.randn(2, 4, *(7, 8)[: packed.weight.ndim - 2])
    geometry = [packed.kernel_size, packed.stride, packed.padding, packed.dilation, packed.output_padding]
    arguments = (x, packed.weight.packed_data, packed.bias.detach(), 6, *geometry, "gelu")
    torch.library.opcheck(torch.ops.sparsam.conv_transposed.default, arguments)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_interleaving(threads: int, step: int) -> None:
    """Of more pixels than one task has, from an offset on, with a last phase that is cut."""
    outer, inner, offset = (3, 301, 205), (4, 301 // step + 2, 205 // step + 3), (1, 0, 1)
    x = torch.randn(5, step, step, *inner)
    y = torch.empty(5, *outer)
    interleave_at(x.data_ptr(), 5, (1, step, step), inner, offset, outer, y.data_ptr())
    d, h, w = torch.meshgrid(*map(torch.arange, outer), indexing="ij")
    assert torch.equal(y, x[:, h % step, w % step, d + 1, h // step, w // step + 1])
    with pytest.raises(
        ValueError, match="size: expected at least 205; got 204; pass all pixels of each phase"
    ):
        interleave_at(x.data_ptr(), 5, (1, 1, 1), (4, 400, 205), offset, outer, y.data_ptr())


def test_one_parameter_in_two_layers() -> None:
    """Whose geometries differ: each packs its own."""
    first, second = whole_numbers(nn.ConvTranspose2d(4, 6, 4, 2, 1)), nn.ConvTranspose2d(4, 6, 4, 3)
    second.weight = first.weight
    x = numbers(2, 4, 5, 5)
    expected = first(x), second(x).detach()
    pack(first)
    pack(second)
    assert isinstance(second.weight, PackedTensor)
    assert torch.equal(first(x), expected[0])
    assert torch.equal(second(x).detach(), expected[1])


def test_phases_are_exact_both_ways() -> None:
    phases = Phases((2, 3), (4, 1), (2, 1))
    weight = torch.randn(6, 4, 3, 5)
    matrix = phases.matrix(weight, 2)
    assert matrix.shape == phases.matrix_shape(weight.shape, 2)
    assert torch.count_nonzero(matrix) == weight.numel()
    assert torch.equal(phases.weight(matrix, weight.shape, 2), weight)
