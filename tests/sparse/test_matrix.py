from __future__ import annotations

import math
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import sparsam
from sparsam import NM, Block, SparseMatrix, Unstructured, checkpoint
from sparsam._core import Packed
from sparsam.sparse import matmul

KERNELS = matmul.KERNELS
SPARSE = ("bitmask", "panels")  # kernels of ours, one for each instruction set
VALUES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
EPS = float(np.finfo(np.float32).eps)

ORACLES: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "relu": lambda z: np.maximum(z, 0),
    "gelu": lambda z: 0.5 * z * (1 + np.vectorize(math.erf, otypes=[float])(z / math.sqrt(2))),
    "gelu_tanh": lambda z: 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "silu": lambda z: z / (1 + np.exp(-z)),
}


def weights(rows: int, cols: int, sparsity: float, seed: int = 0, dtype: Any = np.float32) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, cols), dtype=np.float32)
    w[rng.random(w.shape) < sparsity] = 0
    return w.astype(dtype)


def inputs(*shape: int, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def fixed(w: NDArray[Any], kernel: str, *batches: int) -> SparseMatrix:
    """The matrix, told to use one kernel for these batches."""
    matrix = SparseMatrix.from_dense(w)
    for batch in batches:
        matrix.prepare(batch, kernel=kernel)
    return matrix


def check(
    y: NDArray[Any],
    w: NDArray[Any],
    x: NDArray[Any],
    bias: NDArray[Any] | None = None,
    activation: str | None = None,
) -> None:
    """Against float64: each of a row's nnz additions (and the bias's) rounds once, in float32.

    With u = eps / 2, a sum of n products in any order is off by at most n u / (1 - n u) times the sum of
    their magnitudes. Activations have slopes below 1.13, and are good to some eps of the larger of argument
    and result.
    """
    x64, w64 = x.astype(np.float64), w.astype(np.float64)
    exact = x64 @ w64.T
    size = np.abs(x64) @ np.abs(w64).T
    if bias is not None:
        exact += bias.astype(np.float64)
        size += np.abs(bias.astype(np.float64))
    bound = ((w != 0).sum(axis=1) + 2) * EPS / 2 * size + np.finfo(np.float32).tiny
    if activation is not None:
        result = ORACLES[activation](exact)
        bound = 1.13 * bound + 8 * EPS * np.maximum(np.abs(exact), np.abs(result))
        exact = result
    assert y.dtype == np.float32
    assert y.shape == exact.shape
    assert (np.abs(y - exact) <= bound).all(), float((np.abs(y - exact) / bound).max())


# Products


@pytest.mark.parametrize("dtype", VALUES)
@pytest.mark.parametrize("kernel", SPARSE)
def test_products_are_exact_to_rounding(isa: str, threads: int, kernel: str, dtype: str) -> None:
    x, bias = inputs(70, 333), inputs(300, seed=2)
    for sparsity in (0.0, 0.5, 0.95, 0.995):
        w = weights(300, 333, sparsity, dtype=VALUES[dtype])
        for batch in (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 70):
            check(fixed(w, kernel, batch).linear(x[:batch], bias), w, x[:batch], bias)


@pytest.mark.parametrize("kernel", SPARSE)
@pytest.mark.parametrize("cols", [0, 1, 2, 7, 8, 9, 31, 63, 64, 65, 127, 129, 255, 257, 513])
def test_sizes_that_no_vector_width_divides(isa: str, kernel: str, cols: int) -> None:
    for rows in (0, 1, 3, 4, 5, 17, 255, 257):
        w = weights(rows, cols, 0.6, seed=rows)
        for batch in (0, 1, 2, 7, 17, 40):
            x = inputs(batch, cols)
            check(fixed(w, kernel, batch).linear(x), w, x)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_no_and_all_nonzeros(isa: str, kernel: str, batch: int) -> None:
    x, bias = inputs(batch, 100), inputs(50, seed=3)
    empty = fixed(np.zeros((50, 100), np.float32), kernel, batch)
    assert (empty.nnz, empty.density, empty.sparsity) == (0, 0.0, 1.0)
    assert np.array_equal(empty.linear(x, bias), np.broadcast_to(bias, (batch, 50)))
    full = weights(50, 100, 0.0)
    matrix = fixed(full, kernel, batch)
    assert (matrix.nnz, matrix.density, matrix.sparsity) == (5000, 1.0, 0.0)
    check(matrix.linear(x, bias), full, x, bias)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(0, 300),
    cols=st.integers(0, 300),
    batch=st.integers(0, 80),
    sparsity=st.floats(0, 1),
    kernel=st.sampled_from(KERNELS),
    dtype=st.sampled_from(sorted(VALUES)),
    activation=st.sampled_from([None, *ORACLES]),
    seed=st.integers(0, 99),
)
def test_any_product(
    rows: int,
    cols: int,
    batch: int,
    sparsity: float,
    kernel: str,
    dtype: str,
    activation: Any,
    seed: int,
) -> None:
    w = weights(rows, cols, sparsity, seed, VALUES[dtype])
    x, bias = inputs(batch, cols, seed=seed), inputs(rows, seed=seed + 1)
    matrix = fixed(w, kernel, batch)
    assert matrix.to_dense().tobytes() == (w + w.dtype.type(0)).tobytes()
    for name in sparsam.available_isas():
        with sparsam.use_isa(name):
            check(matrix.linear(x, bias, activation), w, x, bias, activation)


