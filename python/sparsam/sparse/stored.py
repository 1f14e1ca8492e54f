"""The stored form of a matrix as named arrays, and the pattern that can be read from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from sparsam._core import Packed
from sparsam.patterns import NM, Block, Unstructured
from sparsam.sparse.arguments import DTYPES
from sparsam.sparse.int4 import group_of
from sparsam.sparse.int4_form import in_faster_form
from sparsam.sparse.int8 import MAX_COLUMNS, with_slots

__all__ = ["from_arrays", "recognise", "to_arrays"]

_GROUPS = (2, 4, 8, 16, 32)
_MAX_EMPTY_ROWS = 1 << 24  # the most rows of a matrix without columns, which still takes memory for its rows


def to_arrays(packed: Packed) -> dict[str, NDArray[Any]]:
    """Returns shape, bits, values (docs/formats.md); for int8 and int4 also scales, for int4 also levels."""
    shape = np.array([packed.rows, packed.cols], np.int64)
    arrays: dict[str, NDArray[Any]] = {"shape": shape, "bits": packed.bits(), "values": packed.values()}
    if packed.dtype == "int8":
        arrays["scales"] = packed.scales()
    if packed.dtype == "int4":
        arrays["scales"] = packed.scales().astype(ml_dtypes.bfloat16)
        arrays["levels"] = packed.levels()
    return arrays


def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> Packed:
    """Returns the core's object; ValueError for arrays that do not fit together."""
    int4 = "levels" in arrays
    int8 = "scales" in arrays and not int4
    beside = {"scales", "levels"} if int4 else {"scales"} if int8 else set()
    if arrays.keys() != {"shape", "bits", "values"} | beside:
        msg = (
            "tensors: expected shape, bits and values, with int8 also scales, with int4 also scales and "
            f"levels; got {', '.join(map(repr, arrays))}; name a file that SparseMatrix.save wrote"
        )
        raise ValueError(msg)
    shape, bits, values = arrays["shape"], arrays["bits"], arrays["values"]
    if shape.dtype != np.int64 or shape.shape != (2,) or shape.min() < 0:
        msg = f"shape: expected two sizes as int64; got {shape.dtype} {shape.tolist()}; save the matrix again"
        raise ValueError(msg)
    rows, cols = shape.tolist()
    if bits.dtype != np.uint8 or bits.shape != (rows, (cols + 7) // 8):
        msg = (
            f"bits: expected uint8 {(rows, (cols + 7) // 8)}; got {bits.dtype} {bits.shape}; save the matrix "
            "again"
        )
        raise ValueError(msg)
    if cols == 0 and rows > _MAX_EMPTY_ROWS:
        msg = (
            f"shape: expected at most {_MAX_EMPTY_ROWS} rows without columns; got {rows}; save the matrix "
            "again"
        )
        raise ValueError(msg)
    dtypes = ["int8"] if int8 else ["uint8"] if int4 else [*DTYPES]
    if values.dtype.name not in dtypes or values.ndim != 1:
        msg = (
            f"values: expected a vector of {', '.join(dtypes)}; got {values.dtype} {values.shape}; save the "
            "matrix again"
        )
        raise ValueError(msg)
    if int4:
        return _int4(rows, cols, arrays)
    if not int8:
        return Packed.from_parts(rows, cols, bits, values)
    scales = arrays["scales"]
    if scales.dtype != np.float32 or scales.shape != (rows,) or cols > MAX_COLUMNS:
        msg = (
            f"scales: expected float32 ({rows},) and at most {MAX_COLUMNS} columns; got {scales.dtype} "
            f"{scales.shape} and {cols} columns; save the matrix again"
        )
        raise ValueError(msg)
    return with_slots(Packed.from_int8_parts(rows, cols, bits, values, scales))


def _int4(rows: int, cols: int, arrays: Mapping[str, NDArray[Any]]) -> Packed:
    scales, levels = arrays["scales"], arrays["levels"]
    group = group_of(cols, scales.shape[1]) if scales.ndim == 2 and len(scales) == rows else None
    if scales.dtype != ml_dtypes.bfloat16 or group is None or cols > MAX_COLUMNS:
        msg = (
            f"scales: expected bfloat16, one for each 64 or 128 columns of {rows} rows, and at most "
            f"{MAX_COLUMNS} columns; got {scales.dtype} {scales.shape} and {cols} columns; save the matrix "
            "again"
        )
        raise ValueError(msg)
    if levels.dtype != np.int8 or levels.shape != (16,):
        msg = f"levels: expected int8 (16,); got {levels.dtype} {levels.shape}; save the matrix again"
        raise ValueError(msg)
    widened = scales.astype(np.float32)
    return in_faster_form(
        Packed.from_int4_parts(rows, cols, group, arrays["bits"], arrays["values"], widened, levels)
    )


def recognise(packed: Packed) -> NM | Block | Unstructured:
    """The pattern that the nonzero weights follow; a weight that was kept may happen to be 0."""
    rows, cols, nnz = packed.rows, packed.cols, packed.nnz
    if nnz in {0, rows * cols}:
        return Unstructured()
    bits = packed.bits()
    if height := packed.blocked:
        lines = bits[::height]
        while len(lines) % 2 == 0 and np.array_equal(lines[::2], lines[1::2]):
            height, lines = 2 * height, lines[::2]
        return Block(height, 1)
    keep = np.unpackbits(bits, axis=1, count=cols, bitorder="little")
    for size in _GROUPS:
        if cols % size == 0:
            groups = keep.reshape(-1, size).sum(axis=1, dtype=np.uint8)
            most = int(groups.max())
            if most < size and nnz > (most - 0.5) * len(groups):
                return NM(most, size)
    return Unstructured()
