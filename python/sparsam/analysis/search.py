"""The smallest network with a sufficient score: bisection over the total sparsity."""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from numpy.typing import ArrayLike

from sparsam.analysis.bisection import Bisection, SearchProbe
from sparsam.analysis.sensitivity_report import SensitivityReport
from sparsam.checkpoint.json_state import to_number
from sparsam.config import AllocationLike, Override, PruningConfig
from sparsam.coupling import members
from sparsam.inputs.checks import check_sparsity, integer, is_number, positive, to_arrays
from sparsam.masks import Mask
from sparsam.patterns import NM, Unstructured
from sparsam.pools import make_pools
from sparsam.pruner import PruningResult, configured, prune
from sparsam.report import LayerStats, Readable, Report, measure
from sparsam.training.callbacks import Arrays, Masks, evaluate_finite, sparsity_of, validate_returned_weights

__all__ = ["SearchProbe", "SearchResult", "find_smallest"]

Allocate = Callable[[float], Mapping[str, float]]


@dataclass(frozen=True)
class SearchResult(Readable):
    """The result of `find_smallest`; `print` shows it.

    Attributes:
        sparsity: The sparsity of `weights`, over the tensors that are pruned; 0.0 if they are dense.
        score: Their score.
        weights: Name -> array, in new arrays where pruned.
        masks: Name -> mask of each tensor that is pruned; all ones if `weights` are dense.
        report: The statistics of every tensor.
        curve: The degradation curve: all probes, the dense weights first, by rising target.
        min_score: The required score.
        max_sparsity: The highest total that could be reached.
        finished: Whether the search converged; False if `max_evaluations` ran out.
    """

    sparsity: float
    score: float
    weights: dict[str, Any] = field(repr=False)
    masks: dict[str, Mask] = field(repr=False)
    report: Report = field(repr=False)
    curve: tuple[SearchProbe, ...]
    min_score: float
    max_sparsity: float
    finished: bool

    @property
    def dense_score(self) -> float:
        """The score of the dense weights."""
        return self.curve[0].score

    @property
    def evaluations(self) -> int:
        """The number of evaluations, including that of the dense weights."""
        return len(self.curve)

    @property
    def monotone(self) -> bool:
        """Whether no score on the curve is above that of a lower sparsity."""
        return all(later.score <= earlier.score for earlier, later in pairwise(self.curve))

    @property
    def beyond(self) -> tuple[SearchProbe, ...]:
        """Probes that passed although a lower sparsity failed: not trusted, and not returned."""
        failed = [probe.target for probe in self.curve if not probe.passed]
        return tuple(probe for probe in self.curve if failed and probe.passed and probe.target > failed[0])

    def to_dict(self) -> dict[str, Any]:
        """Returns all but the weights and the masks in plain types; infinite scores as text."""
        return {
            "sparsity": self.sparsity,
            "score": to_number(self.score),
            "dense_score": to_number(self.dense_score),
            "min_score": to_number(self.min_score),
            "max_sparsity": self.max_sparsity,
            "evaluations": self.evaluations,
            "finished": self.finished,
            "monotone": self.monotone,
            "curve": [{**probe._asdict(), "score": to_number(probe.score)} for probe in self.curve],
            "report": self.report.to_dict(),
        }

    def __str__(self) -> str:
        scores = f"score {self.score:.6g}, dense {self.dense_score:.6g}, required {self.min_score:.6g}"
        end = "" if self.finished else "; the limit was reached before the search converged"
        lines = [
            f"{self.sparsity:.2%} of the weights pruned: {scores}",
            f"{self.evaluations} evaluations{end}",
            "",
            f"{'sparsity':>9}  {'score':>10}",
        ]
        lines += [
            f"{probe.sparsity:>9.2%}  {probe.score:>10.6g}" + ("" if probe.passed else "  too low")
            for probe in self.curve
        ]
        if not self.monotone:
            lines += ["", "The score does not always fall with sparsity: sparsities not tried may differ."]
        if self.beyond:
            lines.append("Results that passed beyond a sparsity that failed are not trusted.")
        return "\n".join(lines)


