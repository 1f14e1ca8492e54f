"""The functions behind benchmarks/quality on a small problem: every method prunes as asked, and works."""

from __future__ import annotations

import numpy as np
import pytest

import digits_mlp
from _layers import IN_SEQUENCE, ONE_SHOT, table


@pytest.fixture(scope="module")
def problem() -> digits_mlp.Problem:
    return digits_mlp.train(seed=0)


def test_every_method_prunes_a_trained_network(problem: digits_mlp.Problem) -> None:
    dense = problem.accuracy(problem.network)
    rows = digits_mlp.compare(problem, [0.6])
    assert list(rows) == [*ONE_SHOT, *IN_SEQUENCE]
    assert problem.accuracy(problem.network) == dense
    assert dense > 94
    # Chance is 10 %: a method that put its weights into the wrong places would be near it.
    assert all(dense - 15 < accuracy <= 100 for (accuracy,) in rows.values())


def test_nothing_pruned_in_sequence_changes_nothing(problem: digits_mlp.Problem) -> None:
    network, x = problem.network, problem.calibration
    same = digits_mlp.in_sequence(network, x, "obs", "uniform", 0.0)
    np.testing.assert_allclose(same.logits(problem.test), network.logits(problem.test), rtol=0, atol=0.02)


def test_table_is_markdown() -> None:
    assert table({"a": [1.0, 22.25]}, [0.5, 0.95]) == (
        "| method | 50 % | 95 % |\n|---|---|---|\n| a | 1.0 | 22.2 |"
    )
