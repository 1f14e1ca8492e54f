"""Groups of weights as tiles of a matrix, for `Block` and `Slices` alike."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from sparsam import _core
from sparsam.masks import Mask
from sparsam.patterns import Block, Slices, Unstructured


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor as its matrix (out, everything else); a vector is one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def tiling_of(name: str, shape: tuple[int, ...], pattern: Block | Slices) -> tuple[int, int, int, int]:
    """Returns (rows, columns) of the matrix that the tensor is viewed as, then those of one group's tile."""
    if isinstance(pattern, Block):
        rows, cols = matrix_shape(shape)
        return rows, cols, min(pattern.rows, max(rows, 1)), min(pattern.cols, max(cols, 1))
    if not -len(shape) <= pattern.axis < len(shape):
        msg = f"tensor {name!r}: expected an axis for {pattern!r}; got shape {shape}; choose one that it has"
        raise ValueError(msg)
    axis = pattern.axis % len(shape)
    if shape[axis] % pattern.size:
        msg = (
            f"tensor {name!r}: expected an axis of a multiple of {pattern.size} for {pattern!r}; got shape "
            f"{shape}; choose a size that divides it, or exclude the tensor"
        )
        raise ValueError(msg)
    outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    cols = shape[axis] * inner
    return outer, cols, max(outer, 1), max(min(pattern.size * inner, cols), 1)


def count_groups(name: str, shape: tuple[int, ...], pattern: Unstructured | Block | Slices) -> int:
    """Returns how many groups a tensor has; ValueError for a shape that the pattern does not divide."""
    if isinstance(pattern, Unstructured):
        return math.prod(shape)
    rows, cols, tile_rows, tile_cols = tiling_of(name, shape, pattern)
    return math.ceil(rows / tile_rows) * math.ceil(cols / tile_cols)


def count_pruned(name: str, mask: Mask, pattern: Unstructured | Block | Slices) -> int:
    """Returns how many groups of a tensor a mask prunes."""
    if isinstance(pattern, Unstructured):
        return mask.size - mask.count
    kept = mask.to_array().astype(np.float32)
    return int((_core.tile_scores(kept, *tiling_of(name, mask.shape, pattern), 1) == 0).sum())


def tile_sizes(rows: int, cols: int, tile_rows: int, tile_cols: int) -> NDArray[np.float64]:
    """Returns how many elements each tile has."""

    def edges(length: int, tile: int) -> Iterable[int]:
        return (min(tile, length - start) for start in range(0, length, tile))

    return np.outer(list(edges(rows, tile_rows)), list(edges(cols, tile_cols))).astype(np.float64)
