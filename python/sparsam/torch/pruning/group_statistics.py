"""The moments of what a group of weights is multiplied with, and of the outputs that are wanted of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sparsam.statistics import InputStatistics
from sparsam.torch.pruning.calibration import Batch
from sparsam.torch.pruning.layer_inputs import Inputs, input_rows, output_rows
from sparsam.torch.pruning.prunable import PrunableWeight
from torch import Tensor

__all__ = ["GroupStatistics", "OtherRows", "Seen", "split"]

_HELD_OUT = 10  # one batch in so many is set aside
_FEW = 4  # batches: of fewer, the last rows of each are set aside instead


@dataclass(frozen=True)
class Seen:
    """What one batch shows of a group.

    Attributes:
        batch: The batch.
        index: Its place among all.
        inputs: Of the group's weights.
        outputs: Name -> the outputs wanted; empty without targets.
        stream: The sum that the output goes into, in the dense network, by whose size rows are weighed; None:
            rows count alike.
    """

    batch: Batch
    index: int
    inputs: Inputs
    outputs: dict[str, Tensor]
    stream: Tensor | None = None


class OtherRows(Exception):
    """The dense network sent other rows to a weight than the pruned one, as routers of experts do."""


class GroupStatistics:
    """The moments of a group, of the batches that fits are made from and of those held out.

    Attributes:
        parts: For each part of the weights' outputs that has inputs of its own, (fitted, held out).
        targets: Name -> which of a part's targets are the weight's; empty without targets.
    """

    def __init__(self, weights: Sequence[PrunableWeight], batches: int) -> None:
        """Of weights that share inputs, over so many batches."""
        self._weights, self._batches = weights, batches
        self.parts: list[tuple[InputStatistics, InputStatistics]] = []
        self.targets: dict[str, slice] = {}

    def add(self, seen: Seen) -> None:
        """Adds what a batch shows.

        Raises:
            ValueError: It is not finite; the message names the first weight.
            OtherRows: The outputs are not of these inputs.
        """
        first = self._weights[0]
        parts = input_rows(first, seen.inputs)
        outputs = [output_rows(weight, seen.outputs[weight.name]) for weight in self._weights if seen.outputs]
        if any(len(output) != max(map(len, parts)) for output in outputs):
            raise OtherRows
        if not self.parts:
            self._begin(parts, outputs)
        for i, rows in enumerate(parts):
            targets = None
            if outputs:
                columns = [output.chunk(len(parts), 1)[i][: len(rows)] for output in outputs]
                targets = _array(columns[0] if len(columns) == 1 else torch.cat(columns, 1))
            weights = self._row_weights(seen, i, len(rows))
            array = _array(rows)
            for place, chosen in split(seen.index, self._batches, len(rows)):
                try:
                    self.parts[i][place].update(
                        array[chosen],
                        None if targets is None else targets[chosen],
                        weights=None if weights is None else weights[chosen],
                    )
                except ValueError as error:
                    wanted = f"finite activations in batch {seen.index} of the calibration"
                    msg = f"weight {first.name!r}: expected {wanted}; got {error}; leave it out"
                    raise ValueError(msg) from error

    def _begin(self, parts: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        start = 0
        for weight, output in zip(self._weights, outputs, strict=bool(outputs)):
            size = output.shape[1] // len(parts)
            self.targets[weight.name] = slice(start, start + size)
            start += size
        for rows in parts:
            one, other = (InputStatistics(rows.shape[1], targets=start or None) for _ in range(2))
            self.parts.append((one, other))

    def _row_weights(self, seen: Seen, part: int, rows: int) -> Any:
        if self._weights[0].kind == "convolution":
            return None
        found = seen.batch.row_mask(seen.inputs[part].shape[:-1])
        if seen.stream is not None:
            energy = seen.stream.reshape(rows, -1).float().square().mean(1)
            share = 1 / (energy + 1e-6 * energy.mean()).clamp_min(1e-30)
            found = share if found is None else share * found
        return None if found is None else found.double().numpy()


def split(index: int, batches: int, rows: int) -> Iterator[tuple[int, slice]]:
    """Yields 0 with the rows of a batch that fits are made from, and 1 with those held out."""
    if batches >= _FEW:
        step = min(_HELD_OUT, batches)
        yield int(index % step == step // 2), slice(None)
    else:
        kept = rows - rows // _HELD_OUT
        yield 0, slice(0, kept)
        if kept < rows:
            yield 1, slice(kept, rows)


def _array(tensor: Tensor) -> Any:
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).detach().numpy()
