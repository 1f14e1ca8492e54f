from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

import network
from sparsam.analysis.search import SearchProbe, find_smallest
from sparsam.analysis.sweep import sensitivity
from sparsam.config import PruningConfig
from sparsam.patterns import NM, Slices
from sparsam.pruner import prune
from sparsam.training.callbacks import Arrays, Masks

WEIGHTS = {name: np.random.default_rng(3).standard_normal((40, 25)) for name in ("a", "b")}


def gone(weights: Mapping[str, Any]) -> float:
    return 1 - sum(np.count_nonzero(array) for array in weights.values()) / 2000


def scored(curve: Callable[[float], float]) -> Callable[[Arrays], float]:
    """An eval_fn that looks at nothing but the share of zeros."""
    return lambda weights: curve(gone(weights))


@pytest.mark.parametrize("limit", [0.0, 0.004, 0.3, 0.5, 0.77, 0.9961, 1.0])
@pytest.mark.parametrize("tolerance", [0.2, 0.01, 0.001])
def test_bisection_finds_the_limit(limit: float, tolerance: float) -> None:
    seen: list[SearchProbe] = []
    result = find_smallest(
        WEIGHTS,
        scored(lambda s: 1.0 - (s > limit + 1e-9)),
        0.5,
        tolerance=tolerance,
        max_evaluations=100,
        callback=seen.append,
    )
    assert limit - tolerance <= result.sparsity <= limit + 1e-9
    assert gone(result.weights) == pytest.approx(result.sparsity)
    assert result.finished
    assert result.monotone
    assert result.beyond == ()
    assert sorted(seen) == list(result.curve)
    assert seen[0] == (0.0, 0.0, 1.0, True)
    # A bisection, the end, two checks, and the dense weights.
    assert result.evaluations <= np.ceil(np.log2(1 / tolerance)) + 4
    assert result.score == 1.0
    assert result.report.total.pruned_params == round(result.sparsity * 2000)


def test_the_result_is_what_prune_makes() -> None:
    weights = network.weights()
    config = PruningConfig(scope="global", exclude=("version",), overrides={"out.weight": 0.25})
    result = find_smallest(weights, network.accuracy, 0.7, config=config)
    target = next(probe.target for probe in result.curve if probe.sparsity == result.sparsity)
    expected = prune(weights, config, target_sparsity=target)
    assert result.masks == expected.masks
    assert all(np.array_equal(result.weights[name], expected.weights[name]) for name in weights)
    assert result.score == network.accuracy(expected.weights) >= 0.7
    assert result.report == expected.report
    assert 0 < result.sparsity < 1
    assert all(np.array_equal(weights[name], array) for name, array in network.weights().items())


def test_evaluations_are_bounded() -> None:
    calls = 0

    def count(weights: Arrays) -> float:
        nonlocal calls
        calls += 1
        return 1 - gone(weights)

    for bound in (1, 2, 3, 5, 8, 40):
        calls = 0
        result = find_smallest(WEIGHTS, count, 0.41, max_evaluations=bound)
        assert calls == result.evaluations <= bound
        assert result.finished == (bound == 40)
        assert result.score >= 0.41
        assert ("the limit was reached" in str(result)) == (not result.finished)
    assert result.sparsity == pytest.approx(0.59, abs=0.01)


def test_scores_that_rise_again_are_reported_and_not_trusted() -> None:
    # Fails from 0.2 to 0.3 only: bisection starts at 0.5 and does not see it, a check does.
    dip = scored(lambda s: 1.0 - (0.2 < s < 0.3))
    trusting = find_smallest(WEIGHTS, dip, 0.5, checks=0)
    assert trusting.sparsity == 1.0
    assert trusting.monotone
    result = find_smallest(WEIGHTS, dip, 0.5)
    assert 0.19 <= result.sparsity <= 0.2
    assert not result.monotone
    assert {probe.target for probe in result.beyond} >= {0.5, 1.0}
    assert all(probe.passed for probe in result.curve if probe.target <= result.sparsity)
    assert gone(result.weights) == pytest.approx(result.sparsity)
    assert "not trusted" in str(result)


def test_every_probe_at_or_below_the_result_passed() -> None:
    for seed in range(30):
        noise = np.random.default_rng(seed).random(2001)
        result = find_smallest(
            WEIGHTS,
            scored(lambda s, noise=noise: float(1 - s + noise[round(2000 * s)] / 2)),  # type: ignore[misc]
            0.7,
            checks=seed % 4,
        )
        below = [probe.passed for probe in result.curve if probe.sparsity <= result.sparsity]
        assert all(below)
        assert result.monotone == (
            [p.score for p in result.curve] == sorted((p.score for p in result.curve), reverse=True)
        )
        assert [probe.target for probe in result.curve] == sorted({probe.target for probe in result.curve})


