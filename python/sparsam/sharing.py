"""Shared weights: one memory under two names, such as embeddings in a state dict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from numpy.typing import NDArray

from sparsam import _core
from sparsam.masks import _check_separate_memory, _ranges_overlap
from sparsam.pools import Pool


def find_shared(arrays: Mapping[str, NDArray[Any]], pools: Iterable[Pool]) -> dict[str, str]:
    """Returns later name -> first name of the same memory, for tensors to be pruned.

    Raises:
        ValueError: Two names are to be pruned differently, are coupled, or share only a part of their memory.
    """
    pools = list(pools)
    named = dict.fromkeys(name for pool in pools for name in pool.names)
    if not named or not _ranges_overlap([arrays[name] for name in named]):
        return {}
    pool_of: dict[str, Pool] = {}
    for pool in pools:
        for name in pool.names:
            pool_of.setdefault(name, pool)
    first: dict[tuple[Any, ...], str] = {}
    shared: dict[str, str] = {}
    pruned = {name: array for name, array in arrays.items() if name in pool_of and array.size}
    starts = _core.byte_ranges(list(pruned.values()))[:, 0].tolist()
    for (name, array), start in zip(pruned.items(), starts, strict=True):
        place = (start, array.shape, array.strides, array.dtype)
        other = first.setdefault(place, name)
        if other == name:
            continue
        if not _pruned_alike(name, pool_of[name], other, pool_of[other], array.size):
            msg = (
                f"tensors {other!r} and {name!r} share memory: expected one sparsity and pattern for both, "
                "and no ties; got two; exclude one of them, or give both the same override"
            )
            raise ValueError(msg)
        shared[name] = other
    own = {name: arrays[name] for name in first.values()}
    _check_separate_memory(own, own)
    return shared


def _pruned_alike(name: str, pool: Pool, other: str, other_pool: Pool, size: int) -> bool:
    """Whether two tensors are pruned the same way, up to the rounding of an allocation."""
    return (
        not pool.ties
        and not other_pool.ties
        and (pool.pattern, pool.scope, name in pool.transposed)
        == (other_pool.pattern, other_pool.scope, other in other_pool.transposed)
        and abs(pool.sparsity_of(name) - other_pool.sparsity_of(other)) * size <= 1 + 1e-6
    )
