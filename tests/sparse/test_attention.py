"""Attention by the core, against its formula in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsam._core import attention_at

EPS = float(np.finfo(np.float32).eps)

SHAPES = [  # sequences, heads, queries, keys, depth
    (1, 1, 1, 1, 16),
    (2, 3, 5, 7, 16),
    (1, 2, 8, 32, 32),
    (2, 1, 9, 33, 48),
    (1, 3, 17, 65, 64),
    (3, 2, 1, 200, 32),
    (4, 12, 64, 64, 32),  # which threads share
]


def draw(shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def heads(sequences: int, heads: int, positions: int, depth: int, seed: int) -> NDArray[np.float32]:
    """Heads side by side, as projections leave them, seen as (sequences, heads, positions, depth)."""
    found: NDArray[np.float32] = draw((sequences, positions, heads, depth), seed).transpose(0, 2, 1, 3)
    return found


def strides(x: NDArray[Any]) -> tuple[int, int, int]:
    sequences, heads, positions, _ = (step // x.itemsize for step in x.strides)
    return sequences, heads, positions


def attend(
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    mask: NDArray[Any] | None = None,
    scale: float = 0.25,
) -> NDArray[np.float32]:
    """(sequences, heads, queries, depth)."""
    sequences, count, queries, depth = q.shape
    keys = k.shape[2]
    out = np.full((sequences, queries, count, depth), np.nan, np.float32)
    shown: tuple[int, bool, tuple[int, int, int]] = (0, False, (0, 0, 0))
    if mask is not None:
        mask = np.broadcast_to(mask, (sequences, count, queries, keys))
        shown = (mask.__array_interface__["data"][0], mask.dtype == np.bool_, strides(mask))
    attention_at(
        (sequences, count, queries, keys, depth),
        q.__array_interface__["data"][0],
        strides(q),
        k.__array_interface__["data"][0],
        strides(k),
        v.__array_interface__["data"][0],
        strides(v),
        *shown,
        scale,
        out.ctypes.data,
    )
    found: NDArray[np.float32] = out.transpose(0, 2, 1, 3)
    return found


def wanted(q: Any, k: Any, v: Any, mask: NDArray[Any] | None = None, scale: float = 0.25) -> NDArray[Any]:
    """The formula in float64; zeros for a query that sees no key."""
    scores = scale * (q.astype(float) @ k.astype(float).swapaxes(2, 3))
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == np.bool_ else scores + mask
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isneginf(top), 0, top))
    total = weights.sum(-1, keepdims=True)
    result: NDArray[Any] = weights / np.where(total == 0, 1, total) @ v.astype(float)
    return result


def check(found: NDArray[np.float32], expected: NDArray[Any], v: NDArray[np.float32], terms: int) -> None:
    """To what rounding of the sums and of the exponential allows."""
    assert np.abs(found - expected).max() <= 8 * (terms + 16) * EPS * np.abs(v).max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_its_formula(shape: tuple[int, int, int, int, int], isa: str, threads: int) -> None:
    del isa, threads
    sequences, count, queries, keys, depth = shape
    q, k, v = (heads(sequences, count, n, depth, seed) for seed, n in enumerate((queries, keys, keys)))
    check(attend(q, k, v), wanted(q, k, v), v, depth + keys)


@pytest.mark.parametrize("kind", ["padding", "each", "added", "causal"])
@pytest.mark.parametrize("shape", [(2, 3, 9, 21, 32), (1, 2, 40, 40, 16)], ids=str)
def test_masks(shape: tuple[int, int, int, int, int], kind: str, isa: str) -> None:
    del isa
    sequences, count, queries, keys, depth = shape
    q, k, v = (heads(sequences, count, n, depth, seed) for seed, n in enumerate((queries, keys, keys)))
    random = np.random.default_rng(9)
    mask: NDArray[Any] = {
        "padding": random.random((sequences, 1, 1, keys)) < 0.5,
        "each": random.random((sequences, count, queries, keys)) < 0.3,
        "added": random.standard_normal((1, count, queries, keys), np.float32),
        "causal": np.where(np.tri(queries, keys, dtype=bool), 0, -np.inf).astype(np.float32)[None, None],
    }[kind]
    check(attend(q, k, v, mask), wanted(q, k, v, mask), v, depth + keys)


def test_what_is_masked_has_no_part(isa: str) -> None:
    """Not the least: the value of a masked key could be anything but an infinity or a NaN."""
    del isa
    q, k, v = (heads(1, 2, n, 32, seed) for seed, n in enumerate((10, 40, 40)))
    mask = np.zeros((1, 1, 1, 40), np.bool_)
    mask[..., :3] = True
    large = v.copy()
    large[:, :, 3:] = 3e38
    assert np.array_equal(attend(q, k, large, mask), attend(q, k, v, mask))


def test_a_query_that_sees_nothing_gets_zeros(isa: str) -> None:
    del isa
    q, k, v = (heads(1, 1, n, 16, seed) for seed, n in enumerate((3, 5, 5)))
    mask = np.ones((1, 1, 3, 5), np.bool_)
    mask[0, 0, 1] = False
    for given in (mask, np.where(mask, 0, -np.inf).astype(np.float32)):
        found = attend(q, k, v, given)
        assert not found[0, 0, 1].any()
        check(found, wanted(q, k, v, mask), v, 21)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_no_number_stays_in_its_row(number: float, isa: str) -> None:
    del isa
    q, k, v = (heads(1, 1, n, 16, seed) for seed, n in enumerate((9, 33, 33)))
    k = np.abs(k)
    q[0, 0, 4, 3] = number
    found = attend(q, k, v)
    assert np.isnan(found[0, 0, 4]).all()
    others = np.arange(9) != 4
    assert np.isfinite(found[0, 0, others]).all()


def test_far_scores_overflow_nowhere(isa: str) -> None:
    del isa
    q, k, v = (heads(1, 1, n, 16, seed) for seed, n in enumerate((4, 20, 20)))
    check(attend(q, k, v, scale=1e4), wanted(q, k, v, scale=1e4), v, 36 * 10_000)


def test_any_number_of_threads_gives_the_same(threads: int) -> None:
    del threads
    q, k, v = (heads(4, 12, 64, 32, seed) for seed in range(3))
    whole = attend(q, k, v)
    parts = [
        attend(q[i : i + 1, j : j + 1], k[i : i + 1, j : j + 1], v[i : i + 1, j : j + 1])
        for i in range(4)
        for j in range(12)
    ]
    assert np.array_equal(whole.reshape(48, 64, 32), np.concatenate(parts).reshape(48, 64, 32))


def test_nothing_to_do_and_what_is_refused() -> None:
    q, k, v = (heads(1, 2, n, 16, seed) for seed, n in enumerate((3, 0, 0)))
    assert not attend(q, k, v).any()
    assert attend(q[:, :, :0], q, q).size == 0
    with pytest.raises(ValueError, match=r"depth: expected a multiple of 16; got 8"):
        attend(q[..., :8], q[..., :8], q[..., :8])
