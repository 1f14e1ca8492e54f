"""`find_smallest` of a model: the highest sparsity that keeps the score, and the model pruned to it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from structured_models import make, run

import sparsam
import torch
from sparsam import NM, PruningConfig
from sparsam.torch import find_smallest, prune
from torch import nn


def sparsity(model: Any) -> float:
    weights = [p for p in model.parameters() if p.ndim > 1]
    zeros = sum(int((p == 0).sum()) for p in weights)
    return zeros / int(sum(p.numel() for p in weights))


def test_the_model_ends_at_the_highest_sparsity_that_passes() -> None:
    model, _ = make("mlp")
    before = copy.deepcopy(model)
    seen: list[Any] = []
    found = find_smallest(model, lambda m: -sparsity(m), max_drop=0.6, checks=2, callback=seen.append)
    assert found.finished
    assert 0.58 <= found.sparsity <= 0.6
    assert sparsity(model) == pytest.approx(found.sparsity) == -found.score
    assert found.dense_score == 0
    assert found.min_score == -0.6
    assert sorted(seen) == list(found.curve)
    prune(before, PruningConfig(max(p.target for p in found.curve if p.passed)))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert found.report is not None
    assert "too low" in str(found)


def test_it_agrees_with_the_search_over_arrays() -> None:
    model, inputs = make("mlp")
    other = copy.deepcopy(model)
    wanted = run(model, inputs)

    def score(judged: Any) -> float:
        return -float((run(judged, inputs) - wanted).abs().max())

    def score_arrays(weights: Any) -> float:
        other.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in weights.items()})
        return score(other)

    arrays = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    expected = sparsam.find_smallest(arrays, score_arrays, -0.1, checks=1, max_evaluations=12)
    found = find_smallest(model, score, max_drop=0.1)
    assert found.sparsity == expected.sparsity
    assert [p[:2] for p in found.curve] == [p[:2] for p in expected.curve]
    assert found.to_dict()["curve"][0]["passed"]


def test_with_calibration_and_nothing_that_passes_the_model_stays() -> None:
    model, _ = make("mlp")
    before = copy.deepcopy(model.state_dict())
    batches = (torch.randn(8, 12) for _ in range(12))
    found = find_smallest(
        model, lambda m: -sparsity(m), max_drop=0.0, calibration=batches, method="wanda", max_evaluations=4
    )
    assert found.sparsity == 0
    assert found.report is None
    assert not found.finished
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_stopped_search_goes_on(stop: int, tmp_path: Path) -> None:
    model, _ = make("mlp")
    once, again = copy.deepcopy(model), copy.deepcopy(model)
    batches = [torch.randn(8, 12) for _ in range(4)]
    options: Any = {"max_drop": 0.5, "calibration": batches, "method": "wanda"}
    whole = find_smallest(once, lambda m: -sparsity(m), **options)
    calls = 0

    def stopped(judged: Any) -> float:
        nonlocal calls
        calls += 1
        if calls > stop:
            raise KeyboardInterrupt
        return -sparsity(judged)

    before = copy.deepcopy(again.state_dict())
    with pytest.raises(KeyboardInterrupt):
        find_smallest(again, stopped, state_dir=tmp_path, **options)
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())
    calls = 0
    more = 0

    def counted(judged: Any) -> float:
        nonlocal more
        more += 1
        return -sparsity(judged)

    found = find_smallest(again, counted, state_dir=tmp_path, **options)
    assert more == len(whole.curve) - stop + 1  # the dense model again
    assert found.curve == whole.curve
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), once.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"state_dir: .* expected the search of this model"):
        find_smallest(once, counted, state_dir=tmp_path, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_drop": -1.0}, "max_drop: expected a number of at least 0"),
        ({"max_drop": 0.1, "tolerance": 0.0}, "tolerance: expected a number above 0"),
        ({"max_drop": 0.1, "checks": -1}, "checks: expected an integer of at least 0"),
        ({"max_drop": 0.1, "pattern": NM(2, 4)}, "pattern: expected one with sparsities to search"),
    ],
)
def test_arguments_out_of_range(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_smallest(make("mlp")[0], lambda m: -sparsity(m), **arguments)


def test_buffers_that_cannot_be_written_are_left_alone() -> None:
    class Expanded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("shift", torch.zeros(1).expand(8))

    model = Expanded()
    found = find_smallest(model, lambda _: 1.0, max_drop=0.0, max_evaluations=3)
    assert found.sparsity > 0
    assert found.sparsity == int((model.linear.weight == 0).sum()) / 64


def test_a_score_that_is_none_leaves_the_model() -> None:
    model, _ = make("mlp")
    model.train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"eval_fn: expected a finite number .* nan at sparsity 0\.5"):
        find_smallest(model, lambda m: float("nan") if sparsity(m) else 0.0, max_drop=0.1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
