from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import network
from sparsam.analysis.lottery import find_ticket
from sparsam.config import PruningConfig, Scope
from sparsam.patterns import NM, Block, Slices, Tied
from sparsam.training.callbacks import Arrays, Masks

RNG = np.random.default_rng(5)
INIT: dict[str, NDArray[Any]] = {
    "a": RNG.standard_normal((20, 15)).astype(np.float32),
    "b": RNG.standard_normal((7, 11)),
    "b.bias": RNG.standard_normal(7),
    "steps": np.arange(3),
}


class Training:
    """A train_fn that adds a fixed direction, and remembers what it was given."""

    def __init__(self) -> None:
        rng = np.random.default_rng(9)
        self.step: dict[str, NDArray[np.float64]] = {
            name: rng.standard_normal(array.shape) for name, array in INIT.items() if name != "steps"
        }
        self.calls: list[tuple[Arrays, Masks, int]] = []

    def __call__(self, weights: Arrays, masks: Masks, seed: int) -> Mapping[str, Any]:
        self.calls.append(({name: array.copy() for name, array in weights.items()}, dict(masks), seed))
        return {name: weights[name] + step for name, step in self.step.items() if name in weights}


def smallest(array: NDArray[Any], keep: NDArray[np.bool_], k: int) -> NDArray[np.bool_]:
    """The kept entries less the k smallest magnitudes among them, of equals the later ones."""
    flat, kept = np.abs(array.astype(np.float64)).ravel(), keep.ravel().copy()
    alive = sorted(np.flatnonzero(kept), key=lambda i: (flat[i], -i))
    kept[alive[:k]] = False
    return np.reshape(kept, keep.shape)


@pytest.mark.parametrize("rewound", [False, True])
def test_rounds_against_a_slow_reference(rewound: bool) -> None:
    training = Training()
    early = {name: array * 3 for name, array in INIT.items()} if rewound else None
    start = early or INIT
    result = find_ticket(
        INIT,
        training,
        lambda w: float(np.abs(w["a"]).sum()),
        rounds=4,
        rewind=early,
        config=PruningConfig(overrides={"b": 0.1}, exclude=("steps",)),
        controls=(),
    )
    fractions = {"a": 0.2, "b": 0.1}
    keep = {name: np.ones(INIT[name].shape, np.bool_) for name in fractions}
    weights = {name: (INIT[name] + training.step[name]).astype(INIT[name].dtype) for name in fractions}
    left = {name: INIT[name].size for name in fractions}
    assert len(training.calls) == 5
    for round_ in range(1, 5):
        for name, fraction in fractions.items():
            k = round(fraction * left[name])
            keep[name] = smallest(weights[name], keep[name], k)
            left[name] -= k
            expected = np.where(keep[name], start[name], 0)
            weights[name] = ((expected + training.step[name]) * keep[name]).astype(INIT[name].dtype)
            given, masks, seed = training.calls[round_]
            assert np.array_equal(masks[name].to_array(), keep[name])
            assert np.array_equal(given[name], expected)
            assert masks[name].count == left[name]
        assert np.array_equal(given["b.bias"], start["b.bias"])
        assert seed == 0
        row = result.rounds[round_]
        assert row.sparsity == (377 - sum(left.values())) / 377
        assert row.score == pytest.approx(np.abs(weights["a"]).sum())
    first, masks, _ = training.calls[0]
    assert all(np.array_equal(first[name], INIT[name]) for name in INIT)
    assert all(mask.count == mask.size for mask in masks.values())
    for name in fractions:
        assert np.array_equal(result.masks[name].to_array(), keep[name])
        assert np.array_equal(result.weights[name], np.where(keep[name], start[name], 0))
        assert np.array_equal(result.trained[name], weights[name])
        assert result.trained[name].dtype == INIT[name].dtype
    assert result.report.total.pruned_params == 377 - sum(left.values())
    assert result.dense_score == result.rounds[0].score
    assert not result.won


