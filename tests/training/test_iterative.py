"""`IterativePruner`: its schedule, its masks and its history."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cases import model
from iterative_runs import Arrays, Masks, kept, outcome
from sparsam.config import OverrideLike, PruningConfig, Scope
from sparsam.masks import Mask
from sparsam.patterns import NM, Block, Pattern, Slices, Unstructured
from sparsam.pruner import prune
from sparsam.schedules import Polynomial
from sparsam.scores import Magnitude, Random
from sparsam.training.iterative import IterativePruner


def test_defaults() -> None:
    pruner = IterativePruner()
    assert (pruner.initial_sparsity, pruner.final_sparsity, pruner.num_iterations) == (0.2, 0.8, 4)
    assert pruner.schedule == "linear"
    assert pruner.get_schedule() == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert pruner.history == []


def test_the_configuration_fills_in_what_is_left_out() -> None:
    config = PruningConfig(0.9, schedule="cubic", num_iterations=3, method="random")
    pruner = IterativePruner(config=config)
    assert (pruner.final_sparsity, pruner.num_iterations, pruner.schedule) == (0.9, 3, "cubic")
    pruner = IterativePruner(0.0, 0.5, 2, "linear", config)
    assert pruner.get_schedule() == [0.0, 0.5]
    assert pruner.config == PruningConfig(0.5, schedule="linear", num_iterations=2, method="random")


@pytest.mark.parametrize(
    ("config", "schedule"),
    [
        (PruningConfig(), [0.2, 0.3, 0.4, 0.5]),
        (PruningConfig(scope="global"), [0.2, 0.3, 0.4, 0.5]),
        (replace(PruningConfig(), scope="global"), [0.2, 0.3, 0.4, 0.5]),
        (pickle.loads(pickle.dumps(PruningConfig())), [0.2, 0.3, 0.4, 0.5]),
        (PruningConfig(0.5), [0.2, 0.3, 0.4, 0.5]),
        (replace(PruningConfig(), target_sparsity=0.5), [0.2, 0.3, 0.4, 0.5]),
        (PruningConfig(schedule="one_shot"), [0.5] * 4),
        (PruningConfig(num_iterations=1), [0.5]),
        (PruningConfig(pattern=NM(1, 4)), [0.75] * 4),
        (PruningConfig(pattern=NM(1, 4), num_iterations=2), [0.75] * 2),
        (PruningConfig(schedule=[0.3, 0.9]), [0.3, 0.9]),
        (PruningConfig(schedule=lambda p: p / 2), pytest.approx([0, 1 / 6, 1 / 3, 0.5])),
    ],
)
def test_what_a_configuration_leaves_open_has_defaults(config: PruningConfig, schedule: Any) -> None:
    assert IterativePruner(config=config).get_schedule() == pytest.approx(schedule)


def test_initial_sparsity_counts_beside_a_configuration() -> None:
    pruner = IterativePruner(0.3, 0.9, num_iterations=4, config=PruningConfig(scope="global"))
    assert pruner.get_schedule() == pytest.approx([0.3, 0.5, 0.7, 0.9])


def test_explicit_schedules_speak_for_themselves() -> None:
    config = PruningConfig(0.4, num_iterations=7)
    for pruner in (
        IterativePruner(schedule=[0.1, 0.5, 0.7]),
        IterativePruner(schedule=(0.1, 0.5, 0.7), config=config),
    ):
        assert pruner.get_schedule() == [0.1, 0.5, 0.7]
        assert (pruner.final_sparsity, pruner.num_iterations) == (0.7, 3)
    pruner = IterativePruner(schedule=lambda p: 0.5 * p, config=config)
    assert (pruner.final_sparsity, pruner.num_iterations) == (0.5, 7)
    assert IterativePruner(0.0, 0.75, 3, Polynomial(2)).get_schedule() == [0.0, 0.5625, 0.75]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IterativePruner(1.2), "initial_sparsity: expected a number from 0"),
        (lambda: IterativePruner(0.2, 1.2), "target_sparsity: expected a number from 0"),
        (lambda: IterativePruner(0.5, 0.3), "schedule, iteration 2: expected at least 0.5, .*; got 0.3"),
        (lambda: IterativePruner(num_iterations=0), "num_iterations: expected an integer of at least 1"),
        (lambda: IterativePruner(schedule=cast(Any, "agp")), "schedule: expected 'one_shot'"),
        (lambda: IterativePruner(schedule="exponential", final_sparsity=1.0), "exponential schedule"),
        (lambda: IterativePruner(1.0, 0.8, 4, "exponential"), "exponential schedule: .* got 1.0 and 0.8"),
        (
            lambda: IterativePruner(schedule=[0.2, 0.5], final_sparsity=0.8),
            "target_sparsity: expected 0.5, the end of schedule; got 0.8",
        ),
        (
            lambda: IterativePruner(schedule=[0.2, 0.5], num_iterations=3),
            "num_iterations: expected 2, .*; got 3",
        ),
        (
            lambda: IterativePruner(schedule=lambda p: 0.5 - p / 9),
            "schedule, .* 2: expected at least 0.5",
        ),
        (
            lambda: IterativePruner(
                schedule="linear", num_iterations=2, config=PruningConfig(pattern=NM(2, 4))
            ),
            "schedule: expected 'one_shot' with pattern 2:4, .*; got 'linear'",
        ),
    ],
)
def test_contradictions(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(TypeError, match="config: expected a PruningConfig"):
        IterativePruner(config={"scope": "global"})  # type: ignore[arg-type]


def test_one_run_by_hand() -> None:
    calls: list[tuple[Any, ...]] = []

    def evaluate(arrays: Arrays) -> float:
        calls.append(("evaluate", arrays["w"].tolist()))
        return float(arrays["w"].sum())

    def recover(arrays: Arrays, masks: Masks, iteration: int) -> Arrays:
        calls.append(("recover", arrays["w"].tolist(), masks["w"].to_array().tolist(), iteration))
        return {"w": arrays["w"] + 1}

    weights = {"w": np.array([[1.0, 2.0, 3.0, 4.0]])}
    pruner = IterativePruner(schedule=[0.25, 0.5])
    result = pruner.run(weights, evaluate, recover, on_iteration=lambda row: calls.append(row[:3]))

    assert calls == [
        ("evaluate", [[1, 2, 3, 4]]),
        ("recover", [[0, 2, 3, 4]], [[False, True, True, True]], 1),
        ("evaluate", [[0, 3, 4, 5]]),
        (1, 0.25, 12.0),
        ("recover", [[0, 0, 4, 5]], [[False, False, True, True]], 2),
        ("evaluate", [[0, 0, 5, 6]]),
        (2, 0.5, 11.0),
    ]
    assert outcome(result.history) == [(1, 0.25, 12.0), (2, 0.5, 11.0)]
    assert all(row.seconds >= 0 for row in result.history)
    assert pruner.history == result.history
    assert result.weights["w"].tolist() == [[0, 0, 5, 6]]
    assert result.masks["w"].to_array().tolist() == [[False, False, True, True]]
    assert (result.final_sparsity, result.dense_score, result.stopped_early) == (0.5, 10.0, False)
    assert result.report.total.pruned_params == 2
    assert result.dense_weights["w"] is weights["w"]
    assert weights["w"].tolist() == [[1, 2, 3, 4]]


def test_without_recovery_the_end_is_that_of_one_shot() -> None:
    weights = model()
    result = IterativePruner(0.1, 0.7, 6).run(weights, kept)
    expected = prune(weights, target_sparsity=0.7)
    assert result.masks == expected.masks
    assert result.report == expected.report
    assert all((result.weights[name] == expected.weights[name]).all() for name in weights)


def test_sparsity_is_measured_over_what_is_pruned() -> None:
    weights = {"w": np.ones((3, 3)), "bias": np.ones(90)}
    result = IterativePruner(schedule=[0.5]).run(weights, kept)
    assert result.final_sparsity == result.history[0].sparsity == 4 / 9
    assert IterativePruner().run({"bias": np.ones(3)}, kept).final_sparsity == 0.0


@pytest.mark.parametrize("pattern", [Unstructured(), Block(2, 3), Slices(0, size=2), NM(1, 4)])
@pytest.mark.parametrize("method", [Magnitude(1), Magnitude(2), Random(4)])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_nothing_is_ever_revived(pattern: Pattern, method: Magnitude | Random, scope: Scope) -> None:
    config = PruningConfig(pattern=pattern, method=method, scope=scope)
    seen: list[Masks] = []

    def zero_some(arrays: Arrays, masks: Masks, iteration: int) -> None:
        """Leaves kept weights at zero, so that they tie with pruned ones before them."""
        seen.append(masks)
        for array in arrays.values():
            array.reshape(-1)[array.size // 2 - iteration :] = 0

    schedule: Any = "one_shot" if isinstance(pattern, NM) else [0.1, 0.3, 0.5, 0.5, 0.8, 1.0]
    weights = {name: np.arange(1.0, 12 * n + 1).reshape(n, 12) for name, n in (("a", 16), ("b", 8))}
    result = IterativePruner(schedule=schedule, num_iterations=6, config=config).run(weights, kept, zero_some)
    assert len(seen) == 6
    for before, after in pairwise(seen):
        assert all((after[name] & before[name]) == after[name] for name in weights)
    if isinstance(pattern, Unstructured):
        size = 192 + 96
        counts = [sum(mask.size - mask.count for mask in masks.values()) for masks in seen]
        expected = [
            round(s * size) if scope == "global" else round(s * 192) + round(s * 96) for s in schedule
        ]
        assert counts == expected
    assert result.masks == seen[-1]


@settings(deadline=None)
@given(
    values=st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.0, 1.0]), min_size=1, max_size=24),
    steps=st.lists(st.floats(0, 1), min_size=1, max_size=5).map(sorted),
    seed=st.integers(0, 99),
)
def test_masks_are_nested_and_exact(values: list[float], steps: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    seen: list[Mask] = []

    def recover(array: NDArray[Any], mask: Mask, iteration: int) -> NDArray[Any]:
        del iteration
        seen.append(mask)
        return np.asarray(rng.permutation(array))

    result = IterativePruner(schedule=steps).run(np.array(values), lambda a: float(a.sum()), recover)
    assert [mask.size - mask.count for mask in seen] == [round(s * len(values)) for s in steps]
    assert all((after & before) == after for before, after in pairwise(seen))
    assert not result.weights[~result.masks.to_array()].any()


def test_overrides_grow_in_proportion() -> None:
    weights = {name: np.arange(1.0, 101.0).reshape(10, 10) for name in "abcd"}
    overrides: dict[str, OverrideLike] = {"b": 0.4, "c": (0.2, Slices(0)), "d": NM(1, 2)}
    seen: list[list[int]] = []

    def record(arrays: Arrays, masks: Masks, iteration: int) -> None:
        del arrays, iteration
        seen.append([100 - masks[name].count for name in "abcd"])

    config = PruningConfig(overrides=overrides)
    IterativePruner(schedule=[0.0, 0.4, 0.8], config=config).run(weights, kept, record)
    assert seen == [[0, 0, 0, 50], [40, 20, 10, 50], [80, 40, 20, 50]]
    seen.clear()
    IterativePruner(schedule=[0.0, 0.0], config=config).run(weights, kept, record)
    assert seen == [[0, 40, 20, 50]] * 2


def test_patterns_are_checked_once() -> None:
    with pytest.raises(ValueError, match=r"overrides: expected .*; got 'fc9', which matches none"):
        IterativePruner(config=PruningConfig(overrides={"fc9": 0.5})).run(model(), kept)
    with pytest.warns(UserWarning, match="exclude: 'head' matches no tensor") as caught:
        IterativePruner(config=PruningConfig(exclude="head", num_iterations=3)).run(model(), kept)
    assert [warning.filename for warning in caught] == [__file__]


def test_history_survives_an_exception() -> None:
    def fail(arrays: Arrays, masks: Masks, iteration: int) -> None:
        del arrays, masks
        if iteration == 3:
            raise KeyboardInterrupt

    pruner = IterativePruner()
    with pytest.raises(KeyboardInterrupt):
        pruner.run(model(), kept, fail)
    assert [row.iteration for row in pruner.history] == [1, 2]
