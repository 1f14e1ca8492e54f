from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from sparsam import Mask, SparseMatrix


def weights(rows: int = 20, cols: int = 30) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((rows, cols), dtype=np.float32)
    w[rng.random(w.shape) < 0.6] = 0
    return w


# Masks


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_from_mask_keeps_what_the_mask_keeps(dtype: Any) -> None:
    w = weights()
    keep = w > 0
    keep[3, :5] = True
    w[3, :5] = 0.0
    for mask in (keep, Mask.from_array(keep), np.asfortranarray(keep)):
        matrix = SparseMatrix.from_mask(w, mask, dtype=dtype)
        assert matrix.nnz == keep.sum()
        assert np.array_equal(matrix.to_dense(), np.where(keep, w, 0).astype(dtype))
        assert matrix.dtype == dtype
    x = np.ones((2, 30), np.float32)
    x[0, 0] = np.inf  # times a kept 0 it is a NaN, times a pruned weight nothing
    assert np.isnan(matrix.linear(x)[0, 3])
    assert not np.isnan(matrix.linear(x)[0, ~keep[:, 0]]).any()


def test_from_mask_refuses() -> None:
    w = weights()
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, r"mask: expected shape \(20, 30\), as w has; got \(20, 29\)",
         lambda: SparseMatrix.from_mask(w, w[:, 1:] > 0)),
        (ValueError, r"mask: expected shape", lambda: SparseMatrix.from_mask(w, Mask.ones((600,)))),
        (TypeError, "expected dtype bool", lambda: SparseMatrix.from_mask(w, w)),  # type: ignore[arg-type]
        (ValueError, r"w: expected a matrix", lambda: SparseMatrix.from_mask(w[0], w[0] > 0)),
    ]  # fmt: skip
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


# NumPy


def test_functions_of_numpy_get_the_dense_content() -> None:
    w = weights()
    matrix = SparseMatrix.from_dense(w)
    assert np.array_equal(np.asarray(matrix), w)
    assert np.array_equal(np.array(matrix, dtype=np.float64), w)
    assert np.asarray(matrix, dtype=np.float64).dtype == np.float64
    assert np.array_equal(np.where(matrix, 1, 0), w != 0)
    assert np.count_nonzero(matrix) == matrix.nnz
    assert np.array_equal(np.concatenate([matrix, w]), np.concatenate([w, w]))
    assert np.array_equal(np.dot(np.eye(20, dtype=np.float32), matrix), w)
    assert np.allclose(matrix, w)
    with pytest.raises(ValueError, match="copy: expected True or None"):
        matrix.__array__(copy=False)


ARITHMETIC: list[Callable[[Any], Any]] = [
    np.abs,
    np.sum,
    np.max,
    lambda m: m + 1,
    lambda m: np.ones(30) * m,
    lambda m: np.matmul(np.ones(20), m),
    lambda m: np.ones((3, 20)) @ m,
]


@pytest.mark.parametrize("call", ARITHMETIC)
def test_arithmetic_is_an_error(call: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError):
        call(SparseMatrix.from_dense(weights()))


def test_ufuncs_say_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"np.sqrt: expected arrays; got a SparseMatrix; use .*to_dense"):
        np.sqrt(SparseMatrix.from_dense(weights()))


