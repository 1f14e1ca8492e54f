"""PyTorch's semi-structured tensors in the layout of CUTLASS: two of every four weights, and their positions.

The parts are `packed` and `meta` of `torch.sparse.SparseSemiStructuredTensorCUTLASS`, bit for bit those of
`torch/sparse/_semi_structured_conversions.py`. float32 is stored 1:2: of every two weights one. Metadata, 4
bits for each four weights, come in the order of CUTLASS's `ColumnMajorInterleaved<2>` (`host_reorder.h`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam.checkpoint.exchange.bitmask import misfit

__all__ = ["PARTS", "dense", "fits", "parts"]

PARTS = ("packed", "meta")

# dtype -> weights in a group of four halves, the dtype of a word of metadata, what divides rows and columns:
# the rows that are reordered together, the columns that PyTorch asks for.
_KINDS: dict[str, tuple[int, type[np.signedinteger[Any]], int, int]] = {
    "float32": (2, np.int16, 32, 32),
    "float16": (4, np.int16, 32, 64),
    "bfloat16": (4, np.int16, 32, 64),
    "int8": (4, np.int32, 16, 128),
}


def fits(array: NDArray[Any]) -> bool:
    """Returns whether a tensor is a matrix of the dtypes, shapes and zeros that the layout holds."""
    if array.ndim != 2 or not array.size or array.dtype.name not in _KINDS:
        return False
    group, _, rows, cols = _KINDS[array.dtype.name]
    if array.shape[0] % rows or array.shape[1] % cols:
        return False
    return bool((np.count_nonzero(array.reshape(-1, group), axis=1) <= group // 2).all())


def parts(array: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Returns the parts of a matrix that `fits`."""
    group, word, *_ = _KINDS[array.dtype.name]
    rows, cols = array.shape
    nonzero = (array != 0).reshape(-1, group)
    if group == 2:  # a float32 counts as two halves
        nonzero = np.repeat(nonzero, 2, axis=1)
    first, second = nonzero[:, 0], nonzero[:, 1]
    # Which two of four are stored, zeros among them where fewer are nonzero, as PyTorch chooses them.
    one = (~first & second) + 2 * (~first & ~second)
    two = ((first & second) | (~first & ~second) | nonzero[:, 3]) + 2 * ((~first & second) | ~second)
    if group == 2:
        packed = np.take_along_axis(array.reshape(-1, 2), one[:, None] // 2, 1)
    else:
        packed = np.take_along_axis(array.reshape(-1, 4), np.stack([one, two], 1), 1)
    quads = np.dtype(word).itemsize * 2
    codes = (one | two << 2).reshape(rows, -1, quads).astype(np.uint64)
    words = (codes << (4 * np.arange(quads, dtype=np.uint64))).sum(-1, dtype=np.uint64)
    unsigned = np.dtype(word).str.replace("i", "u")
    meta = np.empty(words.size, unsigned)
    meta[_places(words.shape[0], words.shape[1], word)] = words.astype(unsigned).ravel()
    return {"packed": packed.reshape(rows, cols // 2), "meta": meta.reshape(words.shape).view(word)}


def dense(name: str, given: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """Returns the dense matrix from its parts; ValueError if they do not fit together."""
    packed, meta = given["packed"], given["meta"]
    if packed.ndim != 2 or packed.dtype.name not in _KINDS:
        raise misfit(name, f"a matrix in one of {', '.join(_KINDS)}", f"{packed.dtype} {list(packed.shape)}")
    group, word, together, _ = _KINDS[packed.dtype.name]
    quads = np.dtype(word).itemsize * 2
    rows, cols = packed.shape[0], 2 * packed.shape[1]
    wanted = (rows, cols // (group * quads))
    if meta.dtype != word or meta.shape != wanted or rows % together or cols % (4 * quads):
        raise misfit(name, f"metadata {np.dtype(word)} {list(wanted)}", f"{meta.dtype} {list(meta.shape)}")
    words = meta.view(np.dtype(word).str.replace("i", "u")).ravel()[_places(*wanted, word)]
    codes = (words[:, None] >> (4 * np.arange(quads)).astype(words.dtype)).ravel() & 15
    pairs = np.stack([codes & 3, codes >> 2], 1).astype(np.int64)
    if (pairs[:, 0] >= pairs[:, 1]).any():
        raise misfit(name, "two rising places in every four", "others")
    if group == 2:
        if not np.isin(codes, (0b0100, 0b1110)).all():
            raise misfit(name, "one whole float32 in every two", "halves of them")
        pairs = pairs[:, :1] // 2
    array = np.zeros((rows * cols // group, group), packed.dtype)
    np.put_along_axis(array, pairs, packed.reshape(len(pairs), -1), 1)
    return array.reshape(rows, cols)


def _places(rows: int, cols: int, word: type[np.signedinteger[Any]]) -> NDArray[np.int64]:
    """The position in memory of each word of the metadata, row by row."""
    together, woven = (32, 4) if np.dtype(word).itemsize == 2 else (16, 2)
    row = np.arange(rows)[:, None]
    col = np.arange(cols)[None, :]
    row = row // together * together + row % 8 * woven + row % together // 8
    right = (row % 2 == 0) & (col % 2 == 1)
    left = (row % 2 == 1) & (col % 2 == 0)
    move = right.astype(np.int64) - left
    row, col = row + move, col - move
    places: NDArray[np.int64] = (col // 2 * rows * 2 + row * 2 + col % 2).ravel()
    return places
