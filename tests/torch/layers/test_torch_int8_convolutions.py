"""int8 values in Conv1d and Conv2d layers: in models, graphs and files."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from packed_layers import packed_copy, pruned
from rounded_layers import weight_of

import torch
from rounded_matmul import int8_convolution
from sparsam.sparse.int8 import rounded
from sparsam.torch import accelerate, load, pack, restore, save
from sparsam.torch.layers.packed_weight import INT4
from torch import Tensor, nn

LAST = torch.channels_last


def expected_of(layer: Any, x: Tensor, padding: tuple[int, int] | None = None) -> Tensor:
    """What docs/quantization.md says, group by group; signals are images of one row.

    Weights are rounded as in a SparseMatrix, whose tests are elsewhere.
    """
    flat = isinstance(layer, nn.Conv1d)
    weight = layer.weight.detach().float().numpy()
    weight = weight[:, :, None] if flat else weight
    stride, around, dilation = (
        (first, *pair) if flat else pair
        for first, pair in ((1, layer.stride), (0, padding or layer.padding), (1, layer.dilation))
    )
    images = x.detach().float()
    images = images[:, :, None] if flat else images
    bias = None if layer.bias is None else layer.bias.detach().float().numpy()
    outs, ins = weight.shape[0] // layer.groups, weight.shape[1]
    found = []
    for group in range(layer.groups):
        part = weight[group * outs : (group + 1) * outs]
        q, scales = rounded(part.reshape(outs, -1))
        own = images[:, group * ins : (group + 1) * ins].numpy()
        add = None if bias is None else bias[group * outs : (group + 1) * outs]
        geometry: Any = (stride, around, dilation)
        found.append(int8_convolution(q.reshape(part.shape), scales, own, geometry, add))
    y = torch.from_numpy(np.concatenate(found, axis=1))
    return (y[:, :, 0] if flat else y).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 40, 3, padding=1),
        nn.Conv2d(16, 24, (3, 2), (2, 1), (0, 2), (1, 3), groups=4, bias=False),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.Conv2d(16, 8, 1),
        nn.Conv1d(16, 40, 5, 2, 3),
        nn.Conv1d(16, 12, 4, dilation=3, groups=2),
    ],
)
def test_a_layer_computes_what_is_defined(isa: str, layer: Any, dtype: torch.dtype) -> None:
    layer = pruned(copy.deepcopy(layer), 0.7).to(dtype)
    x = torch.randn(3, 16, *((13, 11) if isinstance(layer, nn.Conv2d) else (30,))).to(dtype)
    expected = expected_of(layer, x)
    dense = layer.weight.detach().clone()
    pack(layer, dtype=torch.int8)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x[0]), expected[0])
        if isinstance(layer, nn.Conv2d):
            y = layer(x.to(memory_format=LAST))
            assert torch.equal(y, expected)
            assert y.is_contiguous(memory_format=LAST)
            assert layer(x).is_contiguous()
    weight = weight_of(layer)
    assert weight.packed.forms == ("slots",)
    assert "values=torch.int8" in repr(weight)
    assert str(weight.explain(4)).endswith("slots, the kernel of int8 values")
    error = (weight.to_dense() - dense).abs().amax(tuple(range(1, dense.ndim)))
    assert (error <= dense.abs().amax(tuple(range(1, dense.ndim))) / 80).all()


def test_activations_and_other_padding() -> None:
    x = torch.randn(2, 6, 15, 17)
    layer = pruned(nn.Conv2d(6, 9, 3, padding=1))
    y = packed_copy(layer, dtype=torch.int8, activation="relu")(x)
    assert torch.equal(y.detach(), expected_of(layer, x).relu())
    same = pruned(nn.Conv2d(6, 9, 5, padding="same", dilation=(1, 2)))
    assert torch.equal(packed_copy(same, dtype=torch.int8)(x).detach(), expected_of(same, x, (2, 4)))
    even = pruned(nn.Conv2d(6, 9, 2, padding="same"))
    wider = nn.functional.pad(x, (0, 1, 0, 1))
    assert torch.equal(packed_copy(even, dtype=torch.int8)(x).detach(), expected_of(even, wider, (0, 0)))
    mirrored = pruned(nn.Conv2d(6, 9, 3, padding=1, padding_mode="reflect"))
    wider = nn.functional.pad(x, (1, 1, 1, 1), "reflect")
    found = packed_copy(mirrored, dtype=torch.int8, activation="relu")(x).detach()
    assert torch.equal(found, expected_of(mirrored, wider, (0, 0)).relu())
    assert packed_copy(layer, dtype=torch.int8)(x[:0]).shape == (0, 9, 15, 17)


def test_results_of_an_image_do_not_depend_on_the_others() -> None:
    layer = packed_copy(pruned(nn.Conv2d(8, 8, 3)), dtype=torch.int8)
    x = torch.randn(4, 8, 9, 9) * torch.tensor([1.0, 100.0, 0.01, 1.0])[:, None, None, None]
    x[3, 5, 2, 7] = torch.inf
    with torch.no_grad():
        y = layer(x)
        assert y[3].isnan().all()
        for image in range(3):
            assert torch.equal(y[image], layer(x[image]))


def test_conversions_and_changes() -> None:
    layer = pruned(nn.Conv2d(8, 12, 3, groups=2))
    dense = layer.weight
    pack(layer, dtype=torch.int8)
    again = copy.deepcopy(layer)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    sent = torch.load(file, weights_only=False)
    for other in (again, sent):
        assert torch.equal(other.weight.to_dense(), layer.weight.to_dense())
        assert torch.equal(weight_of(other).packed_data, weight_of(layer).packed_data)
    assert torch.equal(layer.state_dict()["weight"], layer.weight.to_dense())
    assert weight_of(again.bfloat16()).packed.dtype is torch.int8
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(layer.weight.to_dense(), 2 * sent.weight.to_dense())
    assert weight_of(layer).packed.dtype is torch.int8
    restore(layer)
    assert layer.weight is dense
    with pytest.raises(TypeError, match=r"dtype: expected int8 or float values for a convolution; got torch"):
        pack(layer, dtype=INT4)


class Net(nn.Module):
    """Convolutions in groups, of images and of signals."""

    def __init__(self) -> None:
        super().__init__()
        self.images = nn.Conv2d(4, 6, 3, padding=1)
        self.signals = nn.Conv1d(6, 6, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.signals(self.images(x).relu().flatten(2))  # type: ignore[no-any-return]


def net() -> Any:
    torch.manual_seed(0)
    model: Any = pruned_layers(Net().eval())
    for layer in model.children():
        pack(layer, dtype=torch.int8)
    return model


def pruned_layers(model: Any) -> Any:
    for layer in model.children():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            pruned(layer)
    return model


def test_operator() -> None:
    for layer, x in (
        (nn.Conv2d(20, 30, 3, 2, 1, groups=5), torch.randn(4, 20, 9, 8)),
        (nn.Conv2d(20, 30, 3, 2, 1), torch.randn(4, 20, 9, 8).to(memory_format=LAST)),
    ):
        sparse = packed_copy(pruned(layer), dtype=torch.int8)
        geometry = [sparse.kernel_size, sparse.stride, sparse.padding, sparse.dilation]
        arguments = (x, sparse.weight.packed_data, sparse.bias.detach(), 30, *geometry, "gelu")
        torch.library.opcheck(torch.ops.sparsam.conv2d.default, arguments)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_exported_compiled_and_traced(tmp_path: Path) -> None:
    model, x = net(), torch.randn(2, 4, 8, 8)
    other = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = model(other)
        program = torch.export.export(model, (x,))
        torch.export.save(program, tmp_path / "model.pt2")
        loaded: Any = torch.export.load(tmp_path / "model.pt2").module()
        assert torch.equal(loaded(other), expected)
        compiled: Any = torch.compile(model, fullgraph=True, backend="inductor")
        for given in (other, other.to(memory_format=LAST)):
            assert torch.equal(compiled(given), expected)
        traced: Any = torch.jit.trace(model, x)  # type: ignore[no-untyped-call]
        assert torch.equal(traced(other), expected)
    torch._dynamo.reset()


def test_no_gradient() -> None:
    model, x = net(), torch.randn(2, 4, 8, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="backward or forward-mode differentiation: expected dense layers"):
        model(x).sum().backward()


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=2), nn.Flatten(2),
        nn.Conv1d(32, 16, 3), nn.GELU(), nn.Flatten(), nn.Linear(16 * 34, 10),
    )  # fmt: skip
    return pruned_layers(layers).eval()  # type: ignore[no-any-return]


@pytest.mark.usefixtures("clock")
def test_a_model_is_accelerated_saved_and_loaded(tmp_path: Path) -> None:
    model, x = conv_net(), torch.randn(3, 8, 8, 8)
    with torch.no_grad():
        dense = model(x)
        report = accelerate(model, x, values="int8", tolerance=0.1, min_gain=1e-6, verbose=False)
        y = model(x)
    rows = {row.name: row for row in report.layers}
    assert [row.swapped for row in rows.values()] == [True, True, True, False]
    assert rows["0"].activation == "relu"
    assert report.difference is not None
    assert 0 < report.difference <= 0.1
    assert (y - dense).abs().max() <= 0.1 * dense.abs().max()
    for name in ("0", "2", "4"):
        assert weight_of(model.get_submodule(name)).packed.dtype is torch.int8
    save(model, tmp_path)
    with torch.device("meta"):
        loaded = conv_net()
    assert load(tmp_path, loaded) == 3
    with torch.no_grad():
        assert torch.equal(loaded(x), y)
    plain = dict(conv_net().named_parameters())
    for name in ("0", "2", "4"):
        assert torch.equal(weight_of(loaded.get_submodule(name)).packed_data,
                           weight_of(model.get_submodule(name)).packed_data)  # fmt: skip
        error = (weight_of(loaded.get_submodule(name)).to_dense() - plain[f"{name}.weight"]).abs()
        assert error.max() < 0.02


def test_files_have_the_order_of_the_dense_weight(tmp_path: Path) -> None:
    """Bits and values are those of the weight's own rows: int8 convolutions have no format of their own."""
    layer = pruned(nn.Conv2d(4, 6, (2, 3), groups=2))
    q, scales = rounded(layer.weight.detach().reshape(6, 12).numpy())
    save(nn.Sequential(pack(layer, dtype=torch.int8)), tmp_path)
    found = safetensors.torch.load_file(tmp_path / "sparsam.safetensors")
    bits = found["0.weight_bits"].numpy()
    assert bits.shape == (6, 2 + 4)
    keep = np.unpackbits(np.ascontiguousarray(bits[:, :2]), axis=1, count=12, bitorder="little").astype(bool)
    assert np.array_equal(keep, q != 0)
    assert np.array_equal(np.ascontiguousarray(bits[:, 2:]).view(np.float32)[:, 0], scales)
    assert np.array_equal(found["0.weight"].numpy(), q[q != 0])
    again = nn.Sequential(nn.Conv2d(4, 6, (2, 3), groups=2))
    assert load(tmp_path, again) == 1
    assert torch.equal(weight_of(again[0]).packed_data, weight_of(layer).packed_data)


def test_wide_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="w: expected at most 65536 columns for int8; got 65600; use float"):
        pack(nn.Conv1d(1, 1, 65600), dtype=torch.int8)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("kernel", [(1, 65536), (65536, 1)])
def test_kernels_that_a_form_cannot_hold(kernel: tuple[int, int]) -> None:
    """Of as many columns as int8 values may have, but too long for a form's header; others are packed."""
    layer, x = pruned(nn.Conv2d(1, 2, kernel)), torch.randn(1, 1, *kernel)
    with pytest.raises(ValueError, match=f"taps: .* got {kernel[0]} x {kernel[1]}; .* or use float values"):
        pack(copy.deepcopy(layer), dtype=torch.int8)
    model = nn.Sequential(layer, pruned(nn.Conv2d(2, 8, 1)))
    report = accelerate(model, x, values="int8", tolerance=1.0, min_gain=1e-6, verbose=False)
    assert report.layers[0].reason == "a kernel longer than 65535, too long to round"
    assert report.layers[1].reason != report.layers[0].reason
    longest = pack(nn.Conv1d(1, 2, 65535), dtype=torch.int8)
    assert longest(torch.ones(1, 1, 65535)).shape == (1, 2, 1)
