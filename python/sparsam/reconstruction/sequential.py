"""One layer's part of pruning a network layer by layer: a `LayerProblem` in, a `LayerFit` out.

Layers are pruned from the first to the last. Each gets its inputs x from the network pruned so far, and is
fitted to target outputs y: those of the dense network, or those of its own dense weights ("own targets", as
in SparseGPT). All that a fit needs are the moments of x and y, which `InputStatistics` sums up, so a
`LayerProblem` is plain data: it can be solved in any process, with the same result to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam.inputs.checks import expected
from sparsam.masks import Mask
from sparsam.patterns import NM, Pattern, Unstructured
from sparsam.reconstruction.alternating import admm_mask
from sparsam.reconstruction.column_sweep import obs
from sparsam.reconstruction.layer_problem import quadratic
from sparsam.reconstruction.least_squares import refit
from sparsam.statistics import InputStatistics

__all__ = ["DAMPINGS", "RECONSTRUCTIONS", "LayerFit", "LayerProblem", "check_method", "fit_layer"]

RECONSTRUCTIONS = ("obs", "admm")
"""The methods that choose a mask and new values for the weights that stay."""

DAMPINGS = (1e-3, 1e-2, 1e-1)
"""Of least squares, relative to the mean diagonal of H: the best on held-out inputs is taken."""

_DAMPING = 1e-2  # of the optimum for which the mask is chosen; and without held-out inputs, of all
_ROWS = 64  # by which dampings are compared


@dataclass(frozen=True)
class LayerProblem:
    """The data for pruning one layer.

    Attributes:
        name: The name of its weights in errors and reports.
        weights: Dense, (out, in) or (out, in, ...), float32 or float64.
        bias: (out,) or None. A bias corrects the means, so for a layer with one, inputs and targets are
            centred.
        inputs: The moments of its inputs, and of target outputs if there are any.
        held_out: The same for held-out inputs, with which the damping is chosen and the error measured; None:
            the damping is 1e-2, and the error that of the inputs themselves.
        rows: Which of the targets are this layer's; None without targets, and the layer is then fitted to the
            outputs of its own dense weights.
        method: "obs" or "admm".
        sparsity: In [0, 1].
        pattern: The pattern; "obs" supports `Unstructured` and `NM`.
        scope: "layer", or with "obs" also "row".
    """

    name: str
    weights: NDArray[Any]
    bias: NDArray[Any] | None
    inputs: InputStatistics
    held_out: InputStatistics | None
    rows: slice | None
    method: str
    sparsity: float
    pattern: Pattern
    scope: str = "layer"


@dataclass(frozen=True)
class LayerFit:
    """The new weights of a layer.

    Attributes:
        weights: In the shape and dtype of the given weights, 0 where pruned.
        bias: The new bias, if there is one.
        mask: Which weights are kept.
        error: The squared difference from the target outputs, over held-out inputs if there are any, relative
            to the squared norm of the target outputs (around their mean for a layer with a bias).
        damping: Of the least squares, relative to the mean diagonal of H.
    """

    weights: NDArray[Any]
    bias: NDArray[Any] | None
    mask: Mask
    error: float
    damping: float


def check_method(name: str, method: str, pattern: Pattern, scope: str) -> None:
    """Raises ValueError for a pattern or scope that a method of `RECONSTRUCTIONS` does not support."""
    if method == "obs" and not isinstance(pattern, (Unstructured, NM)):
        wanted = f"Unstructured() or NM(n, m) for {name!r} with method 'obs'"
        raise ValueError(expected("pattern", str(pattern), wanted, "use method 'admm', which has them all"))
    if scope == "global" or (scope == "row" and method == "admm"):
        scopes = "'layer' or 'row'" if method == "obs" else "'layer'"
        wanted = f"{scopes} with method {method!r}"
        raise ValueError(expected("scope", scope, wanted, "use an allocation to share out a total"))


def fit_layer(problem: LayerProblem) -> LayerFit:
    """Chooses the weights that a layer keeps, and fits them to the target outputs.

    With H the sum of x x^T and C that of y x^T (both centred if there is a bias), W the dense weights:

    1. the ridge optimum (C + c W)(H + c I)^-1, c = 1e-2 of H's mean diagonal; W itself for own targets;
    2. the mask for it: `obs` or `admm_mask`, with a damping of 0.01;
    3. the least squares on the mask, `refit(W, H, mask, cross=C, damping=d)`, d of `DAMPINGS` being the one
       with which up to 64 rows fit the held-out inputs best; for own targets with "obs" its own update;
    4. the bias: mean of y - W' mean of x.

    Returns:
        The fit; a bias of None stays None.

    Raises:
        ValueError: The method does not support a pattern or scope; as for `obs`, `admm_mask` and `refit`.
    """
    check_method(problem.name, problem.method, problem.pattern, problem.scope)
    seen = _Seen(problem.inputs, problem.rows, centred=problem.bias is not None)
    held = seen if problem.held_out is None else _Seen(problem.held_out, problem.rows, centred=seen.centred)
    dense = problem.weights
    aim = dense if seen.cross is None else _ridge(dense, seen.gram, seen.cross)
    weights, mask = _choose(problem, aim, seen)
    damping = _DAMPING
    if seen.cross is not None or problem.method != "obs":
        rows = np.unique(np.linspace(0, len(dense) - 1, min(_ROWS, len(dense))).astype(np.int64))
        if held is not seen:
            damping = _best_damping(problem, mask, seen, held, rows)
        weights = refit(dense, seen, mask, cross=seen.cross, damping=damping, name=problem.name)
    bias = None if problem.bias is None else seen.bias(dense, weights, problem.bias)
    return LayerFit(weights, bias, mask, held.error(dense, weights, bias, problem.bias), damping)


class _Seen:
    """Moments as the fit uses them: centred or not, with the targets of one layer only.

    It has what `obs` and others read of statistics: `gram`, `mean`, `count`, `precision`.
    """

    def __init__(self, statistics: InputStatistics, rows: slice | None, *, centred: bool) -> None:
        self.centred = centred
        self.moments = statistics.centred
        self.gram = self.moments.gram if centred else statistics.gram
        self.mean, self.count = self.moments.mean, self.moments.count
        self.precision = self.moments.precision
        self.rows = rows
        self.cross: NDArray[np.float64] | None = None
        self.target_mean: NDArray[np.float64] | None = None
        if rows is not None:
            cross = self.moments.cross if centred else statistics.cross
            assert cross is not None
            assert self.moments.target_mean is not None
            self.cross, self.target_mean = cross[rows], self.moments.target_mean[rows]

    def bias(self, dense: NDArray[Any], weights: NDArray[Any], bias: NDArray[Any]) -> NDArray[Any]:
        """The bias that makes the mean output equal to the mean target."""
        new = weights.reshape(len(weights), -1).astype(np.float64)
        if self.target_mean is not None:
            wanted = self.target_mean
        else:
            wanted = dense.reshape(len(dense), -1).astype(np.float64) @ self.mean + bias
        result: NDArray[Any] = (wanted - new @ self.mean).astype(bias.dtype)
        return result

    def error(
        self,
        dense: NDArray[Any],
        weights: NDArray[Any],
        bias: NDArray[Any] | None,
        dense_bias: NDArray[Any] | None,
        subset: NDArray[np.int64] | None = None,
    ) -> float:
        """The squared error of new weights, relative to the squared norm of the target outputs."""
        new = weights.reshape(len(weights), -1).astype(np.float64)
        if self.rows is None:
            return self._own_error(dense.reshape(new.shape).astype(np.float64), new, bias, dense_bias)
        targets, means = self.moments.target_squares, self.moments.target_mean
        assert targets is not None
        assert means is not None
        at = np.arange(len(targets))[self.rows]
        at = at if subset is None else at[subset]
        energy = float(targets[at].sum())
        if bias is None:
            energy += self.moments.weight * float(means[at] @ means[at])
        offset = np.zeros(len(new)) if bias is None else bias.astype(np.float64)
        error = self.moments.squared_error(new, offset, rows=at)
        return _share(error, energy)

    def _own_error(
        self,
        dense: NDArray[np.float64],
        new: NDArray[np.float64],
        bias: NDArray[Any] | None,
        dense_bias: NDArray[Any] | None,
    ) -> float:
        error, energy = quadratic(dense - new, self.gram), quadratic(dense, self.gram)
        if bias is not None and dense_bias is not None:
            rest = (dense - new) @ self.mean + (dense_bias.astype(np.float64) - bias.astype(np.float64))
            error += self.moments.weight * float(rest @ rest)
        return _share(error, energy)


def _share(error: float, energy: float) -> float:
    if energy > 0:
        return error / energy
    return 0.0 if error <= 0 else float("inf")


def _ridge(
    weights: NDArray[Any], gram: NDArray[np.float64], cross: NDArray[np.float64]
) -> NDArray[np.float32]:
    """(C + c W)(H + c I)^-1 in the shape of W: least squares regularised towards W."""
    diagonal = gram.diagonal()
    live = diagonal > 0
    added = _DAMPING * (float(diagonal[live].mean()) if live.any() else 1.0)
    matrix = weights.reshape(len(weights), -1).astype(np.float64)
    system = gram.copy()
    system.flat[:: len(system) + 1] += added
    optimum = np.linalg.solve(system, (cross + added * matrix).T).T
    return np.ascontiguousarray(optimum.reshape(weights.shape), np.float32)


def _choose(problem: LayerProblem, aim: NDArray[Any], seen: _Seen) -> tuple[NDArray[Any], Mask]:
    """The mask, and the weights that come with it."""
    name, sparsity, pattern = problem.name, problem.sparsity, problem.pattern
    if problem.method == "obs":
        found = obs(aim, seen, sparsity=sparsity, pattern=pattern, scope=problem.scope, name=name)
        return found.weights, found.mask
    return aim, admm_mask(aim, seen, sparsity=sparsity, pattern=pattern, damping=_DAMPING, name=name)


def _best_damping(
    problem: LayerProblem, mask: Mask, seen: _Seen, held: _Seen, rows: NDArray[np.int64]
) -> float:
    """The damping whose fit of some rows is best on held-out inputs; the smaller of equal ones."""
    dense, keep = problem.weights[rows], Mask.from_array(mask.to_array()[rows])
    cross = None if seen.cross is None else seen.cross[rows]
    bias = None if problem.bias is None else problem.bias[rows]

    def error(damping: float) -> float:
        new = refit(dense, seen, keep, cross=cross, damping=damping, name=problem.name)
        offset = None
        if bias is not None:
            matrix = new.reshape(len(new), -1).astype(np.float64)
            own = dense.reshape(len(new), -1).astype(np.float64) @ seen.mean + bias
            wanted = own if seen.target_mean is None else seen.target_mean[rows]
            offset = wanted - matrix @ seen.mean
        return held.error(dense, new, offset, bias, rows)

    return min(DAMPINGS, key=error)


def split_counts(total: int, sizes: Sequence[int]) -> list[int]:
    """Divides a number of pruned weights among parts in proportion to their sizes, by largest remainder."""
    whole = sum(sizes) or 1
    exact = [total * size / whole for size in sizes]
    counts = [int(number) for number in exact]
    order = sorted(range(len(sizes)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts
