"""Scores from the inputs of all weights of the dense network, for selections that compare several layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam import scores
from sparsam.config import Scorer
from sparsam.statistics import InputStatistics
from sparsam.torch.pruning.calibration import Batch
from sparsam.torch.pruning.forward_passes import Pass, Slots, advance, current_pass, end
from sparsam.torch.pruning.layer_inputs import Inputs, watch
from sparsam.torch.pruning.twins import Twin
from sparsam.torch.pruning.unfolded_rows import input_rows
from torch import Tensor

__all__ = ["INPUT_METHODS", "InputScores", "dense_input_scores"]

INPUT_METHODS: Mapping[str, Callable[..., Scorer]] = {"wanda": scores.Wanda, "ria": scores.RIA}
"""The methods that score by statistics of inputs."""


@dataclass(frozen=True, eq=False)
class InputScores:
    """Wanda or RIA, for weights whose parts may have separate inputs, as in grouped convolutions.

    Attributes:
        method: "wanda" or "ria".
        parts: Name -> the statistics of each part.
    """

    method: str
    parts: Mapping[str, Sequence[InputStatistics]]
    needs_rows_as_outputs = True

    def score(self, name: str, weights: NDArray[Any], /) -> NDArray[Any]:
        """Returns the scores, computed part by part."""
        kind, parts = INPUT_METHODS[self.method], self.parts[name]
        pieces = zip(parts, np.split(weights, len(parts)), strict=True)
        return np.concatenate([kind({name: statistics}).score(name, piece) for statistics, piece in pieces])


def dense_input_scores(
    method: str, twin: Twin, batches: Sequence[Batch], done: Callable[[int], object] = lambda _: None
) -> InputScores:
    """Runs the dense network once and returns the scorer; `done` is called after each batch.

    Raises:
        ValueError: A weight is never reached, or its inputs are not finite.
    """
    watch(twin.model, twin.weights, current_pass)
    parts: dict[str, list[InputStatistics]] = {}
    slots = Slots(1)
    for index, batch in enumerate(batches):
        one = _Reader(twin, batch, index, slots, parts)
        try:
            advance([one])
        finally:
            end([one])
        done(index)
    for name in twin.weights:
        if name not in parts:
            msg = (
                f"calibration: expected inputs that reach every weight that is pruned; got none for {name!r};"
                " exclude it, or add inputs that reach it"
            )
            raise ValueError(msg)
    return InputScores(method, parts)


class _Reader(Pass):
    """Sums up the inputs of every call."""

    def __init__(
        self, twin: Twin, batch: Batch, index: int, slots: Slots, parts: dict[str, list[InputStatistics]]
    ) -> None:
        super().__init__(twin.model, batch, index, slots)
        self._twin, self._place, self._parts = twin, index, parts

    def before(self, name: str, inputs: Callable[[], Inputs], again: Callable[[], Tensor]) -> None:
        del again
        given = inputs()
        rows = input_rows(self._twin.weights[name], given)
        known = self._parts.setdefault(name, [InputStatistics(part.shape[1], gram=False) for part in rows])
        for i, (statistics, part) in enumerate(zip(known, rows, strict=True)):
            mask = None
            if self._twin.weights[name].kind != "convolution":
                mask = self.batch.row_mask(given[i].shape[:-1])
            try:
                statistics.update(
                    part.detach().float().numpy(), weights=None if mask is None else mask.numpy()
                )
            except ValueError as error:
                wanted = f"finite activations in batch {self._place} of the calibration"
                msg = f"weight {name!r}: expected {wanted}; got {error}; leave it out"
                raise ValueError(msg) from error
