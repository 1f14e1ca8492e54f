"""What SparseMatrix takes, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from matmul_cases import VALUES, check, fixed, inputs, weights
from sparsam import SparseMatrix


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
        (ValueError, "kernel: expected one of dense, bitmask, panels, slots; got 'blas'",
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
    for dtype in (np.float64, np.int16):
        with pytest.raises(TypeError, match="expected one of float32, bfloat16, float16"):
            SparseMatrix.from_dense(w, dtype=dtype)


def test_what_a_smaller_dtype_rounds_to_zero_is_pruned() -> None:
    assert SparseMatrix.from_dense(np.array([[1e-300, 1.0]])).nnz == 1
    assert SparseMatrix.from_dense(np.array([[1e-30, 1.0]], np.float32), dtype=np.float16).nnz == 1


def test_a_shape_beyond_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="shape: expected at most"):
        SparseMatrix.from_dense(np.broadcast_to(np.ones((1, 1), np.float16), (2**61, 1)))


def test_a_misaligned_out_and_an_integer_of_numpy() -> None:
    matrix = SparseMatrix.from_dense(np.eye(8, dtype=np.float32))
    x = np.arange(24, dtype=np.float32).reshape(3, 8)
    for kernel in ("dense", "bitmask", "panels", "slots"):
        matrix.prepare(np.int64(3), kernel=kernel)
        out = np.frombuffer(bytearray(97), np.float32, offset=1).reshape(3, 8)
        assert matrix.linear(x, out=out) is out
        assert np.array_equal(out, x)
