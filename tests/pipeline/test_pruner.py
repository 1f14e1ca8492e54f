from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import reference
from prunable_weights import model, untied, zeros
from sparsam.config import MethodName, PruningConfig, Scope
from sparsam.masks import Mask
from sparsam.patterns import NM, Block, Slices, Unstructured
from sparsam.pruner import MagnitudePruner, prune
from sparsam.scores import Magnitude, Random

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def smallest_pruned(array: NDArray[Any], k: int) -> NDArray[Any]:
    """The oracle: zero the k smallest magnitudes, among equal ones those with the highest index."""
    flat = array.ravel().copy()
    order = np.lexsort((-np.arange(flat.size), np.abs(flat)))
    flat[order[:k]] = 0
    return np.asarray(flat.reshape(array.shape))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"target_sparsity": 0.5}, [[0, 0, 0, 4], [5, -6, 7, 0]]),
        ({"target_sparsity": 0.0}, [[1, -2, 3, 4], [5, -6, 7, 0]]),
        ({"target_sparsity": 1.0}, [[0, 0, 0, 0], [0, 0, 0, 0]]),
        ({"target_sparsity": 0.3125}, [[0, -2, 3, 4], [5, -6, 7, 0]]),
        ({"pattern": NM(2, 4)}, [[0, 0, 3, 4], [0, -6, 7, 0]]),
        ({"pattern": NM(1, 4)}, [[0, 0, 0, 4], [0, 0, 7, 0]]),
        ({"pattern": Block(2, 1)}, [[0, -2, 3, 0], [0, -6, 7, 0]]),
        ({"pattern": Block(1, 3), "target_sparsity": 0.25}, [[1, -2, 3, 4], [5, -6, 7, 0]]),
        ({"pattern": Slices(0)}, [[0, 0, 0, 0], [5, -6, 7, 0]]),
        ({"pattern": Slices(1, size=2)}, [[1, -2, 0, 0], [5, -6, 0, 0]]),
        ({"pattern": Slices(-1), "method": Magnitude(2)}, [[0, -2, 3, 0], [0, -6, 7, 0]]),
    ],
)
def test_by_hand(changes: dict[str, Any], expected: list[list[float]]) -> None:
    weights = np.array([[1, -2, 3, 4], [5, -6, 7, 0]], np.float32)
    result = prune(weights, **changes)
    assert result.weights.tolist() == expected
    assert result.weights.dtype == np.float32
    assert (result.masks.apply(weights) == result.weights).all()


def test_l1_and_l2_rank_groups_differently() -> None:
    weights = np.array([[3.0, 0.0], [2.0, 2.0]])
    assert prune(weights, pattern=Slices(0), method=Magnitude(1)).weights.tolist() == [[0, 0], [2, 2]]
    assert prune(weights, pattern=Slices(0), method=Magnitude(2)).weights.tolist() == [[3, 0], [0, 0]]


@pytest.mark.parametrize("method", [Magnitude(1), Magnitude(2), Random(3)])
@pytest.mark.parametrize("pattern", [NM(1, 4), Block(3, 2), Slices(0), Slices(1, size=4), Slices(-1, size=2)])
def test_every_pattern_with_every_score(method: Magnitude | Random, pattern: NM | Block | Slices) -> None:
    """Groups of one tensor go by the sum of their scores, groups of several by score per weight."""
    rng = np.random.default_rng(0)
    shapes = {"fc": (5, 8), "conv": (6, 4, 4), "wide": (2, 16)}
    weights = {name: np.float32(rng.integers(-5, 6, shape)) for name, shape in shapes.items()}
    scores = {name: np.asarray(method.score(name, array)) for name, array in weights.items()}
    if isinstance(pattern, NM):
        for scope in ("layer", "global"):
            masks = prune(weights, method=method, pattern=pattern, scope=scope).masks
            for name, array in scores.items():
                assert np.array_equal(masks[name].to_array(), reference.select_nm(array, pattern))
        return
    norm = method.norm if isinstance(method, Magnitude) else 1
    labels = {name: reference.labels(array, pattern) for name, array in weights.items()}
    sums = {name: reference.group_scores(array, pattern, norm) for name, array in scores.items()}
    means = np.concatenate([sums[name] / np.bincount(labels[name].reshape(-1)) for name in weights])
    ends = np.cumsum([array.size for array in sums.values()])[:-1]
    for sparsity in (0.0, 0.3, 0.5, 0.8, 1.0):
        config = PruningConfig(sparsity, method, pattern)
        together = np.split(reference.prune_lowest(means, round(sparsity * means.size)), ends)
        for i, (name, array) in enumerate(sums.items()):
            alone = reference.prune_lowest(array, round(sparsity * array.size))
            layer, pooled = (prune(weights, config, scope=scope).masks[name] for scope in ("layer", "global"))
            assert np.array_equal(layer.to_array(), alone[labels[name]])
            assert np.array_equal(pooled.to_array(), together[i][labels[name]])


