from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sparsam.scores import Magnitude, Random, resolve

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def test_magnitude_hands_the_weights_through() -> None:
    weights = np.array([[1.0, -2.0]])
    assert Magnitude().score("w", weights) is weights


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_draws_lie_above_zero_and_zeros_score_zero(dtype: Any) -> None:
    weights = np.random.default_rng(0).standard_normal((50, 40)).astype(dtype)
    weights[::3] = 0
    weights[1, 1] = -0.0
    scores = Random(7).score("w", weights)
    assert scores.shape == weights.shape
    assert scores.dtype == np.float32
    assert (scores[weights == 0] == 0).all()
    assert (scores[weights != 0] > 0).all()
    assert scores.max() <= 1


def test_random_draws_depend_on_seed_name_and_shape_only() -> None:
    weights = np.ones((20, 30))
    scores = Random(7).score("w", weights)
    assert (Random(7).score("w", weights) == scores).all()
    assert (Random(7).score("w", -3 * np.asfortranarray(weights).astype(np.float32)) == scores).all()
    assert (Random(8).score("w", weights) != scores).any()
    assert (Random(7).score("v", weights) != scores).any()


def test_random_draws_are_uniform() -> None:
    scores = np.sort(Random().score("w", np.ones(100_000)))
    assert np.abs(scores - np.linspace(0, 1, 100_000)).max() < 0.01


def test_random_draws_are_the_same_on_every_machine() -> None:
    scores = Random(0).score("fc.weight", np.ones(3))
    assert scores.tolist() == [0.38700324296951294, 0.14549046754837036, 0.296048104763031]


def test_random_passes_nan_on() -> None:
    scores = Random().score("w", np.array([1.0, np.nan, 0.0, np.inf]))
    assert np.isnan(scores).tolist() == [False, True, False, False]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_random_takes_any_shape(shape: tuple[int, ...]) -> None:
    assert Random().score("w", np.ones(shape, np.float32)).shape == shape


@pytest.mark.parametrize("seed", [-1, 1.5, True, "0", None])
def test_random_seeds(seed: Any) -> None:
    with pytest.raises(ValueError, match="Random: expected an integer seed of at least 0"):
        Random(seed)


@pytest.mark.parametrize("norm", [0, 3, True, "1"])
def test_norms(norm: Any) -> None:
    with pytest.raises(ValueError, match=r"Magnitude: expected norm 1 .* or 2"):
        Magnitude(norm)


def test_names() -> None:
    assert resolve("magnitude") == Magnitude(norm=1)
    assert resolve("random") == Random(seed=0)
    mine = Random(np.int64(3))
    assert resolve(mine) is mine
    with pytest.raises(ValueError, match="method: expected one of 'magnitude', 'random'; got 'movement'"):
        resolve("movement")
