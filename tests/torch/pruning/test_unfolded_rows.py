"""The rows of convolutions: im2col patches in every form, and evenly spaced ones of wide ones."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch.nn.functional as F
from pruning_models import normal

import torch
from sparsam.torch import prune
from sparsam.torch.pruning import unfolded_rows as rows_of
from sparsam.torch.pruning.prunable import prunable_weights
from sparsam.torch.pruning.unfolded_rows import input_rows, output_rows, spacing
from torch import Tensor, nn

CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1-d": (nn.Conv1d(3, 5, 4), (2, 3, 20)),
    "1-d, one sample": (nn.Conv1d(3, 5, 4, padding=3), (3, 20)),
    "1-d, stride, dilation, groups": (nn.Conv1d(4, 6, 3, 2, 5, 3, groups=2), (2, 4, 30)),
    "1-d, same": (nn.Conv1d(3, 5, 5, padding="same"), (2, 3, 20)),
    "1-d, circular": (nn.Conv1d(3, 5, 3, padding=2, padding_mode="circular"), (2, 3, 20)),
    "2-d": (nn.Conv2d(3, 5, (3, 2), (2, 1), (1, 2), (1, 2)), (2, 3, 11, 12)),
    "3-d": (nn.Conv3d(3, 5, (2, 3, 1), (1, 2, 1), (1, 0, 2), (1, 1, 2)), (2, 3, 5, 6, 7)),
    "3-d, circular, groups": (
        nn.Conv3d(4, 6, 3, padding=1, padding_mode="circular", groups=2),
        (2, 4, 4, 5, 6),
    ),
    "2-d, reflected, groups": (nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect", groups=4), (2, 4, 8, 9)),
}


@pytest.mark.parametrize("places", [slice(None), slice(1, None, 3)])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_rows_times_the_weight_are_the_outputs(case: str, places: slice) -> None:
    layer, shape = CONVOLUTIONS[case]
    weight = prunable_weights(layer)[0][0]
    x = normal(0, *shape)
    with torch.no_grad():
        wanted = output_rows(weight, layer(x), places)
        parts = input_rows(weight, (x,), places)
        matrices = weight.parameter.flatten(1).chunk(weight.groups)
        got = torch.cat([rows @ matrix.T for rows, matrix in zip(parts, matrices, strict=True)], 1)
    bias: Any = layer.bias
    torch.testing.assert_close(got + bias, wanted)


def test_rows_are_unfolds() -> None:
    layer, shape = CONVOLUTIONS["2-d"]
    module: Any = layer
    x = normal(0, *shape)
    wanted = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    (rows,) = input_rows(prunable_weights(layer)[0][0], (x,))
    assert torch.equal(rows, wanted.transpose(1, 2).reshape(-1, wanted.shape[1]))


def test_how_many_places_are_enough() -> None:
    weight = prunable_weights(nn.Conv1d(512, 4, 16, padding=8))[0][0]  # 8192 inputs
    for frames, batches, most in ((2000, 1, 1), (2000, 20, 1), (2000, 40, 2), (2000, 400, 21), (8, 9000, 1)):
        step = spacing(weight, (torch.zeros(1, 512, frames - 1),), batches)
        assert step == most
        assert frames * batches / step >= min(frames * batches, 4 * 8192)
    grouped = prunable_weights(nn.Conv1d(512, 16, 16, groups=16))[0][0]  # 512 inputs of each part
    assert spacing(grouped, (torch.zeros(1, 512, 2000),), 400) == 1
    assert spacing(prunable_weights(nn.Linear(8192, 4))[0][0], (torch.zeros(9, 8192),), 1 << 30) == 1


class Speech(nn.Module):
    """Frames of a waveform, a wide convolution over them, and what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.frames = nn.Conv1d(1, 16, 10, 5)
        self.context = nn.Conv1d(16, 16, 7, padding="same")
        self.out = nn.Linear(16, 6)

    def forward(self, waveform: Tensor) -> Tensor:
        x = torch.nn.functional.gelu(self.frames(waveform[:, None]))
        x = x + torch.nn.functional.gelu(self.context(x))
        result: Tensor = self.out(x.mean(-1))
        return result


def test_a_speech_model_is_pruned_as_well_with_a_quarter_of_the_places(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches = [normal(i, 8, 800) for i in range(16)]
    outputs, errors, steps = [], [], []
    for products in (2.5e12, 16 * 8 * 159 / 4 * 112**2):
        monkeypatch.setattr(rows_of, "_PRODUCTS", products)
        torch.manual_seed(0)
        model = Speech().eval()
        dense = model(normal(99, 64, 800)).detach()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "calibration: expected")
            prune(model, None, batches, target_sparsity=0.6, method="obs")
        steps.append(spacing(prunable_weights(model)[0][1], (torch.zeros(8, 16, 159),), 16))
        outputs.append(model.context.weight.detach().clone())
        errors.append(float((model(normal(99, 64, 800)) - dense).detach().square().mean() / dense.var()))
    assert steps == [1, 4]
    assert not torch.equal(*outputs)
    assert errors[1] < 1.2 * errors[0] + 1e-3