def test_ties_keep_the_lower_index_and_the_earlier_tensor() -> None:
    assert prune(np.ones((2, 4))).weights.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    weights = {"b": np.ones((1, 4)), "a": -np.ones((1, 4))}
    result = prune(weights, scope="global", target_sparsity=0.75)
    assert result.weights["b"].tolist() == [[1, 1, 0, 0]]
    assert result.weights["a"].tolist() == [[0, 0, 0, 0]]


@settings(deadline=None)
@given(
    values=st.lists(st.integers(-4, 4), max_size=80),
    dtype=st.sampled_from(DTYPES),
    sparsity=st.floats(0, 1),
)
def test_exact_count_with_ties(values: list[int], dtype: Any, sparsity: float) -> None:
    weights = np.array(values, np.float32).astype(dtype)
    result = prune(weights, target_sparsity=sparsity)
    k = round(sparsity * weights.size)
    assert result.masks.count == weights.size - k
    assert result.report.total.pruned_params == k
    assert (result.weights == smallest_pruned(weights, k)).all()


@settings(deadline=None)
@given(sparsity=st.floats(0, 1), sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5))
def test_exact_count_over_all_tensors(sparsity: float, sizes: list[int]) -> None:
    weights = {
        f"w{i}": untied(2, n, seed=i) if n else np.empty((2, 0), np.float32) for i, n in enumerate(sizes)
    }
    result = prune(weights, scope="global", target_sparsity=sparsity)
    k = round(sparsity * 2 * sum(sizes))
    assert sum(mask.size - mask.count for mask in result.masks.values()) == k
    flat = np.concatenate([w.ravel() for w in weights.values()])
    pruned = np.concatenate([w.ravel() for w in result.weights.values()])
    assert (pruned == smallest_pruned(flat, k)).all()


@settings(deadline=None)
@given(
    sparsities=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    method=st.sampled_from(["magnitude", "random"]),
)
def test_more_sparsity_prunes_a_superset(sparsities: list[float], method: MethodName) -> None:
    weights = model()
    for scope in ("layer", "global"):
        less, more = (prune(weights, target_sparsity=s, scope=scope, method=method).masks for s in sparsities)
        assert all((more[name] & less[name]) == more[name] for name in less)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_dtypes_come_out_as_they_came_in(dtype: Any, scope: Scope) -> None:
    weights = {"a": untied(8, 9, dtype=dtype), "b": untied(3, 5, 2, dtype=dtype)}
    result = prune(weights, scope=scope, target_sparsity=0.75)
    for name, array in result.weights.items():
        assert (array.dtype, array.shape) == (dtype, weights[name].shape)
        assert (result.masks[name].apply(weights[name]) == array).all()


def test_biases_and_scalars_stay_dense_and_are_the_same_objects() -> None:
    weights = model()
    result = prune(weights, target_sparsity=0.75)
    assert list(result.weights) == list(weights)
    assert result.weights["fc1.bias"] is weights["fc1.bias"]
    assert result.weights["scale"] is weights["scale"]
    assert list(result.masks) == ["fc1.weight", "fc2.weight"]
    assert zeros(result.weights["fc1.weight"]) == 144


def test_results_share_no_memory_with_the_inputs() -> None:
    weights = model()
    before = {name: array.copy() for name, array in weights.items()}
    for sparsity in (0.0, 0.5, 1.0):
        for method in ("magnitude", "random"):
            result = prune(weights, target_sparsity=sparsity, method=method)
            for name in result.masks:
                assert not np.shares_memory(result.weights[name], weights[name])
    assert all((weights[name] == before[name]).all() for name in weights)


