"""`prune(values=...)`: weights that lie on a grid, which packing finds again to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sparsam.torch
import torch
from messages import FORM
from sparsam import NM, InputStatistics, Mask, quantize
from sparsam.torch import PackedTensor, prune
from torch import Tensor, nn


def network(dtype: torch.dtype = torch.float32) -> Any:  # whose layers have attributes of their kind
    torch.manual_seed(0)
    layers = (nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 32, bias=False), nn.Tanh(), nn.Linear(32, 6))
    return nn.Sequential(*layers).eval().to(dtype)


def batches(dtype: torch.dtype = torch.float32, count: int = 12) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(1)
    return [torch.randn(32, 24, generator=drawn).to(dtype) for _ in range(count)]


def grid_of(weight: Tensor, most: int = 64, group: int | None = None) -> bool:
    """Whether each row, or each group of columns of it, is integers up to `most` times one number."""
    matrix = weight.detach().double().reshape(len(weight), -1).numpy()
    width = group or matrix.shape[1]
    for start in range(0, matrix.shape[1], width):
        for row in matrix[:, start : start + width]:
            largest = np.abs(row).max()
            steps = largest / np.arange(1, most + 1)
            if largest and not any(np.array_equal(np.rint(row / step) * step, row) for step in steps):
                return False
    return True


def codes_of(packed: PackedTensor) -> tuple[Any, Any]:
    """Integers and scales of what is packed."""
    (part,) = packed.packed.parts
    return part.values(), part.scales()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", ["obs", "admm", "wanda"])
def test_weights_lie_on_a_grid_and_are_packed_as_they_are(dtype: torch.dtype, method: Any) -> None:
    model = network(dtype)
    report = prune(model, calibration=batches(dtype), target_sparsity=0.5, method=method, values="int8")
    assert report.values == "int8"
    for layer in (model[0], model[2], model[4]):
        weight = layer.weight.detach()
        assert weight.dtype is dtype
        assert grid_of(weight)
        assert 0.5 <= float((weight == 0).double().mean()) < 0.55
        if dtype is torch.float64:
            continue
        packed = PackedTensor.pack(weight, dtype=torch.int8)
        assert torch.equal(packed.to_dense(), weight)
        codes, scales = codes_of(packed)
        keep = weight != 0
        assert len(codes) == int(keep.sum())
        exact = torch.zeros(weight.shape, dtype=torch.float64)
        exact[keep] = torch.from_numpy(codes).double()
        assert torch.equal(exact * torch.from_numpy(scales).double()[:, None], weight.double())


def test_later_layers_see_what_is_rounded() -> None:
    """One call is the same as one for each layer after the other, with targets of their own."""
    options: dict[str, Any] = {
        "calibration": batches(),
        "target_sparsity": 0.5,
        "method": "obs",
        "targets": "own",
        "values": "int8",
    }
    together, apart = network(), network()
    prune(together, **options)
    for name in ("0", "2", "4"):
        prune(apart, exclude=[other for other in ("0", "2", "4") if other != name], **options)
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        assert torch.equal(one, other)
    first = network()
    prune(first, **options | {"values": None}, exclude=["2", "4"])
    prune(first, exclude=["0", "4"], **options)
    assert not torch.equal(first[2].weight, together[2].weight)


def test_the_rounding_is_that_of_quantize() -> None:
    """On the mask of the fit and the fitted weights, with all inputs, and the bias after it."""
    seen, rounded = network(), network()
    options: dict[str, Any] = {"calibration": batches(), "target_sparsity": 0.6, "exclude": ["2", "4"]}
    unrounded = prune(seen, **options)
    report = prune(rounded, **options, values="int8")
    weight = seen[0].weight.detach().numpy()
    x = InputStatistics(24)
    for batch in batches():
        x.update(batch.numpy())
    found = quantize(weight, x.centred, Mask.from_array(weight != 0))
    fresh = rounded[0].weight.detach().numpy()
    # Sums of the same inputs in another order: the weights may differ in a step here and there.
    assert np.mean(fresh == found.weights) > 0.95
    moved = seen[0].bias.detach().numpy() + (weight - fresh) @ x.mean
    np.testing.assert_allclose(rounded[0].bias.detach().numpy(), moved, atol=1e-5)
    (before,), (after,) = unrounded.pruned, report.pruned
    assert before.error is not None
    assert after.error is not None
    assert before.error <= after.error < 1.1 * before.error + 1e-3


@pytest.mark.parametrize("group", [None, 32])
def test_int4(group: int | None) -> None:
    model = network()
    prune(model, calibration=batches(), target_sparsity=0.5, values="int4", group=group)
    for layer in (model[0], model[2], model[4]):
        assert grid_of(layer.weight, 7, group)


def test_rounding_alone_and_patterns() -> None:
    x = torch.cat(batches())
    model, dense = network(), network()
    prune(model, calibration=batches(), target_sparsity=0.0, values="int8")
    assert grid_of(model[0].weight)
    with torch.no_grad():
        assert float((model(x) - dense(x)).abs().max()) < 0.1 * float(dense(x).abs().max())
    model = network()
    prune(model, calibration=batches(), pattern=NM(2, 4), values="int8")
    kept = (model[0].weight != 0).reshape(-1, 4).sum(1)
    assert int(kept.max()) == 2
    assert grid_of(model[0].weight)


def test_layers_of_other_kinds() -> None:
    """Convolutions with a ReLU after them, in groups, and attention."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, groups=2)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.out = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            tokens = torch.relu(self.conv(x)).flatten(2).transpose(1, 2)
            mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
            y: Tensor = self.out(tokens + mixed)
            return y

    torch.manual_seed(0)
    model = Net().eval()
    images = [torch.randn(8, 4, 6, 6) for _ in range(6)]
    prune(model, calibration=images, target_sparsity=0.5, values="int8")
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            assert grid_of(weight), name
    before = copy.deepcopy(model)
    sparsam.torch.pack(model.attention, dtype=torch.int8)
    sparsam.torch.pack(model.out, dtype=torch.int8)
    for name, weight in model.named_parameters():
        assert torch.equal(weight.to_dense(), before.get_parameter(name)), name


