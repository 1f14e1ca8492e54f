"""A small 3-d U-Net, and a generator of images, through accelerate, files and restore."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune
from torch_cases import Clock, check_round_trip, pruned

import torch
from sparsam.torch import accelerate, load, pack, prune, restore, save
from sparsam.torch.acceleration.model_runner import difference
from sparsam.torch.layers.packed_tensor import PackedTensor
from torch import Tensor, nn


class UNet(nn.Module):
    """Two levels: down by a stride, up by a transposed convolution, joined with what went around."""

    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Conv3d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm3d(6)
        self.down = nn.Conv3d(6, 12, 2, 2)
        self.bottom = nn.Sequential(nn.Conv3d(12, 12, 3, padding=1, groups=2), nn.ReLU())
        self.up = nn.ConvTranspose3d(12, 6, 2, 2)
        self.last = nn.Conv3d(12, 6, (3, 1, 1), padding=(1, 0, 0))
        self.head = nn.Conv3d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        top = self.norm(self.top(x)).relu()
        up = self.up(self.bottom(self.down(top)))
        return self.head(self.last(torch.cat([top, up], 1)).relu())  # type: ignore[no-any-return]


def generator() -> nn.Module:
    """As of DCGAN: images from noise."""
    return nn.Sequential(
        nn.ConvTranspose2d(16, 12, 4), nn.ReLU(),
        nn.ConvTranspose2d(12, 12, 4, 2, 1, groups=3), nn.SiLU(),
        nn.ConvTranspose2d(12, 3, 3, 2, 1, output_padding=1, bias=False), nn.Tanh(),
    )  # fmt: skip


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "U-Net": (UNet, (2, 1, 4, 6, 8)),
    "generator": (generator, (3, 16, 2, 3)),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    return pruned(make()), torch.randn(shape)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("clock")
def test_accelerated_saved_loaded_and_restored(name: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    model, x = made(name)
    with torch.no_grad():
        exact = made(name)[0].double()(x.double()).float()
    report = accelerate(model, x, dtype=dtype, tolerance=0.05, verbose=False)
    convolutions = [row for row in report.layers if "Conv" in row.kind]
    assert all(row.swapped for row in convolutions)
    with torch.no_grad():
        y = model(x)
    assert float(difference(y, exact) or 0) < (1e-5 if dtype is None else 0.05)
    fused = {row.name: row.activation for row in report.layers if row.activation}
    assert fused == ({"bottom.0": "relu"} if name == "U-Net" else {"0": "relu", "2": "silu"})
    save(model, tmp_path)
    with torch.device("meta"):
        empty = MODELS[name][0]().eval()
    assert load(tmp_path, empty) == len(convolutions)
    for loaded in (empty, made(name)[0]):
        if loaded is not empty:
            assert load(tmp_path, loaded) == len(convolutions)
        with torch.no_grad():
            assert torch.equal(loaded(x), y)
        for key, value in model.state_dict(keep_vars=True).items():
            other = loaded.state_dict(keep_vars=True)[key]
            if isinstance(value, PackedTensor):
                assert isinstance(other, PackedTensor)
                assert torch.equal(other.packed_data, value.packed_data)
    assert restore(model) == len(convolutions)
    if dtype is None:
        for key, value in made(name)[0].state_dict().items():
            assert torch.equal(model.state_dict()[key], value)


def test_through_all_checks(clock: Clock) -> None:
    for name in MODELS:
        model, x = made(name)
        check_round_trip(model, x)


@pytest.mark.usefixtures("clock")
def test_int8_values_leave_transposed_convolutions_floats() -> None:
    model, x = made("U-Net")
    report = accelerate(model, x, values="int8", tolerance=0.3, verbose=False)
    assert all(row.swapped for row in report.layers)
    kinds = {
        name: weight.packed.dtype
        for name, weight in model.named_parameters()
        if isinstance(weight, PackedTensor)
    }
    assert kinds.pop("up.weight") is torch.float32
    assert set(kinds.values()) == {torch.int8}


def test_files_have_the_rows_of_the_dense_weight(tmp_path: Path) -> None:
    """Not those of the matrix that is multiplied with, which depends on the geometry."""
    model, _ = made("generator")
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    for layer in model.children():
        if isinstance(layer, nn.ConvTranspose2d):
            pack(layer)
    save(model, tmp_path)
    found = safetensors.torch.load_file(tmp_path / "sparsam.safetensors")
    for name in ("0.weight", "2.weight", "4.weight"):
        dense = plain[name]
        assert found[f"{name}_bits"].shape == (len(dense), (dense[0].numel() + 7) // 8)
        assert torch.equal(found[name], dense[dense != 0])


@pytest.mark.parametrize("how", ["prune", "weight_norm"])
@pytest.mark.usefixtures("clock")
def test_computed_weights(how: str, tmp_path: Path) -> None:
    def computed() -> nn.Module:
        model = generator().eval()
        for layer in model:  # type: ignore[attr-defined]
            if isinstance(layer, nn.ConvTranspose2d):
                if how == "prune":
                    torch_prune.l1_unstructured(layer, "weight", 0.7)  # type: ignore[no-untyped-call]
                else:
                    with torch.no_grad():
                        layer.weight.mul_(torch.rand_like(layer.weight) < 0.3)
                    parametrizations.weight_norm(layer)
        return model

    torch.manual_seed(0)
    model, x = computed(), torch.randn(2, 16, 3, 3)
    with torch.no_grad():
        dense = model(x)
    assert accelerate(model, x, verbose=False).swapped == 3
    with torch.no_grad():
        y = model(x)
    assert float(difference(y, dense) or 0) < 1e-5
    save(model, tmp_path)
    again = computed()
    assert load(tmp_path, again) == 3
    with torch.no_grad():
        assert torch.equal(again(x), y)


def test_a_file_for_another_layer_is_refused(tmp_path: Path) -> None:
    save(nn.Sequential(pack(nn.Conv2d(4, 4, 3), dtype=torch.int8)), tmp_path)
    with pytest.raises(
        ValueError, match=r"field forms: expected \['panels'\] for a transposed convolution; got"
    ):
        load(tmp_path, nn.Sequential(nn.ConvTranspose2d(4, 4, 3)))


def test_pruned() -> None:
    """3-d convolutions by their inputs; transposed ones only where they are named, by magnitude."""
    torch.manual_seed(0)
    model = UNet().eval()
    calibration = [torch.randn(4, 1, 8, 12, 12) for _ in range(3)]
    prune(model, calibration=calibration, method="obs", target_sparsity=0.5)
    assert zeros(model) == wanted_zeros(model, up=0.0)
    before = model.up.weight.detach().abs()
    prune(model, target_sparsity=0.5, overrides={"up.weight": 0.75})
    assert zeros(model) == wanted_zeros(model, up=0.75)
    gone = model.up.weight == 0
    assert before[gone].max() <= before[~gone].min()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight for name, weight in model.named_parameters() if weight.ndim == 5}


def zeros(model: nn.Module) -> dict[str, int]:
    return {name: int((weight == 0).sum()) for name, weight in weights(model).items()}


def wanted_zeros(model: nn.Module, up: float) -> dict[str, int]:
    shares = {name: up if name == "up.weight" else 0.5 for name in weights(model)}
    return {name: round(shares[name] * weight.numel()) for name, weight in weights(model).items()}
