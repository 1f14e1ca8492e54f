"""`latency_plan`: what was measured is what it says, and `prune` takes the plan."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from structured_models import make, run

import sparsam
import torch
from sparsam import InputStatistics
from sparsam.torch import latency_plan, prune
from sparsam.torch.pruning import latency
from torch import nn


def test_the_error_is_that_of_the_outputs_with_one_weight_pruned() -> None:
    model, _ = make("mlp")
    before = copy.deepcopy(model.state_dict())
    batches = [torch.randn(32, 12) for _ in range(2)]
    seen: list[Any] = []
    plan = latency_plan(
        model, batches, sparsity=0.5, levels=(0.75,), callback=lambda name, step: seen.append((name, step))
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == 0
    assert [step.sparsity for step in plan.steps["0.weight"]] == [0.0, 0.5, 0.75]
    assert [name for name, _ in seen] == [
        name for name in ("0.weight", "2.weight", "4.weight") for _ in range(3)
    ]
    statistics = InputStatistics(12)
    for batch in batches:
        statistics.update(batch.numpy())
    other = copy.deepcopy(model)
    pruned = sparsam.obs(model[0].weight.detach().numpy(), statistics, sparsity=0.75).weights
    with torch.no_grad():
        other[0].weight.copy_(torch.from_numpy(pruned))
    wanted = run(model, batches[0])
    expected = float((run(other, batches[0]) - wanted).square().sum() / wanted.square().sum())
    assert plan.steps["0.weight"][2].error == pytest.approx(expected, rel=1e-4)
    assert plan.steps["0.weight"][0].error == 0.0
    for steps in plan.steps.values():
        assert all(step.seconds > 0 for step in steps)
        assert sorted((step.seconds for step in steps), reverse=True) == [step.seconds for step in steps]


def test_the_plan_costs_no_more_than_uniform_and_is_no_slower() -> None:
    model, _ = make("mlp")
    plan = latency_plan(model, [torch.randn(64, 12)], sparsity=0.5)
    assert plan.error <= sum(step.error for step in plan.uniform.values()) * (1 + 1e-6)
    assert plan.seconds <= plan.uniform_seconds
    none = plan.within(0.0)
    assert none.error == 0.0
    assert none.seconds >= plan.seconds
    assert "times as fast, in the layers" in str(plan)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_prune_takes_the_plan_as_an_allocation(name: str) -> None:
    model, inputs = make(name)
    plan = latency_plan(model, [inputs] * 4, sparsity=0.5, levels=(0.25, 0.75))
    report = prune(model, target_sparsity=plan.sparsity, allocation=plan.sparsities)
    rows = {row.name: row for row in report.layers if row.pattern != "dense"}
    assert rows.keys() == plan.sparsities.keys()
    for weight, share in plan.sparsities.items():
        assert rows[weight].pruned_params == round(share * rows[weight].total_params)


def test_a_layer_that_is_called_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.layer(self.layer(x).relu()[:2])
            return found

    torch.manual_seed(0)
    rows: list[Any] = []
    measured = latency._seconds

    def noted(weight: Any, counts: list[int], grid: Any) -> Any:
        rows.append(counts)
        return measured(weight, counts, grid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "_seconds", noted)
        latency_plan(Twice().eval(), [torch.randn(5, 8)], sparsity=0.5)
    assert rows == [[5, 2]]


def test_layers_that_are_called_by_keyword_are_seen() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(input=x)  # type: ignore[no-any-return]

    plan = latency_plan(Keyword().eval(), [torch.randn(16, 8)], sparsity=0.5, levels=())
    assert [step.sparsity for step in plan.steps["layer.weight"]] == [0.0, 0.5]


def test_what_cannot_be_planned_is_an_error() -> None:
    model, _ = make("mlp")
    with pytest.raises(ValueError, match="sparsity: expected a number from 0"):
        latency_plan(model, [torch.randn(4, 12)], sparsity=80)
    with pytest.raises(ValueError, match="calibration: expected inputs that reach a linear layer"):
        latency_plan(nn.Conv1d(1, 2, 1), [torch.randn(4, 1, 3)], sparsity=0.5)
    with pytest.raises(ValueError, match="calibration: expected at least one batch"):
        latency_plan(model, [], sparsity=0.5)
    model[0].bias.data[3] = float("nan")
    with pytest.raises(ValueError, match=r"weight '2.weight': expected finite activations; got inputs"):
        latency_plan(model, [torch.randn(4, 12)], sparsity=0.5)
    model[0].bias.data[3] = 0.0
    assert np.isfinite(run(model, torch.randn(2, 12)).numpy()).all()
