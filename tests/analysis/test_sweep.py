from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import network
from sparsam.analysis.search import find_smallest
from sparsam.analysis.sweep import EvaluationError, SensitivityPoint, sensitivity
from sparsam.config import PruningConfig
from sparsam.patterns import NM, Slices, Tied, Unstructured
from sparsam.pruner import prune
from sparsam.training.callbacks import Arrays
from sweeps import GRID, MATRICES, TENTHS, Counting, by_hand


def test_each_tensor_alone_against_a_slow_reference() -> None:
    weights = network.weights()
    eval_fn = Counting()
    report = sensitivity(weights, eval_fn, GRID)
    assert report.dense_score == 1.0
    assert tuple(curve.name for curve in report.curves) == MATRICES
    for curve in report.curves:
        size = weights[curve.name].size
        assert curve.tensors == ((curve.name, size),)
        assert curve.points == tuple(
            SensitivityPoint(
                curve.name, s, round(s * size), network.accuracy(by_hand(weights, curve.name, s))
            )
            for s in GRID
        )
    assert eval_fn.calls == report.evaluations == 1 + 3 * len(GRID)
    assert eval_fn.dense == 1
    assert all(np.array_equal(array, network.weights()[name]) for name, array in weights.items())


def test_sparsities_are_sorted_and_zero_is_the_dense_score() -> None:
    eval_fn = Counting()
    report = sensitivity(network.weights(), eval_fn, (0.5, 0, 0.25, 0.5))
    assert report.sparsities == (0.25, 0.5)
    assert (eval_fn.calls, eval_fn.dense) == (7, 1)


def test_the_configuration_says_which_tensors_and_how() -> None:
    weights = network.weights()
    config = PruningConfig(
        0.9,
        pattern=Slices(0),
        exclude=("out.*",),
        overrides={"in.bias": 0.1, "mid.weight": (0.3, Slices(1))},
        schedule=[0.5, 0.9],
    )
    report = sensitivity(weights, network.accuracy, (0.25, 0.5), config=config)
    assert [curve.name for curve in report.curves] == ["in.weight", "in.bias", "mid.weight"]
    rows, bias, columns = report.curves
    order = np.argsort(np.abs(weights["mid.weight"]).sum(axis=0), kind="stable")
    pruned = weights["mid.weight"].copy()
    pruned[:, order[:8]] = 0
    assert columns.points[1] == ("mid.weight", 0.5, 64, network.accuracy({**weights, "mid.weight": pruned}))
    assert [point.pruned for point in rows.points] == [48, 96]
    assert [point.pruned for point in bias.points] == [4, 8]


def test_rows() -> None:
    weights = network.weights()
    config = PruningConfig(scope="row", allocation="erk", exclude=("version",))
    report = sensitivity(weights, network.accuracy, (0.5,), config=config)
    assert [curve.points[0].pruned for curve in report.curves] == [16 * 6, 8 * 8, 5 * 4]
    rows = prune({"mid.weight": weights["mid.weight"]}, scope="row").weights
    assert report.curves[1].points[0].score == network.accuracy({**weights, **rows})


def test_nm_has_one_sparsity() -> None:
    weights = {name: array for name, array in network.weights().items() if name != "version"}
    config = PruningConfig(pattern=NM(2, 4), overrides={"mid.weight": NM(1, 4)})
    report = sensitivity(weights, network.accuracy, GRID, config=config)
    grids = {curve.name: [point.sparsity for point in curve.points] for curve in report.curves}
    assert grids == {"in.weight": [0.5], "mid.weight": [0.75], "out.weight": [0.5]}
    assert all(curve.all_or_nothing for curve in report.curves)
    # 192 * 0.5 is needed: in.weight has exactly that, and nothing can be given back.
    steps = report.allocate(96 / 360)
    assert set(steps.values()) <= {0.0, 0.5, 0.75}
    assert sum(s * weights[name].size for name, s in steps.items()) >= 96
    with pytest.raises(ValueError, match=r"groups\['all'\]: expected one N:M pattern for all tensors"):
        sensitivity(weights, network.accuracy, GRID, config=config, groups={"all": "*.weight"})


