"""Pruning methods over the layers of any network: what the scripts of this folder compare.

A method takes weights, what is known of the inputs of their layers, and a sparsity. `ONE_SHOT` see the inputs
of the dense network and keep its biases. `IN_SEQUENCE` is `sparsam.torch.prune`: a layer sees the inputs that
the layers pruned before it give, and aims at the outputs of the dense network.
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

IN_SEQUENCE: dict[str, tuple[str, Callable[[Known, float], Mapping[str, float] | str]]] = {
    "in sequence, obs, uniform": ("obs", lambda _, __: "uniform"),
    "in sequence, admm, uniform": ("admm", lambda _, __: "uniform"),
    "in sequence, admm, lamp": ("admm", lambda _, __: "lamp"),
    "in sequence, admm, sensitivity": ("admm", lambda known, s: known.refitted.allocate(s)),
}
"""`sparsam.torch.prune`: a method, and how a total is shared out."""


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
