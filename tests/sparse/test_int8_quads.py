"""Quads, which multiply many rows with few int8 values: the same bits as slots. And narrow pairs of slots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from matmul_cases import ORACLES, inputs, weights
from rounded_matmul import F32, ROWS, rounded, row
from rounded_matmul import int8_product as product
from sparsam import SparseMatrix, _core
from sparsam._core import Packed

QUADS = [one for one in ROWS if one[1] == "avx2"]
LANES, STEP = 8, 4
NAMES: tuple[Any, ...] = (None, *ORACLES)


@pytest.fixture(autouse=True, params=QUADS, ids="-".join)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every row that has quads, wherever it runs."""
    with row(*request.param):
        yield request.param[1]


@contextmanager
def quads(wanted: bool | None) -> Iterator[None]:
    _core.use_quads(wanted)
    try:
        yield
    finally:
        _core.use_quads(None)


def packed_of(matrix: SparseMatrix) -> Packed:
    packed = matrix._state.forms.packed
    assert packed is not None
    return packed


def of_integers(q: NDArray[np.int8], scales: NDArray[np.float32]) -> SparseMatrix:
    packed = Packed.pack_int8(q, scales)
    packed.add("slots")
    packed.keep(["slots"])
    return SparseMatrix(packed)


def pairs(matrix: SparseMatrix) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """For each group of rows how many pairs of steps are narrow, and how many are not."""
    form = packed_of(matrix).buffer("slots")
    groups = -(-matrix.shape[0] // LANES)
    at = int(form[64:72].view(np.uint64)[0])
    numbers = form[at : at + 8 * (2 * groups + 1)].view(np.uint64)
    begin, wide = numbers[: groups + 1], numbers[groups + 1 :]
    return wide - begin[:-1], begin[1:] - wide


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 16), (17, 100), (100, 300), (200, 65), (530, 33)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_quads_are_exact(shape: tuple[int, int], sparsity: float) -> None:
    w, bias = weights(*shape, sparsity), inputs(shape[0], seed=3)
    matrix = SparseMatrix.from_dense(w, dtype="int8")
    q, scales = rounded(w)
    for batch in (1, 7, 31, 32, 33, 64, 77):
        x = inputs(batch, shape[1], seed=batch)
        with quads(True):
            assert packed_of(matrix).quad_rows(batch) == (batch if matrix.nnz else 0)
            assert np.array_equal(matrix.linear(x, bias), product(q, scales, x, bias)), batch


def test_activations_and_other_outputs(threads: int) -> None:
    w, x, bias = weights(600, 500, 0.9), inputs(70, 500), inputs(600, seed=2)
    w[:512] *= (
        inputs(512, 500, seed=5) > np.linspace(-3, 3, 512)[:, None]
    )  # rows sorted by length leave apart
    matrix = SparseMatrix.from_dense(w, dtype="int8")
    for name in NAMES:
        found: list[NDArray[Any]] = []
        for wanted in (False, True):
            with quads(wanted):
                assert packed_of(matrix).quad_rows(70) == (70 if wanted else 0)
                y = matrix.linear(x, bias, name)
                out = np.zeros((70, 600), np.float64)
                assert np.array_equal(matrix.linear(x, bias, name, out=out), y)
                found.append(y)
        assert np.array_equal(found[0], found[1]), name


def test_rows_that_are_not_finite() -> None:
    w, x = weights(40, 100, 0.9), inputs(40, 100)
    x[3, 7], x[33, 0], x[34], x[35] = np.nan, np.inf, 0, F32(1e-40)
    matrix = SparseMatrix.from_dense(w, dtype="int8")
    with quads(True):
        y = matrix.linear(x)
    bad = [3, 33]
    assert np.isnan(y[bad]).all()
    assert np.array_equal(np.delete(y, bad, axis=0), product(*rounded(w), np.delete(x, bad, axis=0)))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_nothing_saturates(sparsity: float, sign: int) -> None:
    """Bytes of 255 (and 1) times weights of 64 and -64: of one sign in every third row."""
    rng = np.random.default_rng(3)
    signs = np.where(np.arange(33)[:, None] % 3, rng.choice([-64, 64], (33, 1000)), 64)
    q = np.where(rng.random((33, 1000)) < sparsity, 0, signs).astype(np.int8)
    matrix = of_integers(q, np.full(33, 0.5, F32))
    x = np.full((40, 1000), 2.0 * sign, F32)
    for wanted in (False, True):
        with quads(wanted):
            assert np.array_equal(matrix.linear(x), product(q, np.full(33, 0.5, F32), x))


