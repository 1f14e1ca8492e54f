"""The fastest choice within a budget of error, against trying all of them."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsam.analysis.density_choice import Step, fastest

numbers = st.floats(0, 10, allow_subnormal=False).map(lambda x: round(x, 3))
layers = st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4), min_size=1, max_size=4)


@given(layers, st.floats(0, 40))
def test_no_other_choice_is_faster(layers: list[list[tuple[float, float]]], budget: float) -> None:
    steps = {
        f"layer{i}": [Step(j / 10, seconds, error) for j, (seconds, error) in enumerate(found)]
        for i, found in enumerate(layers)
    }
    totals = [
        sum(step.seconds for step in choice)
        for choice in itertools.product(*steps.values())
        # The budget is kept to 2^-20 of what has to be saved.
        if sum(step.error for step in choice) <= budget * (1 - 1e-4) - 1e-4
    ]
    least = sum(min(step.error for step in found) for found in steps.values())
    if least > budget * (1 + 1e-9):
        with pytest.raises(ValueError, match="max_error: expected at least"):
            fastest(steps, budget)
        return
    chosen = fastest(steps, budget)
    assert all(chosen[name] in steps[name] for name in steps)
    assert sum(step.error for step in chosen.values()) <= budget * (1 + 1e-9) + 1e-4
    assert sum(step.seconds for step in chosen.values()) <= min(totals, default=math.inf) + 1e-6


def test_a_layer_that_tolerates_more_is_pruned_more() -> None:
    steps = {
        "tough": [Step(0.0, 4.0, 0.0), Step(0.5, 2.0, 0.1), Step(0.9, 1.0, 0.2)],
        "weak": [Step(0.0, 4.0, 0.0), Step(0.5, 2.0, 1.0), Step(0.9, 1.0, 5.0)],
    }
    chosen = fastest(steps, 1.1)
    assert {name: step.sparsity for name, step in chosen.items()} == {"tough": 0.9, "weak": 0.0}
    assert {name: step.sparsity for name, step in fastest(steps, 1.2).items()} == {"tough": 0.9, "weak": 0.5}
    assert {step.sparsity for step in fastest(steps, 0.0).values()} == {0.0}
    assert {step.sparsity for step in fastest(steps, 100.0).values()} == {0.9}


def test_steps_that_hardly_differ_are_one() -> None:
    steps = {
        "a": [Step(0.0, 3.0, 0.0), Step(0.5, 2.0, 1.0 - 1e-12), Step(0.9, 1.0, 1.0)],
        "b": [Step(0.0, 2.0, 1.0), Step(0.5, 1.0, 1.0 + 1e-13)],
    }
    chosen = fastest(steps, 1.5)
    assert {name: step.sparsity for name, step in chosen.items()} == {"a": 0.0, "b": 0.5}


@pytest.mark.parametrize("budget", [-1.0, math.nan, math.inf])
def test_budgets_that_are_none(budget: float) -> None:
    with pytest.raises(ValueError, match="max_error: expected a number of at least 0"):
        fastest({"a": [Step(0.0, 1.0, 0.0)]}, budget)


@pytest.mark.parametrize("steps", [[], [Step(0.0, math.nan, 0.0)], [Step(0.0, 1.0, -1.0)]])
def test_steps_that_are_none(steps: list[Step]) -> None:
    with pytest.raises(ValueError, match="steps of 'a': expected finite times and errors"):
        fastest({"a": steps}, 1.0)
