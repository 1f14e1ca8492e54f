"""The moments of a group's inputs and target outputs; a group is weights with the same inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sparsam.statistics import InputStatistics
from sparsam.torch.pruning.calibration import Batch
from sparsam.torch.pruning.layer_inputs import Inputs
from sparsam.torch.pruning.prunable import PrunableWeight
from sparsam.torch.pruning.tracked_outputs import Rectifier
from sparsam.torch.pruning.unfolded_rows import input_rows, output_rows, spacing
from torch import Tensor

__all__ = ["GroupBatch", "GroupStatistics", "OtherRows", "row_weights", "split"]

_HELD_OUT = 10  # one batch in this many is held out
_FEW = 4  # batches: with fewer, the last rows of each are held out instead


@dataclass(frozen=True)
class GroupBatch:
    """The inputs and target outputs of a group for one batch.

    Attributes:
        batch: The batch.
        index: Its index among all batches.
        inputs: The inputs of the group's weights.
        outputs: Name -> the target outputs; empty without targets.
        stream: The residual sum of the dense network that includes the output; rows are weighted by its size.
            None: all rows have weight 1.
        rectifiers: Name -> the ReLU that takes the output.
        batches: How many batches there are.
    """

    batch: Batch
    index: int
    inputs: Inputs
    outputs: dict[str, Tensor]
    stream: Tensor | None = None
    rectifiers: Mapping[str, Rectifier] = field(default_factory=dict)
    batches: int = 1

    def places(self, weight: PrunableWeight) -> slice:
        """The positions of a convolution that are used, others in each batch; all for other layers."""
        step = spacing(weight, self.inputs, self.batches)
        return slice(self.index % step, None, step)


class OtherRows(Exception):
    """The dense network sent different rows to a weight than the pruned one, as routers of experts may do."""


class GroupStatistics:
    """The moments of a group, for the batches to fit and for those held out.

    Attributes:
        parts: (fitted, held out) for each part of the outputs with separate inputs, as in grouped
            convolutions.
        targets: Name -> which of a part's targets belong to the weight; empty without targets.
    """

    def __init__(self, weights: Sequence[PrunableWeight], batches: int) -> None:
        """Empty moments of weights that share inputs; `batches` is how many will be added."""
        self._weights, self._batches = weights, batches
        self.parts: list[tuple[InputStatistics, InputStatistics]] = []
        self.targets: dict[str, slice] = {}

    def add(self, seen: GroupBatch) -> None:
        """Adds the rows of a batch.

        Raises:
            ValueError: A value is not finite; the message names the first weight.
            OtherRows: The outputs do not belong to these inputs.
        """
        first = self._weights[0]
        places = seen.places(first)
        parts = input_rows(first, seen.inputs, places)
        outputs = [
            output_rows(weight, seen.outputs[weight.name], places) for weight in self._weights if seen.outputs
        ]
        if any(len(output) != max(map(len, parts)) for output in outputs):
            raise OtherRows
        if not self.parts:
            self._begin(parts, outputs)
        for i, rows in enumerate(parts):
            targets = None
            if outputs:
                columns = [output.chunk(len(parts), 1)[i][: len(rows)] for output in outputs]
                targets = _array(columns[0] if len(columns) == 1 else torch.cat(columns, 1))
            weights = row_weights(first, seen, i, len(rows))
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


def row_weights(weight: PrunableWeight, seen: GroupBatch, part: int, rows: int) -> Any:
    """The weight of each row of a part, float64; None: all have weight 1."""
    if weight.kind == "convolution":
        return None
    found = seen.batch.row_mask(seen.inputs[part].shape[:-1])
    if seen.stream is not None:
        energy = seen.stream.reshape(rows, -1).float().square().mean(1)
        share = 1 / (energy + 1e-6 * energy.mean()).clamp_min(1e-30)
        found = share if found is None else share * found
    return None if found is None else found.double().numpy()


def split(index: int, batches: int, rows: int) -> Iterator[tuple[int, slice]]:
    """Yields (0, the rows of a batch to fit) and (1, those held out)."""
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
