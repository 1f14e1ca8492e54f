"""New values for a group of weights, fitted to the group's statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

import torch
from sparsam.apportionment import split_total
from sparsam.config import Scorer
from sparsam.inputs.float_mode import standard_floats
from sparsam.masks import Mask
from sparsam.patterns import Unstructured
from sparsam.pools import Pool
from sparsam.pruner import prune_pools
from sparsam.reconstruction import quantize
from sparsam.reconstruction.sequential import (
    RECONSTRUCTIONS,
    LayerFit,
    LayerProblem,
    Rounding,
    fit_layer,
)
from sparsam.statistics import InputStatistics
from sparsam.torch.layers.packed_weight import to_array as stored
from sparsam.torch.pruning.group_statistics import GroupStatistics
from sparsam.torch.pruning.input_scores import InputScores
from sparsam.torch.pruning.rectified_fits import Shown, fit_to_rectified
from sparsam.torch.pruning.twins import Rows
from torch import Tensor

__all__ = ["BITS", "Method", "NewLayer", "fit_group"]

BITS = {"int8": 8, "int4": 4}

Array = NDArray[Any]
Parts = Sequence[tuple[InputStatistics, InputStatistics]]


@dataclass(frozen=True)
class NewLayer:
    """The new values of a weight.

    Attributes:
        name: Its name.
        weights: (out, in, ...).
        bias: (out,) or None.
        error: The squared difference from the target outputs, relative to their squared norm.
        damping: The damping of the least squares; None if nothing was fitted.
        targets: "dense" or "own": the outputs that it was fitted to or compared with.
    """

    name: str
    weights: Array
    bias: Array | None
    error: float
    damping: float | None
    targets: str

    def put(self, rows: Rows) -> None:
        """Assigns them to the weight."""
        bias = None if self.bias is None else torch.from_numpy(self.bias)
        rows.put(torch.from_numpy(self.weights), bias)

    def without_values(self) -> NewLayer:
        """A copy without values, for the report."""
        return replace(self, weights=np.empty(0), bias=None)


@dataclass(frozen=True)
class Method:
    """How masks are chosen, by a reconstruction or by scores, and how kept weights are rounded.

    Attributes:
        name: "obs", "admm", "wanda" or "ria"; "" for a scorer that needs no statistics.
        scorer: The scorer without statistics, if `name` is "".
        values: "int8" or "int4" for weights that are integers times scales; None for any.
        group: Columns that share a scale; None for one scale for each output.
    """

    name: str
    scorer: Scorer | None = None
    values: str | None = None
    group: int | None = None

    @property
    def reconstructs(self) -> bool:
        """Whether the kept weights get new values."""
        return self.name in RECONSTRUCTIONS

    def rounding(self, weight: Tensor) -> Rounding | None:
        """How the values of a weight are rounded."""
        if self.values is None:
            return None
        return Rounding(BITS[self.values], self.group, stored(weight[:0].detach()).dtype)


@standard_floats
def fit_group(
    statistics: GroupStatistics,
    layers: Mapping[str, Rows],
    pools: Mapping[str, Pool],
    method: Method,
    executor: Executor | None,
    rectified: Mapping[str, Shown],
) -> list[NewLayer]:
    """Solves the problems of a group.

    Args:
        statistics: The group's statistics; if they have targets, layers are fitted to those.
        layers: Name -> the weight, for the group only.
        pools: Name -> sparsity and pattern.
        method: How masks are chosen.
        executor: Solves the problems; None: this thread. The results are the same.
        rectified: Name -> the batches again, for weights whose outputs a ReLU takes.
    """
    if not method.reconstructs:
        return [_score(name, statistics.parts, rows, pools[name], method) for name, rows in layers.items()]
    problems: list[LayerProblem] = []
    for name, rows in layers.items():
        problems += _problems(name, statistics, rows, pools[name], method)
    fits = zip(problems, _solve(problems, executor), strict=True)
    result = []
    for name, rows in layers.items():
        found = []
        for _ in statistics.parts:
            problem, fit = next(fits)
            if name in rectified and name in statistics.targets and len(statistics.parts) == 1:
                fit = fit_to_rectified(problem, fit, rows.weight, rectified[name])
            found.append(fit)
        weights = np.concatenate([fit.weights for fit in found])
        biases = [fit.bias for fit in found if fit.bias is not None]
        error = float(np.mean([fit.error for fit in found]))
        targets = "dense" if name in statistics.targets else "own"
        bias = np.concatenate(biases) if biases else None
        result.append(NewLayer(name, weights, bias, error, found[0].damping, targets))
    return result


def _solve(problems: Sequence[LayerProblem], executor: Executor | None) -> Iterator[LayerFit]:
    """Returns the fits in order; after a failure, problems that have not begun are cancelled."""
    if executor is None:
        yield from map(fit_layer, problems)
        return
    futures: list[Future[LayerFit]] = [executor.submit(fit_layer, problem) for problem in problems]
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def _problems(
    name: str, statistics: GroupStatistics, rows: Rows, pool: Pool, method: Method
) -> Iterator[LayerProblem]:
    """Returns one problem for each part of the weight with separate inputs."""
    matrix, bias = to_array(rows.matrix()), rows.bias()
    parts = len(statistics.parts)
    matrices = np.split(matrix, parts)
    biases = [None] * parts if bias is None else np.split(to_array(bias), parts)
    shares = [pool.sparsity_of(name)] * parts
    if parts > 1 and isinstance(pool.pattern, Unstructured):
        sizes = [part.size for part in matrices]
        counts = split_total(round(pool.sparsity_of(name) * matrix.size), sizes)
        shares = [count / size for count, size in zip(counts, sizes, strict=True)]
    for i, (fitted, held_out) in enumerate(statistics.parts):
        yield LayerProblem(
            name,
            matrices[i],
            biases[i],
            fitted,
            held_out if held_out.count else None,
            statistics.targets.get(name),
            method.name,
            shares[i],
            pool.pattern,
            pool.scope,
            method.rounding(rows.matrix()),
        )


def _score(name: str, parts: Parts, rows: Rows, pool: Pool, method: Method) -> NewLayer:
    """Masks by scores; kept weights keep their values, except for rounding."""
    matrix = to_array(rows.matrix())
    scorer = method.scorer or InputScores(method.name, {name: [fitted for fitted, _ in parts]})
    out = np.empty_like(matrix)
    prune_pools({name: matrix}, [replace(pool, transposed=frozenset())], scorer, {name: out})
    rounding, errors = method.rounding(rows.matrix()), []
    for (fitted, held_out), old, new in zip(
        parts, np.split(matrix, len(parts)), np.split(out, len(parts)), strict=True
    ):
        if rounding is not None:
            new[...] = _rounded(name, new, fitted, rounding)
        errors.append(_own_error(held_out if held_out.count else fitted, old, new))
    return NewLayer(name, out, None, float(np.mean(errors)), None, "own")


def _rounded(name: str, kept: Array, fitted: InputStatistics, how: Rounding) -> Array:
    """The weights of a part that were kept, rounded."""
    mask = Mask.from_array(kept != 0)
    return quantize(
        kept.astype(how.dtype), fitted, mask, bits=how.bits, group=how.group, name=name
    ).weights.astype(kept.dtype)


def _own_error(seen: InputStatistics, old: Array, new: Array) -> float:
    gram = seen.gram
    before = old.reshape(len(old), -1).astype(np.float64)
    change = before - new.reshape(before.shape)
    energy = float(np.vdot(before @ gram, before))
    return float(np.vdot(change @ gram, change)) / energy if energy > 0 else 0.0


def to_array(tensor: Tensor) -> Array:
    """Returns an array in C order: float64 for a float64 tensor, else float32."""
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    return np.ascontiguousarray(wide.detach().numpy())
