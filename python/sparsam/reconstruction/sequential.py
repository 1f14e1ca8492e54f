"""One layer's part of pruning a network layer by layer: a `LayerProblem` in, a `LayerFit` out.

Layers are pruned from the first to the last. Each gets its inputs x from the network pruned so far, and is
fitted to target outputs y: those of the dense network, or those of its own dense weights ("own targets", as
in SparseGPT). All that a fit needs are the moments of x and y, which `InputStatistics` sums up, so a
`LayerProblem` is plain data: it can be solved in any process, with the same result to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sparsam.inputs.checks import expected
from sparsam.inputs.float_mode import standard_floats
from sparsam.masks import Mask
from sparsam.patterns import NM, Pattern, Unstructured
from sparsam.reconstruction.alternating import admm_mask
from sparsam.reconstruction.column_sweep import obs
from sparsam.reconstruction.fit_moments import FitMoments
from sparsam.reconstruction.layer_problem import corrected_bias
from sparsam.reconstruction.least_squares import refit
from sparsam.reconstruction.quantized_sweep import quantize
from sparsam.selection import select
from sparsam.statistics import InputStatistics

__all__ = [
    "DAMPINGS",
    "RECONSTRUCTIONS",
    "LayerFit",
    "LayerProblem",
    "Rounding",
    "check_method",
    "fit_layer",
    "refit_layer",
    "round_layer",
]

RECONSTRUCTIONS = ("obs", "admm")
"""The methods that choose a mask and new values for the kept weights."""

DAMPINGS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Candidates for the damping of least squares, relative to the mean diagonal of H."""

_DAMPING = 1e-2  # when the mask is chosen, and everywhere if there are no held-out inputs
_OBS_PATTERNS = (Unstructured, NM)
_ROWS = 32  # the most rows with which dampings are compared


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded once they are fitted; the arguments of `quantize`, and a dtype.

    Attributes:
        bits: 8 or 4.
        group: Columns that share a scale, or None.
        dtype: The dtype of the model's weights, in which the rounded weights must be exact.
    """

    bits: int
    group: int | None
    dtype: Any


@dataclass(frozen=True)
class LayerProblem:
    """The data for pruning one layer, complete: it can be solved in any process.

    Attributes:
        name: The name of its weights in errors and reports.
        weights: Dense, (out, in) or (out, in, ...), float32 or float64.
        bias: (out,) or None. A bias corrects the means, so for a layer with one, inputs and targets are
            centred.
        inputs: The moments of its inputs, and of target outputs if there are any.
        held_out: The same for held-out inputs, with which the damping is chosen and the error measured before
            the last fit includes them too; None: the damping is 1e-2, and the error that of the inputs.
        rows: Which of the targets are this layer's; None without targets, and the layer is then fitted to the
            outputs of its own dense weights.
        method: "obs" or "admm".
        sparsity: In [0, 1].
        pattern: The pattern; "obs" supports `Unstructured` and `NM`.
        scope: "layer", or with "obs" also "row".
        rounding: How the fitted weights are rounded; None: not at all.
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
    rounding: Rounding | None = None


@dataclass(frozen=True)
class LayerFit:
    """The new weights of a layer.

    Attributes:
        weights: In the shape and dtype of the given weights, 0 where pruned.
        bias: The new bias, if there is one.
        mask: Which weights are kept.
        error: The squared difference from the target outputs, relative to the squared norm of the target
            outputs (around their mean for a layer with a bias). With held-out inputs: that of up to 32 rows
            of the weights over these, before the fit includes them.
        damping: Of the least squares, relative to the mean diagonal of H.
    """

    weights: NDArray[Any]
    bias: NDArray[Any] | None
    mask: Mask
    error: float
    damping: float


def check_method(name: str, method: str, pattern: Pattern, scope: str) -> None:
    """Raises ValueError for a pattern or scope that a method of `RECONSTRUCTIONS` does not support."""
    if method == "obs" and not isinstance(pattern, _OBS_PATTERNS):
        wanted = f"Unstructured() or NM(n, m) for {name!r} with method 'obs'"
        raise ValueError(expected("pattern", str(pattern), wanted, "use method 'admm', which supports all"))
    if scope == "global" or (scope == "row" and method == "admm"):
        scopes = "'layer' or 'row'" if method == "obs" else "'layer'"
        wanted = f"{scopes} with method {method!r}"
        raise ValueError(expected("scope", scope, wanted, "use an allocation to share out a total"))