@pytest.mark.parametrize("activation", ORACLES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("batch", [1, 5, 33])
def test_activations(isa: str, kernel: str, activation: Any, batch: int) -> None:
    w = weights(131, 64, 0.5)
    x = inputs(batch, 64) * np.geomspace(1e-3, 3, batch, dtype=np.float32)[:, None]
    bias = inputs(131, seed=5)
    matrix = fixed(w, kernel, batch)
    check(matrix.linear(x, bias, activation), w, x, bias, activation)
    check(matrix.linear(x, activation=activation), w, x, None, activation)


@pytest.mark.parametrize("activation", ORACLES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_activations_far_out(isa: str, kernel: str, activation: str) -> None:
    """Where exp and tanh overflow or vanish, results are still right; NaN stays NaN."""
    z = np.array([[-1e4, -100, -20, -5, -1e-30, 0, 1e-30, 5, 20, 100, 1e4]], np.float32)
    matrix = fixed(np.eye(z.size, dtype=np.float32), kernel, 1)
    with np.errstate(over="ignore"):
        exact = ORACLES[activation](z.astype(np.float64))
    y = matrix.linear(z, activation=activation)  # type: ignore[arg-type]
    assert (np.abs(y - exact) <= 8 * EPS * np.maximum(1, np.abs(z))).all()
    assert np.isnan(matrix.linear(np.full_like(z, np.nan), activation=activation)).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", VALUES)
@pytest.mark.parametrize("batch", [1, 2, 4, 16, 17, 40])
@pytest.mark.parametrize("blocks", [False, True])
def test_a_pruned_weight_multiplies_nothing(
    isa: str, kernel: str, dtype: str, batch: int, blocks: bool
) -> None:
    w = weights(45, 130, 0.7, dtype=VALUES[dtype])
    if blocks:
        w = np.repeat(w, 4, axis=0)
    x = inputs(batch, 130)
    rng = np.random.default_rng(9)
    for value in (np.inf, -np.inf, np.nan):
        x[rng.random(x.shape) < 0.01] = value
    y = fixed(w, kernel, batch).linear(x)
    for t in range(batch):
        for r in range(len(w)):
            kept = w[r] != 0
            with np.errstate(invalid="ignore"):
                exact = float((x[t, kept].astype(np.float64) * w[r, kept].astype(np.float64)).sum())
            if not math.isfinite(exact):
                assert y[t, r] == exact or (math.isnan(exact) and math.isnan(y[t, r]))
            else:
                assert y[t, r] == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_infinite_and_nan_weights(isa: str, kernel: str) -> None:
    w = np.array([[np.inf, 0, 1], [0, np.nan, 1], [0, 0, 1]], np.float32)
    y = fixed(w, kernel, 1).linear(np.array([[1, 2, 3]], np.float32))
    assert np.array_equal(y, np.array([[np.inf, np.nan, 3]], np.float32), equal_nan=True)
    y = fixed(w, kernel, 1).linear(np.array([[0, 2, 3]], np.float32))
    assert np.array_equal(y, np.array([[np.nan, np.nan, 3]], np.float32), equal_nan=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_numbers_take_the_dense_kernel_nowhere_wrong(kernel: str) -> None:
    w, x = weights(20, 30, 0.5), inputs(3, 30) * np.float32(1e30)  # x^2 overflows
    check(fixed(w, kernel, 3).linear(x), w, x)


def test_minus_zero_is_zero() -> None:
    w = np.array([[-0.0, 1.0], [2.0, -0.0]], np.float32)
    matrix = SparseMatrix.from_dense(w)
    assert matrix.nnz == 2
    assert not np.signbit(matrix.to_dense()).any()


# Arguments


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", ">f4", ">f8"])
def test_x_of_other_floats(dtype: str) -> None:
    w = weights(20, 30, 0.5)
    matrix = fixed(w, "panels", 6)
    x = inputs(6, 30).astype(np.dtype(VALUES.get(dtype, dtype)))
    check(matrix.linear(x), w, x.astype(np.float32))
    check(matrix.linear(x.tolist()), w, x.astype(np.float32))


def test_x_of_any_strides_and_dimensions() -> None:
    w = weights(20, 30, 0.5)
    matrix = SparseMatrix.from_dense(w)
    base = inputs(12, 60)
    for x in (
        base[::2, ::2],
        base.T[:30, :5].T,
        base[:, 30:],
        np.asfortranarray(base[:, :30]),
        base[::-1, ::-2],
    ):
        check(matrix.linear(x), w, x)
    x = inputs(2, 3, 4, 30)
    y = matrix.linear(x)
    assert y.shape == (2, 3, 4, 20)
    check(y.reshape(24, 20), w, x.reshape(24, 30))
    assert matrix.linear(x[0, 0, 0]).shape == (20,)
    assert matrix.linear(x[:0]).shape == (0, 3, 4, 20)
    check(matrix.linear(np.broadcast_to(x[0, 0, 0], (5, 30))), w, np.broadcast_to(x[0, 0, 0], (5, 30)))
    x.flags.writeable = False
    assert np.array_equal(matrix.linear(x), y)


def test_matmul_operator() -> None:
    w = weights(20, 30, 0.5)
    matrix = SparseMatrix.from_dense(w)
    x = inputs(30, 7)
    check((matrix @ x).T, w, x.T)
    check((matrix @ x[:, 0])[None], w, x[:, :1].T)
    assert (matrix @ x[:, :0]).shape == (20, 0)
    check((matrix @ np.asfortranarray(x)).T, w, x.T)
    for bad in (inputs(20, 7), inputs(30, 7, 2), np.float32(3)):
        with pytest.raises(
            ValueError, match=r"expected shape \(30,\) or \(30, n\) for a matrix of shape \(20, 30\)"
        ):
            matrix @ bad
    with pytest.raises(TypeError):
        inputs(7, 20) @ matrix


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_out(dtype: str) -> None:
    w, x = weights(20, 30, 0.5), inputs(6, 30)
    matrix = fixed(w, "bitmask", 6)
    y = matrix.linear(x)
    room = np.full((12, 40), 7, VALUES.get(dtype, dtype))
    for out in (room[:6, :20].copy(), room[::2, ::2], room.T[:20, :6].T):
        assert matrix.linear(x, out=out) is out
        assert np.array_equal(out, y.astype(room.dtype))
    assert (room[1::2, 21:] == 7).all()
    both = np.zeros((6, 50), np.float32)  # x and out side by side in one array do not overlap
    both[:, :30] = x
    matrix.linear(both[:, :30], out=both[:, 30:])
    assert np.array_equal(both[:, 30:], y)


def test_bias_is_converted() -> None:
    w, x = weights(20, 30, 0.5), inputs(6, 30)
    bias = inputs(40)[::2].astype(np.float64)
    y = SparseMatrix.from_dense(w).linear(x, bias.tolist())
    check(y, w, x, bias)


def test_wrong_arguments() -> None:
    matrix = SparseMatrix.from_dense(weights(20, 30, 0.5))
    x = inputs(6, 30)
    square = SparseMatrix.from_dense(weights(30, 30, 0.5))
    line = inputs(60)
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, r"x: expected shape \(..., 30\) for a matrix of shape \(20, 30\); got \(6, 29\)",
         lambda: matrix.linear(x[:, 1:])),
        (ValueError, r"x: expected shape .*; got \(\)", lambda: matrix.linear(np.float32(1))),
        (TypeError, "x: expected dtype float32 .*; got int64",
         lambda: matrix.linear(np.ones((6, 30), np.int64))),
        (TypeError, "x: expected dtype float32 .*; got complex64",
         lambda: matrix.linear(x.astype(np.complex64))),
        (TypeError, "x: expected dtype float32 .*; got bool", lambda: matrix.linear(x > 0)),
        (TypeError, "x: expected dtype float32 .*; got object", lambda: matrix.linear(x.astype(object))),
        (ValueError, r"bias: expected shape \(20,\) .*; got \(30,\)", lambda: matrix.linear(x, x[0])),
        (ValueError, r"bias: expected shape \(20,\) .*; got \(1, 20\)", lambda: matrix.linear(x, x[:1, :20])),
        (TypeError, "bias: expected dtype float32 .*; got int64",
         lambda: matrix.linear(x, np.zeros(20, np.int64))),
        (ValueError, "activation: expected None or one of relu, gelu, gelu_tanh, silu; got 'Relu'",
         lambda: matrix.linear(x, activation="Relu")),  # type: ignore[arg-type]
        (ValueError, r"out: expected shape \(6, 20\); got \(6, 30\)", lambda: matrix.linear(x, out=x.copy())),
        (TypeError, "out: expected an array of floats; got int64",
         lambda: matrix.linear(x, out=np.zeros((6, 20), np.int64))),
        (TypeError, "out: expected an array of floats; got list",
         lambda: matrix.linear(x, out=[0.0])),  # type: ignore[arg-type]
        (ValueError, "out: expected a writeable array; got a read-only one",
         lambda: matrix.linear(x, out=np.broadcast_to(np.zeros(20, np.float32), (6, 20)))),
        (ValueError, "out: expected separate memory; got an overlap with x", lambda: square.linear(x, out=x)),
        (ValueError, "out: expected separate memory; got an overlap with x",
         lambda: square.linear(line[:30], out=line[29:59])),
        (ValueError, "out: expected separate memory; got an overlap with x",
         lambda: square.linear(line[::2], out=line[:30])),
        (ValueError, "out: expected separate memory; got an overlap with bias",
         lambda: square.linear(line[:30], line[30:], out=line[30:])),
        (ValueError, "batches: expected numbers of at least 0; got -1", lambda: matrix.prepare(-1)),
        (ValueError, "kernel: expected one of dense, bitmask, panels; got 'blas'",
         lambda: matrix.prepare(1, kernel="blas")),
    ]  # fmt: skip
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


def test_from_dense() -> None:
    w = weights(20, 30, 0.5)
    assert SparseMatrix.from_dense(w.astype(np.float64)).dtype == np.float32
    assert SparseMatrix.from_dense(w.tolist()).dtype == np.float32
    for name, dtype in VALUES.items():
        assert SparseMatrix.from_dense(w.astype(dtype)).dtype == dtype
        for given_as in (dtype, np.dtype(dtype)):
            matrix = SparseMatrix.from_dense(w, dtype=given_as)
            assert matrix.dtype == dtype, name
            assert np.array_equal(matrix.to_dense(), w.astype(dtype))
    for view in (w.T, w[::2, ::-3], np.asfortranarray(w), w.astype(">f4"), np.broadcast_to(w[:1], (5, 30))):
        matrix = SparseMatrix.from_dense(view)
        assert matrix.shape == view.shape
        assert np.array_equal(matrix.to_dense(), view)
    for bad in (w[0], w[None], np.float32(1)):
        with pytest.raises(ValueError, match=r"expected a matrix \(out, in\)"):
            SparseMatrix.from_dense(bad)
    for kind in (np.int64, np.bool_, np.complex64, object):
        with pytest.raises(TypeError, match=r"w: expected dtype float16, .*; got "):
            SparseMatrix.from_dense(w.astype(kind))
    for dtype in (np.float64, np.int8):
        with pytest.raises(TypeError, match="expected one of float32, bfloat16, float16"):
            SparseMatrix.from_dense(w, dtype=dtype)


def test_what_a_smaller_dtype_rounds_to_zero_is_pruned() -> None:
    assert SparseMatrix.from_dense(np.array([[1e-300, 1.0]])).nnz == 1
    assert SparseMatrix.from_dense(np.array([[1e-30, 1.0]], np.float32), dtype=np.float16).nnz == 1


# Patterns, choices, memory


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
    packed = matrix.nbytes
    assert w.size / 8 + 4 * matrix.nnz <= packed <= w.size / 8 + 4 * matrix.nnz + 16 * 257 + 64
    matrix.prepare(1, kernel="bitmask")
    assert matrix.nbytes == packed
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


# Threads


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


# Files


def golden() -> SparseMatrix:
    """Two rows of nine columns: 1, -2 at 0 and 8; 0.5 at 3."""
    w = np.zeros((2, 9), np.float32)
    w[0, 0], w[0, 8], w[1, 3] = 1, -2, 0.5
    return SparseMatrix.from_dense(w)


GOLDEN = (
    b'{"__metadata__":{"sparsam":"SparseMatrix 1"},"shape":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},'
    b'"values":{"dtype":"F32","shape":[3],"data_offsets":[16,28]},'
    b'"bits":{"dtype":"U8","shape":[2,2],"data_offsets":[28,32]}}'
)
GOLDEN_DATA = bytes.fromhex(
    "0200000000000000 0900000000000000"  # shape
    "0000803f 000000c0 0000003f"  # values: 1, -2, 0.5
    "01 01 08 00"  # bits: columns 0 and 8; column 3
)


def test_golden_bytes(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    golden().save(file)
    header = GOLDEN + b" " * (-len(GOLDEN) % 8)
    assert file.read_bytes() == len(header).to_bytes(8, "little") + header + GOLDEN_DATA
    assert np.array_equal(SparseMatrix.load(file).to_dense(), golden().to_dense())


@pytest.fixture(params=["save", "pickle"])
def copy(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[SparseMatrix], SparseMatrix]:
    def through(matrix: SparseMatrix) -> SparseMatrix:
        if request.param == "pickle":
            again = pickle.loads(pickle.dumps(matrix))
            assert isinstance(again, SparseMatrix)
            return again
        matrix.save(tmp_path / "w.safetensors")
        return SparseMatrix.load(tmp_path / "w.safetensors")

    return through


@pytest.mark.parametrize("dtype", VALUES)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1), (3, 9), (64, 64), (100, 77)])
def test_a_copy_is_equal(
    copy: Callable[[SparseMatrix], SparseMatrix], shape: tuple[int, int], dtype: str
) -> None:
    w = weights(*shape, 0.6, dtype=VALUES[dtype])
    again = copy(SparseMatrix.from_dense(w))
    assert (again.shape, again.dtype, again.nnz) == (shape, w.dtype, int(np.count_nonzero(w)))
    assert np.array_equal(again.to_dense(), w)
    x = inputs(3, shape[1])
    check(again.linear(x), w, x)


