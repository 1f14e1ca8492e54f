"""SparseMatrix: patterns, memory, threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sparsam
from matmul_cases import KERNELS, check, fixed, inputs, weights
from sparsam import NM, Block, SparseMatrix, Unstructured


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (4, 8), (3, 8), (16, 32)])
def test_nm_is_recognised(n: int, m: int) -> None:
    w = inputs(64, 128)
    w = sparsam.select(w, 1 - n / m, NM(n, m)).apply(w)
    assert SparseMatrix.from_dense(w).pattern == NM(n, m)
    w[np.nonzero(w)[0][0], np.nonzero(w)[1][0]] = 0  # a weight that was kept may be 0
    assert SparseMatrix.from_dense(w).pattern == NM(n, m)


@pytest.mark.parametrize("rows", [4, 8, 16])
def test_blocks_are_recognised(isa: str, rows: int) -> None:
    w = inputs(64, 130)
    w = sparsam.select(w, 0.8, Block(rows, 1)).apply(w)
    assert SparseMatrix.from_dense(w).pattern == Block(rows, 1)
    x, bias = inputs(40, 130), inputs(64, seed=3)
    for kernel in KERNELS:
        for batch in (1, 16, 17, 40):
            check(fixed(w, kernel, batch).linear(x[:batch], bias, "relu"), w, x[:batch], bias, "relu")


def test_no_pattern() -> None:
    zeros = (np.zeros((8, 8), np.float32), np.zeros((0, 4), np.float32))
    for w in (*zeros, *(weights(64, 128, sparsity) for sparsity in (0.0, 0.5, 0.95)), weights(3, 7, 0.5)):
        matrix = SparseMatrix.from_dense(w)
        assert matrix.pattern == Unstructured()
        assert matrix.pattern is matrix.pattern


def test_forms_and_copies_are_counted() -> None:
    w = weights(256, 512, 0.8)
    matrix = SparseMatrix.from_dense(w)
    assert matrix.nbytes == matrix._state.forms.nbytes
    matrix.prepare(1, kernel="bitmask")
    packed = matrix.nbytes
    assert w.size / 8 + 4 * matrix.nnz <= packed <= w.size / 8 + 4 * matrix.nnz + 16 * 257 + 64
    matrix.prepare(64, kernel="panels")
    panels = matrix.nbytes - packed
    assert panels > 4 * matrix.nnz
    matrix.prepare(64, kernel="dense")
    assert matrix.nbytes == packed + w.nbytes  # the panels are not needed any more
    matrix.linear(inputs(64, 512))
    matrix.linear(inputs(9, 512))
    assert matrix.nbytes == packed + w.nbytes
    matrix.prepare([1, 64], kernel="panels")
    assert matrix.nbytes == panels
    matrix.prepare([1, 64], kernel="dense")
    assert matrix.nbytes == w.nbytes
    matrix.prepare([1, 64], kernel="slots")
    assert 4 * matrix.nnz < matrix.nbytes < 8 * matrix.nnz


def test_concurrent_calls_on_one_matrix() -> None:
    w = weights(300, 200, 0.8)
    matrix = SparseMatrix.from_dense(w)
    xs = [inputs(batch, 200, seed=batch) for batch in (1, 2, 5, 16, 17, 33, 64, 100)]
    start = threading.Barrier(8)

    def work(i: int) -> list[NDArray[Any]]:
        start.wait()
        return [matrix.linear(xs[(i + j) % 8], None, "relu") for j in range(16)]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    for i, ys in enumerate(results):
        for j, y in enumerate(ys):
            check(y, w, xs[(i + j) % 8], None, "relu")


def test_threads_that_choose_and_multiply_at_once() -> None:
    w, x = weights(100, 80, 0.5), inputs(9, 80)
    for _ in range(10):
        matrix = SparseMatrix.from_dense(w)
        with ThreadPoolExecutor(4) as pool:
            for kernel in (*KERNELS, *KERNELS):
                pool.submit(matrix.prepare, 9, kernel=kernel)
                for y in pool.map(matrix.linear, [x, x, x]):
                    check(y, w, x)