@standard_floats
def fit_layer(problem: LayerProblem) -> LayerFit:
    """Chooses the weights that a layer keeps, and fits them to the target outputs.

    With H the sum of x x^T and C that of y x^T (both centred if there is a bias), W the dense weights:

    1. the ridge optimum (C + c W)(H + c I)^-1, c times H's mean diagonal; W itself for own targets;
    2. the mask for it: `obs` or `admm_mask`, with a damping of 0.01;
    3. the least squares on the mask, `refit(W, H, mask, cross=C, damping=d)`, H and C being those of all
       inputs by then, held out or not. For own targets with "obs" its own update;
    4. the bias: mean of y - W' mean of x;
    5. with a rounding, `round_layer`.

    c and d are those of `DAMPINGS` with which up to 32 rows fit the held-out inputs best; 1e-2 without these.

    Zeros of W stay zero and count as pruned, whatever the optimum has in their places.

    Returns:
        The fit; a bias of None stays None.

    Raises:
        ValueError: The method does not support a pattern or scope; as for `obs`, `admm_mask` and `refit`.
    """
    check_method(problem.name, problem.method, problem.pattern, problem.scope)
    dense, old = problem.weights, problem.bias
    seen = held = FitMoments(problem.inputs, problem.rows, centred=old is not None)
    if problem.held_out is not None:
        held = FitMoments(problem.held_out, problem.rows, centred=seen.centred)
    search = _DampingSearch(problem, seen, held)
    aim = dense
    if seen.cross is not None:
        damping = _DAMPING if held is seen else search.best(search.ridge_error)[0]
        aim = _ridge(dense, seen.gram, seen.cross, damping)
    weights, mask = _choose(problem, aim, seen)
    damping, error = _DAMPING, None
    if seen.cross is not None or problem.method != "obs":
        if problem.held_out is not None:
            damping, error = search.best(lambda tried: search.mask_error(mask, tried))
            seen = FitMoments(problem.inputs + problem.held_out, problem.rows, centred=seen.centred)
        weights = refit(dense, seen, mask, cross=seen.cross, damping=damping, name=problem.name)
    bias = None if old is None else seen.bias(dense, weights, old)
    if error is None:
        error = held.error(dense, weights, bias, old)
    return round_layer(problem, LayerFit(weights, bias, mask, error, damping))


@standard_floats
def round_layer(problem: LayerProblem, fit: LayerFit) -> LayerFit:
    """Rounds the weights of a fit as its problem says: `quantize` on their mask, and the bias after them.

    The error of the fit increases by what rounding adds to it, measured over all rows.
    """
    if problem.rounding is None:
        return fit
    how, held_out = problem.rounding, problem.held_out
    inputs = problem.inputs if held_out is None else problem.inputs + held_out
    seen = FitMoments(inputs, None, centred=problem.bias is not None)
    start = fit.weights.astype(how.dtype)
    found = quantize(start, seen, fit.mask, bits=how.bits, group=how.group, name=problem.name)
    weights, bias = found.weights.astype(fit.weights.dtype), fit.bias
    if bias is not None:
        bias = corrected_bias(bias, fit.weights, weights, seen.mean)
    held = FitMoments(held_out or problem.inputs, problem.rows, centred=seen.centred)
    before, after = (
        held.error(problem.weights, w, b, problem.bias) for w, b in ((fit.weights, fit.bias), (weights, bias))
    )
    error = fit.error + (after - before if before < after else 0)
    return replace(fit, weights=weights, bias=bias, mask=found.mask, error=error)


@standard_floats
def refit_layer(
    problem: LayerProblem, fit: LayerFit, cross: NDArray[np.float64], total: NDArray[np.float64]
) -> LayerFit:
    """Fits the kept weights again, to targets y + d, regularised towards their values.

    Args:
        problem: The layer, with targets y.
        fit: Its fit so far.
        cross: The sum of d x^T over all inputs, held out or not, (out, in).
        total: The sum of d, (out,).

    Returns:
        The new weights and bias, with the mask, error and damping of `fit`.
    """
    inputs = problem.inputs if problem.held_out is None else problem.inputs + problem.held_out
    seen = FitMoments(inputs, problem.rows, centred=problem.bias is not None)
    assert seen.cross is not None
    assert seen.target_mean is not None
    moved = cross - np.outer(total, seen.mean) if seen.centred else cross
    wanted = seen.cross + moved
    new = refit(fit.weights, seen, fit.mask, cross=wanted, damping=fit.damping, name=problem.name)
    if fit.bias is None:
        return replace(fit, weights=new)
    seen.target_mean = seen.target_mean + total / seen.moments.weight
    return replace(fit, weights=new, bias=seen.bias(problem.weights, new, fit.bias))


