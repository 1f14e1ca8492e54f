"""Refits weights whose outputs go into a ReLU, with respect to the outputs of the ReLU.

Where the dense network's input of the ReLU is below 0, any output that keeps it there is as good. There the
target is the weight's present output, clipped to the one for which the input is 0; elsewhere it is the dense
output, as before. A few such rounds follow the fit, each with the outputs of the one before: except for the
damping, no round increases the squared error after the ReLU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from sparsam.reconstruction.sequential import LayerFit, LayerProblem, refit_layer, round_layer
from sparsam.torch.pruning.group_statistics import GroupBatch, row_weights
from sparsam.torch.pruning.prunable import PrunableWeight
from sparsam.torch.pruning.unfolded_rows import input_rows, output_rows
from torch import Tensor

__all__ = ["Shown", "fit_to_rectified"]

_ROUNDS = 3

Shown = Callable[[], Iterable[GroupBatch]]
"""Returns the inputs and targets of a weight in all batches; may be called repeatedly."""


def fit_to_rectified(problem: LayerProblem, fit: LayerFit, weight: PrunableWeight, shown: Shown) -> LayerFit:
    """Fits a weight again.

    Args:
        problem: Its problem, with targets.
        fit: The solution.
        weight: The weight in the model.
        shown: Its inputs and targets in all batches, with its `Rectifier`.

    Returns:
        The fit, with the same mask and error, except for the changes by rounding if the problem has one.
    """
    for _ in range(_ROUNDS):
        matrix = torch.from_numpy(fit.weights.reshape(len(fit.weights), -1))
        bias = None if fit.bias is None else torch.from_numpy(fit.bias).to(matrix.dtype)
        cross = torch.zeros(matrix.shape, dtype=torch.float64)
        total = torch.zeros(len(matrix), dtype=torch.float64)
        for seen in shown():
            (x,) = input_rows(weight, seen.inputs, seen.places(weight))
            x = x.to(matrix.dtype)
            moved = _moved(weight, seen, torch.nn.functional.linear(x, matrix, bias))
            counts = row_weights(weight, seen, 0, len(x))
            if counts is not None:
                kept = torch.from_numpy(counts)
                moved = torch.where(kept[:, None] > 0, moved * kept[:, None].to(moved.dtype), 0)
                x = torch.where(kept[:, None] > 0, x, 0)
            cross += moved.T @ x
            total += moved.sum(0, dtype=torch.float64)
        fit = refit_layer(problem, fit, cross.numpy(), total.numpy())
    return round_layer(problem, fit)


def _moved(weight: PrunableWeight, seen: GroupBatch, given: Tensor) -> Tensor:
    """The target minus the dense output, (rows, out), of a weight whose present output is `given`."""
    output, rectifier = seen.outputs[weight.name], seen.rectifiers[weight.name]
    places = seen.places(weight)
    dense = output_rows(weight, output, places).to(given.dtype)
    zero = output_rows(weight, rectifier.zero.expand(output.shape), places)
    rising: Tensor | int = 1
    if rectifier.rising is not None:
        rising = output_rows(weight, rectifier.rising.expand(output.shape), places)
    below = rising * (dense - zero) <= 0
    allowed = torch.where(rising * (given - zero) > 0, zero, given)
    return torch.where(below, allowed - dense, 0)
