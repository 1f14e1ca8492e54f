from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cases import CASES, DTYPES, make
from sparsam import Mask
from sparsam.training.regrowth import drop_fraction, rigl_update, set_update


def kept(mask: Mask) -> list[int]:
    return [int(i) for i in np.flatnonzero(mask.to_array())]


def by_hand(
    weights: NDArray[Any], mask: Mask, gradients: NDArray[Any], fraction: float
) -> tuple[list[int], set[int]]:
    """The indices that survive the drop, and those that RigL grows, by sorting lists."""
    w, g = np.abs(weights.astype(float)).ravel(), np.abs(gradients.astype(float)).ravel()
    active = kept(mask)
    inactive = [i for i in range(mask.size) if i not in set(active)]
    k = min(round(fraction * len(active)), len(inactive))
    dropped = sorted(active, key=lambda i: (w[i], -i))[:k]
    grown = sorted(inactive, key=lambda i: (-g[i], i))[:k]
    return [i for i in active if i not in dropped], set(grown)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_updates_are_exact(case: str, dtype: str) -> None:
    weights, gradients = make(case, 96, dtype).reshape(8, 12), make(case, 96, dtype, seed=1).reshape(8, 12)
    before = weights.tobytes(), gradients.tobytes()
    for density in (0.0, 0.1, 0.5, 0.9, 1.0):
        mask = Mask.from_array(np.random.default_rng(2).random((8, 12)) < density)
        for fraction in (0.0, 0.05, 0.3, 1.0):
            stay, grown = by_hand(weights, mask, gradients, fraction)
            rigl = rigl_update(weights, mask, gradients, fraction)
            assert kept(rigl) == sorted({*stay, *grown})
            random = set_update(weights, mask, fraction, seed=4)
            assert set(stay) <= set(kept(random))
            assert not (set(kept(random)) - set(stay)) & set(kept(mask))
            for update in (rigl, random):
                assert update.count == mask.count
                assert update.shape == mask.shape
    assert (weights.tobytes(), gradients.tobytes()) == before


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(-2, 2), st.integers(-2, 2)), max_size=20), st.floats(0, 1)
)
def test_any_update(entries: list[tuple[bool, int, int]], fraction: float) -> None:
    mask = Mask.from_array(np.array([keep for keep, _, _ in entries], np.bool_))
    weights, gradients = (np.array([entry[i] for entry in entries], np.float32) for i in (1, 2))
    stay, grown = by_hand(weights, mask, gradients, fraction)
    assert kept(rigl_update(weights, mask, gradients, fraction)) == sorted({*stay, *grown})
    random = set_update(weights, mask, fraction, seed=0)
    assert random.count == mask.count
    assert set(stay) <= set(kept(random))


def test_by_hand() -> None:
    mask = Mask.from_array(np.array([True, True, True, True, False, False, False]))
    weights = np.array([3.0, -1.0, 1.0, 2.0, 9.0, 9.0, 9.0])
    gradients = np.array([9.0, 9.0, 9.0, 9.0, 1.0, -2.0, 2.0])
    assert kept(rigl_update(weights, mask, gradients, 0.25)) == [0, 1, 3, 5]
    assert kept(rigl_update(weights, mask, gradients, 0.5)) == [0, 3, 5, 6]
    assert kept(rigl_update(weights, mask, gradients, 1.0)) == [
        0,
        4,
        5,
        6,
    ]  # only three can come, so three go
    assert kept(set_update(weights, mask, 1.0, seed=0)) == [0, 4, 5, 6]


def test_growth_is_uniform_and_seeded() -> None:
    mask = Mask.from_array(np.arange(40) < 20)
    weights = np.arange(40.0)
    updates = [set_update(weights, mask, 0.25, seed=seed) for seed in range(2000)]
    assert updates[7] == set_update(weights, mask, 0.25, seed=7)
    assert len({tuple(kept(update)) for update in updates[:20]}) > 15
    counts = np.sum([update.to_array()[20:] for update in updates], axis=0)
    assert counts.sum() == 2000 * 5
    assert np.abs(counts - 500).max() < 6 * math.sqrt(2000 * 0.25 * 0.75)


def test_what_does_not_matter_may_be_nan() -> None:
    mask = Mask.from_array(np.array([[True, True], [False, False]]))
    weights, gradients = np.array([[1.0, 2.0], [np.nan, np.nan]]), np.array([[np.nan, np.nan], [1.0, 2.0]])
    assert kept(rigl_update(weights, mask, gradients, 0.5)) == [1, 3]
    with pytest.raises(
        ValueError, match=r"tensor 'weights': expected numbers to rank; got NaN at index \(0, 1\)"
    ):
        set_update(np.array([[1, np.nan], [0, 0]]), mask, 0.5, seed=0)
    with pytest.raises(
        ValueError, match=r"tensor 'gradients': expected numbers to rank; got NaN at index \(1, 0\)"
    ):
        rigl_update(np.ones((2, 2)), mask, np.array([[1, 1], [np.nan, 1]]), 0.5)


def test_mistakes_are_named() -> None:
    ones, mask = np.ones((2, 3)), Mask.ones((2, 3))
    cases: list[tuple[Any, type[Exception], str]] = [
        (
            lambda: set_update(ones[0], mask, 0.5, seed=0),
            ValueError,
            r"weights: expected the shape of the mask, .*; got \(3,\)",
        ),
        (lambda: rigl_update(ones, mask, ones.T, 0.5), ValueError, r"gradients: expected .*; got \(3, 2\)"),
        (lambda: set_update(ones, mask, 1.5, seed=0), ValueError, "fraction: expected a number from 0"),
        (lambda: set_update(ones, mask, 0.5, seed=-1), ValueError, "seed: expected an integer of at least 0"),
        (lambda: set_update(ones, mask, 0.5, seed=0.5), ValueError, "seed: expected an integer; got 0.5"),  # type: ignore[arg-type]
        (lambda: set_update(ones.astype(int), mask, 0.5, seed=0), TypeError, r"expected dtype .*; got int64"),
        (lambda: set_update(ones, ones == 1, 0.5, seed=0), TypeError, "mask: expected a Mask; got array"),
        (lambda: drop_fraction(-1, 10), ValueError, "step: expected an integer of at least 0; got -1"),
        (lambda: drop_fraction(1, 0), ValueError, "end: expected an integer of at least 1; got 0"),
        (lambda: drop_fraction(1, 10, 1.5), ValueError, "initial: expected a number from 0"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


def test_the_fraction_decays_as_a_cosine() -> None:
    assert drop_fraction(0, 100) == 0.3
    assert math.isclose(drop_fraction(50, 100), 0.15)
    assert math.isclose(drop_fraction(25, 100, 0.5), 0.25 * (1 + math.sqrt(0.5)))
    assert drop_fraction(100, 100) == drop_fraction(10**6, 100) == 0.0
    steps = [drop_fraction(step, 40) for step in range(42)]
    assert steps == sorted(steps, reverse=True)