def _ridge(
    weights: NDArray[Any], gram: NDArray[np.float64], cross: NDArray[np.float64], damping: float
) -> NDArray[np.float32]:
    """(C + c W)(H + c I)^-1 in the shape of W: least squares regularised towards W."""
    diagonal = gram.diagonal()
    live = diagonal > 0
    added = damping * (float(diagonal[live].mean()) if live.any() else 1.0)
    matrix = weights.reshape(len(weights), -1).astype(np.float64)
    system = gram.copy()
    system.flat[:: len(system) + 1] += added
    optimum = np.linalg.solve(system, (cross + added * matrix).T).T
    return np.ascontiguousarray(optimum.reshape(weights.shape), np.float32)


def _choose(problem: LayerProblem, aim: NDArray[Any], seen: FitMoments) -> tuple[NDArray[Any], Mask]:
    """The mask, and the weights that come with it."""
    name, sparsity, pattern = problem.name, problem.sparsity, problem.pattern
    alive = problem.weights != 0
    aim = aim if alive.all() else np.where(alive, aim, 0).astype(aim.dtype)
    if problem.method == "obs":
        found = obs(aim, seen, sparsity=sparsity, pattern=pattern, scope=problem.scope, name=name)
        if (mask := _without_zeros(problem, aim, alive, seen, found.mask)) is not found.mask:
            found = obs(aim, seen, mask, name=name)
        return found.weights, found.mask
    chosen = admm_mask(aim, seen, sparsity=sparsity, pattern=pattern, damping=_DAMPING, name=name)
    return aim, _without_zeros(problem, aim, alive, seen, chosen)


def _without_zeros(
    problem: LayerProblem, aim: NDArray[Any], alive: NDArray[np.bool_], seen: FitMoments, mask: Mask
) -> Mask:
    """The mask, or if it would revive zeros, another of the same count that prunes these first.

    Weights that it kept are preferred to the others; within both, the order is that of |w_j| sqrt(H_jj).
    """
    keep = mask.to_array()
    if not (keep & ~alive).any():
        return mask
    sizes = np.sqrt(np.maximum(seen.gram.diagonal(), 0)).reshape(1, *aim.shape[1:])
    scores = np.abs(aim).astype(np.float64) * sizes
    scores /= 2 * (scores.max(initial=0) or 1)
    ranked = np.where(alive, scores + keep + 1e-9, 0)
    chosen = select(ranked, problem.sparsity, problem.pattern, scope=_scope(problem), name=problem.name)
    return Mask.from_array(chosen.to_array() & alive)


def _scope(problem: LayerProblem) -> Literal["layer", "row"]:
    return "row" if problem.scope == "row" else "layer"


class _DampingSearch:
    """Some rows of a layer, fitted to the inputs and compared on the held-out inputs."""

    def __init__(self, problem: LayerProblem, seen: FitMoments, held: FitMoments) -> None:
        count = len(problem.weights)
        self.rows = np.unique(np.linspace(0, count - 1, min(_ROWS, count)).astype(np.int64))
        self.name, self.seen, self.held = problem.name, seen, held
        self.dense = problem.weights[self.rows]
        self.bias = None if problem.bias is None else problem.bias[self.rows]
        self.cross = None if seen.cross is None else seen.cross[self.rows]

    def ridge_error(self, damping: float) -> float:
        """The error of the optimum without a mask."""
        assert self.cross is not None
        return self._error(_ridge(self.dense, self.seen.gram, self.cross, damping))

    def mask_error(self, mask: Mask, damping: float) -> float:
        """The error of the fit on a mask."""
        keep = Mask.from_array(mask.to_array()[self.rows])
        new = refit(self.dense, self.seen, keep, cross=self.cross, damping=damping, name=self.name)
        return self._error(new)

    def _error(self, new: NDArray[Any]) -> float:
        offset = None if self.bias is None else self.seen.bias(self.dense, new, self.bias, self.rows)
        return self.held.error(self.dense, new, offset, self.bias, self.rows)

    @staticmethod
    def best(error: Callable[[float], float]) -> tuple[float, float]:
        """The damping with the smallest error, and the error; searched from 1e-2 while the error falls."""
        at = DAMPINGS.index(_DAMPING)
        best = start = (error(_DAMPING), _DAMPING)
        for way in (DAMPINGS[at + 1 :], DAMPINGS[:at][::-1]):
            for damping in way:
                tried = (error(damping), damping)
                if tried[0] >= best[0]:
                    break
                best = tried
            if best is not start:
                break
        return best[1], best[0]
