"""`refit` and `admm` against least squares on each support."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import sparsam
from layer_cases import Matrix, bare_error, moments, weights
from sparsam import NM, Block, Mask, Slices, select
from sparsam.reconstruction import admm, admm_mask, alternating, obs, reconstruction_error, refit


def best_on_support(w: Matrix, x: Matrix, keep: NDArray[np.bool_]) -> Matrix:
    """Least squares on the inputs themselves (as their triangle, to be quick), support by support."""
    r: Matrix = np.linalg.qr(x)[1]
    new = np.zeros_like(w)
    for support in np.unique(keep, axis=0):
        rows, s = (keep == support).all(axis=1), np.flatnonzero(support)
        new[np.ix_(rows, s)] = np.linalg.lstsq(r[:, s], r @ w[rows].T, rcond=None)[0].T
    return new


def test_refit_is_least_squares_on_each_support(isa: str, threads: int) -> None:
    x, h = moments(45, 200)
    w = weights(23, 45)
    keep = np.random.default_rng(2).random(w.shape) < np.linspace(0, 1, 23)[:, None]
    new = refit(w, h, Mask.from_array(keep))
    assert np.array_equal(new != 0, keep)
    np.testing.assert_allclose(new, best_on_support(w, x, keep), rtol=1e-9, atol=1e-9)
    assert np.array_equal(new[keep.all(axis=1)], w[keep.all(axis=1)])


@pytest.mark.parametrize("kept", [1, 15, 16, 17, 31, 32, 33, 34, 48, 63, 65, 97])
def test_refit_at_every_edge_of_the_tiles(isa: str, kept: int) -> None:
    x, h = moments(100, 150, strength=0.7)
    w = weights(70, 100) if kept in {33, 97} else weights(35, 100)
    keep = np.zeros(w.shape, np.bool_)
    for i, row in enumerate(keep):
        row[np.random.default_rng(i // 33).permutation(100)[:kept]] = True  # runs of up to 33 rows
    new = refit(w, h, Mask.from_array(keep))
    np.testing.assert_allclose(new, best_on_support(w, x, keep), rtol=1e-8, atol=1e-8)


def test_refit_of_one_support_for_all_rows(threads: int) -> None:
    x, h = moments(40, 200)
    w = weights(150, 40)
    mask = select(w, 0.5, Slices(1))
    np.testing.assert_allclose(refit(w, h, mask), best_on_support(w, x, mask.to_array()), atol=1e-9)


def test_refit_without_full_rank_reaches_the_minimum(isa: str) -> None:
    x, _ = moments(30, 12)  # fewer inputs than features
    x[:, 7], x[:, 20] = x[:, 3], 2 * x[:, 4] - x[:, 5]
    x[:, 11] = 0
    h = x.T @ x
    w = weights(20, 30)
    for density in (0.2, 0.5, 0.8):
        keep = np.random.default_rng(0).random(w.shape) < density
        new = refit(w, h, Mask.from_array(keep))
        assert bare_error(w, new, x) <= bare_error(w, best_on_support(w, x, keep), x) * (1 + 1e-12) + 1e-20
        assert np.array_equal(new[keep[:, 11], 11], w[keep[:, 11], 11])  # a dead input's weight stays


def test_refit_damping_minimises_the_damped_error() -> None:
    _, h = moments(20, 60)
    w = weights(5, 20)
    mask = select(w, 0.5)
    damped = h + 0.3 * np.diag(h).mean() * np.eye(20)
    np.testing.assert_allclose(refit(w, h, mask, damping=0.3), refit(w, damped, mask), rtol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(2, 40),
    st.floats(0, 1),
    st.floats(0, 0.99),
    st.integers(0, 2**31),
    st.sampled_from([1.0, 0.4, 4.0]),
)
def test_refit_is_never_above_another_method(
    rows: int, cols: int, sparsity: float, strength: float, seed: int, ratio: float
) -> None:
    _, h = moments(cols, max(1, int(ratio * cols)), seed, strength)
    w = weights(rows, cols, seed)
    pruned = obs(w, h, sparsity=sparsity)
    others = [pruned.weights, admm(w, h, pruned.mask).weights, pruned.mask.apply(w)]
    best = reconstruction_error(w, refit(w, h, pruned.mask), h)
    assert pruned.mask.size - pruned.mask.count == round(sparsity * w.size)
    for other in others:
        assert best <= reconstruction_error(w, other, h) * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("strength", [0.5, 0.9, 0.98])
@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_admm_comes_within_a_percent_of_refit(sparsity: float, strength: float) -> None:
    _, h = moments(96, 400, strength=strength)
    w = weights(32, 96)
    for mask in (select(w, sparsity), obs(w, h, sparsity=sparsity).mask):
        result = admm(w, h, mask)
        assert result.mask is mask
        assert np.array_equal(result.weights != 0, mask.to_array())
        best = reconstruction_error(w, refit(w, h, mask), h)
        assert best * (1 - 1e-9) <= reconstruction_error(w, result.weights, h) <= 1.01 * best


def test_admm_without_polish_steps_is_boza_s_iteration() -> None:
    """Against the update written with explicit solves, far from its limit."""
    _, h = moments(12, 40)
    d = np.sqrt(np.diag(h))
    g, w = h / np.outer(d, d), weights(4, 12) * d
    keep = select(w, 0.5).to_array()
    new, dual = w, np.zeros_like(w)
    for _ in range(3):
        z = np.where(keep, new + dual, 0)
        dual = dual + new - z
        new = np.linalg.solve(g + 0.5 * np.eye(12), (w @ g + 0.5 * (z - dual)).T).T
    expected = np.where(keep, new + dual, 0)
    np.testing.assert_allclose(alternating._update(w, g, keep, 3, 0.5), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [
        (sparsam.Unstructured(), 0.61),
        (NM(2, 4), 0.5),
        (Block(2, 4), 0.5),
        (Slices(0), 0.25),
        (Slices(1, 4), 0.5),
    ],
    ids=str,
)
def test_admm_finds_a_mask_of_the_pattern(pattern: Any, sparsity: float) -> None:
    _, h = moments(48, 300)
    w = weights(16, 48)
    result = admm(w, h, sparsity=sparsity, pattern=pattern)
    assert result.mask.count == select(w, sparsity, pattern).count
    assert admm_mask(w, h, sparsity=sparsity, pattern=pattern) == result.mask
    assert np.array_equal(result.weights, refit(w, h, result.mask)) or np.allclose(
        result.weights, refit(w, h, result.mask), rtol=1e-8, atol=1e-10
    )
    if isinstance(pattern, NM):
        assert (result.mask.to_array().reshape(-1, 4).sum(axis=1) == 2).all()
        assert admm(w, h, pattern=pattern).mask == admm_mask(w, h, pattern=pattern) == result.mask
    restarted = admm(w, h, sparsity=sparsity, pattern=pattern, rho=1e-6, iterations=30)
    assert restarted.mask.count == result.mask.count
    assert restarted.mask == admm_mask(w, h, sparsity=sparsity, pattern=pattern, rho=1e-6, iterations=30)