DTYPES: list[Any] = [np.float32, np.float16, ml_dtypes.bfloat16, "int8", "int4"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrices_compare_element_by_element(dtype: Any) -> None:
    matrix = SparseMatrix.from_dense(weights(), dtype=dtype)
    w = matrix.to_dense()
    changed = w.copy()
    changed[w != 0] *= 2
    other, zero = SparseMatrix.from_dense(changed, dtype=dtype), w == 0
    assert zero.any()
    assert not zero.all()
    comparisons: list[tuple[Any, Any, NDArray[np.bool_]]] = [
        (matrix, matrix, np.ones_like(zero)),
        (matrix, other, w == other.to_dense()),
        (matrix, changed, zero),
        (changed, matrix, zero),
        (matrix, changed.tolist(), zero),
        (matrix, changed[:1], w == changed[:1]),
        (matrix, 0, zero),
        (0.0, matrix, zero),
        (np.float32(0), matrix, zero),
        (matrix, Mask.from_array(w != 0), w == (w != 0)),
        (Mask.from_array(w != 0), matrix, w == (w != 0)),
    ]
    for left, right, expected in comparisons:
        equal, different = left == right, left != right
        assert type(equal) is type(different) is np.ndarray
        assert equal.dtype == different.dtype == np.bool_
        assert np.array_equal(equal, expected)
        assert np.array_equal(different, ~expected)
    assert np.array_equal(np.not_equal(matrix, changed), ~zero)
    assert np.array_equal(matrix, w)
    np.testing.assert_array_equal(matrix, w)


def test_matrices_compare_with_tensors_and_those_of_scipy() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    matrix = SparseMatrix.from_dense(weights())
    csr = sparse.csr_array(matrix.to_dense() * 2)
    for left, right in ((matrix, csr), (csr, matrix), (matrix, sparse.coo_matrix(csr))):
        assert np.array_equal(left == right, weights() == 0)
        assert np.array_equal(left != right, weights() != 0)
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(weights() * 2)
    assert np.array_equal(matrix == tensor, weights() == 0)


def test_what_is_no_array_is_not_equal_to_a_matrix() -> None:
    matrix = SparseMatrix.from_dense(weights())
    for other in (None, "matrix", {}, object()):
        assert (matrix == other) is (other == matrix) is False
        assert (matrix != other) is (other != matrix) is True
    with pytest.raises(ValueError, match=r"broadcast|shape"):
        assert matrix == matrix.T
    with pytest.raises(TypeError, match=r"np.equal: expected arrays; got a SparseMatrix"):
        np.equal(matrix, 0, out=np.zeros((20, 30), np.bool_))


@pytest.mark.parametrize("shape", [(20, 30), (1, 1), (0, 5)])
def test_a_matrix_has_no_truth_value_and_no_hash(shape: tuple[int, int]) -> None:
    matrix = SparseMatrix.from_dense(np.ones(shape, np.float32))
    with pytest.raises(ValueError, match=r"shape \(\d+, \d+\): expected a single .*ambiguous; compare"):
        bool(matrix)
    with pytest.raises(TypeError, match="unhashable type: 'SparseMatrix'"):
        hash(matrix)
    assert np.array_equal(copy.deepcopy(matrix), pickle.loads(pickle.dumps(matrix)))


def test_transpose() -> None:
    w = weights()
    keep = w > 0
    keep[2, 2:9] = True
    w[2, 2:9] = 0
    matrix = SparseMatrix.from_mask(w, keep)
    assert matrix.T.shape == (30, 20)
    assert matrix.T.nnz == matrix.nnz
    assert np.array_equal(matrix.T.to_dense(), matrix.to_dense().T)
    assert np.array_equal(matrix.T.T.to_dense(), matrix.to_dense())
    assert SparseMatrix.from_dense(w[:0]).T.shape == (30, 0)


# SciPy


def test_scipy_and_back() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    w = weights()
    keep = w > 0
    keep[2, 2:9] = True
    w[2, 2:9] = 0
    matrix = SparseMatrix.from_mask(w, keep)
    csr = matrix.to_scipy()
    assert csr.nnz == matrix.nnz  # kept zeros are stored zeros
    assert np.array_equal(csr.toarray(), matrix.to_dense())
    csr.check_format(full_check=True)
    for form in ("csr", "csc", "coo", "lil", "dok", "bsr", "dia"):
        again = SparseMatrix.from_scipy(csr.asformat(form))
        assert np.array_equal(again.to_dense(), matrix.to_dense())
    assert SparseMatrix.from_scipy(csr).nnz == matrix.nnz
    assert SparseMatrix.from_scipy(csr.astype(np.float64), dtype=np.float16).dtype == np.float16
    twice = sparse.coo_array((np.ones(2), ([0, 0], [1, 1])), shape=(2, 3))
    assert SparseMatrix.from_scipy(twice).to_dense().tolist() == [[0, 2, 0], [0, 0, 0]]
    for shape in ((0, 5), (5, 0), (3, 4)):
        empty = SparseMatrix.from_dense(np.zeros(shape, np.float32))
        assert empty.to_scipy().shape == SparseMatrix.from_scipy(empty.to_scipy()).shape == shape
    narrow = SparseMatrix.from_dense(w, dtype=ml_dtypes.bfloat16)
    assert np.array_equal(narrow.to_scipy().toarray(), narrow.to_dense().astype(np.float32))


def test_scipy_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(TypeError, match="matrix: expected a SciPy sparse matrix; got ndarray"):
        SparseMatrix.from_scipy(weights())
    with pytest.raises(TypeError, match=r"w: expected dtype float16, .*; got int64"):
        SparseMatrix.from_scipy(sparse.csr_array(np.eye(3, dtype=np.int64)))
    matrix = SparseMatrix.from_dense(weights())
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match="SciPy: expected it to be installed; got none; pip install scipy"):
        matrix.to_scipy()
