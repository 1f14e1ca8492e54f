"""Exact products with int8 and int4 values, as docs/formats.md defines them, and the rows of kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

import sparsam
from sparsam import SparseMatrix, _core

F32 = np.float32


def rows() -> Iterator[tuple[str, str]]:
    """Each instruction set, and the rows for int8 values that run under it."""
    for name in sparsam.available_isas():
        with sparsam.use_isa(name):
            found = _core.int8_isas()
        yield from ((name, int8) for int8 in found)


ROWS = list(rows())


@contextmanager
def row(name: str, int8: str) -> Iterator[None]:
    with sparsam.use_isa(name):
        _core.use_int8_isa(int8)
        try:
            yield
        finally:
            _core.use_int8_isa("")


def rounded(w: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """What docs/formats.md says of int8 values."""
    largest = np.abs(w).max(axis=1, initial=0).astype(F32)
    scales = np.where(largest > 0, largest / F32(64), F32(1))
    return np.clip(np.rint(w.astype(F32) / scales[:, None]), -64, 64).astype(np.int64), scales


def int8_product(
    q: NDArray[Any], scales: NDArray[np.float32], x: NDArray[Any], bias: NDArray[Any] | None = None
) -> NDArray[np.float32]:
    """The exact sums, and then one operation of float32 after the other."""
    x = x.astype(F32)
    largest = np.abs(x).max(axis=1, initial=0)
    x_scales = np.where(largest < F32(2.0**-96), F32(0), largest / F32(127))
    inverse = F32(127) / np.where(x_scales > 0, largest, F32(np.inf))
    sums = np.rint(x * inverse[:, None]).astype(np.int64) @ q.T.astype(np.int64)
    y: NDArray[np.float32] = sums.astype(F32) * (scales[None, :] * x_scales[:, None])
    return y if bias is None else y + bias


def int8_convolution(
    q: NDArray[Any],
    scales: NDArray[np.float32],
    x: NDArray[Any],
    geometry: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    bias: NDArray[Any] | None = None,
) -> NDArray[np.float32]:
    """The same of images (n, channels, height, width), each with one scale, and q (out, channels, ...).

    `geometry` is stride, padding and dilation.
    """
    stride, padding, dilation = geometry
    x = x.astype(F32)
    largest = np.abs(x).max(axis=(1, 2, 3), initial=0)
    x_scales = np.where(largest < F32(2.0**-96), F32(0), largest / F32(127))
    inverse = F32(127) / np.where(x_scales > 0, largest, F32(np.inf))
    whole = np.rint(x * inverse[:, None, None, None]).astype(np.int64)
    whole = np.pad(whole, ((0, 0), (0, 0), *((p, p) for p in padding)))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, q.shape[2:], strict=True)]
    windows = sliding_window_view(whole, reach, axis=(2, 3))
    windows = windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    sums = np.tensordot(windows, q.astype(np.int64), axes=((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2)
    y: NDArray[np.float32] = sums.astype(F32) * (scales * x_scales[:, None])[:, :, None, None]
    return y if bias is None else y + bias[:, None, None]


def int4_product(
    q: NDArray[Any],
    scales: NDArray[np.float32],
    width: int,
    x: NDArray[Any],
    bias: NDArray[Any] | None = None,
) -> NDArray[np.float32]:
    """The exact sums of each group of columns, and then one operation of float32 after the other."""
    x = x.astype(F32)
    largest = np.abs(x).max(axis=1, initial=0)
    x_scales = np.where(largest < F32(2.0**-96), F32(0), largest / F32(127))
    inverse = F32(127) / np.where(x_scales > 0, largest, F32(np.inf))
    rounded = np.rint(x * inverse[:, None]).astype(np.int64) + 128
    total = np.zeros((len(x), len(q)), F32)
    zero = np.zeros(len(q), F32)
    for group in range(scales.shape[1]):
        part = q[:, group * width : (group + 1) * width].astype(np.int64)
        total += (rounded[:, group * width : (group + 1) * width] @ part.T).astype(F32) * scales[:, group]
        zero += (128 * part.sum(axis=1)).astype(F32) * scales[:, group]
    y: NDArray[np.float32] = (total - zero) * x_scales[:, None]
    return y if bias is None else y + bias


def grid_of(matrix: SparseMatrix) -> tuple[NDArray[np.int64], NDArray[np.float32], int]:
    """What a matrix says it is: integers, scales, columns of a group; checked against its content."""
    packed = matrix._state.forms.readable()
    scales, width, dense = packed.scales(), packed.width, matrix.to_dense()
    columns = np.repeat(scales, width, axis=1)[:, : dense.shape[1]]
    q = np.rint(dense / columns).astype(np.int64)
    assert np.array_equal(q.astype(F32) * columns, dense)
    assert np.isin(q, packed.levels()).all()
    return q, scales, width