def test_an_accelerated_model_frees_what_it_rounded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 320), nn.ReLU(), nn.Linear(320, 256)).eval()
    seen = [torch.randn(300, 256) for _ in range(6)]
    prune(model, calibration=seen, target_sparsity=0.8, values="int8", method="obs")
    dense = {name: value.detach().clone() for name, value in model.named_parameters()}
    x = torch.randn(8, 256)
    report = sparsam.torch.accelerate(
        model, x, values="int8", min_gain=1e-6, tolerance=0.5, seconds=0.2, verbose=False
    )
    if not report.swapped:
        pytest.skip("nothing is faster packed on this machine")
    for row in report.layers:
        if row.swapped:
            weight: Any = model.get_submodule(row.name).weight
            assert torch.equal(weight.to_dense(), dense[f"{row.name}.weight"])
            assert weight.original.numel() == 0
    sparsam.torch.save(model, tmp_path)
    blank = nn.Sequential(nn.Linear(256, 320), nn.ReLU(), nn.Linear(320, 256)).eval()
    sparsam.torch.load(tmp_path, blank)
    with torch.no_grad():
        assert torch.equal(blank(x), model(x))


def test_progress_is_that_of_the_same_values(tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibration": batches(), "target_sparsity": 0.5, "state_dir": tmp_path}
    model, again = network(), network()
    prune(model, **options, values="int8")
    prune(again, **options, values="int8")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="saved; got another's"):
        prune(network(), **options)


def test_reports() -> None:
    model = network()
    report = prune(model, calibration=batches(), target_sparsity=0.5, values="int8")
    assert 'values: int8, scaled floats that accelerate(..., values="int8") packs' in str(report)
    assert report.to_dict()["values"] == "int8"
    plain = prune(network(), target_sparsity=0.5)
    assert plain.to_dict()["values"] == ""
    assert "values:" not in str(plain)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("values: expected None, 'int8' or 'int4'; got 'int3'", {"values": "int3"}),
        ("values: .*; got 8", {"values": 8}),
        (r"values: .*; got \['int8'\]", {"values": ["int8"]}),
        ("values: expected pruning layer by layer; got no cal", {"values": "int8", "calibration": None}),
        (
            "values: .*; got method 'magnitude' in scope 'global'",
            {"values": "int8", "method": "magnitude", "scope": "global"},
        ),
        ("group: expected None, or .*; got 32 with values='int8'", {"values": "int8", "group": 32}),
        ("group: .*; got 16 with values='int4'", {"values": "int4", "group": 16}),
        ("group: .*; got 64 with values=None", {"group": 64}),
    ],
)
def test_what_is_refused(match: str, options: dict[str, Any]) -> None:
    model = network()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=match) as caught:
        prune(model, **{"calibration": batches(count=2), **options})
    assert FORM.fullmatch(str(caught.value)), caught.value
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