# Recovery


def test_recovery_is_masked_and_its_weights_are_returned() -> None:
    calls: list[float] = []

    def recover(weights: Arrays, masks: Masks) -> Arrays:
        calls.append(gone(weights))
        assert all(np.array_equal(masks[name].to_array(), array != 0) for name, array in weights.items())
        return {name: np.full_like(array, gone(weights)) for name, array in weights.items()}

    def evaluate(weights: Arrays) -> float:
        kept = weights["a"][weights["a"] != 0]
        return 1.0 if kept.size and 0.05 < kept[0] < 0.6 else float(kept.size == 1000)

    result = find_smallest(WEIGHTS, evaluate, 0.5, recover_fn=recover)
    assert result.sparsity == pytest.approx(0.6, abs=0.01)
    assert len(calls) == result.evaluations - 1
    for name, mask in result.masks.items():
        kept = result.weights[name][mask.to_array()]
        assert np.all(kept == kept[0])
        assert kept[0] == pytest.approx(result.sparsity)
        assert not result.weights[name][~mask.to_array()].any()


def test_recovery_in_place_and_its_errors() -> None:
    def in_place(weights: Arrays, masks: Masks) -> None:
        weights["a"] += 1

    result = find_smallest(WEIGHTS, scored(lambda s: 1 - s), 0.5, recover_fn=in_place)
    kept = result.masks["a"].to_array()
    assert np.array_equal(result.weights["a"][kept], WEIGHTS["a"][kept] + 1)
    for returned, kind, message in [
        ({"c": 1}, ValueError, r"recover_fn: expected only the tensors .*; got \['c'\]"),
        ({"a": np.zeros(3)}, ValueError, r"tensor 'a': expected .*; got \(3,\)"),
        ({"a": np.full((40, 25), np.nan)}, ValueError, "recover_fn at sparsity 0.5: tensor 'a': .* got NaN"),
        (3, TypeError, "recover_fn: expected a mapping"),
    ]:
        with pytest.raises(kind, match=message):
            find_smallest(WEIGHTS, lambda _: 1.0, 0.5, recover_fn=lambda *_, r=returned: r)


def test_the_safe_side_still_has_its_recovered_weights() -> None:
    result = find_smallest(
        WEIGHTS,
        scored(lambda s: 1.0 - (0.3 < s < 0.45)),
        0.5,
        recover_fn=lambda weights, _: {name: array * 2 for name, array in weights.items()},
        checks=4,
    )
    assert result.sparsity <= 0.3
    assert result.beyond
    for name, mask in result.masks.items():
        assert np.array_equal(result.weights[name], mask.apply(2 * WEIGHTS[name]))


# Allocation


def test_by_sensitivity() -> None:
    weights = network.weights()
    config = PruningConfig(exclude=("in.weight",))
    report = sensitivity(weights, network.accuracy, (0.3, 0.6, 0.9), config=config)
    result = find_smallest(weights, network.accuracy, 0.6, config=config, allocation=report)
    assert result.max_sparsity == report.max_sparsity == pytest.approx(0.9, abs=0.01)
    target = next(probe.target for probe in result.curve if probe.sparsity == result.sparsity)
    assert {name: mask.sparsity for name, mask in result.masks.items()} == pytest.approx(
        report.allocate(target)
    )
    assert result.sparsity == pytest.approx(target, abs=1 / 168)
    with pytest.raises(ValueError, match=r"got one for 'mid\.weight', which the configuration does"):
        find_smallest(
            weights,
            network.accuracy,
            0.6,
            config=PruningConfig(exclude=("*.weight",), overrides={"in.bias": 0.5}),
            allocation=report,
        )


