"""What `obs`, `admm` and `refit` have in common: scale, damping, bias, dtypes, layouts, sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sparsam
from cases import DTYPES
from layer_cases import Matrix, bare_error, moments, weights
from sparsam import NM, Mask, select
from sparsam.reconstruction import admm, admm_mask, obs, reconstruction_error, refit


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