def find_smallest(
    weights: Mapping[str, ArrayLike],
    eval_fn: Callable[[Arrays], float],
    min_score: float,
    *,
    config: PruningConfig | None = None,
    allocation: AllocationLike | SensitivityReport | Allocate | None = None,
    recover_fn: Callable[[Arrays, Masks], Mapping[str, ArrayLike] | None] | None = None,
    max_evaluations: int = 20,
    tolerance: float = 0.01,
    checks: int = 2,
    callback: Callable[[SearchProbe], object] | None = None,
) -> SearchResult:
    """Finds the highest total sparsity whose score is at least `min_score`.

    Bisection: the interval between the highest sparsity that passed and the lowest that failed is halved
    until it is at most `tolerance` wide. Every probe prunes the dense weights. The highest sparsity
    possible is tried only when all below it passed.

    That is right if the score falls with sparsity. Since it need not, up to `checks` probes are then spent in
    the middle of the widest gaps below the sparsity found; if one fails, the search continues below it. The
    result is conservative: every probe at or below its sparsity passed. `curve`, `monotone` and `beyond` of
    the result show the other probes.

    Args:
        weights: Name -> array, as for `sparsam.prune`. Not modified.
        eval_fn: Weights -> score; the larger, the better. It is given a copy.
        min_score: The lowest score that is good enough.
        config: What is pruned, and how, as for `sparsam.prune`; the target sparsity is searched for,
            overrides keep theirs.
        allocation: How a total is divided: as for `allocation` of the configuration (except fixed
            sparsities), or a `SensitivityReport`, or a function from a total sparsity to {tensor: sparsity}.
            Tensors that the last two do not name stay dense, unless overridden. Default: as in `config`.
        recover_fn: (weights, masks) -> the recovered weights, or None if it changed the given ones in place;
            pruned weights are zeroed again. Called in every probe.
        max_evaluations: How many times `eval_fn` may be called.
        tolerance: The accuracy of the total sparsity.
        checks: The number of further probes that look for failures below the result; 0 assumes that scores
            fall with sparsity.
        callback: Called with each probe, the dense weights first.

    Returns:
        The weights found, and all probes; the dense weights with sparsity 0 if every probe failed.

    Raises:
        ValueError: The dense weights miss `min_score`; `eval_fn` returned NaN; the configuration has an N:M
            pattern, which has one sparsity; an argument is out of range; as for `sparsam.prune`.
        TypeError: `weights` is not a mapping; a callback returned something of another type.
    """
    arrays = to_arrays(weights)
    if not is_number(min_score) or math.isnan(min_score):
        msg = f"min_score: expected a number; got {min_score!r}; pass the lowest score that is good enough"
        raise ValueError(msg)
    if integer("checks", checks) < 0:
        msg = f"checks: expected an integer of at least 0; got {checks}; pass 0 for none"
        raise ValueError(msg)
    if not check_sparsity("tolerance", tolerance) > 0:
        msg = (
            "tolerance: expected a number above 0; got 0; pass the width of the bracket to stop at, 0.01 say"
        )
        raise ValueError(msg)
    settings = configured(config)
    if isinstance(settings.pattern, NM):
        msg = (
            f"pattern: expected one with a choice of sparsities to search; got {settings.pattern}, which has "
            f"only {settings.pattern.sparsity}; call prune, or use another pattern"
        )
        raise ValueError(msg)
    search = _Search(arrays, eval_fn, float(min_score), recover_fn, _pruner(arrays, settings, allocation))
    search.run(
        positive("max_evaluations", max_evaluations),
        tolerance,
        checks,
        allocation.max_sparsity if isinstance(allocation, SensitivityReport) else 1.0,
        callback,
    )
    return search.result()


