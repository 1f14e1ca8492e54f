"""The time of two models, taken in turn, so that other work on the machine slows both in the same way."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Timing", "example", "time_in_turn"]

_LEAST = 5  # runs of each


@dataclass(frozen=True)
class Timing:
    """One shape of input.

    Attributes:
        rows: Texts in a batch.
        tokens: Of a text.
        dense_ms: Median milliseconds of the dense model.
        accelerated_ms: The same of the accelerated one.
    """

    rows: int
    tokens: int
    dense_ms: float
    accelerated_ms: float

    @property
    def speedup(self) -> float:
        """dense_ms / accelerated_ms."""
        return self.dense_ms / self.accelerated_ms


def example(shape: tuple[int, int], vocabulary: int) -> dict[str, Tensor]:
    """Keyword inputs of (rows, tokens), the same each time: what a text says takes no time."""
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def time_in_turn(
    dense: nn.Module, model: nn.Module, examples: Sequence[dict[str, Tensor]], seconds: float
) -> tuple[Timing, ...]:
    """Times both models with each example for about `seconds`, and at least five runs of each."""
    found = []
    with torch.inference_mode():
        for inputs in examples:
            for one in (dense, model):
                one(**inputs)
            taken: tuple[list[float], list[float]] = ([], [])
            end = time.perf_counter() + seconds
            while len(taken[0]) < _LEAST or time.perf_counter() < end:
                for one, times in zip((dense, model), taken, strict=True):
                    start = time.perf_counter()
                    one(**inputs)
                    times.append(1e3 * (time.perf_counter() - start))
            found.append(Timing(*inputs["input_ids"].shape, *map(statistics.median, taken)))
    return tuple(found)