@pytest.mark.parametrize(("value", "narrow"), [(32, True), (-32, True), (33, False), (-33, False)])
def test_pairs_are_narrow_up_to_sums_of_128(value: int, narrow: bool) -> None:
    """Four weights of one sign sum to 128, times 255 fits 16 bits; four of 33 do not."""
    q = np.full((16, 64), value, np.int8)
    matrix = of_integers(q, np.ones(16, F32))
    assert [n.tolist() for n in pairs(matrix)] == ([[8, 8], [0, 0]] if narrow else [[0, 0], [8, 8]])
    for sign in (1, -1):
        x = np.full((9, 64), 3.0 * sign, F32)
        assert np.array_equal(matrix.linear(x), product(q, np.ones(16, F32), x))


def test_narrow_and_wide_pairs_of_one_group() -> None:
    """Weights of both signs are dealt so that they cancel; a pair without that is of its own kind."""
    rng = np.random.default_rng(1)
    q = np.tile(np.array([64, 64, -64, -64], np.int8), (8, 40))
    q[5, 60:80] = 64
    q[2] = rng.integers(20, 40, 160)
    matrix = of_integers(q, np.ones(8, F32))
    narrow, wide = pairs(matrix)
    assert narrow[0] > 0
    assert wide[0] > 0
    assert narrow[0] + wide[0] == 20
    assert np.array_equal(matrix.to_dense(), q)
    for batch in (1, 2, 3, 4, 5, 6, 7, 8):
        x = np.where(rng.random((batch, 160)) < 0.5, -1, 1).astype(F32)
        assert np.array_equal(matrix.linear(x), product(q, np.ones(8, F32), x)), batch


def test_a_damaged_number_of_narrow_pairs_is_refused() -> None:
    packed = packed_of(SparseMatrix.from_dense(weights(16, 100, 0.5), dtype="int8"))
    good = packed.buffer("slots")
    at = int(good[64:72].view(np.uint64)[0]) + 8 * 3
    for change in (1, 2, 200, 255):
        bad = good.copy()
        bad[at] ^= change
        with pytest.raises(ValueError, match="buffer: expected a whole form; got damage"):
            Packed.from_buffers([bad])


def test_columns_that_quads_cannot_number() -> None:
    """Four times the last column fits 16 bits, or slots multiply."""
    most = 2**16 // STEP
    for cols, wanted in ((most, 40), (most + 1, 0)):
        q = np.zeros((3, cols), np.int8)
        q[0, [0, -1]], q[1, -1], q[2, -17:] = (5, 64), -64, 3
        matrix = of_integers(q, np.ones(3, F32))
        x = inputs(40, cols)
        with quads(True):
            assert packed_of(matrix).quad_rows(40) == wanted
            assert np.array_equal(matrix.linear(x), product(q, np.ones(3, F32), x))


def test_where_they_are_used() -> None:
    """With many rows of inputs and few weights; a part of a tile is left to slots."""
    sparse, dense = (
        packed_of(SparseMatrix.from_dense(weights(512, 768, s), dtype="int8")) for s in (0.95, 0.5)
    )
    assert [sparse.quad_rows(batch) for batch in (1, 8, 512)] == [0, 0, 512]
    assert sparse.quad_rows(256 + 1) == 256
    assert dense.quad_rows(512) == 0
    with quads(False):
        assert sparse.quad_rows(512) == 0
    x = inputs(257, 768)
    matrix = SparseMatrix(sparse)
    y = matrix.linear(x)
    with quads(False):
        assert np.array_equal(matrix.linear(x), y)
