"""The kernels behind second moments, against NumPy: exact for small integers, within the bound otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsam import InputStatistics, _core, set_num_threads
from sparsam.moment_sums import MomentSums, Scaled


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("height", "width", "rows"), [(1, 1, 1), (7, 33, 128), (130, 40, 129), (96, 300, 700), (5, 4, 0)]
)
def test_sums_of_integers_are_exact(
    isa: str, threads: int, height: int, width: int, rows: int, dtype: Any
) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-9, 10, (rows, n)).astype(dtype) for n in (height, width))
    scale_a, scale_b = (np.ldexp(1.0, rng.integers(-40, 40, n)) for n in (height, width))
    sums = MomentSums.zeros(height, width)
    square = MomentSums.zeros(width, width, symmetric=True)
    for _ in range(2):
        sums.add(Scaled(a, scale_a), Scaled(b, scale_b))
        square.add(Scaled(b, scale_b), Scaled(b, scale_b))
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    assert np.array_equal(sums.dense(), 2 * np.outer(scale_a, scale_b) * (wide_a.T @ wide_b))
    assert np.array_equal(square.dense(), 2 * np.outer(scale_b, scale_b) * (wide_b.T @ wide_b))
    left, right = rng.standard_normal(height), rng.standard_normal(width)
    assert np.array_equal(sums.dense(0.5, left, right), sums.dense() + np.outer(left, right) * 0.5)
    assert np.array_equal(square.plus(square).dense(), 2 * square.dense())


def test_float32_sums_stay_within_their_bound(isa: str, threads: int) -> None:
    """All of one sign, as rounding errors add up worst, and enough rows that float32 sums would show."""
    x = np.random.default_rng(0).uniform(0.5, 1, (20_000, 40)).astype(np.float32)
    sums = MomentSums.zeros(40, 40, symmetric=True)
    sums.add(Scaled(x, np.ones(40)), Scaled(x, np.ones(40)))
    want = x.astype(np.longdouble).T @ x.astype(np.longdouble)
    sizes = np.sqrt(want.diagonal())
    errors = np.abs(sums.dense() - want) / np.outer(sizes, sizes)
    assert errors.max() <= 2.0**-20
    plain = np.zeros((40, 40), np.float32)
    for row in x:
        plain += np.outer(row, row)
    assert (np.abs(plain - want) / np.outer(sizes, sizes)).max() > 2.0**-18


def test_every_number_of_threads_gives_the_same(isa: str) -> None:
    x = np.random.default_rng(0).standard_normal((300, 300), dtype=np.float32)
    found = []
    for threads in (1, 2, 5):
        set_num_threads(threads)
        found.append(InputStatistics(300).update(x).gram)
    set_num_threads(None)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_gram_of_centred_inputs_is_symmetric_and_close() -> None:
    half = np.random.default_rng(0).integers(-99, 100, (500, 150))
    x = np.concatenate([half, -half])[np.random.default_rng(1).permutation(1000)].astype(np.float32)
    s = InputStatistics(150).update(x)
    want = x.astype(np.float64).T @ x.astype(np.float64)
    sizes = np.sqrt(want.diagonal())
    assert np.array_equal(s.gram, s.gram.T)
    assert (np.abs(s.gram - want) <= 2.0**-20 * np.outer(sizes, sizes)).all()


def test_only_half_of_a_symmetric_matrix_is_held() -> None:
    assert MomentSums.zeros(1024, 1024, symmetric=True).tiles.nbytes == 36 * 128 * 128 * 8


def test_the_core_refuses_what_does_not_fit() -> None:
    a, ones, tiles = np.ones((3, 4), np.float32), np.ones(4), np.zeros((1, 32, 32))
    for arguments, message in (
        ((tiles, a, ones, a[:2], ones, (32, 32), True), "the same number of rows"),
        ((tiles, a, ones[:3].copy(), a, ones, (32, 32), True), "a: expected a matrix and a number for each"),
        ((tiles, a, ones, a, ones, (32, 48), False), "edges: expected multiples of 32"),
        ((tiles, a, ones, a, ones, (32, 64), True), "edges: expected two alike"),
        ((tiles, a, ones, a, ones, (64, 64), True), "tiles: expected 4096 writeable numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            _core.add_products(*arguments)
