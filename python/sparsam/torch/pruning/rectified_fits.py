"""Weights whose outputs a ReLU takes, fitted again to what the ReLU lets through.

Where the dense network gives the ReLU less than 0, any such output will do. So there a weight is asked for
what it gives, or for what gives 0 if that is above; elsewhere for the dense output, as before. A few rounds
of that follow the fit, each towards what the one before gives: but for the damping, no round makes the
squared error after the ReLU larger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from sparsam.reconstruction.sequential import LayerFit, LayerProblem, refit_layer, round_layer
from sparsam.torch.pruning.group_statistics import Seen, row_weights
from sparsam.torch.pruning.prunable import PrunableWeight
from sparsam.torch.pruning.unfolded_rows import input_rows, output_rows
from torch import Tensor

__all__ = ["Shown", "fit_to_rectified"]

_ROUNDS = 3

Shown = Callable[[], Iterable[Seen]]
"""Gives what all batches show of a weight, again and again."""


def fit_to_rectified(problem: LayerProblem, fit: LayerFit, weight: PrunableWeight, shown: Shown) -> LayerFit:
    """Fits a weight again.

    Args:
        problem: Its problem, with targets.
        fit: The solution.
        weight: Where it is.
        shown: What the batches show of it, with its `Rectifier`.

    Returns:
        The fit, with the same mask and error but for what rounding changes, where the problem asks for it.
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


def _moved(weight: PrunableWeight, seen: Seen, given: Tensor) -> Tensor:
    """What is wanted less the dense output, (rows, out), of a weight that gives `given`."""
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
