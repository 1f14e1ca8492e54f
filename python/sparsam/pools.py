"""Which tensors are pruned, and which of them share one selection."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from sparsam.allocation import allocate_groups
from sparsam.config import PruningConfig, Scope
from sparsam.coupling import members, tied_sparsities
from sparsam.inputs.dtypes import DTYPES, is_weight_dtype
from sparsam.inputs.float_mode import standard_floats
from sparsam.inputs.names import NamePatterns, closest, matching
from sparsam.masks import Mask
from sparsam.orientation import Weights, mask_outputs_first
from sparsam.patterns import NM, Block, Pattern, Slices, Tied
from sparsam.tiles import count_pruned

# The most weights in one call of selection, which holds all their scores; a single tensor may have more.
_BATCH = 1 << 20


@dataclass(frozen=True)
class Pool:
    """Tensors that are selected by the same rules: together, or each by itself.

    A name is in two pools if it is in two couplings.

    Attributes:
        names: The tensors.
        sparsity: In scope "global" of all their groups together, which share one threshold and one exact
            count. In scope "layer" and "row" of each tensor or row: the same for all, or name -> its own.
        pattern: What a group is; couplings have their own groups.
        ties: The couplings among them.
        scope: What weights are compared with, as in `PruningConfig`.
        transposed: Which tensors are stored as (in, out).
    """

    names: tuple[str, ...]
    sparsity: float | dict[str, float]
    pattern: Pattern
    ties: tuple[Tied, ...] = ()
    scope: Scope = "global"
    transposed: frozenset[str] = frozenset()

    def sparsity_of(self, name: str) -> float:
        """The sparsity of a tensor, or that which it shares with all others."""
        return self.sparsity[name] if isinstance(self.sparsity, dict) else self.sparsity

    def split(self) -> list[Pool]:
        """Returns the pools that each have one exact count: in scope "global" itself, else one per tensor."""
        if self.scope == "global":
            return [self]
        return [
            replace(self, names=(name,), sparsity=self.sparsity_of(name), transposed=self.transposed & {name})
            for name in self.names
        ]


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
    excluded = NamePatterns(config.exclude).among(arrays)
    overridden = NamePatterns(config.overrides).among(arrays)
    transposed = frozenset(NamePatterns(config.transposed).among(arrays))
    alone: Scope = "row" if config.scope == "row" else "layer"
    pooled: list[str] = []
    overrides: dict[tuple[Pattern, Scope], dict[str, float]] = {}
    accepted = None  # The dtype that was checked last; most often all tensors have the same.
    for name, array in arrays.items():
        if name in excluded:
            continue
        dtype = array.dtype
        if name not in tied:
            if name in overridden:
                override = config.overrides[overridden[name]]
                sparsity, pattern = override.resolved(config.target_sparsity, config.pattern)
                scope: Scope = "layer" if isinstance(pattern, (Block, Slices)) else alone
                overrides.setdefault((pattern, scope), {})[name] = sparsity
            elif array.ndim < min_rank or (min_rank and dtype.kind in "biu"):
                continue
            else:
                pooled.append(name)
        if dtype is not accepted:
            if not is_weight_dtype(dtype):
                _refuse_dtype(name, array)
            accepted = dtype
    target, pattern = config.target_sparsity, config.pattern
    free = tuple(tie for tie, own in zip(config.ties, own_sparsities, strict=True) if own is None)
    pools = [
        *(
            Pool(members((tie,)), own, pattern, (tie,), transposed=transposed)
            for tie, own in zip(config.ties, own_sparsities, strict=True)
            if own is not None
        ),
        *(
            Pool(tuple(sparsities), sparsities, own, (), scope, transposed)
            for (own, scope), sparsities in overrides.items()
        ),
    ]
    if config.scope != "global":
        weights = Weights({name: arrays[name] for name in pooled}, transposed)
        shares = _shares(weights, config, previous)
        each = [Pool(tuple(pooled), shares, pattern, (), alone, transposed)] if pooled else []
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


def batched(pools: Iterable[Pool], arrays: Mapping[str, NDArray[Any]]) -> Iterator[Pool]:
    """Yields pools small enough for their scores to be held in memory, with the same result as the given."""
    for pool in pools:
        if pool.scope == "global":
            yield pool
            continue
        names: list[str] = []
        filled = 0
        for name in pool.names:
            size = arrays[name].size
            if names and filled + size > _BATCH:
                yield replace(pool, names=tuple(names))
                names, filled = [], 0
            names.append(name)
            filled += size
        if len(names) == len(pool.names):
            yield pool
        elif names:
            yield replace(pool, names=tuple(names))


def _shares(
    weights: Weights, config: PruningConfig, previous: Mapping[str, Mask] | None
) -> float | dict[str, float]:
    """The sparsity of each tensor: for "uniform" the target itself, since each tensor rounds by itself."""
    if config.allocation == "uniform":
        return config.target_sparsity
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


def _refuse_dtype(name: str, array: NDArray[Any]) -> None:
    msg = (
        f"tensor {name!r}: expected one of the dtypes {', '.join(DTYPES)} in native byte order; got "
        f"{array.dtype}; convert it with .astype(), or exclude the tensor"
    )
    raise TypeError(msg)
