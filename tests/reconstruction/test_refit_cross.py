"""refit towards given outputs: the cross moments of inputs and wanted outputs in place of W H."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsam.masks import Mask
from sparsam.reconstruction import refit

Problem = dict[str, NDArray[Any]]


@pytest.fixture
def problem() -> Problem:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(200, 20)) @ rng.normal(size=(20, 20))
    y = x[:, :7] + rng.normal(size=(200, 7))
    keep = rng.random((7, 20)) < 0.4
    keep[0], keep[1] = True, False
    return {"x": x, "y": y, "w": rng.normal(size=(7, 20)), "keep": keep}


def test_is_least_squares_towards_the_outputs(problem: Problem) -> None:
    x, y, w, keep = (problem[name] for name in ("x", "y", "w", "keep"))
    got = refit(w, x.T @ x, Mask.from_array(keep), cross=y.T @ x)
    for row in range(len(w)):
        expected = np.zeros(20)
        expected[keep[row]] = np.linalg.lstsq(x[:, keep[row]], y[:, row], rcond=None)[0]
        np.testing.assert_allclose(got[row], expected, rtol=0, atol=1e-9)


def test_damping_draws_to_the_weights(problem: Problem) -> None:
    x, y, w, keep = (problem[name] for name in ("x", "y", "w", "keep"))
    c = 0.3 * np.mean(np.sum(x * x, axis=0))
    got = refit(w, x.T @ x, Mask.from_array(keep), cross=y.T @ x, damping=0.3)
    for row in range(len(w)):
        # Damping as further samples: each kept weight observed to be what it was, with weight c.
        inputs = np.vstack([x[:, keep[row]], np.sqrt(c) * np.eye(keep[row].sum())])
        outputs = np.concatenate([y[:, row], np.sqrt(c) * w[row, keep[row]]])
        expected = np.linalg.lstsq(inputs, outputs, rcond=None)[0]
        np.testing.assert_allclose(got[row, keep[row]], expected, rtol=0, atol=1e-9)


def test_the_dense_outputs_are_what_is_aimed_at_without_it(problem: Problem) -> None:
    x, w, mask = problem["x"], problem["w"], Mask.from_array(problem["keep"])
    gram = x.T @ x
    for damping in (0.0, 0.1):
        np.testing.assert_allclose(
            refit(w, gram, mask, cross=w @ gram, damping=damping),
            refit(w, gram, mask, damping=damping),
            rtol=0,
            atol=1e-9,
        )


@pytest.mark.parametrize(
    ("cross", "error", "words"),
    [
        (np.zeros((7, 19)), ValueError, r"'w': expected shape \(7, 20\); got \(7, 19\)"),
        (np.full((7, 20), np.nan), ValueError, r"'w'.*got nan at index \(0, 0\)"),
        (np.zeros((7, 20), int), TypeError, "'w': expected dtype float32 or float64; got int64"),
    ],
)
def test_refuses_moments_that_do_not_fit(
    problem: Problem, cross: NDArray[Any], error: type[Exception], words: str
) -> None:
    x, w, mask = problem["x"], problem["w"], Mask.from_array(problem["keep"])
    with pytest.raises(error, match=words):
        refit(w, x.T @ x, mask, cross=cross, name="w")
