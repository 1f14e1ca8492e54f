"""Statistics of a convolution with 8192 inputs, as those of one-dimensional models of speech are."""

from __future__ import annotations

import os
from typing import Any

import pytest

import torch
from sparsam.torch.pruning import unfolded_rows
from sparsam.torch.pruning.calibration import Batch
from sparsam.torch.pruning.group_statistics import GroupBatch, GroupStatistics
from sparsam.torch.pruning.prunable import prunable_weights
from torch import nn

SMALL = int(os.environ.get("SPARSAM_BENCH_MAX", "1000000000")) < 1 << 26
CHANNELS, KERNEL, FRAMES, BATCHES = (16, 16, 50, 4) if SMALL else (512, 16, 500, 20)
SAMPLES = 8 if SMALL else 16  # in each batch: 160,000 places of the large one in all


PLACES = BATCHES * SAMPLES * FRAMES


@pytest.mark.benchmark(group=f"second moments of {CHANNELS * KERNEL} inputs, {PLACES:,} places")
@pytest.mark.parametrize("places", ["every", "spaced"])
def bench_moments(places: str, benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if places == "every":
        monkeypatch.setattr(unfolded_rows, "_PRODUCTS", float("inf"))
    torch.manual_seed(0)
    layer = nn.Conv1d(CHANNELS, CHANNELS, KERNEL, padding="same")
    weight = prunable_weights(layer)[0][0]
    inputs = torch.randn(SAMPLES, CHANNELS, FRAMES)
    batch = Batch((inputs,), {}, inputs, SAMPLES, {"input": inputs})

    def gather() -> GroupStatistics:
        found = GroupStatistics([weight], BATCHES)
        for index in range(BATCHES):
            found.add(GroupBatch(batch, index, (inputs,), {}, batches=BATCHES))
        return found

    found = benchmark.pedantic(gather, rounds=1)
    count = sum(part.count for part in found.parts[0])
    width = CHANNELS * KERNEL
    assert count == PLACES if places == "every" or SMALL else 4 * width <= count <= PLACES / 4
    variance = found.parts[0][0].rms ** 2
    assert abs(float(variance.mean()) - 1) < 0.1
