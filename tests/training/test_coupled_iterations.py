"""Couplings in `IterativePruner`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coupled_weights import MLP, SCORERS, SELF_ATTENTION, Arrays, block
from sparsam.config import PruningConfig, Scope, Scorer
from sparsam.masks import Mask
from sparsam.patterns import Block, Pattern, Slices, Tied, Unstructured
from sparsam.pruner import prune
from sparsam.training.iterative import IterativePruner


@pytest.mark.parametrize("method", SCORERS)
@pytest.mark.parametrize(
    ("scope", "pattern"), [("layer", Unstructured()), ("global", Slices(0)), ("global", Block(2, 2))]
)
def test_iterations_are_nested_and_exact(method: Scorer, scope: Scope, pattern: Pattern) -> None:
    ties = [
        SELF_ATTENTION,
        Tied({"fc1": Slices(0), "fc1.bias": Slices(0), "fc2": Slices(1)}),
        Tied({"fc2": Slices(0), "embed": Slices(0, 1)}),
    ]
    weights = block(4) | {"embed": block(5)["embed"][:5]}
    schedule = [0.1, 0.3, 0.3, 0.5, 0.8, 1.0]
    seen: list[dict[str, Mask]] = []

    def zero_some(arrays: Arrays, masks: dict[str, Mask], iteration: int) -> None:
        """Revives what is pruned, then leaves kept weights at zero, so that they tie with pruned ones."""
        seen.append(masks)
        for array in arrays.values():
            array[array == 0] = 1
            if iteration > 1:
                array[...] = 0

    config = PruningConfig(pattern=pattern, method=method, scope=scope, ties=ties)
    result = IterativePruner(schedule=schedule, config=config).run(weights, lambda _: 1.0, zero_some)
    for before, after in pairwise(seen):
        assert all((after[name] & before[name]) == after[name] for name in after)
    heads = [4 - masks["q"].to_array().any(axis=1).reshape(4, 3).any(axis=1).sum() for masks in seen]
    neurons = [8 - np.count_nonzero(masks["fc1.bias"].to_array()) for masks in seen]
    if scope == "layer":
        assert heads == [round(s * 4) for s in schedule]
        assert neurons == [round(s * 8) for s in schedule]
    assert result.masks == seen[-1]
    assert not any(result.weights[name].any() for name in result.masks)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_without_recovery_the_end_is_that_of_one_shot(scope: Scope) -> None:
    config = PruningConfig(0.7, scope=scope, ties=[MLP, SELF_ATTENTION], pattern=Slices(0))
    weights = block(6, high=1000)
    result = IterativePruner(0.1, config=config, num_iterations=5, schedule="linear").run(
        weights, lambda _: 0.0
    )
    expected = prune(weights, config)
    assert result.masks == expected.masks
    assert result.report == expected.report


def test_a_run_with_other_ties_is_another_run(tmp_path: Path) -> None:
    def run(*ties: Tied) -> Any:
        config = PruningConfig(schedule=[0.25, 0.5], ties=ties)
        return IterativePruner(config=config).run(block(), lambda _: 1.0, state_dir=tmp_path)

    first = run(MLP, SELF_ATTENTION)
    again = run(Tied(dict(reversed(list(MLP.members.items())))), SELF_ATTENTION)
    assert (again.history, again.masks) == (first.history, first.masks)
    for ties in ((), (MLP,), (SELF_ATTENTION, MLP), (Tied(MLP.members, scored="fc1"), SELF_ATTENTION)):
        with pytest.raises(ValueError, match=r"another run's: ties was .*, now "):
            run(*ties)
