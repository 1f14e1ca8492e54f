"""Iterative pruning: prune a little, let the model recover, evaluate, and repeat while scores are good.

The dense weights are never modified, each iteration works on a copy of the last good weights, and with a
`state_dir` every finished iteration survives the end of the process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from numpy.typing import ArrayLike, NDArray

from sparsam import schedules, scores
from sparsam.config import ConfigFields, PruningConfig, ScheduleLike, ScheduleName, is_explicit
from sparsam.inputs.checks import check_sparsity, expected, to_arrays
from sparsam.masks import Mask
from sparsam.patterns import NM
from sparsam.pools import Pool, check_patterns, make_pools
from sparsam.pruner import SINGLE, configured, describe, prune_pools
from sparsam.report import Report
from sparsam.training.callbacks import Arrays, Masks, sparsity_of, validate_returned_weights
from sparsam.training.callbacks import evaluate as score_of
from sparsam.training.run_identity import RunIdentity
from sparsam.training.saved_run import HistoryRow, Limits, Progress, StateDir
from sparsam.training.timetable import config_at

__all__ = ["HistoryRow", "IterativePruner", "IterativeResult"]

WeightsT = TypeVar("WeightsT")
MasksT = TypeVar("MasksT")


@dataclass(frozen=True)
class IterativeResult(Generic[WeightsT, MasksT]):
    """What `IterativePruner.run` returns; if one array was given, `weights` and `masks` are single too.

    Attributes:
        history: One row per iteration, the one that stopped the run included.
        final_sparsity: The sparsity of `weights`, as in the row that they come from; 0.0 if they are dense.
        weights: Name -> the last good weights, in new arrays.
        masks: Name -> the mask of each tensor that is being pruned; all ones if `weights` are dense.
        report: The statistics of every tensor.
        dense_weights: Name -> the original weights: the caller's arrays.
        dense_score: What `eval_fn` returned for them.
        stopped_early: Whether a score failed `min_score` or `max_drop`.
    """

    history: list[HistoryRow]
    final_sparsity: float
    weights: WeightsT
    masks: MasksT
    report: Report
    dense_weights: WeightsT
    dense_score: float
    stopped_early: bool


class IterativePruner:
    """Prunes along a schedule, with recovery in between.

    Attributes:
        initial_sparsity: Where the schedule starts; not used by "one_shot", a list or a function.
        final_sparsity: Where it ends.
        num_iterations: The number of iterations.
        schedule: The given schedule, or the configuration's.
        config: The configuration, with final_sparsity, num_iterations and schedule set in it.
        history: The rows of the latest run: during the run, and also after an error.
    """

    def __init__(
        self,
        initial_sparsity: float = 0.2,
        final_sparsity: float | None = None,
        num_iterations: int | None = None,
        schedule: ScheduleLike | None = None,
        config: PruningConfig | None = None,
    ) -> None:
        """Determines the schedule.

        Args:
            initial_sparsity: The sparsity of the first iteration.
            final_sparsity: The sparsity of the last. Default: the end of an explicit schedule, else the
                target of `config`; 0.8 without a `config`.
            num_iterations: Default: the length of an explicit list, else that of `config`, else 4.
            schedule: A name, an object of `sparsam.schedules`, a list of sparsities or a function of
                progress. Default: that of `config`, else "linear" ("one_shot" for an N:M pattern).
            config: What is pruned, and how.

        Raises:
            ValueError: A value is out of range, values contradict each other, the schedule decreases, or its
                sparsity is not that of an N:M pattern.
        """
        changes: ConfigFields = {}
        if config is None:
            changes["target_sparsity"] = 0.8
        if schedule is not None:
            changes["schedule"] = schedule
            if is_explicit(schedule):
                changes["target_sparsity"] = None
        if final_sparsity is not None:
            changes["target_sparsity"] = final_sparsity
        if num_iterations is not None:
            changes["num_iterations"] = num_iterations
        settings = configured(config, changes)
        default: ScheduleName = "one_shot" if isinstance(settings.pattern, NM) else "linear"
        self.schedule: ScheduleLike = default if settings.schedule is None else settings.schedule
        self.num_iterations: int = 4 if settings.num_iterations is None else settings.num_iterations
        self.config = replace(settings, schedule=self.schedule, num_iterations=self.num_iterations)
        self.initial_sparsity = check_sparsity("initial_sparsity", initial_sparsity)
        self.final_sparsity = self.config.target_sparsity
        self.history: list[HistoryRow] = []
        pattern, sparsities = self.config.pattern, self.get_schedule()
        if isinstance(pattern, NM) and set(sparsities) != {pattern.sparsity}:
            wanted = f"'one_shot' with pattern {pattern}, which has one sparsity"
            raise ValueError(expected("schedule", self.schedule, wanted, "pass one of them"))

    def get_schedule(self) -> list[float]:
        """Returns the sparsity of each iteration."""
        return schedules.sample(
            self.schedule,
            num_iterations=self.num_iterations,
            initial=self.initial_sparsity,
            final=self.final_sparsity,
        )

    @overload
    def run(
        self,
        weights: Mapping[str, ArrayLike],
        eval_fn: Callable[[Arrays], float],
        recover_fn: Callable[[Arrays, Masks, int], Mapping[str, ArrayLike] | None] | None = ...,
        *,
        min_score: float | None = ...,
        max_drop: float | None = ...,
        on_iteration: Callable[[HistoryRow], object] | None = ...,
        state_dir: str | PathLike[str] | None = ...,
    ) -> IterativeResult[Arrays, Masks]: ...
    @overload
    def run(
        self,
        weights: ArrayLike,
        eval_fn: Callable[[NDArray[Any]], float],
        recover_fn: Callable[[NDArray[Any], Mask, int], ArrayLike | None] | None = ...,
        *,
        min_score: float | None = ...,
        max_drop: float | None = ...,
        on_iteration: Callable[[HistoryRow], object] | None = ...,
        state_dir: str | PathLike[str] | None = ...,
    ) -> IterativeResult[NDArray[Any], Mask]: ...
    def run(
        self,
        weights: Mapping[str, ArrayLike] | ArrayLike,
        eval_fn: Callable[[Any], float],
        recover_fn: Callable[[Any, Any, int], Any] | None = None,
        *,
        min_score: float | None = None,
        max_drop: float | None = None,
        on_iteration: Callable[[HistoryRow], object] | None = None,
        state_dir: str | PathLike[str] | None = None,
    ) -> IterativeResult[Any, Any]:
        """Prunes, recovers, evaluates and records, once for each sparsity of the schedule.

        Pruned weights stay pruned: masks only grow, and weights that recovery revived are zeroed again before
        evaluation. The sparsity of an override grows in proportion to the schedule, as do those of an
        allocation that is a mapping; an N:M override applies in full from the first iteration on.

        An allocation is computed in each iteration, from the recovered weights. If a tensor's new share is
        below what is already pruned of it, it keeps its zeros, and the increases of other tensors are reduced
        in proportion, so that the total holds.

        Args:
            weights: As for `sparsam.prune`. Never modified.
            eval_fn: Weights -> score; the larger, the better (return the negative of a loss). It is given a
                copy.
            recover_fn: (weights, masks, iteration) -> the recovered weights, or None if it changed the given
                ones in place. Tensors that it does not return stay unchanged.
            min_score: Stop at a score that is not at least this.
            max_drop: Stop at a score that is more than this below the dense score.
            on_iteration: Called with each new row of the history after it has been stored in `state_dir`.
            state_dir: A folder, made if needed, for the state of the run after each iteration. If it holds
                one, the run resumes from there and repeats only the interrupted iteration; the present limits
                apply to the earlier iterations too. One run at a time may use a folder. State that
                `recover_fn` keeps, such as an optimizer's, is not saved.

        Returns:
            The last good weights (the dense ones if the first iteration fails), with masks and history.

        Raises:
            ValueError: As for `sparsam.prune`; `recover_fn` returned an unknown name, another shape or a NaN;
                `state_dir` belongs to a run with other weights, configuration or schedule, is in use or
                damaged, or an iteration in it fails the limits and the weights of the one before are gone.
            TypeError: As for `sparsam.prune`; a callback returned something of another type.
        """
        limits = Limits(min_score, max_drop)
        if isinstance(weights, Mapping):
            dense, min_rank, evaluate, recover = to_arrays(weights), 2, eval_fn, recover_fn
        else:
            dense, min_rank, evaluate = to_arrays({SINGLE: weights}), 0, _alone_eval(eval_fn)
            recover = None if recover_fn is None else _alone_recover(recover_fn)
        check_patterns(self.config, dense, stacklevel=2)
        steps = self._steps()
        pools = make_pools(dense, steps[-1], min_rank=min_rank)
        with nullcontext() if state_dir is None else self._state_dir(state_dir, dense) as store:
            progress = self._advance(
                dense, steps, pools, min_rank, evaluate, recover, limits, on_iteration, store
            )
        result: IterativeResult[Any, Any] = _result(dense, progress, pools)
        if isinstance(weights, Mapping):
            return result
        mask = result.masks.get(SINGLE, Mask.ones(dense[SINGLE].shape))
        return replace(result, weights=result.weights[SINGLE], masks=mask, dense_weights=dense[SINGLE])

    def _state_dir(self, path: str | PathLike[str], dense: Arrays) -> StateDir:
        return StateDir(Path(path), RunIdentity.of(self.config, self.get_schedule(), dense))

    def _advance(
        self,
        dense: Arrays,
        steps: list[PruningConfig],
        pools: list[Pool],
        min_rank: int,
        evaluate: Callable[[Arrays], float],
        recover: Callable[[Arrays, Masks, int], Any] | None,
        limits: Limits,
        on_iteration: Callable[[HistoryRow], object] | None,
        store: StateDir | None,
    ) -> Progress:
        """Runs from the start or the stored state to the end of the schedule or the first bad score."""
        pruned = [name for pool in pools for name in pool.names]
        progress = store.load(dense, pruned) if store else None
        if progress is None:
            progress = Progress(score_of(evaluate, dense))
            if store:
                store.save(progress)
        progress = limits.applied(progress)
        self.history = progress.rows()

        while not progress.failed and len(progress.history) < len(steps):
            start = time.perf_counter()
            iteration = len(progress.history) + 1
            arrays, masks = self._pruned(progress, dense, steps[iteration - 1], min_rank)
            if recover is not None:
                arrays = _recovered(recover, arrays, masks, iteration)
            score = score_of(evaluate, arrays)
            row = HistoryRow(iteration, sparsity_of(masks), score, time.perf_counter() - start)
            if limits.fails(score, progress.dense_score):
                progress = replace(progress, failed=row)
            else:
                progress = Progress(progress.dense_score, (*progress.history, row), None, arrays, masks)
            if store:
                store.save(progress)
            self.history.append(row)
            if on_iteration is not None:
                on_iteration(row)
        return progress

    def _steps(self) -> list[PruningConfig]:
        """The configuration of each iteration."""
        schedule = self.get_schedule()
        return [config_at(self.config, sparsity, schedule[-1]) for sparsity in schedule]

    def _pruned(
        self, progress: Progress, dense: Arrays, step: PruningConfig, min_rank: int
    ) -> tuple[Arrays, Masks]:
        """The last good weights pruned further, in new arrays."""
        weights = dense if progress.weights is None else progress.weights
        arrays = {name: array.copy() for name, array in weights.items()}
        pools = make_pools(arrays, step, min_rank=min_rank, previous=progress.masks)
        method = scores.resolve(self.config.method)
        return arrays, prune_pools(arrays, pools, method, arrays, previous=progress.masks).masks


def _alone_eval(eval_fn: Callable[[Any], float]) -> Callable[[Arrays], float]:
    """An `eval_fn` of one array as one of a mapping."""
    return lambda arrays: eval_fn(arrays[SINGLE])


def _alone_recover(recover_fn: Callable[[Any, Any, int], Any]) -> Callable[[Arrays, Masks, int], Any]:
    """A `recover_fn` of one array as one of a mapping."""

    def recover(arrays: Arrays, masks: Masks, iteration: int) -> Mapping[str, ArrayLike] | None:
        array = arrays[SINGLE]
        returned = recover_fn(array, masks.get(SINGLE, Mask.ones(array.shape)), iteration)
        return None if returned is None else {SINGLE: returned}

    return recover


def _recovered(
    recover: Callable[[Arrays, Masks, int], Any], arrays: Arrays, masks: Masks, iteration: int
) -> Arrays:
    """The weights after recovery."""
    given = dict(arrays)
    returned = recover(given, dict(masks), iteration)
    return validate_returned_weights("recover_fn", given, returned, arrays, masks, f", iteration {iteration}")


def _result(dense: Arrays, progress: Progress, pools: list[Pool]) -> IterativeResult[Arrays, Masks]:
    weights, masks = progress.weights, progress.masks
    if weights is None or masks is None:
        weights = {name: array.copy() for name, array in dense.items()}
        masks = {name: Mask.ones(dense[name].shape) for pool in pools for name in pool.names}
    return IterativeResult(
        history=progress.rows(),
        final_sparsity=progress.history[-1].sparsity if progress.history else 0.0,
        weights=weights,
        masks=masks,
        report=describe(weights, masks, pools),
        dense_weights=dense,
        dense_score=progress.dense_score,
        stopped_early=progress.failed is not None,
    )
