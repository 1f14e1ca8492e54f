"""Couplings that do not fit the tensors or each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from coupled_weights import MLP, SELF_ATTENTION, block
from sparsam.config import PruningConfig
from sparsam.patterns import Slices, Tied
from sparsam.pruner import MagnitudePruner, prune
from sparsam.training.iterative import IterativePruner


@pytest.mark.parametrize(
    ("ties", "changes", "message"),
    [
        (
            [Tied({"fc1.wieght": Slices(0)})],
            {},
            "ties: expected names of tensors as members; got 'fc1.wieght'; the closest names are 'fc1",
        ),
        (
            [Tied({"q": Slices(2)})],
            {},
            r"tensor 'q': expected an axis for Slices\(axis=2, size=1\); got shape \(12, 5\)",
        ),
        ([Tied({"q": Slices(0, 5)})], {}, r"tensor 'q': expected an axis of a multiple of 5"),
        (
            [Tied({"q": Slices(0, 3), "o": Slices(1, 2)})],
            {},
            r"'q' of shape \(12, 5\) has 4 \(slices axis 0 size 3\), 'o' of .* has 6 \(slices axis 1",
        ),
        (
            [SELF_ATTENTION, Tied({"q": Slices(-2)})],
            {},
            "tensor 'q': expected one tie across axis 0, since only one",
        ),
        ([MLP, MLP], {}, "tensor 'fc1': expected one tie across axis 0"),
        (
            [MLP],
            {"exclude": ["fc*"]},
            r"tensor 'fc1': expected members that are pruned; got 'fc\*' in exclude; narrow that",
        ),
        (
            [MLP],
            {"overrides": {"*bias": 0.5}},
            r"of the tied \['fc1', 'fc1.bias', 'fc2'\]: expected .* got \{'fc1.bias': Override\(spars",
        ),
        ([MLP], {"overrides": {"fc*": 0.5, "fc2": 0.8}}, r"of the tied .*: expected one"),
        ([MLP], {"overrides": {"fc*": (0.5, Slices(0))}}, r"of the tied .*: expected one"),
    ],
)
def test_ties_that_do_not_fit(ties: list[Tied], changes: dict[str, Any], message: str) -> None:
    for scope in ("layer", "global"):
        config = PruningConfig(scope=scope, ties=ties, **changes)
        with pytest.raises(ValueError, match=message):
            prune(block(), config)
        with pytest.raises(ValueError, match=message):
            IterativePruner(config=config).run(block(), lambda _: 1.0)


def test_an_allocation_that_names_what_is_tied_is_refused() -> None:
    weights = {name: block()[name] for name in MLP.members}
    with pytest.raises(
        ValueError,
        match=r"allocation: expected .* tensors to be pruned, apart from overrides and ties, .*; got 'fc1'",
    ):
        prune(weights, ties=[MLP], allocation={"fc1": 0.9})


def test_ties_without_tensors() -> None:
    with pytest.raises(ValueError, match=r"ties: expected names .*; got 'q'; there are no tensors"):
        prune({}, ties=[SELF_ATTENTION])
    with pytest.raises(ValueError, match=r"expected scope .layer. or .row., .* and no ties"):
        MagnitudePruner(PruningConfig(ties=[MLP]))


def test_nan_and_dtypes_are_refused_by_name() -> None:
    for name in ("o", "fc1.bias"):
        weights = block()
        weights[name].reshape(-1)[3] = np.nan
        with pytest.raises(
            ValueError, match=rf"tensor '{name}': expected numbers to rank; got NaN at index \("
        ):
            prune(weights, ties=[MLP, SELF_ATTENTION])
    weights = block()
    weights["fc1.bias"] = np.ones(8, np.int64)
    with pytest.raises(
        TypeError, match=r"tensor 'fc1.bias': expected one of the dtypes float16, .*; got int64"
    ):
        prune(weights, ties=[MLP])

    class Broken:
        def score(self, name: str, weights: NDArray[Any], /) -> NDArray[Any]:
            return np.full(weights.shape, np.nan if name == "o" else 1.0)

    with pytest.raises(
        ValueError, match=r"the score of tensor 'o': expected numbers to rank; got NaN at index \(0, 0\)"
    ):
        prune(block(), method=Broken(), ties=[SELF_ATTENTION], exclude=["embed", "conv", "fc?"])
