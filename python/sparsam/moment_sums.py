"""Sums of products of the columns of two matrices, in tiles of float64 to which the core adds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam import _core

__all__ = ["MomentSums", "Scaled"]

_EDGE = 128  # rows and columns of a tile, at most
_PANEL = 32  # rows and columns of a tile are a multiple of this


@dataclass(frozen=True)
class Scaled:
    """A matrix whose column j is stored divided by `scale[j]`.

    Attributes:
        rows: (rows, width), float32 or float64, in C order.
        scale: (width,).
    """

    rows: NDArray[Any]
    scale: NDArray[np.float64]

    @classmethod
    def row(cls, values: NDArray[np.float64]) -> Scaled:
        """One row."""
        return cls(np.ascontiguousarray(values)[None], np.ones(len(values)))


@dataclass
class MomentSums:
    """A matrix of sums in tiles; if it is symmetric, only tiles on the diagonal and to its right.

    Each tile is contiguous, padded at the far edges. A large symmetric matrix takes half the memory, and sums
    stay in the cache while products are added to them.

    Attributes:
        height: Rows of the matrix.
        width: Columns of the matrix.
        symmetric: Whether both factors are the same matrix.
        tiles: (tiles, edge, edge), row by row of tiles.
    """

    height: int
    width: int
    symmetric: bool
    tiles: NDArray[np.float64] = field(repr=False)

    @classmethod
    def zeros(cls, height: int, width: int, *, symmetric: bool = False) -> MomentSums:
        """All sums 0."""
        (high, wide), (down, across) = _edges(height, width), _numbers(height, width)
        count = across * (across + 1) // 2 if symmetric else down * across
        return cls(height, width, symmetric, np.zeros((count, high, wide)))

    def add(self, a: Scaled, b: Scaled) -> None:
        """Adds A^T B; changes nothing if that fails."""
        edges = _edges(self.height, self.width)
        _core.add_products(self.tiles, a.rows, a.scale, b.rows, b.scale, edges, self.symmetric)

    def plus(self, other: MomentSums) -> MomentSums:
        """The sum of two, a new object."""
        return MomentSums(self.height, self.width, self.symmetric, self.tiles + other.tiles)

    def dense(
        self, factor: float = 0.0, left: NDArray[np.float64] | None = None, right: NDArray[Any] | None = None
    ) -> NDArray[np.float64]:
        """The whole matrix, plus factor * left right^T where these are given; a new array."""
        result = np.empty((self.height, self.width))
        high, wide = _edges(self.height, self.width)
        down, across = _numbers(self.height, self.width)
        places = [(i, j) for i in range(down) for j in range(i if self.symmetric else 0, across)]
        for (i, j), tile in zip(places, self.tiles, strict=True):
            rows, columns = slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide)
            part = result[rows, columns]
            part[:] = tile[: part.shape[0], : part.shape[1]]
            if self.symmetric and i == j:
                part[:] = np.triu(part) + np.triu(part, 1).T
            if left is not None and right is not None:
                part += left[rows, None] * right[columns] * factor
            if self.symmetric and i != j:
                result[columns, rows] = part.T
        return result


def _edges(height: int, width: int) -> tuple[int, int]:
    high, wide = (min(_EDGE, -(-n // _PANEL) * _PANEL) or _PANEL for n in (height, width))
    return high, wide


def _numbers(height: int, width: int) -> tuple[int, int]:
    high, wide = _edges(height, width)
    return -(-height // high), -(-width // wide)