def test_exclude_beats_overrides_and_the_last_override_wins() -> None:
    config = PruningConfig(
        0.5,
        exclude=["fc2*"],
        overrides={"fc*": 0.25, "fc1.w*": (0.75, Block(4, 4)), "*.bias": 0.5, "fc2*": 1.0},
    )
    with pytest.warns(UserWarning, match=r"overrides: 'fc2\*' matches only tensors that exclude") as caught:
        result = prune(model(), config)
    assert [warning.filename for warning in caught] == [__file__]
    assert list(result.masks) == ["fc1.weight", "fc1.bias"]
    assert zeros(result.weights["fc1.weight"]) == 9 * 16
    assert zeros(result.weights["fc1.bias"]) == 8
    assert [layer.pattern for layer in result.report.layers] == [
        "block 4x4",
        "unstructured",
        "dense",
        "dense",
    ]


def test_an_override_may_be_a_pattern_alone() -> None:
    result = prune(model(), target_sparsity=0.25, overrides={"fc2*": NM(1, 4), "fc1.weight": Slices(0)})
    assert zeros(result.weights["fc2.weight"]) == 48
    assert (result.weights["fc1.weight"] == 0).all(axis=1).sum() == 4


def test_overridden_tensors_are_outside_the_pool() -> None:
    weights = {"a": untied(4, 4), "b": untied(4, 4) * 100, "c": untied(4, 4) * 1000}
    result = prune(weights, scope="global", target_sparsity=0.5, overrides={"c": 0.25})
    assert [zeros(array) for array in result.weights.values()] == [16, 0, 4]


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(
        ValueError, match=r"overrides: expected .*; got 'fc1.wieght', which matches none; .* 'fc1.weight'"
    ):
        prune(model(), overrides={"fc1.wieght": 0.5})
    with pytest.raises(
        ValueError, match=r"overrides: expected .*; got 'a', which matches none; there are no tensors"
    ):
        prune({}, overrides={"a": 0.5})
    with pytest.warns(UserWarning, match=r"exclude: 'head\*' matches no tensor") as caught:
        prune(model(), exclude="head*")
    assert caught[0].filename == __file__


def test_random_is_seeded_and_hits_the_count() -> None:
    weights = model()
    config = PruningConfig(0.7)
    first, again, other = (prune(weights, config, method=Random(seed)).masks for seed in (1, 1, 2))
    assert first == again != other
    assert first["fc1.weight"].count == 192 - round(0.7 * 192)
    alone = prune({"fc2.weight": weights["fc2.weight"]}, config, method=Random(1)).masks
    assert alone["fc2.weight"] == first["fc2.weight"]


def test_random_prunes_what_is_zero_first() -> None:
    weights = untied(10, 10)
    weights[::2] = 0
    result = prune(weights, method="random", target_sparsity=0.5)
    assert result.masks == Mask.from_array(weights != 0)


class Positional:
    """A method of one's own: later weights matter more."""

    def score(self, name: str, weights: NDArray[Any], /) -> NDArray[Any]:
        del name
        return np.where(weights == 0, 0.0, np.arange(1.0, weights.size + 1).reshape(weights.shape))


def test_a_method_of_ones_own() -> None:
    assert prune([[4.0, 3.0], [2.0, 1.0]], method=Positional()).weights.tolist() == [[0, 0], [2, 1]]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.ones(4), r"tensor 'weights': expected scores of shape \(2, 2\) .*; got shape \(4,\)"),
        (np.ones((2, 2), int), r"expected scores .* one of the dtypes float16, .*; got .* dtype int64"),
        (-np.ones((2, 2)), "expected scores of at least 0 from .*; got -1.0"),
    ],
)
def test_wrong_scores(scores: NDArray[Any], message: str) -> None:
    class Wrong:
        def score(self, *_: object) -> NDArray[Any]:
            return scores

    with pytest.raises(ValueError, match=message):
        prune(np.ones((2, 2)), method=Wrong())


def test_changes_apply_on_top_of_the_configuration() -> None:
    config = PruningConfig(0.75, scope="global", schedule="cubic", num_iterations=9)
    assert prune(np.ones((2, 4)), config, target_sparsity=0.25).masks.count == 6
    assert config.target_sparsity == 0.75
    assert prune(np.ones((2, 4)), PruningConfig(), pattern=NM(1, 4)).masks.count == 2
    assert prune(np.ones((2, 4)), PruningConfig(0.5), pattern=NM(1, 4)).masks.count == 2
    with pytest.raises(ValueError, match=r"target_sparsity: expected 0.75, .* pattern 1:4; got 0.5"):
        prune(np.ones((2, 4)), PruningConfig(), target_sparsity=0.5, pattern=NM(1, 4))
    with pytest.raises(TypeError, match="unexpected keyword argument 'sparsity'"):
        prune(np.ones((2, 4)), sparsity=0.25)  # type: ignore[call-overload]