def test_global_scope_shares_the_count() -> None:
    training = Training()
    result = find_ticket(
        INIT,
        training,
        lambda _: 1.0,
        rounds=2,
        fraction=0.5,
        config=PruningConfig(scope="global"),
        controls=(),
    )
    assert [row.sparsity for row in result.rounds] == [0.0, 188 / 377, (188 + round(0.5 * 189)) / 377]
    trained = np.concatenate(
        [np.abs((INIT[name] + training.step[name]).astype(INIT[name].dtype)).ravel() for name in ("a", "b")]
    )
    first = np.concatenate([training.calls[1][1][name].to_array().ravel() for name in ("a", "b")])
    assert trained[first].min() >= trained[~first].max()


@pytest.mark.parametrize("pattern", [Slices(0), Slices(1), Block(3, 4), Slices(-1, 1)])
def test_patterns_and_their_random_masks(pattern: Any) -> None:
    training = Training()
    weights = {"a": INIT["a"], "b": INIT["b"]}
    training.step = {name: training.step[name] for name in weights}
    find_ticket(
        weights,
        training,
        lambda _: 1.0,
        rounds=3,
        config=PruningConfig(pattern=pattern),
        controls=["random mask"],
    )
    ticket, drawn = training.calls[-2][1], training.calls[-1][1]
    for name in weights:
        ours, theirs = ticket[name].to_array(), drawn[name].to_array()
        groups = count_groups(ours, pattern)
        assert count_groups(theirs, pattern) == groups
        n = groups[1]
        k = 0
        for _ in range(3):
            k += round(0.2 * (n - k))
        assert groups[0] == k > 0


def count_groups(keep: NDArray[np.bool_], pattern: Any) -> tuple[int, int]:
    """How many groups are pruned, of how many; each must be of one kind."""
    if isinstance(pattern, Slices):
        moved = np.moveaxis(keep, pattern.axis, 0)
        groups = [moved[i : i + pattern.size] for i in range(0, len(moved), pattern.size)]
    else:
        rows, cols = keep.shape
        groups = [
            keep[i : i + pattern.rows, j : j + pattern.cols]
            for i in range(0, rows, pattern.rows)
            for j in range(0, cols, pattern.cols)
        ]
    assert all(group.all() or not group.any() for group in groups)
    return sum(not group.any() for group in groups), len(groups)


def test_rows_and_allocations() -> None:
    result = find_ticket(
        {"a": INIT["a"]}, Training(), lambda _: 1.0, rounds=2, config=PruningConfig(scope="row"), controls=()
    )
    # 300 weights: 60, then 48 more; of each row of 15 the nearest to 108 / 300.
    assert {int(n) for n in result.masks["a"].to_array().sum(axis=1)} == {15 - round(15 * 0.36)}
    with pytest.raises(ValueError, match=r"expected 'uniform', since .*; got 'erk'"):
        find_ticket(INIT, Training(), lambda _: 1.0, config=PruningConfig(allocation="erk"))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_ties_and_their_random_masks(scope: Scope) -> None:
    """Whole neurons of three layers; the middle one loses rows and columns."""
    rng = np.random.default_rng(2)
    weights = {
        "a": rng.standard_normal((20, 6)),
        "b": rng.standard_normal((10, 20)),
        "c": rng.standard_normal((3, 10)),
    }
    ties = (Tied({"a": Slices(0), "b": Slices(1)}), Tied({"b": Slices(0), "c": Slices(1)}))
    seen: list[Masks] = []

    def train(_: Arrays, masks: Masks, seed: int) -> None:
        seen.append(masks)

    result = find_ticket(
        weights,
        train,
        lambda _: 1.0,
        rounds=2,
        fraction=0.3,
        config=PruningConfig(ties=ties, scope=scope),
        controls="random mask",
    )
    counts = []
    for masks in (result.masks, seen[-1]):
        a, b, c = (masks[name].to_array() for name in "abc")
        first, second = np.asarray(a.any(axis=1)), np.asarray(c.any(axis=0))
        assert np.array_equal(a, np.broadcast_to(first[:, None], a.shape))
        assert np.array_equal(b, np.outer(second, first))
        assert np.array_equal(c, np.broadcast_to(second, c.shape))
        counts.append((int(first.sum()), int(second.sum())))
    assert counts[0] == counts[1]
    # 20 - 6 - 4 and 10 - 3 - 2; together 30 - 9 - 6.
    assert sum(counts[0]) == 15
    assert scope == "global" or counts[0] == (10, 5)
    assert seen[-1] != result.masks


