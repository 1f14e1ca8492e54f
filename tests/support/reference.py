"""Slow NumPy oracles: the rules of selection written down as directly as possible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam import NM, Block, Slices


def magnitudes(x: NDArray[Any]) -> NDArray[np.float64]:
    return np.abs(x.astype(np.float64)).reshape(-1)


def prune_lowest(scores: NDArray[np.float64], k: int) -> NDArray[np.bool_]:
    """Keep mask: the k lowest of a flat array go, of equal ones those with the higher index."""
    order = np.lexsort((-np.arange(scores.size), scores))
    keep = np.ones(scores.size, np.bool_)
    keep[order[:k]] = False
    return keep


def threshold(arrays: Sequence[NDArray[Any]], sparsity: float) -> tuple[float, int, int, int]:
    flat = np.concatenate([magnitudes(a) for a in arrays]) if arrays else np.empty(0)
    k = round(sparsity * flat.size)
    if k == 0:
        return 0.0, 0, 0, 0
    value = float(np.sort(flat)[k - 1])
    return value, k, int((flat < value).sum()), int((flat == value).sum())


def select(arrays: Sequence[NDArray[Any]], sparsity: float) -> list[NDArray[np.bool_]]:
    flat = np.concatenate([magnitudes(a) for a in arrays])
    keep = prune_lowest(flat, round(sparsity * flat.size))
    ends = np.cumsum([a.size for a in arrays])[:-1]
    return [part.reshape(a.shape) for part, a in zip(np.split(keep, ends), arrays, strict=True)]


def select_rows(x: NDArray[Any], sparsity: float) -> NDArray[np.bool_]:
    """In each row by itself the round(sparsity * columns) last ones go of the descending stable order."""
    rows = matrix(x)
    keep = np.zeros(rows.shape, np.bool_)
    for scores, kept in zip(rows.astype(np.float64), keep, strict=True):
        order = np.argsort(-np.abs(scores), kind="stable")
        kept[order[: scores.size - round(sparsity * scores.size)]] = True
    return keep.reshape(x.shape)


def matrix(x: NDArray[Any]) -> NDArray[Any]:
    return x.reshape(1, -1) if x.ndim < 2 else x.reshape(x.shape[0], math.prod(x.shape[1:]))


def select_nm(x: NDArray[Any], pattern: NM) -> NDArray[np.bool_]:
    keep = [prune_lowest(magnitudes(g), pattern.m - pattern.n) for g in x.reshape(-1, pattern.m)]
    return np.array(keep, np.bool_).reshape(x.shape)


def labels(x: NDArray[Any], pattern: Block | Slices) -> NDArray[np.int64]:
    """The number of each element's group."""
    if isinstance(pattern, Slices):
        axis = pattern.axis % x.ndim
        index = np.arange(x.shape[axis]) // pattern.size
        shape = [-1 if i == axis else 1 for i in range(x.ndim)]
        return np.broadcast_to(index.reshape(shape), x.shape)
    rows, cols = matrix(x).shape
    tile_rows, tile_cols = min(pattern.rows, rows), min(pattern.cols, cols)
    across = math.ceil(cols / tile_cols)
    grid = (np.arange(rows) // tile_rows)[:, None] * across + np.arange(cols) // tile_cols
    return np.asarray(grid, np.int64).reshape(x.shape)


def group_scores(x: NDArray[Any], pattern: Block | Slices, norm: int) -> NDArray[np.float64]:
    sums = np.bincount(labels(x, pattern).reshape(-1), weights=magnitudes(x) ** norm)
    return sums.astype(np.float64)
