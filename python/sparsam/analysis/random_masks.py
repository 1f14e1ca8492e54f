"""Random masks that prune as many groups of every tensor and coupling as given ones."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam.coupling import _pruned, _tied_rival
from sparsam.masks import Mask
from sparsam.orientation import Weights, mask_as_stored, mask_outputs_first
from sparsam.patterns import NM, Pattern, Tied, Unstructured
from sparsam.pools import Pool
from sparsam.tiles import tiling_of

_Arrays = Mapping[str, NDArray[Any]]


def generator(purpose: str, name: str, seed: int) -> np.random.Generator:
    """A generator that depends on the purpose, the seed and the tensor's name, not on its position."""
    text = f"{purpose} {name}".encode(errors="surrogatepass")
    key = hashlib.blake2b(text, digest_size=16).digest()
    return np.random.default_rng([seed, int.from_bytes(key, "little")])


def count_groups(pool: Pool, arrays: _Arrays) -> int:
    """How many groups of the pattern compete in a pool."""
    tied = sum(_tied_rival(tie, arrays).groups for tie in pool.ties)
    alone = (name for name in pool.names if not any(name in tie.members for tie in pool.ties))
    weights = Weights(arrays, pool.transposed)
    return tied + sum(
        math.prod(_tiles(name, weights.outputs_first(name).shape, pool.pattern)[2]) for name in alone
    )


def draw_masks(
    arrays: _Arrays, masks: Mapping[str, Mask], pools: Collection[Pool], seed: int
) -> dict[str, Mask]:
    """Returns name -> a mask with as many groups of the pattern as the given one has, drawn at random.

    Coupled tensors are drawn together, group by group; a tensor in two couplings loses the groups of both.
    """
    patterns = {name: pool.pattern for pool in pools for name in pool.names}
    transposed = frozenset().union(*(pool.transposed for pool in pools))
    ties = {id(tie): tie for pool in pools for tie in pool.ties}.values()
    drawn: dict[str, Mask] = {}
    for tie in ties:
        for name, mask in _drawn_tie(tie, arrays, masks, seed).items():
            drawn[name] = drawn[name] & mask if name in drawn else mask
    for name, mask in masks.items():
        if name not in drawn:
            if name in transposed:
                drawn[name] = mask_as_stored(_drawn(name, mask_outputs_first(mask), patterns[name], seed))
            else:
                drawn[name] = _drawn(name, mask, patterns[name], seed)
    return {name: drawn[name] for name in masks}


def _drawn(name: str, mask: Mask, pattern: Pattern, seed: int) -> Mask:
    (rows, cols), (tile_rows, tile_cols), _ = _tiles(name, mask.shape, pattern)
    keep = mask.to_array().reshape(rows, cols)[::tile_rows, ::tile_cols]
    order = generator("mask", name, seed).permutation(keep.ravel())
    return _expanded(order.reshape(keep.shape), (rows, cols, tile_rows, tile_cols), mask.shape)


def _drawn_tie(tie: Tied, arrays: _Arrays, masks: Mapping[str, Mask], seed: int) -> dict[str, Mask]:
    rival = _tied_rival(tie, arrays)
    if not rival.groups:
        return {name: masks[name] for name in tie.members}
    keep = generator("tie", " ".join(tie.members), seed).permutation(~_pruned(rival, masks))
    drawn = {}
    for name, (rows, cols, tile_rows, tile_cols) in rival.tilings.items():
        grid = keep.reshape(math.ceil(rows / tile_rows), math.ceil(cols / tile_cols))
        drawn[name] = _expanded(grid, (rows, cols, tile_rows, tile_cols), arrays[name].shape)
    return drawn


def _expanded(groups: NDArray[np.bool_], tiling: tuple[int, int, int, int], shape: tuple[int, ...]) -> Mask:
    """Expands one flag for each group to one for each weight."""
    rows, cols, tile_rows, tile_cols = tiling
    whole = groups.repeat(tile_rows, axis=0).repeat(tile_cols, axis=1)[:rows, :cols]
    return Mask.from_array(whole.reshape(shape))


def _tiles(
    name: str, shape: tuple[int, ...], pattern: Pattern
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """A tensor as a matrix, the tile of it that is a group, and the grid of tiles."""
    if isinstance(pattern, (NM, Unstructured)):
        size = math.prod(shape)
        return (1, size), (1, 1), (1, size)
    rows, cols, tile_rows, tile_cols = tiling_of(name, shape, pattern)
    return (rows, cols), (tile_rows, tile_cols), (math.ceil(rows / tile_rows), math.ceil(cols / tile_cols))