def test_controls() -> None:
    training = Training()
    early = {name: array * 3 for name, array in INIT.items()}
    result = find_ticket(INIT, training, lambda _: 1.0, rounds=2, rewind=early, seeds=(3, 1, 4))
    # Dense, two rounds, the ticket with two more seeds, and two controls for each of three seeds.
    assert [seed for *_, seed in training.calls] == [3, 3, 3, 1, 4, 3, 3, 1, 1, 4, 4]
    ticket = result.masks
    draws = []
    for place, (weights, masks, _) in enumerate(training.calls[5:]):
        for name in ("a", "b"):
            keep = masks[name].to_array()
            assert masks[name].count == ticket[name].count
            if place % 2:
                assert masks[name] != ticket[name]
                assert np.array_equal(weights[name], np.where(keep, early[name], 0))
                draws.append(keep.tobytes())
            else:
                assert masks[name] == ticket[name]
                values = set(INIT[name].ravel().tolist()) | {0}
                assert set(weights[name].ravel().tolist()) <= values
                assert not np.array_equal(weights[name], np.where(keep, INIT[name], 0))
                draws.append(weights[name].tobytes())
        assert np.array_equal(weights["steps"], (early if place % 2 else INIT)["steps"])
    assert len(set(draws)) == len(draws)
    # The same seeds draw the same again.
    again = Training()
    find_ticket(INIT, again, lambda _: 1.0, rounds=2, rewind=early, seeds=(3, 1, 4))
    for (weights, masks, _), (weights_again, masks_again, _) in zip(training.calls, again.calls, strict=True):
        assert masks == masks_again
        assert all(np.array_equal(array, weights_again[name]) for name, array in weights.items())


def test_weights_drawn_anew_by_the_caller() -> None:
    training = Training()
    find_ticket(
        INIT,
        training,
        lambda _: 1.0,
        rounds=1,
        controls="reinitialised",
        reinit_fn=lambda seed: {name: np.full(array.shape, seed + 7) for name, array in INIT.items()},
        seeds=(2,),
    )
    weights, masks, _ = training.calls[-1]
    assert np.array_equal(weights["a"], np.where(masks["a"].to_array(), 9, 0))
    assert weights["a"].dtype == np.float32


def test_won_and_margins() -> None:
    scores = iter([0.9, 0.91, 0.92, 0.93, 0.6, 0.8, 0.7, 0.92])
    seen: list[Any] = []
    result = find_ticket(
        INIT,
        Training(),
        lambda _: next(scores),
        rounds=2,
        seeds=(0, 1),
        callback=lambda *values: seen.append(values[:2]),
    )
    assert result.ticket_scores == (0.92, 0.93)
    assert result.control_scores == {"reinitialised": (0.6, 0.7), "random mask": (0.8, 0.92)}
    assert result.margins["reinitialised"] == pytest.approx((0.32, 0.23))
    assert result.margins["random mask"] == pytest.approx((0.12, 0.01))
    assert result.won
    assert result.matches_dense
    assert seen == [
        ("dense", 0),
        ("ticket", 0),
        ("ticket", 0),
        ("ticket", 1),
        ("reinitialised", 0),
        ("random mask", 0),
        ("reinitialised", 1),
        ("random mask", 1),
    ]
    text = str(result)
    assert "random mask          0.86  +0.01 to +0.12" in text
    assert text.endswith(
        "The ticket beat every control with every seed.\n"
        "It scores at least as much as the dense network (0.9)."
    )
    content = result.to_dict()
    assert content["won"] is True
    assert content["rounds"][2] == {"round": 2, "sparsity": result.sparsity, "score": 0.92}
    tie = find_ticket(INIT, Training(), lambda _: 0.5, rounds=1)
    assert not tie.won
    assert "did not beat every control" in str(tie)