def parts() -> dict[str, NDArray[Any]]:
    return {
        "shape": np.array([2, 9]),
        "bits": np.array([[1, 1], [8, 0]], np.uint8),
        "values": np.array([1, -2, 0.5], np.float32),
    }


MUTATIONS: dict[str, tuple[dict[str, NDArray[Any] | None], str]] = {
    "a tensor is missing": ({"bits": None}, "tensors: expected shape, bits and values"),
    "a tensor too many": ({"more": np.zeros(1)}, "tensors: expected shape"),
    "shape of other dtype": ({"shape": np.array([2, 9], np.int32)}, "two sizes as int64"),
    "three sizes": ({"shape": np.array([2, 9, 1])}, "two sizes"),
    "no sizes": ({"shape": np.empty(0, np.int64)}, "two sizes"),
    "a negative size": ({"shape": np.array([2, -9])}, "two sizes"),
    "more rows than bits": ({"shape": np.array([3, 9])}, r"expected uint8 \(3, 2\); got"),
    "more columns than bits": ({"shape": np.array([2, 17])}, r"expected uint8 \(2, 3\)"),
    "huge sizes": ({"shape": np.array([1 << 62, 1 << 62])}, "expected uint8"),
    "huge without columns": (
        {"shape": np.array([1 << 40, 0]), "bits": np.empty((1 << 40, 0), np.uint8)},
        "rows without columns",
    ),
    "huge without rows": (
        {
            "shape": np.array([0, 1 << 50]),
            "bits": np.empty((0, 1 << 47), np.uint8),
            "values": np.empty(0, np.float32),
        },
        "too large",
    ),
    "bits of other dtype": ({"bits": np.array([[1, 1], [8, 0]], np.int8)}, "expected uint8"),
    "flat bits": ({"bits": np.array([1, 1, 8, 0], np.uint8)}, "expected uint8"),
    "a bit past the last column": ({"bits": np.array([[1, 2], [8, 1]], np.uint8)}, "past the last column"),
    "a bit too many": ({"bits": np.array([[1, 1], [9, 0]], np.uint8)}, "3 values for 4 bits"),
    "a value too few": ({"values": np.ones(2, np.float32)}, "2 values for 3 bits"),
    "values of other dtype": ({"values": np.ones(3)}, "expected a vector of float32"),
    "integer values": ({"values": np.ones(3, np.int16)}, "expected a vector"),
    "a matrix of values": ({"values": np.ones((1, 3), np.float32)}, "expected a vector"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_files_are_refused(name: str, tmp_path: Path) -> None:
    changes, message = MUTATIONS[name]
    arrays = {key: array for key, array in (parts() | changes).items() if array is not None}
    file = tmp_path / "w.safetensors"
    checkpoint.save(file, arrays, {"sparsam": "SparseMatrix 1"})
    with pytest.raises(ValueError, match=rf"w.safetensors: expected a SparseMatrix .*{message}"):
        SparseMatrix.load(file)


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    checkpoint.save(file, parts())
    with pytest.raises(ValueError, match="metadata: expected"):
        SparseMatrix.load(file)
    checkpoint.save(file, parts(), {"sparsam": "SparseMatrix 2"})
    with pytest.raises(ValueError, match="metadata: expected"):
        SparseMatrix.load(file)
    file.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(ValueError, match="a zip archive"):
        SparseMatrix.load(file)
    with pytest.raises(FileNotFoundError):
        SparseMatrix.load(tmp_path / "none")


def test_repr() -> None:
    assert repr(golden()) == "SparseMatrix(2x9, float32, 3 nonzero, density 0.1667)"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("batch", [1, 5, 40])
@pytest.mark.parametrize("narrow", [False, True])
def test_activations_of_infinities_and_nan(isa: str, kernel: str, batch: int, narrow: bool) -> None:
    """As torch has them: -inf times a gate of 0 is NaN; everywhere in y."""
    special = np.array([-np.inf, np.inf, np.nan, -3e38, 3e38, -1e4, 0.0], np.float32)
    expected: dict[str, list[float]] = {
        "": special.tolist(),
        "relu": [0, np.inf, np.nan, 0, 3e38, 0, 0],
        "gelu": (gated := [np.nan, np.inf, np.nan, 0, 3e38, 0, 0]),
        "gelu_tanh": gated,
        "silu": gated,
    }
    w = np.eye(67, dtype=np.float32)
    x = np.resize(special, (batch, 67))
    for activation, values in expected.items():
        wanted = np.resize(np.array(values, np.float32), (batch, 67))
        if narrow:
            if kernel == "dense":
                continue
            packed = Packed.pack(w)
            packed.add(kernel)
            x16, y16 = x.astype(ml_dtypes.bfloat16), np.empty((batch, 67), ml_dtypes.bfloat16)
            packed.linear_at(kernel, x16.ctypes.data, True, batch, 0, activation, y16.ctypes.data)
            y = y16.astype(np.float32)
        else:
            y = fixed(w, kernel, batch).linear(x, activation=activation or None)  # type: ignore[arg-type]
        np.testing.assert_allclose(y, wanted, rtol=1e-2 if narrow else 1e-6, atol=1e-30)


def test_a_shape_beyond_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="shape too large"):
        SparseMatrix.from_dense(np.broadcast_to(np.ones((1, 1), np.float16), (2**61, 1)))


def test_a_misaligned_out_and_an_integer_of_numpy() -> None:
    matrix = SparseMatrix.from_dense(np.eye(8, dtype=np.float32))
    x = np.arange(24, dtype=np.float32).reshape(3, 8)
    for kernel in ("dense", "bitmask", "panels"):
        matrix.prepare(np.int64(3), kernel=kernel)
        out = np.frombuffer(bytearray(97), np.float32, offset=1).reshape(3, 8)
        assert matrix.linear(x, out=out) is out
        assert np.array_equal(out, x)
