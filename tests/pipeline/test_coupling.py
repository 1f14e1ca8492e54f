"""Slices of several tensors that are pruned together: against an oracle that ranks groups one by one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import reference
from cases import CASES, make
from coupled_weights import MLP, SCORERS, SELF_ATTENTION, Arrays, block
from sparsam.config import PruningConfig, Scope, Scorer
from sparsam.masks import Mask
from sparsam.patterns import NM, Block, Pattern, Slices, Tied, Unstructured
from sparsam.pruner import prune
from sparsam.scores import Magnitude
from sparsam.training.iterative import IterativePruner

Rival = dict[str, Block | Slices]


SCOPES_OF_TIES: tuple[Scope, ...] = ("layer", "global")


def groups_of(x: NDArray[Any], pattern: Block | Slices) -> NDArray[np.int64]:
    return reference.labels(x, pattern)


def oracle(
    weights: Arrays, rivals: Sequence[tuple[Rival, Sequence[str]]], sparsity: float, method: Scorer
) -> dict[str, NDArray[np.bool_]]:
    """The rule as directly as possible: one list of groups, sorted by score; then the masks."""
    order = list(weights)
    ranked = sorted(rivals, key=lambda rival: min(order.index(name) for name in rival[0]))
    norm = method.norm if isinstance(method, Magnitude) else 1
    scores = []
    for members, scored in ranked:
        total: Any = 0.0
        size: Any = 0
        for name in scored:
            values = np.asarray(method.score(name, weights[name]))
            total = total + reference.group_scores(values, members[name], norm)
            size = size + np.bincount(groups_of(values, members[name]).reshape(-1))
        scores.append(total / size if len(ranked) > 1 else total)
    flat = np.concatenate(scores)
    keep = reference.prune_lowest(flat, round(sparsity * flat.size))
    ends = np.cumsum([len(s) for s in scores])[:-1]
    masks: dict[str, NDArray[np.bool_]] = {}
    for (members, _), kept in zip(ranked, np.split(keep, ends), strict=True):
        for name, pattern in members.items():
            mask = kept[groups_of(weights[name], pattern)]
            masks[name] = masks[name] & mask if name in masks else mask
    return masks


def rival(tied: Tied, weights: Arrays) -> tuple[Rival, Sequence[str]]:
    scored = tied.scored or [name for name in tied.members if weights[name].ndim > 1] or list(tied.members)
    return dict(tied.members), scored


def check(masks: dict[str, Mask], expected: dict[str, NDArray[np.bool_]]) -> None:
    for name, keep in expected.items():
        assert np.array_equal(masks[name].to_array(), keep), name


@pytest.mark.parametrize("method", SCORERS)
@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(2, 3), Slices(0)])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_layer_scope(method: Scorer, pattern: Pattern, sparsity: float) -> None:
    if isinstance(pattern, NM):
        sparsity = pattern.sparsity
    weights = block()
    config = PruningConfig(
        sparsity, method, pattern, exclude=["conv"] * isinstance(pattern, NM), ties=[MLP, SELF_ATTENTION]
    )
    result = prune(weights, config)
    for tied in config.ties:
        check(result.masks, oracle(weights, [rival(tied, weights)], sparsity, method))
    rest = {name: weights[name] for name in ("embed", "norm", "conv")}
    untied = prune(rest, config, ties=())
    assert {name: mask for name, mask in result.masks.items() if name in rest} == untied.masks
    assert list(result.masks) == [name for name in weights if name in result.masks]
    for name, mask in result.masks.items():
        assert np.array_equal(result.weights[name], mask.to_array() * weights[name])
    assert result.weights["norm"] is weights["norm"]


@pytest.mark.parametrize("method", SCORERS)
@pytest.mark.parametrize("pattern", [Block(2, 3), Slices(0), Slices(1, 2)])
def test_global_scope_with_groups_is_one_pool(method: Scorer, pattern: Block | Slices) -> None:
    for seed, sparsity in enumerate((0.0, 0.2, 0.5, 0.77, 1.0)):
        weights = block(seed)
        config = PruningConfig(sparsity, method, pattern, "global", ties=[MLP, SELF_ATTENTION])
        rivals = [rival(tied, weights) for tied in config.ties]
        rivals += [({name: pattern}, [name]) for name in ("embed", "conv")]
        result = prune(weights, config)
        check(result.masks, oracle(weights, rivals, sparsity, method))
        assert set(result.masks) == set(weights) - {"norm"}


@pytest.mark.parametrize("method", SCORERS)
@pytest.mark.parametrize("pattern", [Unstructured(), NM(1, 4)])
def test_global_scope_with_weights_is_two_pools(method: Scorer, pattern: Pattern) -> None:
    weights = block(3)
    config = PruningConfig(0.75, method, pattern, "global", exclude=["conv"], ties=[SELF_ATTENTION, MLP])
    result = prune(weights, config)
    check(result.masks, oracle(weights, [rival(tied, weights) for tied in config.ties], 0.75, method))
    assert (
        result.masks["embed"]
        == prune({"embed": weights["embed"]}, config, exclude=(), ties=()).masks["embed"]
    )


def test_groups_of_different_sizes_are_compared_by_score_per_weight() -> None:
    weights = {"long": np.full((1, 8), 1.0), "short": np.full((2, 2), [[2.0], [0.9]])}
    result = prune(weights, target_sparsity=1 / 3, pattern=Slices(0), scope="global")
    assert result.weights["short"].tolist() == [[2, 2], [0, 0]]
    assert prune(weights, target_sparsity=2 / 3, pattern=Slices(0), scope="global").masks["long"].count == 0

    weights = {"in": np.ones((2, 8)), "out": np.full((1, 2), [3.0, 9.0]), "other": np.full((1, 4), 1.1)}
    tied = Tied({"in": Slices(0), "out": Slices(1)})
    result = prune(weights, target_sparsity=1 / 3, pattern=Slices(0), scope="global", ties=[tied])
    assert [mask.count for mask in result.masks.values()] == [16, 2, 0]


def test_equal_scores_keep_the_lower_group_and_the_earlier_tensor() -> None:
    ones = {"b": np.ones((4, 2)), "a": np.ones((2, 4)), "d": np.ones((2, 2)), "c": np.ones((2, 2))}
    ties = [Tied({"c": Slices(0), "d": Slices(1)}), Tied({"a": Slices(1), "b": Slices(0)})]
    result = prune(ones, target_sparsity=0.5, scope="global", ties=ties)
    assert [result.masks[name].count for name in ("b", "a", "d", "c")] == [6, 6, 0, 0]
    assert result.weights["b"].tolist() == [[1, 1], [1, 1], [1, 1], [0, 0]]
    assert prune(ones, target_sparsity=0.5, ties=ties).weights["a"].tolist() == [[1, 1, 0, 0]] * 2


def test_biases_go_with_the_group_but_do_not_decide() -> None:
    weights = {"w": np.array([[1.0], [2.0], [3.0]]), "b": np.array([9.0, 0.0, 1.0])}
    members = {"b": Slices(0), "w": Slices(0)}
    result = prune(weights, target_sparsity=1 / 3, ties=[Tied(members)])
    assert result.weights["b"].tolist() == [0, 0, 1]
    result = prune(weights, target_sparsity=1 / 3, ties=[Tied(members, scored=("w", "b"))])
    assert result.weights["w"].tolist() == [[1], [0], [3]]
    result = prune(weights, target_sparsity=2 / 3, ties=[Tied(members, scored="b")])
    assert result.weights["w"].tolist() == [[1], [0], [0]]
    biases = {"b": weights["b"], "c": np.array([0.0, 2.0, 2.0])}
    result = prune(biases, target_sparsity=1 / 3, ties=[Tied({"b": Slices(0), "c": Slices(0)})])
    assert result.weights["b"].tolist() == [9, 0, 1]


def test_a_tensor_in_two_ties_loses_what_either_prunes() -> None:
    ties = [
        Tied({"a": Slices(0), "b": Slices(1)}),
        Tied({"b": Slices(0), "c": Slices(-1, 2)}),
    ]
    shapes = {"c": (3, 8), "b": (4, 6), "a": (6, 5)}
    for seed, scope, inplace in product(range(8), SCOPES_OF_TIES, (False, True)):
        rng = np.random.default_rng(seed)
        weights = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        before = {name: array.copy() for name, array in weights.items()}
        result = prune(weights, target_sparsity=0.5, scope=scope, ties=ties, inplace=inplace)
        if scope == "layer":
            first, second = (oracle(before, [rival(tied, before)], 0.5, Magnitude()) for tied in ties)
            expected = {**first, **second, "b": first["b"] & second["b"]}
        else:
            expected = oracle(before, [rival(tied, before) for tied in ties], 0.5, Magnitude())
        check(result.masks, expected)
        assert all(np.array_equal(result.weights[name], expected[name] * before[name]) for name in before)
        assert all((result.weights[name] is weights[name]) == inplace for name in weights)
    assert result.report.layers[1].pattern == "tied slices axis 1, tied slices axis 0"
    assert result.report.layers[0].pattern == "tied slices axis -1 size 2"


@pytest.mark.filterwarnings("ignore:tensor .* got zeros and ones only")
@settings(deadline=None, max_examples=60)
@given(data=st.data(), sparsity=st.floats(0, 1), scope=st.sampled_from(["layer", "global"]))
def test_counts_are_exact_and_members_agree(data: st.DataObject, sparsity: float, scope: Scope) -> None:
    weights: Arrays = {}
    ties = []
    for t in range(data.draw(st.integers(1, 3))):
        groups = data.draw(st.integers(0, 5))
        members = {}
        for m in range(data.draw(st.integers(1, 3))):
            rank, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
            shape = [data.draw(st.integers(0 if rank > 1 else 1, 3)) for _ in range(rank)]
            axis = data.draw(st.integers(-rank, rank - 1))
            shape[axis] = groups * size
            rng = np.random.default_rng(data.draw(st.integers(0, 99)))
            dtype = data.draw(st.sampled_from([np.float16, ml_dtypes.bfloat16, np.float32, np.float64]))
            weights[f"{t}.{m}"] = rng.integers(-2, 3, shape).astype(dtype)
            members[f"{t}.{m}"] = Slices(axis, size)
        ties.append((Tied(members), groups))
    config = PruningConfig(sparsity, scope=scope, ties=[tied for tied, _ in ties])
    result = prune(weights, config)
    pruned = []
    for tied, groups in ties:
        kept = []
        for name, slices in tied.members.items():
            keep = result.masks[name].to_array()
            if keep.size:
                labels = groups_of(keep, slices)
                kept.append([keep[labels == group] for group in range(groups)])
        states = (
            [np.concatenate([member[group].reshape(-1) for member in kept]) for group in range(groups)]
            if kept
            else []
        )
        assert all(state.all() or not state.any() for state in states)
        pruned.append(sum(not state.any() for state in states) if kept else None)
    counts = [groups for _, groups in ties]
    if None not in pruned:
        if scope == "layer":
            assert pruned == [round(sparsity * n) for n in counts]
        else:
            assert sum(filter(None, pruned)) == round(sparsity * sum(counts))


@pytest.mark.parametrize("case", CASES)
def test_adversarial_values(case: str) -> None:
    weights: Arrays = {
        "in": make(case, 96, "float32").reshape(12, 8),
        "out": make(case, 60, "float16", 1).reshape(5, 12),
    }
    tied = Tied({"out": Slices(1, 2), "in": Slices(0, 2)})
    for sparsity in (0.3, 0.5, 1.0):
        result = prune(weights, target_sparsity=sparsity, ties=[tied])
        k = round(sparsity * 6)
        assert [mask.size - mask.count for mask in result.masks.values()] == [k * 16, k * 10]
        scores = np.add(*(reference.group_scores(weights[name], tied.members[name], 1) for name in weights))
        kept = result.masks["in"].to_array()[::2, 0]
        rounding = 1e-12 * np.nan_to_num(scores, posinf=0).max()
        assert k in {0, 6} or np.max(scores[~kept]) <= np.min(scores[kept]) + rounding


@pytest.mark.parametrize("scope", ["layer", "row", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75, 1.0])
def test_a_tie_may_have_a_sparsity_of_its_own(scope: Scope, sparsity: float) -> None:
    weights = block(5)
    config = PruningConfig(0.5, scope=scope, ties=[MLP, SELF_ATTENTION], overrides={"fc*": sparsity})
    result = prune(weights, config)
    check(result.masks, oracle(weights, [rival(MLP, weights)], sparsity, Magnitude()))
    check(result.masks, oracle(weights, [rival(SELF_ATTENTION, weights)], 0.5, Magnitude()))
    steps = IterativePruner(num_iterations=3, final_sparsity=0.5, config=config)
    assert steps.run(weights, lambda _: 1.0).masks["fc1"] == result.masks["fc1"]
    # 3 of 8 groups, each member to within one weight of that.
    rounded = {"fc1": 14 / 40, "fc1.bias": 3 / 8, "fc2": 16 / 40}
    assert prune(weights, config, overrides=rounded).masks["fc1"].count == 25


def test_memory_layouts_do_not_matter(threads: int) -> None:
    expected = prune(block(), ties=[MLP, SELF_ATTENTION])
    views = {name: np.asfortranarray(array[::-1].copy())[::-1] for name, array in block().items()}
    result = prune(views, ties=[MLP, SELF_ATTENTION])
    assert result.masks == expected.masks


def test_one_array_by_itself_can_be_tied() -> None:
    result = prune(np.arange(6.0).reshape(3, 2), target_sparsity=1 / 3, ties=[Tied({"weights": Slices(0)})])
    assert result.weights.tolist() == [[0, 0], [2, 3], [4, 5]]