def test_a_ticket_wins_where_the_start_matters() -> None:
    """Gradient descent on a diagonal linear problem: what is large at the end was large at the start."""
    rng = np.random.default_rng(0)
    init = {"w": rng.standard_normal((10, 40))}
    target = np.where(np.abs(init["w"]) > 1, init["w"] * 1.5, 0)

    def train(weights: Arrays, masks: Masks, seed: int) -> Arrays:
        w = weights["w"]
        for _ in range(20):
            w = w - 0.05 * (w - target) * masks["w"].to_array()
        return {"w": w}

    result = find_ticket(
        init, train, lambda w: -float(np.square(w["w"] - target).sum()), rounds=3, seeds=(0, 1)
    )
    assert result.won
    assert result.sparsity == pytest.approx(1 - 0.8**3, abs=0.01)


def test_inputs_are_not_modified_and_dtypes_stay() -> None:
    init = {
        "h": np.ones((4, 4), np.float16) * np.arange(1, 5, dtype=np.float16),
        "f": RNG.standard_normal((4, 6)).astype(ml_dtypes.bfloat16),
    }
    before = {name: array.copy() for name, array in init.items()}

    def in_place(weights: Arrays, masks: Masks, seed: int) -> None:
        for array in weights.values():
            np.add(array, 1, out=array)

    result = find_ticket(init, in_place, lambda _: 1.0, rounds=2)
    assert all(np.array_equal(init[name], array) for name, array in before.items())
    assert {name: array.dtype for name, array in result.trained.items()} == {
        name: array.dtype for name, array in init.items()
    }
    for name, mask in result.masks.items():
        assert not result.trained[name][~mask.to_array()].astype(np.float64).any()


def test_arguments() -> None:
    good: dict[str, Any] = {"init_weights": INIT, "train_fn": lambda *_: None, "eval_fn": lambda _: 1.0}
    cases: list[tuple[type[Exception], dict[str, Any], str]] = [
        (TypeError, {"init_weights": INIT["a"]}, "init_weights: expected a mapping"),
        (ValueError, {"rounds": 0}, "rounds: expected an integer of at least 1"),
        (ValueError, {"fraction": 1.1}, "fraction: expected a number from 0"),
        (ValueError, {"seeds": ()}, "seeds: expected at least one"),
        (ValueError, {"seeds": 3}, "seeds: expected at least one"),
        (ValueError, {"seeds": (-1,)}, "seeds: expected at least one integer of at least 0"),
        (ValueError, {"controls": ["luck"]}, "controls: expected some of 'reinitialised', 'random mask'"),
        (ValueError, {"config": PruningConfig(pattern=NM(2, 4))}, "got 2:4, which has one sparsity"),
        (ValueError, {"config": PruningConfig(overrides={"b": NM(1, 11)})}, "tensor 'b': .*; got 1:11"),
        (ValueError, {"config": PruningConfig(exclude="*")}, "expected tensors to prune"),
        (ValueError, {"rewind": {"a": INIT["a"]}}, r"rewind: expected the tensors \['a', 'b'"),
        (TypeError, {"rewind": 3}, "rewind: expected a mapping"),
        (ValueError, {"rewind": {**INIT, "a": np.zeros(3)}}, r"rewind: tensor 'a': expected .*; got \(3,\)"),
        (ValueError, {"reinit_fn": lambda _: {}}, "reinit_fn: expected the tensors"),
        (ValueError, {"train_fn": lambda *_: {"c": 1}}, "train_fn: expected only the tensors"),
        (
            ValueError,
            {"train_fn": lambda w, *_: {"a": w["a"] * np.nan}},
            r"train_fn \(dense, seed 0\): tensor 'a': expected numbers to rank; got NaN",
        ),
        (
            ValueError,
            {"eval_fn": lambda _: float("nan")},
            "dense, seed 0: expected a score from eval_fn; got NaN",
        ),
        (TypeError, {"eval_fn": lambda _: "x"}, "eval_fn: expected a number"),
    ]
    for kind, changes, message in cases:
        with pytest.raises(kind, match=message):
            find_ticket(**{**good, **changes})


def test_the_shared_network() -> None:
    """It trains nothing, but every dtype and the integers go through."""
    result = find_ticket(network.weights(), lambda *_: None, network.accuracy, rounds=3)
    assert result.dense_score == 1.0
    assert 0 < result.ticket_scores[0] < 1
