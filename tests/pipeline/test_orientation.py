"""Weights stored as (in, out), and N:M along input channels: each against the same on a transposed copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import sparsam
from sparsam import select
from sparsam.allocation import OWL, Global
from sparsam.analysis.lottery import find_ticket
from sparsam.config import PruningConfig
from sparsam.orientation import as_stored, outputs_first
from sparsam.patterns import NM, Block, Pattern, Slices, Tied, Unstructured
from sparsam.pruner import MagnitudePruner
from sparsam.scores import RIA, Saliency, Wanda
from sparsam.statistics import InputStatistics
from sparsam.training.iterative import IterativePruner

Array = NDArray[np.float64]
PATTERNS: list[tuple[Pattern, Any]] = [
    (Unstructured(), "layer"),
    (Unstructured(), "row"),
    (NM(2, 4), "layer"),
    (NM(1, 4, axis="channels"), "layer"),
    (Block(2, 3), "layer"),
    (Slices(0), "layer"),
    (Slices(1, 2), "layer"),
]


def weights_of(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def slow_transpose(array: NDArray[Any]) -> NDArray[Any]:
    """(out, in) of (in, out); (out, in, ...) of (..., in, out)."""
    axes = (array.ndim - 1, array.ndim - 2, *range(array.ndim - 2)) if array.ndim > 1 else (0,)
    return np.ascontiguousarray(np.transpose(array, axes))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_views_and_back(shape: list[int]) -> None:
    array = np.arange(np.prod(shape)).reshape(shape)
    assert np.array_equal(outputs_first(array), slow_transpose(array))
    assert np.array_equal(as_stored(outputs_first(array)), array)


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4), (3, 3, 8, 4), (3, 4, 8)])
@pytest.mark.parametrize(("pattern", "scope"), PATTERNS)
def test_select_and_prune_see_what_is_stored_the_other_way(
    pattern: Pattern, scope: Any, shape: tuple[int, ...]
) -> None:
    stored = weights_of(*shape)
    sparsity = pattern.sparsity if isinstance(pattern, NM) else 0.4
    usual = slow_transpose(stored)
    wanted = select(usual, sparsity, pattern, scope=scope).to_array()
    found = select(stored, sparsity, pattern, scope=scope, transposed=True)
    assert np.array_equal(slow_transpose(found.to_array()), wanted)
    config = PruningConfig(sparsity, pattern=pattern, scope=scope, transposed="h.*")
    result = sparsam.prune({"h.0": stored, "usual": usual}, config)
    assert np.array_equal(slow_transpose(result.masks["h.0"].to_array()), wanted)
    assert np.array_equal(result.masks["usual"].to_array(), wanted)
    assert np.array_equal(result.weights["h.0"], np.where(result.masks["h.0"].to_array(), stored, 0))
    inplace = stored.copy()
    sparsam.prune({"h.0": inplace}, config, inplace=True)
    assert np.array_equal(inplace, result.weights["h.0"])
    alone, _ = MagnitudePruner(config).prune_layer("h.0", stored)
    assert np.array_equal(alone, inplace)
    overridden = sparsam.prune(
        {"h.0": stored}, scope=scope, overrides={"h.0": (sparsity, pattern)}, transposed=["h.0"]
    )
    assert overridden.masks["h.0"] == result.masks["h.0"]


@pytest.mark.parametrize("method", [Wanda, RIA])
def test_scores_follow_the_inputs(method: Any) -> None:
    for shape in ((8, 8), (6, 10), (2, 3, 4)):
        stored = weights_of(*shape)
        usual = slow_transpose(stored)
        inputs = InputStatistics(usual[0].size).update(weights_of(20, usual[0].size, seed=1))
        wanted = sparsam.prune({"w": usual}, method=method({"w": inputs}), scope="row").masks["w"].to_array()
        found = sparsam.prune({"w": stored}, method=method({"w": inputs}), scope="row", transposed="w")
        assert np.array_equal(slow_transpose(found.masks["w"].to_array()), wanted)


def test_scores_that_have_no_axes_see_the_tensor_as_it_is_stored() -> None:
    stored, gradient = weights_of(6, 6), weights_of(6, 6, seed=2)
    method = Saliency({"w": gradient})
    found = sparsam.prune({"w": stored}, method=method, scope="row", transposed="w").masks["w"].to_array()
    wanted = select(np.abs(stored * gradient).T.copy(), 0.5, scope="row").to_array()
    assert np.array_equal(found.T, wanted)


@pytest.mark.parametrize("pattern", [Unstructured(), Block(2, 3), Slices(1)])
def test_allocations_follow(pattern: Any) -> None:
    usual = {"h.0.w": weights_of(6, 9), "h.1.w": weights_of(9, 12, seed=1) ** 3}
    stored = {name: slow_transpose(array) for name, array in usual.items()}
    inputs = {
        name: InputStatistics(w.shape[1]).update(weights_of(30, w.shape[1])) for name, w in usual.items()
    }
    for method in (OWL(inputs), Global(), Global(Wanda(inputs)), "erk", "lamp"):
        wanted = sparsam.allocate(usual, 0.5, method, pattern=pattern)
        found = sparsam.allocate(stored, 0.5, method, pattern=pattern, transposed="*")
        assert found == wanted
        assert sparsam.allocate(stored, 0.5, method, pattern=pattern, transposed=["h.*"]) == wanted


@pytest.mark.parametrize("pattern", [Slices(0), Block(2, 2)])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_ties_have_the_axes_of_the_tensors_as_stored(pattern: Pattern, scope: Any) -> None:
    usual = {"fc1": weights_of(8, 4), "fc2": weights_of(6, 8, seed=1), "other": weights_of(6, 8, seed=2)}
    stored = {**usual, "fc1": slow_transpose(usual["fc1"]), "other": slow_transpose(usual["other"])}
    config = PruningConfig(pattern=pattern, scope=scope)
    wanted = sparsam.prune(usual, config, ties=Tied({"fc1": Slices(0), "fc2": Slices(1)})).masks
    ties = Tied({"fc1": Slices(1), "fc2": Slices(1)})
    found = sparsam.prune(stored, config, ties=ties, transposed=("fc1", "other")).masks
    assert found["fc2"] == wanted["fc2"]
    for name in ("fc1", "other"):
        assert np.array_equal(found[name].to_array().T, wanted[name].to_array())


@pytest.mark.parametrize(("pattern", "scope"), [(Block(2, 3), "layer"), (Unstructured(), "row")])
def test_step_by_step(pattern: Pattern, scope: Any) -> None:
    usual = {"a": weights_of(8, 12), "b": weights_of(6, 12, seed=1)}
    stored = {name: slow_transpose(array) for name, array in usual.items()}
    for allocation in ("uniform", "erk"):
        config = PruningConfig(0.75, pattern=pattern, scope=scope, allocation=allocation)
        pruner = IterativePruner(num_iterations=3, config=config)
        wanted = pruner.run(usual, lambda _: 1.0).masks
        turned = IterativePruner(num_iterations=3, config=config.with_changes(transposed="*"))
        found = turned.run(stored, lambda _: 1.0).masks
        assert all(np.array_equal(found[name].to_array().T, wanted[name].to_array()) for name in usual)


def test_tickets() -> None:
    usual = {"a": weights_of(8, 12)}
    stored = {"a": slow_transpose(usual["a"])}
    tickets = [
        find_ticket(
            given, lambda *_: None, lambda _: 1.0, config=PruningConfig(pattern=Block(2, 3), transposed=names)
        )
        for given, names in ((usual, ()), (stored, "a"))
    ]
    assert np.array_equal(tickets[1].masks["a"].to_array().T, tickets[0].masks["a"].to_array())


def test_a_nan_has_its_place_in_the_tensor_as_it_is_stored() -> None:
    stored = np.ones((4, 8))
    stored[1, 6] = np.nan
    with pytest.raises(ValueError, match=r"'w'.*index \(1, 6\)"):
        sparsam.prune({"w": stored}, pattern=NM(2, 4), transposed="w")
    with pytest.raises(ValueError, match=r"'scores'.*index \(1, 6\)"):
        select(stored, 0.5, NM(2, 4), transposed=True)
    conv = np.ones((2, 4, 3, 3))
    conv[1, 2, 0, 1] = np.nan
    with pytest.raises(ValueError, match=r"'w'.*index \(1, 2, 0, 1\)"):
        sparsam.prune({"w": conv}, pattern=NM(2, 4, axis="channels"))


def slow_channels(scores: Array, pattern: NM) -> NDArray[np.bool_]:
    """The n largest of every m neighbours along axis 1; of equals the lower index."""
    keep = np.zeros(scores.shape, bool)
    for row, *place in np.ndindex(scores.shape[0], *scores.shape[2:]):
        for start in range(0, scores.shape[1], pattern.m):
            places = [(row, start + i, *place) for i in range(pattern.m)]
            group = [abs(scores[at]) for at in places]
            for kept in np.argsort(-np.array(group), kind="stable")[: pattern.n]:
                keep[places[kept]] = True
    return keep


@given(
    st.sampled_from([(3, 8), (2, 4, 3), (3, 8, 3, 3), (2, 4, 1, 5), (1, 12, 2, 1, 2), (0, 4, 3)]),
    st.sampled_from([NM(2, 4, axis="channels"), NM(1, 4, axis="channels"), NM(1, 2, axis="channels")]),
    st.integers(0, 99),
)
def test_channels(shape: tuple[int, ...], pattern: NM, seed: int) -> None:
    scores = np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float64)
    mask = select(scores, pattern.sparsity, pattern)
    assert np.array_equal(mask.to_array(), slow_channels(scores, pattern))
    result = sparsam.prune({"w": scores}, pattern=pattern)
    assert result.masks["w"] == mask
    assert result.report.total.pruned_params == mask.size - mask.count


def test_channels_of_matrices_are_their_columns() -> None:
    matrix, vector = weights_of(4, 8), weights_of(8)
    for array in (matrix, vector):
        assert select(array, 0.5, NM(2, 4)) == select(array, 0.5, NM(2, 4, axis="channels"))
    assert select(weights_of(4, 4, 3, 3), 0.5, NM(2, 4)) != select(
        weights_of(4, 4, 3, 3), 0.5, NM(2, 4, axis="channels")
    )


def test_channels_that_do_not_divide() -> None:
    select(np.ones((2, 2, 2, 2)), 0.5, NM(2, 4))
    with pytest.raises(
        ValueError, match=r"2:4 channels: expected a multiple of 4 input channels; got 2 in shape"
    ):
        select(np.ones((2, 2, 2, 2)), 0.5, NM(2, 4, axis="channels"))
    with pytest.raises(ValueError, match="NM: axis: expected 'flat' or 'channels'; got 'in'"):
        NM(2, 4, axis="in")  # type: ignore[arg-type]