def test_groups_are_pruned_together() -> None:
    weights = network.weights()
    groups = {"ends": ["out.weight", "in.*"], "middle": "mid*"}
    report = sensitivity(weights, network.accuracy, (0.5,), groups=groups)
    ends, middle = report.curves
    assert ends.tensors == (("in.weight", 192), ("out.weight", 40))
    both = by_hand(by_hand(weights, "in.weight", 0.5), "out.weight", 0.5)
    assert ends.points == (("ends", 0.5, 116, network.accuracy(both)),)
    assert middle.params == 128
    pooled = sensitivity(
        weights, network.accuracy, (0.5,), groups=groups, config=PruningConfig(scope="global")
    )
    assert pooled.curves[0].points[0].pruned == 116
    assert pooled.curves[0] != ends
    allocated = report.allocate(0.4)
    assert list(allocated) == ["in.weight", "out.weight", "mid.weight"]
    assert sum(s * weights[name].size for name, s in allocated.items()) == pytest.approx(144, abs=1e-9)
    assert abs(allocated["in.weight"] - allocated["out.weight"]) <= 1 / 40


HEADS = (
    Tied({"q": Slices(0, 2), "o": Slices(1, 2)}),
    Tied({"fc1": Slices(0), "bias": Slices(0), "fc2": Slices(1)}),
)


def tied_network() -> Arrays:
    rng = np.random.default_rng(4)
    shapes = {"q": (8, 6), "o": (6, 8), "fc1": (10, 6), "bias": (10,), "fc2": (6, 10), "head": (4, 6)}
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 3)])
def test_ties_are_pruned_together(pattern: Any) -> None:
    weights = tied_network()
    config = PruningConfig(pattern=pattern, ties=HEADS)
    seen: list[Arrays] = []

    def remember(tensors: Arrays) -> float:
        seen.append({name: array.copy() for name, array in tensors.items()})
        return float(sum(np.count_nonzero(array) for array in tensors.values()))

    report = sensitivity(weights, remember, (0.5,), config=config)
    assert [curve.name for curve in report.curves] == ["head", "q + o", "fc1 + bias + fc2"]
    # One evaluation after another: the dense one, head, the heads, the neurons.
    _, head, heads, neurons = seen
    expected = prune(weights, target_sparsity=0.5, exclude=("head",), ties=HEADS).weights
    for name in weights:
        assert np.array_equal(heads[name], (expected if name in HEADS[0].members else weights)[name])
        assert np.array_equal(neurons[name], (expected if name in HEADS[1].members else weights)[name])
        assert (name == "head") == (not np.array_equal(head[name], weights[name]))
    assert [curve.points[0].pruned for curve in report.curves] == [
        8 if pattern != Unstructured() else 12,
        48,
        65,
    ]
    together = sensitivity(weights, remember, (0.5,), config=config, groups={"block": ["q", "o"]})
    assert together.curves[0].points[0].score == report.curves[1].points[0].score
    with pytest.raises(
        ValueError, match=r"groups\['a'\]: expected all or none of the tied \['q', 'o'\]; got \['q'\]"
    ):
        sensitivity(weights, remember, (0.5,), config=config, groups={"a": "q"})


def test_allocated_ties_are_pruned_as_allocated() -> None:
    weights = tied_network()
    config = PruningConfig(ties=HEADS)
    report = sensitivity(weights, _kept, config=config)
    shares = report.allocate(0.6)
    result = prune(weights, target_sparsity=0.0, ties=HEADS, overrides=shares)
    for curve, groups in zip(report.curves, (24, 4, 10), strict=True):
        pruned = sum(shares[name] * size for name, size in curve.tensors)
        name, size = curve.tensors[0]
        assert result.masks[name].count == size - round(pruned / curve.params * groups) * size // groups
    found = find_smallest(weights, _kept, 0.4, config=config, allocation=report)
    assert found.score >= 0.4
    assert 0.4 < found.sparsity < 0.7
    assert not found.weights["fc1"][found.weights["bias"] == 0].any()


def _kept(weights: Arrays) -> float:
    sizes = [(np.count_nonzero(array), array.size) for array in weights.values()]
    return float(sum(kept for kept, _ in sizes) / sum(size for _, size in sizes))


def test_a_tensor_in_two_ties_has_no_sparsity_of_its_own() -> None:
    weights = {"a": np.ones((4, 3)), "b": np.ones((4, 4)), "c": np.ones((2, 4))}
    ties = (Tied({"a": Slices(0), "b": Slices(1)}), Tied({"b": Slices(0), "c": Slices(1)}))
    report = sensitivity(weights, lambda _: 1.0, (0.5,), config=PruningConfig(ties=ties))
    assert [curve.points[0].pruned for curve in report.curves] == [14, 12]
    with pytest.raises(ValueError, match="curves: expected each tensor in one; got 'b' in two"):
        report.allocate(0.2)


# A budget


def _steps(weights: Arrays) -> float:
    """Falls steeply at 0.6 of mid.weight, gently along in.weight, and not at all with out.weight."""
    gone = {name: 1 - np.count_nonzero(weights[name]) / weights[name].size for name in MATRICES}
    return float(10 - 8 * (gone["mid.weight"] > 0.6) - gone["in.weight"])