def test_by_a_function_and_by_name() -> None:
    weights = {"a[0]": WEIGHTS["a"], "b": WEIGHTS["b"], "c": WEIGHTS["a"].copy()}
    result = find_smallest(
        weights,
        lambda _: 1.0,
        0.5,
        config=PruningConfig(overrides={"c": (0.5, Slices(0))}),
        allocation=lambda total: {"a[0]": total / 2},
    )
    assert {name: mask.sparsity for name, mask in result.masks.items()} == {"a[0]": 0.5, "b": 0.0, "c": 0.5}
    assert find_smallest(WEIGHTS, lambda _: 1.0, 0.5, allocation="uniform").sparsity == 1.0
    with pytest.raises(ValueError, match="allocation: expected"):
        find_smallest(WEIGHTS, lambda _: 1.0, 0.5, allocation="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="allocation of 'b': expected a number from 0"):
        find_smallest(WEIGHTS, lambda _: 1.0, 0.5, allocation=lambda total: {"b": 2 * total + 1})


@pytest.mark.parametrize("allocation", ["erk", "lamp", "global"])
def test_what_the_configuration_takes(allocation: Any) -> None:
    weights = network.weights()
    del weights["version"]
    result = find_smallest(weights, network.accuracy, 0.6, allocation=allocation)
    target = next(probe.target for probe in result.curve if probe.sparsity == result.sparsity)
    assert result.masks == prune(weights, target_sparsity=target, allocation=allocation).masks
    assert 0 < result.sparsity < 1
    with pytest.raises(ValueError, match="allocation: expected a rule that divides any total; got fixed"):
        find_smallest(weights, network.accuracy, 0.6, allocation={"in.*": 0.25})


def test_an_end_below_one_is_tried_last() -> None:
    report = sensitivity(WEIGHTS, lambda _: 1.0, (0.8,))
    result = find_smallest(WEIGHTS, lambda _: 1.0, 0.5, allocation=report)
    assert result.sparsity == result.max_sparsity == 0.8
    assert result.monotone


# What is wrong


def test_dense_weights_that_miss_the_score() -> None:
    with pytest.raises(ValueError, match=r"min_score: expected at most 0.4, .* got 0.5"):
        find_smallest(WEIGHTS, lambda _: 0.4, 0.5)


def test_only_the_dense_weights_pass() -> None:
    config = PruningConfig(overrides={"b": 0.5})
    result = find_smallest(WEIGHTS, scored(lambda s: float(s == 0)), 0.5, config=config)
    assert result.sparsity == 0.0
    assert all(np.array_equal(result.weights[name], array) for name, array in WEIGHTS.items())
    assert all(mask.count == 1000 for mask in result.masks.values())
    assert result.report.total.pruned_params == 0
    assert {layer.pattern for layer in result.report.layers} == {"dense"}


def test_arguments() -> None:
    cases: list[tuple[type[Exception], dict[str, Any], str]] = [
        (TypeError, {"weights": WEIGHTS["a"]}, "weights: expected a mapping"),
        (ValueError, {"min_score": float("nan")}, "min_score: expected a number"),
        (ValueError, {"min_score": True}, "min_score: expected a number"),
        (ValueError, {"tolerance": 0}, "tolerance: expected a number above 0"),
        (ValueError, {"max_evaluations": 0}, "max_evaluations: expected an integer of at least 1"),
        (ValueError, {"checks": -1}, "checks: expected an integer of at least 0"),
        (ValueError, {"config": PruningConfig(pattern=NM(2, 4))}, "got 2:4, which has only 0.5"),
        (
            ValueError,
            {"eval_fn": lambda _: float("nan")},
            "the dense weights: expected a score from eval_fn; got NaN",
        ),
        (
            ValueError,
            {"eval_fn": scored(lambda s: float("nan") if s else 1.0)},
            "sparsity 0.5: expected a score from eval_fn; got NaN",
        ),
        (
            TypeError,
            {"allocation": lambda _: None},
            "allocation: expected a function that returns .* got None",
        ),
        (TypeError, {"eval_fn": lambda _: None}, "eval_fn: expected a number; got None"),
    ]
    for kind, changes, message in cases:
        with pytest.raises(kind, match=message):
            find_smallest(**{"weights": WEIGHTS, "eval_fn": lambda _: 1.0, "min_score": 0.5, **changes})


def test_plain_data() -> None:
    result = find_smallest(WEIGHTS, scored(lambda s: 1 - s), 0.5)
    content = result.to_dict()
    assert content["sparsity"] == result.sparsity
    assert content["curve"][0] == {"target": 0.0, "sparsity": 0.0, "score": 1.0, "passed": True}
    assert content["report"]["total"]["pruned_params"] == round(2000 * result.sparsity)
    low = find_smallest(WEIGHTS, scored(lambda s: -np.inf if s > 0.5 else 1.0), 0.5).to_dict()
    assert low["curve"][-1]["score"] == "-inf"
    assert "Infinity" not in json.dumps(low)
    assert str(result).startswith(
        "50.00 % of the weights pruned: score 0.5, dense 1, required 0.5".replace(" %", "%")
    )
