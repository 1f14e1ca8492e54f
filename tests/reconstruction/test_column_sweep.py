"""`obs` against Optimal Brain Surgeon with explicit inverses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from layer_cases import Matrix, moments, weights
from reference import prune_lowest
from sparsam import NM, Block, select
from sparsam.reconstruction import obs


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