def test_a_budget_goes_where_curves_bend() -> None:
    report = sensitivity(network.weights(), Counting(_steps), TENTHS, max_evaluations=10)
    assert report.evaluations == 10
    at = {curve.name: [point.sparsity for point in curve.points] for curve in report.curves}
    assert all(points[-1] == 0.9 for points in at.values())
    assert {0.6, 0.7} <= set(at["mid.weight"])
    assert at["out.weight"] == [0.9]


@pytest.mark.parametrize("budget", range(4, 30))
def test_a_budget_is_spent_exactly(budget: int) -> None:
    eval_fn = Counting()
    seen: list[tuple[int, int]] = []
    report = sensitivity(
        network.weights(),
        eval_fn,
        TENTHS,
        max_evaluations=budget,
        callback=lambda done, total, _: seen.append((done, total)),
    )
    assert eval_fn.calls == report.evaluations == min(budget, 28)
    assert seen == [(i, min(budget, 28)) for i in range(1, min(budget, 28) + 1)]
    full = sensitivity(network.weights(), network.accuracy, TENTHS)
    for curve, whole in zip(report.curves, full.curves, strict=True):
        assert set(curve.points) <= set(whole.points)


def test_too_small_a_budget() -> None:
    with pytest.raises(ValueError, match="max_evaluations: expected at least 4, the dense weights and each"):
        sensitivity(network.weights(), network.accuracy, max_evaluations=3)


# Errors


def test_scores_that_are_no_numbers() -> None:
    nan = EvaluationError, "'in.weight' at sparsity 0.5: ValueError: .*expected a score from eval_fn; got NaN"

    def sometimes(tensors: Arrays) -> float:
        return float("nan") if (tensors["in.weight"] == 0).any() else 1.0

    with pytest.raises(nan[0], match=nan[1]) as caught:
        sensitivity(network.weights(), sometimes, (0.5,))
    assert caught.value.report is not None
    assert caught.value.report.evaluations == 1
    with pytest.raises(EvaluationError, match=r".*expected a number; got 'good'") as caught:
        sensitivity(network.weights(), lambda _: "good", (0.5,))  # type: ignore[arg-type, return-value]
    assert caught.value.report is None
    with pytest.raises(EvaluationError, match="expected a finite score"):
        sensitivity(network.weights(), lambda _: float("-inf"), (0.5,))


def test_arguments() -> None:
    weights = network.weights()
    cases: list[tuple[type[Exception], dict[str, Any], str]] = [
        (ValueError, {"sparsities": ()}, "sparsities: expected a sequence with at least one above 0"),
        (ValueError, {"sparsities": 0.5}, "sparsities: expected a sequence with .* got 0.5"),
        (ValueError, {"groups": {}}, "groups: expected a mapping from groups to the names"),
        (ValueError, {"groups": ["in.weight"]}, "groups: expected a mapping from groups to the names"),
        (ValueError, {"groups": {"a": 3}}, r"groups\['a'\]: expected a name or pattern, or several; got 3"),
        (ValueError, {"sparsities": (1.5,)}, "sparsities: expected a number"),
        (ValueError, {"max_evaluations": 0}, "max_evaluations: expected an integer of at least 1"),
        (
            ValueError,
            {"groups": {"a": "in.weihgt"}},
            r"groups\['a'\]: expected .*; got 'in.weihgt', .* 'in.weight'",
        ),
        (ValueError, {"groups": {"a": "in.bias"}}, "that the configuration prunes; got 'in.bias'"),
        (ValueError, {"groups": {"a": ()}}, "expected at least one name or pattern"),
        (
            ValueError,
            {"groups": {"a": "*.weight", "b": "in.weight"}},
            "'in.weight' in one; got it in 'a' and in 'b'",
        ),
        (ValueError, {"config": PruningConfig(exclude="*")}, "expected tensors to prune"),
        (TypeError, {"config": 0.5}, "config: expected a PruningConfig"),
        (TypeError, {"weights": weights["in.weight"]}, "weights: expected a mapping .* got ndarray"),
        (ValueError, {"weights": {"": weights["in.weight"]}}, "names that are not empty"),
    ]
    for kind, changes, message in cases:
        with pytest.raises(kind, match=message):
            sensitivity(**{"weights": weights, "eval_fn": network.accuracy, **changes})
    with pytest.raises(
        EvaluationError,
        match=r"'a' at sparsity 0.3: ValueError: tensor 'a': expected numbers to rank; got NaN at index",
    ):
        sensitivity({"a": np.full((2, 2), np.nan)}, lambda _: 1.0)
