"""Times of two models, measured alternately, so that other work on the machine slows both equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

__all__ = ["Timing", "example", "median_milliseconds", "time_in_turn"]

_LEAST = 5  # runs of each


@dataclass(frozen=True)
class Timing:
    """One shape of input.

    Attributes:
        rows: Texts in a batch.
        tokens: Tokens in a text.
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
    """Keyword inputs of (rows, tokens), the same each time: time does not depend on the text."""
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def median_milliseconds(calls: Sequence[Callable[[], object]], seconds: float) -> tuple[float, ...]:
    """Calls each function in turn for about `seconds`, at least five times; returns their median times."""
    taken: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while len(taken[0]) < _LEAST or time.perf_counter() < end:
        for call, times in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
    return tuple(map(statistics.median, taken))


def time_in_turn(
    dense: nn.Module, model: nn.Module, examples: Sequence[dict[str, Tensor]], seconds: float
) -> tuple[Timing, ...]:
    """Times both models with each example for about `seconds`, and at least five runs of each."""
    found = []
    with torch.inference_mode():
        for inputs in examples:
            calls = [partial(one, **inputs) for one in (dense, model)]
            for warm_up in calls:
                warm_up()
            found.append(Timing(*inputs["input_ids"].shape, *median_milliseconds(calls, seconds)))
    return tuple(found)
