"""Pruning methods over the layers of any network: what the scripts of this folder compare.

A method takes weights, what is known of the inputs of their layers, and a sparsity. `ONE_SHOT` see the inputs
of the dense network and keep its biases. `fit` is one step of pruning *in sequence*: a layer sees the inputs
that the layers pruned before it give, and aims at the outputs of the dense network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam import Mask, prune
from sparsam.allocation import allocate
from sparsam.analysis.sweep import SensitivityReport
from sparsam.reconstruction import admm_mask, obs, refit
from sparsam.statistics import InputStatistics

Array = NDArray[Any]
Arrays = Mapping[str, Array]

DAMPING = 1e-4
"""Of least squares towards given outputs; 1e-2 to 1e-5 made no difference above noise (docs/quality.md)."""


@dataclass(frozen=True)
class Known:
    """What one-shot methods may use.

    Attributes:
        weights: Dense.
        inputs: The inputs of each layer in the dense network.
        alone: Sensitivity of each tensor, pruned alone by magnitude.
        refitted: Sensitivity of each tensor, pruned alone by `obs` and `refit`.
    """

    weights: Arrays
    inputs: Mapping[str, InputStatistics]
    alone: SensitivityReport
    refitted: SensitivityReport


OneShot = Callable[[Known, float], dict[str, Array]]
Choose = Callable[[str, Array, Array, float], Mask]
"""Name, weights (out, in), sum of x x^T and sparsity -> mask."""


def by_magnitude(known: Known, sparsity: float, **how: Any) -> dict[str, Array]:
    return prune(known.weights, target_sparsity=sparsity, **how).weights


def by_sensitivity(known: Known, sparsity: float) -> dict[str, Array]:
    return by_magnitude(known, sparsity, allocation=known.alone.allocate(sparsity))


def by_obs(known: Known, sparsity: float) -> dict[str, Array]:
    return {
        name: obs(array, known.inputs[name], sparsity=sparsity, name=name).weights
        for name, array in known.weights.items()
    }


def by_refit(choose: Choose, known: Known, shares: Mapping[str, float]) -> dict[str, Array]:
    """A mask from each layer's inputs, then the least squares on it."""
    refitted = {}
    for name, array in known.weights.items():
        gram = known.inputs[name].gram
        mask = choose(name, array, gram, shares[name])
        refitted[name] = refit(array, gram, mask, name=name)
    return refitted


def obs_mask(name: str, array: Array, gram: Array, sparsity: float) -> Mask:
    return obs(array, gram, sparsity=sparsity, name=name).mask


def by_admm(name: str, array: Array, gram: Array, sparsity: float) -> Mask:
    return admm_mask(array, gram, sparsity=sparsity, damping=0.01, name=name)


def _uniform(known: Known, sparsity: float) -> dict[str, float]:
    return dict.fromkeys(known.weights, sparsity)


ONE_SHOT: dict[str, OneShot] = {
    "magnitude, uniform": by_magnitude,
    "magnitude, global": lambda known, s: by_magnitude(known, s, scope="global"),
    "magnitude, erk": lambda known, s: by_magnitude(known, s, allocation="erk"),
    "magnitude, lamp": lambda known, s: by_magnitude(known, s, allocation="lamp"),
    "magnitude, sensitivity": by_sensitivity,
    "obs, uniform": by_obs,
    "obs + refit, uniform": lambda known, s: by_refit(obs_mask, known, _uniform(known, s)),
    "obs + refit, lamp": lambda known, s: by_refit(obs_mask, known, allocate(known.weights, s, "lamp")),
    "obs + refit, sensitivity": lambda known, s: by_refit(obs_mask, known, known.refitted.allocate(s)),
    "admm + refit, uniform": lambda known, s: by_refit(by_admm, known, _uniform(known, s)),
    "admm + refit, lamp": lambda known, s: by_refit(by_admm, known, allocate(known.weights, s, "lamp")),
    "admm + refit, sensitivity": lambda known, s: by_refit(by_admm, known, known.refitted.allocate(s)),
}

IN_SEQUENCE: dict[str, tuple[Choose, Callable[[Known, float], dict[str, float]]]] = {
    "in sequence, obs, uniform": (obs_mask, _uniform),
    "in sequence, admm, uniform": (by_admm, _uniform),
    "in sequence, admm, lamp": (by_admm, lambda known, s: allocate(known.weights, s, "lamp")),
    "in sequence, admm, sensitivity": (by_admm, lambda known, s: known.refitted.allocate(s)),
}


@dataclass(frozen=True)
class Outputs:
    """Wanted outputs y beside the inputs x of a layer: the sum of y x^T and of y over the same samples."""

    cross: Array
    total: Array


@dataclass(frozen=True)
class Fitted:
    """A layer after `fit`: float32 weights of the shape that came in, bias and mask."""

    weights: Array
    bias: Array
    mask: Mask


def fit(
    name: str,
    weights: Array,
    inputs: InputStatistics,
    outputs: Outputs,
    choose: Choose,
    sparsity: float,
    scale: Array | None = None,
) -> Fitted:
    """Prunes a layer such that it gives the wanted outputs, with a bias of its own.

    The bias takes up the means, so inputs and outputs are centred. What is pruned is chosen for W*, the least
    squares without a mask. With `scale` (out,) the layer's outputs are those of other weights, `weights /
    scale`, times `scale` (a batch normalisation's, folded in), and the choice is made for those.
    """
    dense = Mask.ones(weights.shape)
    optimum = _least_squares(name, weights, inputs, outputs, dense).weights
    if scale is not None:
        optimum = optimum / scale.reshape(-1, *[1] * (weights.ndim - 1))
    mask = choose(name, optimum, inputs.centred.gram, sparsity)
    return _least_squares(name, weights, inputs, outputs, mask)


def refine(name: str, weights: Array, inputs: InputStatistics, outputs: Outputs, mask: Mask) -> Fitted:
    """Fits a layer to other outputs on the mask that it has."""
    return _least_squares(name, weights, inputs, outputs, mask)


def _least_squares(
    name: str, weights: Array, inputs: InputStatistics, outputs: Outputs, mask: Mask
) -> Fitted:
    cross = outputs.cross - np.outer(outputs.total, inputs.mean)
    new = refit(weights, inputs.centred, mask, cross=cross, damping=DAMPING, name=name)
    matrix = new.reshape(len(new), -1).astype(np.float64)
    bias = outputs.total / inputs.count - matrix @ inputs.mean
    return Fitted(new, bias.astype(np.float32), mask)


def table(rows: Mapping[str, Sequence[float]], sparsities: Sequence[float], digits: int = 1) -> str:
    """Numbers as a markdown table: a row for each method, a column for each sparsity."""
    lines = [
        "| method | " + " | ".join(f"{100 * s:g} %" for s in sparsities) + " |",
        "|---" * (1 + len(sparsities)) + "|",
    ]
    lines += [
        f"| {name} | " + " | ".join(f"{value:.{digits}f}" for value in values) + " |"
        for name, values in rows.items()
    ]
    return "\n".join(lines)


def check_sparsity(weights: Arrays, sparsity: float, method: str) -> None:
    """Asserts that a method pruned what it was asked for: no more weights are left than the others have.

    Tensors round their counts one by one, and a kept weight may be exactly 0.
    """
    zeros = sum(int(np.count_nonzero(array == 0)) for array in weights.values())
    size = sum(array.size for array in weights.values())
    assert zeros >= round(sparsity * size) - len(weights), f"{method}: {zeros} of {size} are 0"
