from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import sparsam
from cases import DTYPES
from reference import prune_lowest
from sparsam import NM, Block, Mask, Slices, select
from sparsam.reconstruction import admm, admm_mask, alternating, obs, reconstruction_error, refit

Matrix = NDArray[np.float64]


def moments(inputs: int, samples: int, seed: int = 0, strength: float = 0.9) -> tuple[Matrix, Matrix]:
    """Inputs with a mean, neighbours correlated, and the sum of x x^T."""
    rng = np.random.default_rng(seed)
    mix = strength ** np.abs(np.subtract.outer(np.arange(inputs), np.arange(inputs)))
    x = rng.standard_normal((samples, inputs)) @ mix + rng.standard_normal(inputs)
    return x, x.T @ x


def weights(rows: int, cols: int, seed: int = 1) -> Matrix:
    return np.random.default_rng(seed).standard_normal((rows, cols))


def bare_error(w: NDArray[Any], new: NDArray[Any], x: Matrix) -> float:
    """The relative squared error of the outputs themselves."""
    w, new = (a.astype(np.float64).reshape(len(a), -1) for a in (w, new))
    return float((((w - new) @ x.T) ** 2).sum() / ((w @ x.T) ** 2).sum())


def best_on_support(w: Matrix, x: Matrix, keep: NDArray[np.bool_]) -> Matrix:
    """Least squares on the inputs themselves (as their triangle, to be quick), support by support."""
    r: Matrix = np.linalg.qr(x)[1]
    new = np.zeros_like(w)
    for support in np.unique(keep, axis=0):
        rows, s = (keep == support).all(axis=1), np.flatnonzero(support)
        new[np.ix_(rows, s)] = np.linalg.lstsq(r[:, s], r @ w[rows].T, rcond=None)[0].T
    return new


def brain_surgery(
    w: Matrix, h: Matrix, damping: float, block: int, choose: Callable[[Matrix, int, int], Any]
) -> tuple[Matrix, NDArray[np.bool_]]:
    """Optimal brain surgery from left to right, with the inverse of H of the remaining columns each time.

    `choose(scores, start, column)` gives the keep mask of columns from `column` on, or None to stay with what
    was chosen; scores are w^2 / [H^-1]_jj, of every column with only those from it on remaining.
    """
    w, inputs = w.copy(), w.shape[1]
    h = h + damping * np.diag(h).mean() * np.eye(inputs)
    inverses = [np.linalg.inv(h[j:, j:]) for j in range(inputs)]
    diagonal = np.array([inverse[0, 0] for inverse in inverses])
    keep = np.ones(w.shape, np.bool_)
    for j in range(inputs):
        chosen = choose(w**2 / diagonal, j // block * block, j)
        if chosen is not None:
            keep[:, j : j + chosen.shape[1]] = chosen
        error = np.where(keep[:, j], 0, w[:, j]) / diagonal[j]
        w[:, j:] -= np.outer(error, inverses[j][0])
        w[~keep[:, j], j] = 0
    return w, keep


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


@pytest.mark.parametrize("block", [1, 5, 24, 128])
def test_obs_equals_brain_surgery_with_explicit_inverses(isa: str, threads: int, block: int) -> None:
    _, h = moments(24, 60)
    w, share = weights(19, 24), 0.6
    total = round(share * w.size)

    def choose(scores: Matrix, start: int, column: int) -> Any:
        if column != start:
            return None
        stop = min(start + block, 24)
        before, after = ((2 * total * c + 24) // 48 for c in (start, stop))
        part = scores[:, start:stop]
        return prune_lowest(part.reshape(-1), after - before).reshape(part.shape)

    expected, keep = brain_surgery(w, h, 0.01, block, choose)
    result = obs(w, h, sparsity=share, block=block)
    assert np.array_equal(result.mask.to_array(), keep)
    assert result.mask.size - result.mask.count == total
    np.testing.assert_allclose(result.weights, expected, rtol=1e-9, atol=1e-10)
    single = obs(w.astype(np.float32), h.astype(np.float32), mask=result.mask, block=block)
    np.testing.assert_allclose(single.weights, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("n", "m", "block"), [(2, 4, 128), (1, 4, 6), (3, 8, 2), (4, 4, 128), (1, 24, 16)])
def test_obs_of_n_of_m_chooses_from_updated_weights(isa: str, n: int, m: int, block: int) -> None:
    _, h = moments(24, 60)
    w = weights(19, 24)

    def choose(scores: Matrix, start: int, column: int) -> Any:
        if column % m:
            return None
        return np.array([prune_lowest(row[column : column + m], m - n) for row in scores])

    expected, keep = brain_surgery(w, h, 0.01, m, choose)
    result = obs(w, h, pattern=NM(n, m), block=block)
    assert (result.mask.to_array().reshape(-1, m).sum(axis=1) == n).all()
    assert np.array_equal(result.mask.to_array(), keep)
    np.testing.assert_allclose(result.weights, expected, rtol=1e-9, atol=1e-10)


def test_obs_with_a_mask_updates_only(isa: str) -> None:
    _, h = moments(70, 300)
    w = weights(33, 70)
    mask = select(w, 0.5, Block(3, 5))
    keep = mask.to_array()
    expected, _ = brain_surgery(w, h, 0.01, 1, lambda _, __, column: keep[:, column : column + 1])
    result = obs(w, h, mask=mask, block=32)
    assert result.mask == mask
    np.testing.assert_allclose(result.weights, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 32), (9, 33), (65, 129), (130, 300)])
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_obs_counts_are_exact(shape: tuple[int, int], scope: str) -> None:
    x, _ = moments(shape[1], 50)
    x[:, ::3] = 0  # every third input is dead
    w = weights(*shape)
    for sparsity in (0.0, 0.2, 0.5, 0.613, 1.0):
        result = obs(w, x.T @ x, sparsity=sparsity, scope=scope, block=100)
        keep = result.mask.to_array()
        assert np.array_equal(result.weights != 0, keep)
        if scope == "row":
            assert ((~keep).sum(axis=1) == round(sparsity * shape[1])).all()
        else:
            assert (~keep).sum() == round(sparsity * w.size)
        assert not keep[:, ::3].any() or keep[:, 1::3].all()  # live ones go after the dead
        assert np.array_equal(result.weights[:, ::3][keep[:, ::3]], w[:, ::3][keep[:, ::3]])


