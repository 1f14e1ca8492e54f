from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from allocated_weights import METHODS, NETWORK, WEIGHTS, Arrays, mask_of_ones, seen
from sparsam import NM, Block, IterativePruner, PruningConfig, Slices, Unstructured, prune
from sparsam.allocation import allocate
from sparsam.config import AllocationLike
from sparsam.patterns import Pattern
from sparsam.scores import Wanda
from sparsam.tiles import count_pruned


def test_excluded_and_overridden_tensors_are_not_part_of_the_total() -> None:
    config = PruningConfig(0.6, allocation="erk", exclude=("head",), overrides={"fc1": 0.1, "bias": 0.5})
    masks = prune(NETWORK, config).masks
    rest = {name: NETWORK[name] for name in ("conv", "fc2")}
    assert {name: masks[name] for name in rest} == prune(rest, config, exclude=(), overrides={}).masks
    assert (masks["fc1"].count, masks["bias"].count) == (540, 10)
    assert sum(masks[name].size - masks[name].count for name in rest) == round(0.6 * (216 + 180))


def test_rows_share_an_allocation() -> None:
    shares = allocate(NETWORK, 0.6, "erk")
    masks = prune(NETWORK, target_sparsity=0.6, allocation="erk", scope="row").masks
    for name, mask in masks.items():
        pruned = (~mask.to_array()).reshape(mask.shape[0], -1)
        assert (pruned.sum(1) == round(shares[name] * pruned.shape[1])).all()
    wanda = Wanda(seen(WEIGHTS))
    overrides = {"head": (0.5, Slices(0)), "fc1": (0.5, NM(1, 2))}
    rows = prune(NETWORK, PruningConfig(0.5, wanda, scope="row", overrides=overrides)).masks  # type: ignore[arg-type]
    scores = wanda.score("conv", NETWORK["conv"]).reshape(8, 27)
    kept = np.argsort(-scores, axis=1, kind="stable")[:, : 27 - round(0.5 * 27)]
    assert (
        np.sort(kept, axis=1) == np.nonzero(rows["conv"].to_array().reshape(8, 27))[1].reshape(8, -1)
    ).all()
    assert rows["head"].to_array().all(axis=1).sum() == 1


@pytest.mark.parametrize("pattern", [Unstructured(), Block(2, 3), Slices(0)], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_iterations_revive_nothing_and_keep_the_total(method: AllocationLike, pattern: Pattern) -> None:
    """Recovery rescales tensors, so that global allocations differ between iterations."""
    assert not isinstance(pattern, NM)
    seen_masks: list[dict[str, Any]] = []

    def recover(arrays: Arrays, masks: dict[str, Any], iteration: int) -> None:
        seen_masks.append(masks)
        for i, name in enumerate(masks):
            arrays[name] *= 1000.0 ** ((i + iteration) % 3)

    schedule = [0.1, 0.3, 0.5, 0.5, 0.55] if isinstance(method, dict) else [0.1, 0.3, 0.5, 0.5, 0.8, 1.0]
    config = PruningConfig(allocation=method, pattern=pattern)
    result = IterativePruner(schedule=schedule, config=config).run(NETWORK, lambda _: 0.0, recover)
    assert len(seen_masks) == len(schedule)
    for before, after in pairwise(seen_masks):
        assert all((after[name] & before[name]) == after[name] for name in after)
    groups = {name: count_pruned(name, ~mask_of_ones(array), pattern) for name, array in WEIGHTS.items()}
    for masks, sparsity in zip(seen_masks, schedule, strict=True):
        pruned = sum(count_pruned(name, mask, pattern) for name, mask in masks.items())
        if method == "uniform":
            assert pruned == sum(round(sparsity * n) for n in groups.values())
        else:
            assert pruned == round(sparsity * sum(groups.values()))
    assert result.masks == seen_masks[-1]


def test_rows_never_revive_either() -> None:
    seen_masks: list[dict[str, Any]] = []

    def recover(arrays: Arrays, masks: dict[str, Any], iteration: int) -> None:
        seen_masks.append(masks)
        arrays["fc1"] *= 1000.0 ** (iteration % 2)
        arrays["fc2"] *= 100.0 ** ((iteration + 1) % 2)

    config = PruningConfig(allocation="global", scope="row")
    IterativePruner(0.1, 0.9, 6, config=config).run(NETWORK, lambda _: 0.0, recover)
    for before, after in pairwise(seen_masks):
        assert all((after[name] & before[name]) == after[name] for name in after)
        rows = [(~mask.to_array()).reshape(mask.shape[0], -1).sum(1) for mask in after.values()]
        assert all((counts == counts[0]).all() for counts in rows)