def test_report_counts_bytes() -> None:
    weights = {"a": untied(10, 10, dtype=np.float16), "bias": np.ones(10, np.float64)}
    pruned, dense = prune(weights, target_sparsity=0.9).report.layers
    assert (pruned.total_params, pruned.pruned_params, pruned.sparsity) == (100, 90, 0.9)
    assert (pruned.shape, pruned.dtype, pruned.pattern) == ((10, 10), "float16", "unstructured")
    assert (pruned.dense_bytes, pruned.packed_bytes) == (200, 13 + 20)
    assert (dense.pruned_params, dense.pattern, dense.dense_bytes, dense.packed_bytes) == (0, "dense", 80, 80)


def test_empty_mapping() -> None:
    result = prune({}, scope="global")
    assert (result.weights, result.masks, result.report.layers) == ({}, {}, ())


def test_magnitude_pruner() -> None:
    pruner = MagnitudePruner(PruningConfig(0.5, exclude=["head"], overrides={"out": 0.75}))
    weights = [[0.1, -0.5, 0.01, 0.8]]
    pruned, stats = pruner.prune_layer("layer1", weights)
    assert pruned.tolist() == [[0, -0.5, 0, 0.8]]
    assert (stats.name, stats.total_params, stats.pruned_params, stats.sparsity) == ("layer1", 4, 2, 0.5)
    bias, _ = pruner.prune_layer("bias", [1, 2, 3, 4])
    assert bias.tolist() == [0, 0, 3, 4]
    assert pruner.prune_layer("out", weights)[1].sparsity == 0.75
    assert pruner.prune_layer("head", weights)[0].tolist() == weights
    assert [s.sparsity for s in pruner.stats] == [0.5, 0.5, 0.75, 0.0]
    assert [s.pattern for s in pruner.stats] == ["unstructured"] * 3 + ["dense"]
    assert MagnitudePruner().config == PruningConfig()
    whole, stats = pruner.prune_layer("whole", np.array([[3, -1], [2, 4]], np.int8))
    assert whole.tolist() == [[3, 0], [0, 4]]
    assert whole.dtype.name == stats.dtype == "float64"


def test_magnitude_pruner_is_for_magnitude_and_layers() -> None:
    with pytest.raises(
        ValueError, match=r"method: expected 'magnitude' or .* ranks by magnitude; got 'random'"
    ):
        MagnitudePruner(PruningConfig(method="random"))
    with pytest.raises(ValueError, match="expected scope 'layer'"):
        MagnitudePruner(PruningConfig(scope="global"))
    with pytest.raises(ValueError, match="allocation 'uniform' and no ties"):
        MagnitudePruner(PruningConfig(allocation="erk"))
    assert MagnitudePruner(PruningConfig(method=Magnitude(2), pattern=Unstructured())).stats == []
    rows, _ = MagnitudePruner(PruningConfig(scope="row")).prune_layer("w", [[1.0, 2.0], [3.0, 4.0]])
    assert rows.tolist() == [[0, 2], [0, 4]]


@pytest.mark.parametrize("method", ["magnitude", "random", "lamp"])
def test_scope_row_prunes_each_row_alike(method: MethodName) -> None:
    weights = {"conv": np.random.default_rng(0).standard_normal((6, 2, 3, 3)), "bias": np.ones(6)}
    before = weights["conv"].copy()
    result = prune(weights, target_sparsity=0.3, scope="row", method=method)
    assert (np.count_nonzero(result.weights["conv"] == 0, axis=(1, 2, 3)) == round(0.3 * 18)).all()
    assert list(result.masks) == ["conv"]
    assert np.array_equal(weights["conv"], before)
    inplace = prune(weights, target_sparsity=0.3, scope="row", method=method, inplace=True)
    assert inplace.masks == result.masks
    assert np.array_equal(weights["conv"], result.weights["conv"])
    weights["conv"][2, 1, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"tensor 'conv'.*\(2, 1, 0, 0\)"):
        prune(weights, scope="row", method=method)