def test_obs_keeps_the_lower_index_of_ties() -> None:
    w = np.ones((3, 8))
    keep = obs(w, np.eye(8), sparsity=0.5, damping=0.0).mask.to_array()
    assert np.array_equal(keep, (np.arange(24) < 12).reshape(3, 8))
    assert np.array_equal(obs(w, np.eye(8), pattern=NM(1, 4)).mask.to_array()[0], [1, 0, 0, 0] * 2)
    dead = np.diag([1.0, 0, 0, 1])
    assert np.array_equal(obs(np.ones((2, 4)), dead, sparsity=0.25).mask.to_array(), [[1] * 4, [1, 0, 0, 1]])


def test_equal_bits_for_any_number_of_threads(isa: str) -> None:
    _, h = moments(260, 300)
    w = weights(300, 260).astype(np.float32)
    runs = []
    for threads in (1, 2, 5):
        sparsam.set_num_threads(threads)
        first, second = obs(w, h, sparsity=0.7), obs(w, h, pattern=NM(2, 4))
        runs.append((first.weights, second.weights, refit(w, h, first.mask), first.mask, second.mask))
    sparsam.set_num_threads(None)
    for run in runs[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(run[:3], runs[0][:3], strict=True))
        assert run[3:] == runs[0][3:]


@pytest.mark.parametrize("size", [1e-90, 1e90])
def test_the_scale_of_h_does_not_matter_to_the_search_of_a_mask(size: float) -> None:
    rng = np.random.default_rng(2)
    w, x = rng.standard_normal((6, 16)).astype(np.float32), rng.standard_normal((40, 16))
    x[:, 3] = 0
    found, scaled = admm(w, x.T @ x, sparsity=0.6), admm(w, size * (x.T @ x), sparsity=0.6)
    assert found.mask == scaled.mask
    np.testing.assert_allclose(found.weights, scaled.weights, rtol=1e-5, atol=1e-6)


def test_damping_grows_until_the_factorisation_works() -> None:
    x, _ = moments(20, 5)
    x[:, 1] = x[:, 0]
    h = x.T @ x
    result = obs(weights(4, 20), h, sparsity=0.5, damping=0.0)
    assert 0 < result.damping <= 1e-6
    assert obs(weights(4, 20), h, sparsity=0.5).damping == 0.01
    with pytest.raises(ValueError, match=r"'fc': .* not positive definite even"):
        obs(weights(4, 2), np.array([[1.0, 9.0], [9.0, 1.0]]), sparsity=0.5, name="fc")


def test_the_scale_of_h_does_not_matter() -> None:
    _, h = moments(30, 100)
    w = weights(9, 30)
    for scale in (1e-30, 1e30):
        assert obs(w, h * scale, sparsity=0.5).mask == obs(w, h, sparsity=0.5).mask
        np.testing.assert_allclose(
            obs(w, h * scale, sparsity=0.5).weights, obs(w, h, sparsity=0.5).weights, rtol=1e-6
        )
        np.testing.assert_allclose(
            refit(w, h * scale, select(w, 0.5)), refit(w, h, select(w, 0.5)), rtol=1e-6
        )


