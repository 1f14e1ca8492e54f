"""Which tensors are pruned, and which of them share one selection."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from sparsam.allocation import allocate_groups
from sparsam.config import PruningConfig, Scope
from sparsam.coupling import members, tied_sparsities
from sparsam.inputs.float_mode import standard_floats
from sparsam.inputs.names import NamePatterns, closest, matching
from sparsam.masks import Mask
from sparsam.orientation import Weights, mask_outputs_first
from sparsam.patterns import NM, Block, Pattern, Slices, Tied, Unstructured
from sparsam.selection import DTYPES, is_weight_dtype
from sparsam.tiles import count_pruned

# Tensors up to this size are handed to selection in batches, which are no larger than that.
_SMALL = 1 << 16
_BATCH = 1 << 22


@dataclass(frozen=True)
class Pool:
    """Tensors that share one selection: one threshold and one exact count.

    A name is in two pools if it is in two couplings.

    Attributes:
        names: The tensors.
        sparsity: Of all their groups together; in scope "layer" and "row" of each tensor or row.
        pattern: What a group is; couplings have their own groups.
        ties: The couplings among them.
        scope: What weights are compared with, as in `PruningConfig`.
        transposed: Which tensors are stored as (in, out).
    """

    names: tuple[str, ...]
    sparsity: float
    pattern: Pattern
    ties: tuple[Tied, ...] = ()
    scope: Scope = "global"
    transposed: frozenset[str] = frozenset()


def check_patterns(config: PruningConfig, names: Collection[str], *, stacklevel: int) -> None:
    """Raises ValueError for an override that matches no name; warns of other name patterns without effect."""
    excluded = NamePatterns(config.exclude)
    names = dict.fromkeys(names)
    for pattern in config.overrides:
        found = matching(pattern, names)
        if not found:
            msg = (
                f"overrides: expected names or patterns of tensors; got {pattern!r}, which matches none; "
                f"{closest(pattern, names)}"
            )
            raise ValueError(msg)
        if all(map(excluded.matches, found)):
            msg = f"overrides: {pattern!r} matches only tensors that exclude leaves dense"
            warnings.warn(msg, UserWarning, stacklevel=stacklevel + 1)
    for what, patterns in (("exclude", config.exclude), ("transposed", config.transposed)):
        for pattern in patterns:
            if not matching(pattern, names):
                msg = f"{what}: {pattern!r} matches no tensor"
                warnings.warn(msg, UserWarning, stacklevel=stacklevel + 1)


@standard_floats
def make_pools(
    arrays: Mapping[str, NDArray[Any]],
    config: PruningConfig,
    *,
    min_rank: int = 2,
    previous: Mapping[str, Mask] | None = None,
) -> list[Pool]:
    """Returns the pools of tensors that are pruned; a tensor in none of them stays dense.

    Args:
        arrays: Name -> array.
        config: The configuration.
        min_rank: Tensors with fewer axes are pruned only when named in overrides. If it is above 0, the same
            holds for integers and booleans, which are not weights.
        previous: Masks of an earlier step: an allocation other than uniform prunes at least as many groups of
            each tensor as these do. If that exceeds a tensor's share, the others get less.

    Raises:
        ValueError: Couplings or an allocation do not fit the tensors, or couplings contradict exclude or
            overrides.
        TypeError: A tensor to be pruned has a dtype that cannot be.
    """
    own_sparsities = tied_sparsities(config, arrays)
    tied = frozenset(members(config.ties))
    excluded, overridden = NamePatterns(config.exclude), NamePatterns(config.overrides)
    stored = NamePatterns(config.transposed)
    transposed = (
        frozenset(name for name in arrays if stored.matches(name)) if config.transposed else frozenset()
    )
    alone: Scope = "row" if config.scope == "row" else "layer"
    pooled: list[str] = []
    overrides: list[Pool] = []
    for name, array in arrays.items():
        if excluded.matches(name):
            continue
        if name not in tied:
            key = overridden.last(name)
            if key is not None:
                sparsity, pattern = config.overrides[key].settle(config)
                scope: Scope = "layer" if isinstance(pattern, (Block, Slices)) else alone
                own = transposed and transposed & {name}
                overrides.append(Pool((name,), sparsity, pattern, (), scope, own))
            elif array.ndim < min_rank or (min_rank and array.dtype.kind in "biu"):
                continue
            else:
                pooled.append(name)
        _check_dtype(name, array)
    target, pattern = config.target_sparsity, config.pattern
    free = tuple(tie for tie, own in zip(config.ties, own_sparsities, strict=True) if own is None)
    pools = [
        *(
            Pool(members((tie,)), own, pattern, (tie,), transposed=transposed)
            for tie, own in zip(config.ties, own_sparsities, strict=True)
            if own is not None
        ),
        *overrides,
    ]
    if config.scope != "global":
        shares = _shares(Weights({name: arrays[name] for name in pooled}, transposed), config, previous)
        each = [
            Pool((name,), shares[name], pattern, (), alone, transposed and transposed & {name})
            for name in pooled
        ]
        tie_pools = [Pool(members((tie,)), target, pattern, (tie,), transposed=transposed) for tie in free]
        return [*each, *tie_pools, *pools]
    # A single weight cannot be compared with a head.
    rivals = [(pooled, free)] if isinstance(pattern, (Block, Slices)) else [(pooled, ()), ([], free)]
    together = [
        Pool((*names, *members(ties)), target, pattern, ties, transposed=transposed)
        for names, ties in rivals
        if names or ties
    ]
    return together + pools


def batched(pools: Iterable[Pool], sizes: Mapping[str, int]) -> list[list[Pool]]:
    """Returns the pools in batches, in which small tensors of one pattern and scope are together."""
    batches: list[list[Pool]] = []
    open_: dict[tuple[Pattern, Scope], list[Pool]] = {}
    filled: dict[tuple[Pattern, Scope], int] = {}
    key: tuple[Pattern, Scope] = (Unstructured(), "layer")
    for pool in pools:
        size = sizes[pool.names[0]] if len(pool.names) == 1 else _SMALL + 1
        if pool.ties or pool.scope == "global" or size > _SMALL:
            batches.append([pool])
            continue
        if pool.pattern is not key[0] or pool.scope != key[1]:
            key = (pool.pattern, pool.scope)
        open_.setdefault(key, []).append(pool)
        filled[key] = filled.get(key, 0) + size
        if filled[key] >= _BATCH:
            batches.append(open_.pop(key))
            del filled[key]
    return batches + list(open_.values())


def _shares(weights: Weights, config: PruningConfig, previous: Mapping[str, Mask] | None) -> dict[str, float]:
    """The sparsity of each tensor: for "uniform" the target itself, since each tensor rounds by itself."""
    if config.allocation == "uniform":
        return dict.fromkeys(weights, config.target_sparsity)
    pattern = config.pattern
    assert not isinstance(pattern, NM)  # which PruningConfig refuses
    floors = None
    if previous:
        masks = {
            name: mask_outputs_first(previous[name]) if name in weights.transposed else previous[name]
            for name in weights
        }
        floors = {name: count_pruned(name, mask, pattern) for name, mask in masks.items()}
    return allocate_groups(weights, config.target_sparsity, config.allocation, pattern, floors=floors)


def _check_dtype(name: str, array: NDArray[Any]) -> None:
    if not is_weight_dtype(array.dtype):
        msg = (
            f"tensor {name!r}: expected one of the dtypes {', '.join(DTYPES)} in native byte order; got "
            f"{array.dtype}; convert it with .astype(), or exclude the tensor"
        )
        raise TypeError(msg)
