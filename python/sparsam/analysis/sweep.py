"""How sensitive each tensor is to pruning: one at a time, all others dense, the score recorded.

The sweep is many independent evaluations, so an executor may spread them over threads, processes or machines.
Measurements are chosen in rounds that depend only on scores: the result is the same on any executor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike, NDArray

from sparsam.analysis.executor import TaskError, TaskRunner
from sparsam.analysis.sensitivity_curve import SensitivityCurve, SensitivityPoint
from sparsam.analysis.sensitivity_report import SensitivityReport
from sparsam.analysis.sweep_plan import DENSE, Task, rounds
from sparsam.analysis.sweep_store import SweepStore
from sparsam.config import PruningConfig
from sparsam.coupling import members
from sparsam.inputs.checks import check_sparsity, expected, positive, to_arrays
from sparsam.inputs.names import NamePatterns, closest, matching
from sparsam.patterns import NM, Pattern, Tied, Unstructured
from sparsam.pools import check_patterns, make_pools
from sparsam.pruner import configured, prune
from sparsam.scores import resolve
from sparsam.training.callbacks import Arrays, evaluate_finite
from sparsam.training.run_identity import RunIdentity, describe

__all__ = [
    "EvaluationError",
    "SensitivityCurve",
    "SensitivityPoint",
    "SensitivityReport",
    "sensitivity",
]

SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9)


class EvaluationError(ValueError):
    """An evaluation failed; the exception behind it is its `__cause__`.

    Attributes:
        name: The tensor or group that was pruned; "" for the dense weights.
        sparsity: How far it was pruned.
        report: All measurements that succeeded; None if that of the dense weights did not.
    """

    def __init__(self, message: str, name: str, sparsity: float, report: SensitivityReport | None) -> None:
        super().__init__(message)
        self.name = name
        self.sparsity = sparsity
        self.report = report

    def __reduce__(self) -> tuple[Any, ...]:
        return EvaluationError, (str(self), self.name, self.sparsity, self.report)


@dataclass(frozen=True)
class _Curve:
    """One curve of the sweep: tensors that are pruned together, and the sparsities that they can have."""

    tensors: tuple[str, ...]
    grid: tuple[float, ...]
    all_or_nothing: bool
    ties: tuple[Tied, ...]


def sensitivity(
    weights: Mapping[str, ArrayLike],
    eval_fn: Callable[[Arrays], float],
    sparsities: Sequence[float] = SPARSITIES,
    *,
    config: PruningConfig | None = None,
    groups: Mapping[str, str | Sequence[str]] | None = None,
    max_evaluations: int | None = None,
    callback: Callable[[int, int, SensitivityPoint], object] | None = None,
    state: str | PathLike[str] | None = None,
    executor: Executor | None = None,
) -> SensitivityReport:
    """Prunes each tensor, or each group of tensors, alone at each sparsity and records the score.

    The dense weights are evaluated exactly once. With `max_evaluations` every curve is measured at its
    highest sparsity first; then, in rounds of a quarter of what is left of the budget, the intervals between
    two measurements where the curve may differ most from a straight line are halved: those with the largest
    `|score difference| * max(t, 1 - t)`, t being the place of the new measurement within the interval, as
    for a monotone curve the score there lies between those of the ends. Of equals the wider interval comes
    first, then the earlier tensor, then the lower sparsity.

    Args:
        weights: Name -> array, as for `sparsam.prune`. Not modified.
        eval_fn: Weights -> score; the larger, the better (return the negative of a loss). It is given a copy
            of all weights. For processes and Dask it must pickle.
        sparsities: The sparsities to measure; order, repeats and 0 do not matter. Tensors with an N:M pattern
            are measured only at the pattern's sparsity.
        config: Its method and patterns are used, and `exclude`; of `overrides` the patterns (and which
            vectors they name); the scope within a group. Its sparsities, allocation and schedule are not.
        groups: Group -> the names of its tensors, or shell-style patterns; only these are swept then. Left
            out: each tensor that the configuration prunes by itself, and each of its `ties`, under the names
            of its tensors.
        max_evaluations: How many evaluations may be spent, the dense one included; what `state` holds
            counts too.
        callback: Called in the caller's thread after each evaluation has been stored in `state`, with the
            number done, the total number, and the point.
        state: A file, replaced after each evaluation. If it exists, evaluations that it holds are not
            repeated; it must be of the same weights, method, patterns and groups. Whether `eval_fn` is still
            the same is not checked. One run at a time may use a file.
        executor: Any `concurrent.futures.Executor`: a pool of threads or processes, or Dask's
            `client.get_executor()`. Weights and functions are sent about once to each process, not with each
            evaluation. The results do not depend on it.

    Returns:
        The report.

    Raises:
        EvaluationError: `eval_fn` raised, or returned NaN or no number, or the executor failed: with the
            tensor, the sparsity, and the report of all that was measured. Running evaluations finish first.
        ValueError: As for `sparsam.prune`; a group matches nothing or shares a tensor with another; the
            budget is less than one evaluation for each curve and the dense one; `state` is of another run.
        TypeError: `weights` is no mapping; as for `sparsam.prune`.
    """
    arrays = to_arrays(weights)
    settings = configured(config)
    check_patterns(settings, arrays, stacklevel=2)
    unset: dict[str, Any] = {"target_sparsity": None, "schedule": None, "num_iterations": None}
    settings = replace(settings, allocation="uniform", **unset)
    curves = _curves(arrays, settings, _grid(sparsities), groups)
    total = 1 + sum(len(curve.grid) for curve in curves.values())
    if max_evaluations is not None:
        if positive("max_evaluations", max_evaluations) < 1 + len(curves):
            msg = (
                f"max_evaluations: expected at least {1 + len(curves)}, the dense weights and each of "
                f"{len(curves)} tensors or groups once; got {max_evaluations}; raise it, or group tensors"
            )
            raise ValueError(msg)
        total = min(total, max_evaluations)

    store = None
    if state is not None:
        tensors = {name: curve.tensors for name, curve in curves.items()}
        store = SweepStore(Path(state), RunIdentity.of(settings, (), arrays, tensors))
    known = {Task(p.name, p.sparsity): p for p in store.load()} if store else {}
    wanted: list[Task] = []
    job = _Job(arrays, eval_fn, settings, curves)

    def report() -> SensitivityReport | None:
        return _report(arrays, settings, curves, {task: known[task] for task in wanted if task in known})

    with TaskRunner(job, executor) as spread:
        for tasks in rounds({name: curve.grid for name, curve in curves.items()}, known, total):
            wanted += tasks
            try:
                with closing(spread.run([task for task in tasks if task not in known])) as results:
                    for task, point in results:
                        known[task] = point
                        if store:
                            store.save(known.values())
                        if callback is not None:
                            callback(sum(task in known for task in wanted), total, point)
            except TaskError as error:
                name, sparsity = error.task
                where = f"tensor or group {name!r} at sparsity {sparsity:g}" if name else "the dense weights"
                kept = f"; what was measured is in {state}" if store and known else ""
                msg = f"{where}: {error}{kept}"
                raise EvaluationError(msg, name, sparsity, report()) from error.__cause__
    found = report()
    assert found is not None
    return found


@dataclass(frozen=True)
class _Job:
    """The data that all evaluations share; it is sent to the workers."""

    weights: Arrays
    eval_fn: Callable[[Arrays], float]
    config: PruningConfig
    curves: Mapping[str, _Curve]

    def __call__(self, task: Task) -> SensitivityPoint:
        if task == DENSE:
            score = evaluate_finite(self.eval_fn, self.weights, "the dense weights")
            if math.isinf(score):
                msg = (
                    "the dense weights: expected a finite score from eval_fn, to compare with; got "
                    f"{score}; bound the score"
                )
                raise ValueError(msg)
            return SensitivityPoint("", 0.0, 0, score)
        name, sparsity = task
        curve = self.curves[name]
        tensors = {tensor: self.weights[tensor] for tensor in curve.tensors}
        result = prune(tensors, _alone(self.config, curve, sparsity))
        pruned = sum(mask.size - mask.count for mask in result.masks.values())
        score = evaluate_finite(
            self.eval_fn, {**self.weights, **result.weights}, f"{name!r} at sparsity {sparsity:g}"
        )
        return SensitivityPoint(name, sparsity, pruned, score)


def _alone(config: PruningConfig, curve: _Curve, sparsity: float) -> PruningConfig:
    """The configuration that prunes these tensors and no others, all of them to one sparsity."""
    overrides = {
        pattern: own.at(sparsity)
        for pattern, own in config.overrides.items()
        if matching(pattern, curve.tensors)
    }
    # Only ties: an N:M pattern would force its own sparsity on them.
    alone = set(curve.tensors) <= set(members(curve.ties))
    pattern = Unstructured() if alone else config.pattern
    target = pattern.sparsity if isinstance(pattern, NM) else sparsity
    return replace(
        config, target_sparsity=target, pattern=pattern, exclude=(), overrides=overrides, ties=curve.ties
    )


def _grid(sparsities: Sequence[float]) -> tuple[float, ...]:
    values = sparsities if isinstance(sparsities, Iterable) else ()
    grid = tuple(sorted({check_sparsity("sparsities", value) for value in values} - {0.0}))
    if not grid:
        msg = (
            f"sparsities: expected a sequence with at least one above 0; got {sparsities!r}; pass (0.25, "
            "0.5, 0.75), say"
        )
        raise ValueError(msg)
    return grid


def _curves(
    arrays: Arrays,
    config: PruningConfig,
    grid: tuple[float, ...],
    groups: Mapping[str, str | Sequence[str]] | None,
) -> dict[str, _Curve]:
    """What is swept, in the order of the weights or of the groups."""
    if groups is not None and (not isinstance(groups, Mapping) or not groups):
        raise ValueError(
            expected(
                "groups",
                groups,
                "a mapping from groups to the names of their tensors",
                "pass {'block0': ['block0.*']}, say",
            )
        )
    patterns = {name: pool.pattern for pool in make_pools(arrays, config) for name in pool.names}
    tied = members(config.ties)
    patterns |= dict.fromkeys(tied, Unstructured())
    prunable = [name for name, array in arrays.items() if name in patterns and array.size]
    if groups is None:
        curves = {name: _curve(name, (name,), patterns, grid) for name in prunable if name not in tied}
        for tie in config.ties:
            name = " + ".join(tie.members)
            curves[name] = _Curve(tuple(tie.members), grid, all_or_nothing=False, ties=(tie,))
    else:
        curves = {
            name: _curve(name, _members(name, names, prunable), patterns, grid, config.ties)
            for name, names in groups.items()
        }
    if not curves or "" in curves:
        msg = (
            f"weights: expected tensors to prune; got {list(arrays)!r}, all of which the configuration "
            "leaves dense; change exclude, or add weights"
            if not curves
            else "weights, groups: expected names that are not empty; got ''; rename it"
        )
        raise ValueError(msg)
    owners: dict[str, str] = {}
    for group in groups or ():
        for name in curves[group].tensors:
            if owners.setdefault(name, group) != group:
                msg = (
                    f"groups: expected tensor {name!r} in one; got it in {owners[name]!r} and in {group!r}; "
                    "take it out of one"
                )
                raise ValueError(msg)
    return curves


def _members(group: str, names: str | Sequence[str], prunable: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(names, Iterable):
        raise ValueError(
            expected(f"groups[{group!r}]", names, "a name or pattern, or several", "pass 'block0.*', say")
        )
    wanted = (names,) if isinstance(names, str) else tuple(names)
    for pattern in wanted:
        if not matching(pattern, prunable):
            msg = (
                f"groups[{group!r}]: expected names or patterns of tensors that the configuration prunes; "
                f"got {pattern!r}, which matches none; {closest(pattern, prunable)}"
            )
            raise ValueError(msg)
    if not wanted:
        msg = f"groups[{group!r}]: expected at least one name or pattern; got none; fill or drop the group"
        raise ValueError(msg)
    patterns = NamePatterns(wanted)
    return tuple(name for name in prunable if patterns.matches(name))


def _curve(
    group: str,
    names: tuple[str, ...],
    patterns: Mapping[str, Pattern],
    grid: tuple[float, ...],
    ties: Sequence[Tied] = (),
) -> _Curve:
    for tie in ties:
        if (inside := set(tie.members) & set(names)) and inside != set(tie.members):
            wanted = f"all or none of the tied {list(tie.members)!r}"
            msg = f"groups[{group!r}]: expected {wanted}; got {sorted(inside)!r}; extend or shrink the group"
            raise ValueError(msg)
    own = tuple(tie for tie in ties if set(tie.members) <= set(names))
    fixed = {pattern.sparsity for name in names if isinstance(pattern := patterns[name], NM)}
    free = any(not isinstance(patterns[name], NM) for name in names)
    if len(fixed) + free > 1:
        found = ", ".join(f"{name!r}: {patterns[name]}" for name in names)
        msg = (
            f"groups[{group!r}]: expected one N:M pattern for all tensors, as it has one sparsity; got "
            f"{found}; group them by pattern"
        )
        raise ValueError(msg)
    return _Curve(names, tuple(fixed - {0.0}) if fixed else grid, bool(fixed), own)


def _report(
    arrays: Mapping[str, NDArray[Any]],
    config: PruningConfig,
    curves: Mapping[str, _Curve],
    points: Mapping[Task, SensitivityPoint],
) -> SensitivityReport | None:
    if DENSE not in points:
        return None
    measured = sorted(points.values(), key=lambda point: point.sparsity)
    return SensitivityReport(
        points[DENSE].score,
        tuple(
            SensitivityCurve(
                name,
                tuple((tensor, arrays[tensor].size) for tensor in curve.tensors),
                tuple(point for point in measured if point.name == name),
                curve.all_or_nothing,
            )
            for name, curve in curves.items()
        ),
        describe(resolve(config.method)),
        str(config.pattern),
    )