class Statistics:
    """The part of InputStatistics that is asked for."""

    def __init__(self, x: Matrix) -> None:
        self.gram, self.mean = x.T @ x, x.mean(axis=0)


@pytest.mark.parametrize("method", ["obs", "admm"])
def test_bias_takes_the_mean_out_of_the_error(method: str) -> None:
    x, _ = moments(30, 100)
    w, bias, statistics = weights(10, 30), np.arange(10, dtype=np.float32), Statistics(x)
    if method == "obs":
        result = obs(w, statistics, sparsity=0.7, bias=bias)
    else:
        result = admm(w, statistics, sparsity=0.7, bias=bias)
    assert result.bias is not None
    assert result.bias.dtype == np.float32
    before = ((w - result.weights) @ x.T).mean(axis=1)
    after = (w @ x.T + bias[:, None] - result.weights @ x.T - result.bias[:, None]).mean(axis=1)
    assert np.abs(after).max() < 1e-5
    assert np.abs(before).max() > 1e-3
    given = obs(w, statistics.gram, mask=result.mask, bias=bias, mean=np.zeros(30))
    assert np.array_equal(given.bias, bias)  # type: ignore[arg-type]
    assert obs(w, statistics, sparsity=0.7).bias is None


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_dtypes_and_convolutions_come_back_as_they_came(dtype: str) -> None:
    x, h = moments(36, 200)
    w = weights(8, 36).reshape(8, 4, 3, 3).transpose(0, 1, 3, 2).astype(DTYPES[dtype])
    before = w.copy()
    mask = select(w, 0.5)
    results = [refit(w, h, mask), obs(w, h, sparsity=0.5).weights, obs(w, h, mask=mask).weights]
    results += [admm(w, h, mask).weights, admm(w, h, sparsity=0.5).weights]
    assert admm_mask(w, h, sparsity=0.5) == admm(w, h, sparsity=0.5).mask
    for result in results:
        assert result.dtype == w.dtype
        assert result.shape == w.shape
        assert np.count_nonzero(result) == mask.count
    assert np.array_equal(w, before)
    wide = refit(w.astype(np.float64), h, mask)
    assert np.array_equal(results[0], wide.astype(w.dtype))
    assert reconstruction_error(w, results[0], h.astype(np.float32)) == pytest.approx(
        bare_error(w, results[0], x), rel=1e-3
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_memory_layouts_do_not_matter(dtype: str) -> None:
    w, h = weights(9, 20).astype(dtype), moments(20, 80)[1]
    h[:, 4] = h[4] = 0
    mask = select(w, 0.5)

    def results(w: NDArray[Any], h: NDArray[Any]) -> list[NDArray[Any]]:
        swept = [
            obs(w, h, sparsity=0.5),
            obs(w, h, sparsity=0.5, scope="row"),
            obs(w, h, pattern=NM(2, 4)),
            obs(w, h, mask=mask),
        ]
        found = [admm(w, h, mask), admm(w, h, sparsity=0.5)]
        return [*(result.weights for result in swept + found), refit(w, h, mask)]

    views = [np.asfortranarray(w), np.repeat(np.repeat(w, 2, 0), 3, 1)[::2, ::3], w[::-1].copy()[::-1]]
    for view in views:
        view.flags.writeable = False
        for own, plain in zip(results(view, np.asfortranarray(h)), results(w, h), strict=True):
            assert np.array_equal(own, plain)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty_layers(shape: tuple[int, int]) -> None:
    w, h = np.zeros(shape), np.eye(shape[1])
    for result in (obs(w, h, sparsity=0.5), admm(w, h, sparsity=0.5), admm(w, h, Mask.ones(shape))):
        assert result.weights.shape == result.mask.shape == shape
    assert refit(w, h, Mask.ones(shape)).shape == shape
    assert reconstruction_error(w, w, h) == 0


def test_nothing_and_everything_pruned() -> None:
    _, h = moments(12, 40)
    w = weights(5, 12)
    for none, everything in (
        (obs(w, h, sparsity=0.0), obs(w, h, sparsity=1.0)),
        (admm(w, h, sparsity=0.0), admm(w, h, sparsity=1.0)),
    ):
        np.testing.assert_allclose(none.weights, w, rtol=1e-12)
        assert not everything.weights.any()
    assert reconstruction_error(w, w, h) == 0
    assert reconstruction_error(w, 0 * w, h) == 1
    assert reconstruction_error(0 * w, w, h) == np.inf
