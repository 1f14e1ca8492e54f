"""A SensitivityReport as the `allocation` of a configuration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sparsam
from sparsam.analysis.sweep import SensitivityReport
from sparsam.patterns import Block, Slices, Tied, Unstructured
from sparsam.training.iterative import IterativePruner

SHAPES = {"a": (8, 10), "b": (6, 8), "c": (4, 6), "bias": (8,)}


def weights() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def score(arrays: dict[str, Any]) -> float:
    return -sum(
        float(((arrays[name] - array) ** 2).sum()) * i for i, (name, array) in enumerate(weights().items(), 1)
    )


def sweep(**options: Any) -> SensitivityReport:
    return sparsam.sensitivity(weights(), score, [0.3, 0.6, 0.9], **options)


@pytest.mark.parametrize("target", [0.0, 0.2, 0.5, 0.8])
def test_of_weights_it_is_what_allocate_returns(target: float) -> None:
    report = sweep()
    shares = report.allocate(target)
    assert sparsam.allocate(weights(), target, report) == pytest.approx(shares)
    masks = sparsam.prune(weights(), target_sparsity=target, allocation=report).masks
    by_dict = sparsam.prune(weights(), target_sparsity=target, allocation=shares).masks
    by_overrides = sparsam.prune(weights(), overrides=shares).masks
    assert masks == by_dict == by_overrides
    assert sum(mask.size - mask.count for mask in masks.values()) == round(target * 152)


@pytest.mark.parametrize(
    ("pattern", "groups"),
    [
        (Slices(0), {"a": 8, "b": 6, "c": 4}),
        (Slices(1, 2), {"a": 5, "b": 4, "c": 3}),
        (Block(3, 4), {"a": 9, "b": 4, "c": 4}),
    ],
)
@pytest.mark.parametrize("transposed", [(), "a"])
def test_of_groups_the_total_is_exact(pattern: Any, groups: dict[str, int], transposed: Any) -> None:
    given = {**weights(), "a": weights()["a"].T.copy()} if transposed else weights()
    shares = sparsam.allocate(given, 0.5, sweep(), pattern=pattern, transposed=transposed)
    counts = {name: share * groups[name] for name, share in shares.items()}
    assert counts == pytest.approx({name: round(count) for name, count in counts.items()})
    assert round(sum(counts.values())) == round(0.5 * sum(groups.values()))
    masks = sparsam.prune(given, allocation=sweep(), pattern=pattern, transposed=transposed).masks
    assert {name: mask.sparsity for name, mask in masks.items()} == pytest.approx(
        {
            name: share if isinstance(pattern, Slices) else masks[name].sparsity
            for name, share in shares.items()
        }
    )


def test_groups_and_ties() -> None:
    report = sweep(groups={"ab": ["a", "b"], "c": "c"})
    masks = sparsam.prune(weights(), allocation=report).masks
    assert masks["a"].sparsity == pytest.approx(masks["b"].sparsity, abs=1 / 48)
    tie = Tied({"a": Slices(0), "bias": Slices(0), "b": Slices(1)})
    report = sparsam.sensitivity(weights(), score, [0.5], config=sparsam.PruningConfig(ties=tie))
    masks = sparsam.prune(weights(), target_sparsity=0.25, ties=tie, allocation=report).masks
    assert masks["c"].sparsity == 0.25
    assert masks["a"].sparsity == 0.25


def test_in_steps_and_in_searches() -> None:
    report = sweep()
    result = IterativePruner(0.2, 0.6, 3, config=sparsam.PruningConfig(allocation=report)).run(
        weights(), score
    )
    assert [row.sparsity for row in result.history] == pytest.approx([0.2, 0.4, 0.6], abs=1 / 152)
    found = sparsam.find_smallest(weights(), score, -50.0, config=sparsam.PruningConfig(allocation=report))
    assert found.sparsity > 0


def test_what_does_not_fit() -> None:
    report = sweep()
    other = {**weights(), "d": np.ones((2, 2))}
    with pytest.raises(
        ValueError, match=r"allocation: tensor 'd': expected a sensitivity curve .*; got none; excl"
    ):
        sparsam.prune(other, allocation=report)
    sparsam.prune(other, allocation=report, exclude="d")
    with pytest.raises(
        ValueError, match=r"tensor 'c': expected a sensitivity curve of its 4 .*; got one of 24"
    ):
        sparsam.allocate({"c": np.ones((2, 2))}, 0.5, report)
    group = sweep(groups={"ab": ["a", "b"], "c": "c"})
    with pytest.raises(
        ValueError, match=r"all tensors of the group 'ab' to be pruned; got 'b' outside the total"
    ):
        sparsam.prune(weights(), allocation=group, exclude="b")
    with pytest.raises(ValueError, match=r"target: expected at most 0\.9"):
        sparsam.prune(weights(), allocation=report, target_sparsity=0.95)
    with pytest.raises(ValueError, match="'uniform' with scope 'global'"):
        sparsam.prune(weights(), allocation=report, scope="global")


def test_empty_tensors_have_no_say() -> None:
    empty = {"t0": np.ones((4, 4)), "t1": np.ones((0, 4))}
    report = SensitivityReport.from_json(
        sparsam.sensitivity({"t0": empty["t0"]}, lambda _: 1.0, [0.5]).to_json()
    )
    for method in (
        {"t0": 0.5},
        {"t0": 0.5, "t1": 0.25},
        {"t1": 0.25},
        "erk",
        "lamp",
        "global",
        "uniform",
        report,
    ):
        shares = sparsam.allocate(empty, 0.5, method)
        assert shares["t0"] == 0.5
        assert 0 <= shares["t1"] <= 1
        assert sparsam.prune(empty, allocation=method).masks["t0"].count == 8
    for method in ({"t1": 0.25}, {"t1": 0.0}, "erk", "lamp", "global", "uniform"):
        assert list(sparsam.allocate({"t1": empty["t1"]}, 0.5, method)) == ["t1"]  # type: ignore[arg-type]
    assert sparsam.allocate({}, 0.5) == {}
    assert sparsam.allocate({"t0": empty["t0"]}, 0.5, pattern=Unstructured()) == {"t0": 0.5}
