"""`IterativePruner`: what recovery and evaluation may do, what they return, and when the run stops early."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from cases import model
from iterative_runs import Arrays, Masks, kept, outcome
from sparsam.masks import Mask
from sparsam.pruner import prune
from sparsam.training.iterative import HistoryRow, IterativePruner


def test_recovery_may_do_as_it_likes_with_what_it_gets() -> None:
    weights = model()
    before = {name: array.copy() for name, array in weights.items()}
    hoard: list[NDArray[Any]] = []

    def rebind(arrays: Arrays, masks: Masks, iteration: int) -> None:
        masks.clear()
        arrays["fc1.weight"] = np.full((20, 16), iteration, np.float64)
        arrays["fc2.bias"] += 1
        del arrays["fc2.weight"]
        hoard.extend(arrays.values())

    def shared(arrays: Arrays, _: Masks, iteration: int) -> Arrays:
        hoard.append(mine := np.full((20, 16), iteration, ml_dtypes.bfloat16))
        assert (arrays["fc1.weight"] == 0).any()
        return {"fc1.weight": mine}

    for recover in (rebind, shared):
        result = IterativePruner(num_iterations=2).run(weights, kept, recover)
        assert list(result.weights) == list(weights)
        assert set(np.unique(result.weights["fc1.weight"].astype(np.float32))) == {0.0, 2.0}
        assert result.weights["fc1.weight"].dtype == ml_dtypes.bfloat16
        assert result.masks["fc1.weight"].count == np.count_nonzero(result.weights["fc1.weight"])
    assert (hoard[-1] == 2).all()
    assert not np.shares_memory(hoard[-1], result.weights["fc1.weight"])
    assert all((weights[name] == before[name]).all() for name in weights)


def test_evaluation_may_do_as_it_likes_too() -> None:
    def spoil(arrays: Arrays) -> float:
        score = kept(arrays)
        for array in arrays.values():
            array[...] = 7
        arrays.clear()
        return score

    weights = model()
    expected = IterativePruner().run(weights, kept)
    result = IterativePruner().run(weights, spoil)
    assert outcome(result.history) == outcome(expected.history)
    assert result.masks == expected.masks
    assert not (weights["fc1.weight"] == 7).any()


def test_read_only_weights_reach_the_callbacks_writeable() -> None:
    weights = model()
    for array in weights.values():
        array.flags.writeable = False

    def recover(arrays: Arrays, masks: Masks, iteration: int) -> None:
        del masks, iteration
        for array in arrays.values():
            array[...] = 1

    assert IterativePruner().run(weights, kept, recover).weights["fc2.bias"].flags.writeable


def test_one_array_stays_one_array() -> None:
    def recover(array: NDArray[Any], mask: Mask, iteration: int) -> NDArray[Any]:
        assert isinstance(mask, Mask)
        return array * iteration

    result = IterativePruner(schedule=[0.25, 0.5]).run([4, 3, 2, 1], lambda a: float(a.sum()), recover)
    assert result.weights.tolist() == [8, 6, 0, 0]
    assert result.masks.to_array().tolist() == [True, True, False, False]
    assert result.dense_weights.tolist() == [4, 3, 2, 1]
    assert (
        IterativePruner().run(np.ones((2, 5)), lambda a: float(a.sum()), lambda *_: None).weights.sum() == 2
    )
    dense = IterativePruner().run(np.ones((2, 5)), lambda _: 0.0, min_score=1)
    assert dense.masks == Mask.ones((2, 5))


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (0.93, TypeError, "recover_fn: expected a mapping from names to arrays, or None; got 0.93"),
        (
            {"fc3": np.ones(3)},
            ValueError,
            r"recover_fn: expected only the tensors \['fc2.weight', .*; got \['fc3'\] too",
        ),
        ({"fc2.bias": np.ones(3)}, ValueError, r"tensor 'fc2.bias': expected shape \(12,\); got \(3,\)"),
    ],
)
def test_recoveries_that_make_no_sense(returned: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        IterativePruner().run(model(), kept, lambda *_: returned)


def test_a_recovery_that_diverges() -> None:
    for last in (1, 4):

        def diverge(arrays: Arrays, masks: Masks, iteration: int) -> None:
            if iteration == last:  # noqa: B023
                arrays["fc1.weight"] *= np.nan

        message = rf"recover_fn, iteration {last}: tensor 'fc1.weight': .*; got NaN at index \(\d+, \d+\)"
        with pytest.raises(ValueError, match=message):
            IterativePruner().run(model(), kept, diverge)


def test_scores_are_numbers() -> None:
    with pytest.raises(TypeError, match="eval_fn: expected a number; got None"):
        IterativePruner().run(model(), lambda _: None)  # type: ignore[arg-type, return-value]
    assert IterativePruner().run(model(), lambda _: np.float32(0.5)).dense_score == 0.5


@pytest.mark.parametrize(
    "limit", [{"min_score": "0.9"}, {"min_score": float("nan")}, {"max_drop": True}, {"max_drop": -0.1}]
)
def test_limits_are_numbers(limit: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(limit))}: expected"):
        IterativePruner().run(model(), kept, **limit)


@pytest.mark.parametrize(
    "limits", [{"min_score": 0.55}, {"max_drop": 0.45}, {"min_score": 0.1, "max_drop": 0.5}]
)
def test_early_stop_returns_the_last_good_weights(limits: dict[str, Any]) -> None:
    weights = {"w": np.random.default_rng(0).standard_normal((10, 10)), "b": np.ones(1)}
    rows: list[HistoryRow] = []

    def score(arrays: Arrays) -> float:
        return np.count_nonzero(arrays["w"]) / 100

    def recover(arrays: Arrays, masks: Masks, iteration: int) -> None:
        del masks, iteration
        arrays["b"] += 1

    pruner = IterativePruner(schedule=[0.2, 0.4, 0.6, 0.8])
    result = pruner.run(weights, score, recover, on_iteration=rows.append, **limits)
    good = 2
    assert result.stopped_early
    assert outcome(result.history) == [(1, 0.2, 0.8), (2, 0.4, 0.6), (3, 0.6, 0.4)]
    assert rows == result.history == pruner.history
    assert result.final_sparsity == 0.4
    assert result.weights["b"] == 1 + good
    assert result.masks == prune(weights, target_sparsity=0.4).masks
    assert result.report == prune(weights, target_sparsity=0.4).report


def test_a_score_at_the_limit_is_good() -> None:
    weights = {"w": np.ones((10, 10))}
    run = IterativePruner(schedule=[0.25, 0.5]).run
    assert not run(weights, kept, min_score=0.5, max_drop=0.5).stopped_early
    assert run(weights, kept, min_score=0.51).final_sparsity == 0.25
    assert run(weights, kept, max_drop=0.49).final_sparsity == 0.25


@pytest.mark.parametrize("limit", [{"min_score": 2.0}, {"max_drop": 0.0}, {}])
def test_a_first_iteration_that_fails_leaves_the_weights_dense(limit: dict[str, Any]) -> None:
    weights = model()
    evaluate: Callable[[Arrays], float] = kept if limit else lambda _: float("nan")
    result = IterativePruner().run(weights, evaluate, **(limit or {"min_score": -1e9}))
    assert result.stopped_early
    assert len(result.history) == 1
    assert result.final_sparsity == 0.0
    assert result.masks == {name: Mask.ones(weights[name].shape) for name in ("fc2.weight", "fc1.weight")}
    assert result.report.total.pruned_params == 0
    for name, array in result.weights.items():
        assert (array == weights[name]).all()
        assert not np.shares_memory(array, weights[name])