class _Search:
    """The probes of one search, and the recovered weights of those that may be returned."""

    def __init__(
        self,
        arrays: Arrays,
        eval_fn: Callable[[Arrays], float],
        min_score: float,
        recover_fn: Callable[[Arrays, Masks], Any] | None,
        pruned: Callable[[float], PruningResult[Arrays, Masks]],
    ) -> None:
        self._arrays = arrays
        self._eval_fn = eval_fn
        self._min_score = min_score
        self._recover_fn = recover_fn
        self._pruned = pruned
        self._bisection = Bisection(1.0, 1.0, 0)
        self._kept: dict[float, tuple[Arrays, Masks, tuple[LayerStats, ...]]] = {}
        self._end = 1.0

    def run(
        self,
        max_evaluations: int,
        tolerance: float,
        checks: int,
        end: float,
        callback: Callable[[SearchProbe], object] | None,
    ) -> None:
        self._end = end
        score = evaluate_finite(self._eval_fn, self._arrays, "the dense weights")
        if score < self._min_score:
            msg = (
                f"min_score: expected at most {score}, what the dense weights score; got {self._min_score}; "
                "lower min_score, or correct eval_fn"
            )
            raise ValueError(msg)
        self._bisection = Bisection(end, tolerance, checks)
        self._note(SearchProbe(0.0, 0.0, score, passed=True), callback)
        while (target := self._bisection.following()) is not None:
            if len(self._bisection.probes) == max_evaluations:
                break
            self._note(self._probe(target), callback)

    def result(self) -> SearchResult:
        best = self._bisection.bounds()[0]
        if best in self._kept:
            weights, masks, layers = self._kept[best]
        else:
            found = self._pruned(best)
            weights, masks, layers = found.weights, found.masks, found.report.layers
        if best == 0:
            # Overrides prune even at a total of 0; what was evaluated is dense.
            masks = {name: Mask.ones(mask.shape) for name, mask in masks.items()}
            weights = {name: array.copy() for name, array in self._arrays.items()}
            layers = tuple(replace(row, pruned_params=0, pattern="dense") for row in layers)
        return SearchResult(
            sparsity=self._bisection.probes[best].sparsity,
            score=self._bisection.probes[best].score,
            weights=weights,
            masks=masks,
            report=Report(
                measure(row.name, weights[row.name], pruned=row.pruned_params, pattern=row.pattern)
                for row in layers
            ),
            curve=self._bisection.curve(),
            min_score=self._min_score,
            max_sparsity=self._end,
            finished=self._bisection.finished,
        )

    def _probe(self, target: float) -> SearchProbe:
        result = self._pruned(target)
        weights = result.weights
        if self._recover_fn is not None:
            given = {name: array.copy() for name, array in weights.items()}
            returned = self._recover_fn(given, dict(result.masks))
            where = f" at sparsity {target:g}"
            weights = validate_returned_weights("recover_fn", given, returned, weights, result.masks, where)
        score = evaluate_finite(self._eval_fn, weights, f"sparsity {target:g}")
        passed = score >= self._min_score
        if passed and self._recover_fn is not None:
            self._kept[target] = weights, result.masks, result.report.layers
        return SearchProbe(target, sparsity_of(result.masks), score, passed)

    def _note(self, probe: SearchProbe, callback: Callable[[SearchProbe], object] | None) -> None:
        self._bisection.note(probe)
        best = self._bisection.bounds()
        for target in [at for at in self._kept if best[1] is not None and at > best[1]]:
            del self._kept[target]
        if callback is not None:
            callback(probe)


def _pruner(
    arrays: Arrays, config: PruningConfig, allocation: AllocationLike | SensitivityReport | Allocate | None
) -> Callable[[float], PruningResult[Arrays, Masks]]:
    """A function from a total sparsity to the result of `prune`."""
    changes: dict[str, Any] = {"schedule": None, "num_iterations": None, "target_sparsity": 0.0}
    allocate: Allocate | None = None
    if isinstance(allocation, SensitivityReport):
        allocate = allocation.allocate
    elif allocation is not None and not isinstance(allocation, str) and callable(allocation):
        allocate = allocation
    if allocate is not None:
        changes["allocation"] = "uniform"
    elif allocation is not None:
        changes["allocation"] = allocation
    config = replace(config, **changes)
    if isinstance(config.allocation, Mapping):
        msg = (
            "allocation: expected a rule that divides any total; got fixed sparsities; pass a function from "
            "a total to sparsities, or put fixed ones in overrides"
        )
        raise ValueError(msg)

    def pruned(target: float) -> PruningResult[Arrays, Masks]:
        if allocate is None:
            return prune(arrays, config, target_sparsity=target)
        return prune(arrays, config, overrides=_explicit(arrays, config, allocate(target)))

    return pruned


def _explicit(arrays: Arrays, config: PruningConfig, sparsities: Mapping[str, float]) -> dict[str, Override]:
    """The overrides of the configuration, and after them one for each tensor with a sparsity of its own."""
    if not isinstance(sparsities, Mapping):
        msg = (
            f"allocation: expected a function that returns {{tensor: sparsity}}; got {sparsities!r} from it; "
            "pass report.allocate, say"
        )
        raise TypeError(msg)
    patterns = {name: pool.pattern for pool in make_pools(arrays, config) for name in pool.names}
    if unknown := [name for name in sparsities if name not in patterns]:
        msg = (
            f"allocation: expected sparsities for some of {list(patterns)!r}; got one for {unknown[0]!r}, "
            "which the configuration does not prune; leave it out"
        )
        raise ValueError(msg)
    tied = members(config.ties)
    own: dict[str, Override] = {}
    for name, sparsity in sparsities.items():
        share = check_sparsity(f"allocation of {name!r}", sparsity)
        # N:M has no sparsity 0, and a coupling accepts only a sparsity.
        pattern = patterns[name] if share else Unstructured()
        own[glob.escape(name)] = Override(share, None if name in tied else pattern)
    kept = {pattern: value for pattern, value in config.overrides.items() if pattern not in own}
    return {**kept, **own}
