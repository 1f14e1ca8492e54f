"""Pruning: configuration and weights in, pruned weights, masks and a report out.

This module combines the stages: tensors that share one selection form a pool, scores and selection turn each
pool into masks, and the masks are applied.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from operator import is_
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsam import scores
from sparsam.config import ConfigFields, PruningConfig, Scorer
from sparsam.coupling import select_tied, tied_patterns
from sparsam.inputs.checks import to_arrays
from sparsam.inputs.float_mode import standard_floats
from sparsam.inputs.tensors import is_tensor, to_torch
from sparsam.inputs.weights import check_writeable, warn_of_flags
from sparsam.masks import Mask, _check_separate_memory
from sparsam.orientation import mask_as_stored, outputs_first
from sparsam.patterns import Unstructured
from sparsam.pools import Pool, batched, check_patterns, make_pools
from sparsam.ranking import pruned_last, score_tensor
from sparsam.report import LayerStats, Report, count_nonzero, row_of
from sparsam.selection import Pruned, _refuse_nan, check_outputs, select_into
from sparsam.sharing import find_shared

if TYPE_CHECKING:
    from typing_extensions import Unpack

SINGLE = "weights"
"""The name of an array that was passed without one."""

WeightsT = TypeVar("WeightsT")
MasksT = TypeVar("MasksT")


@dataclass(frozen=True)
class PruningResult(Generic[WeightsT, MasksT]):
    """What `prune` returns.

    Attributes:
        weights: Name -> pruned array, dtypes and shapes as given; tensors left dense are the caller's own
            objects. One array if one array was given.
        masks: Name -> `Mask` of each tensor that was pruned. One mask if one array was given.
        report: The statistics of every tensor; `print` it.
    """

    weights: WeightsT
    masks: MasksT
    report: Report


@overload
def prune(
    weights: Mapping[str, ArrayLike],
    config: PruningConfig | None = ...,
    *,
    inplace: bool = ...,
    **changes: Unpack[ConfigFields],
) -> PruningResult[dict[str, NDArray[Any]], dict[str, Mask]]: ...
@overload
def prune(
    weights: ArrayLike,
    config: PruningConfig | None = ...,
    *,
    inplace: bool = ...,
    **changes: Unpack[ConfigFields],
) -> PruningResult[NDArray[Any], Mask]: ...
def prune(
    weights: Mapping[str, ArrayLike] | ArrayLike,
    config: PruningConfig | None = None,
    *,
    inplace: bool = False,
    **changes: Unpack[ConfigFields],
) -> PruningResult[Any, Any]:
    """Prunes weights to the target sparsity of a configuration, at once.

    In each pool of tensors (one tensor, or in global scope all of them) exactly `round(sparsity * n)` of the
    n groups of the pattern are zeroed, in scope "row" of each row; an allocation gives each tensor its own
    sparsity, such that the total is `round(target_sparsity * N)` of all N groups. Among equal scores the
    earlier tensor and the lower flat index are kept. Tensors coupled by the configuration's `ties` are pruned
    together, group by group.

    Args:
        weights: Name -> array of float16, bfloat16, float32 or float64, of any shape and strides; or one
            array. Torch tensors and Parameters on the CPU, such as those of a state dict, are returned as
            tensors without gradient. Nested lists are converted by NumPy, integers to float64. Tensors with
            fewer than two axes and arrays of integers or booleans stay dense unless named in `overrides`; a
            single array is pruned whatever its shape; its name in `exclude` and `overrides` is "weights".
            Arrays with the same memory under two names are pruned once, counted once, and returned as one.
        config: What to do; `PruningConfig()` if left out.
        inplace: Zero the pruned weights in the caller's arrays and return those. If a tensor cannot be
            pruned, or the user stops the call (KeyboardInterrupt), others may already be pruned; each is
            either unchanged or completely pruned.
        **changes: Fields of `PruningConfig` to set on top of `config`: `prune(w, target_sparsity=0.9)`.

    Returns:
        The pruned weights, their masks and a report. Arrays are new except with `inplace` and for tensors
        left dense.

    Raises:
        ValueError: An override matches no tensor; a tensor has a NaN, or a shape that the pattern does not
            divide; couplings do not fit the tensors, `exclude` or `overrides`; tensors share memory and are
            to be pruned differently, or overlap; with `inplace`, a tensor is read-only, not an array, or
            overlaps another; a field of the configuration is wrong.
        TypeError: A tensor to be pruned has another dtype, or is a torch tensor that NumPy cannot read or
            that requires a gradient; `weights` is a model.

    Warns:
        UserWarning: A pattern in `exclude` or `transposed` matches no tensor, or one in `overrides` only
            excluded ones; a tensor to be pruned has only zeros and ones.
    """
    settings = configured(config, changes)
    named = weights if isinstance(weights, Mapping) else {SINGLE: weights}
    arrays = to_arrays(named)
    check_patterns(settings, arrays, stacklevel=2)
    result = _prune(named, arrays, settings, inplace=inplace, min_rank=2 if named is weights else 0)
    if named is weights:
        return result
    mask = result.masks.get(SINGLE)
    if mask is None:
        mask = Mask.ones(arrays[SINGLE].shape)
    return PruningResult(result.weights[SINGLE], mask, result.report)


class MagnitudePruner:
    """Prunes one layer at a time by magnitude, and keeps the statistics.

    Attributes:
        config: The configuration; its method is "magnitude", its scope "layer" or "row", its allocation
            "uniform".
        stats: The statistics of each call of `prune_layer`, in order.
    """

    def __init__(self, config: PruningConfig | None = None) -> None:
        """Takes the configuration, or the default; ValueError unless it prunes single layers by magnitude."""
        self.config = configured(config)
        self.stats: list[LayerStats] = []
        if not scores.traits(scores.resolve(self.config.method)).ranks_by_magnitude:
            msg = (
                "MagnitudePruner: method: expected 'magnitude' or another that ranks by magnitude; got "
                f"{self.config.method!r}; use sparsam.prune"
            )
            raise ValueError(msg)
        if self.config.scope == "global" or self.config.allocation != "uniform" or self.config.ties:
            wanted = "scope 'layer' or 'row', allocation 'uniform' and no ties"
            msg = (
                f"MagnitudePruner: expected {wanted}, since it sees one layer; got {self.config!r}; "
                "use sparsam.prune"
            )
            raise ValueError(msg)

    def prune_layer(self, name: str, weights: ArrayLike) -> tuple[NDArray[Any], LayerStats]:
        """Prunes one tensor, whatever its shape.

        Args:
            name: The tensor's name, as used in `exclude` and `overrides` of the configuration.
            weights: Anything that NumPy can turn into an array; integers become float64. Not modified.

        Returns:
            The pruned array (a tensor if a torch tensor was given), and its statistics, which are also
            appended to `stats`.

        Raises:
            ValueError: A NaN, or a shape that the pattern does not divide.
            TypeError: A dtype other than float16, bfloat16, float32, float64 and integers.
        """
        array = to_arrays({name: weights})[name]
        arrays = {name: array.astype(np.float64) if array.dtype.kind in "biu" else array}
        given = {name: weights} if is_tensor(weights) else arrays
        result = _prune(given, arrays, self.config, inplace=False, min_rank=0)
        (stats,) = result.report.layers
        self.stats.append(stats)
        return result.weights[name], stats


def configured(config: PruningConfig | None, changes: ConfigFields | None = None) -> PruningConfig:
    """Returns `config`, or the default one, with the changes applied (`PruningConfig.with_changes`)."""
    changes = changes or {}
    if config is None:
        return PruningConfig(**changes)
    if not isinstance(config, PruningConfig):
        msg = (
            f"config: expected a PruningConfig; got {config!r}; pass fields by name, as in "
            "target_sparsity=0.9"
        )
        raise TypeError(msg)
    return config.with_changes(**changes) if changes else config


@standard_floats
def prune_pools(
    arrays: Mapping[str, NDArray[Any]],
    pools: Collection[Pool],
    method: Scorer,
    outs: Mapping[str, NDArray[Any]],
    *,
    previous: Mapping[str, Mask] | None = None,
    checked: bool = False,
) -> Pruned:
    """Selects weights in each pool and writes the pruned tensors.

    Args:
        arrays: Name -> array.
        pools: What `make_pools` returned.
        method: The scorer.
        outs: Name -> array that receives the pruned tensor; may be the same array.
        previous: Masks of an earlier step; what they pruned stays pruned, as long as no pool's sparsity
            shrinks.
        checked: Whether the outputs are known to fit, and to share no memory.

    Returns:
        Name -> mask of each tensor in a pool, in the order of `arrays`, and how many of its weights are not
        zero.
    """
    norm = scores.traits(method).norm
    masks: dict[str, Mask] = {}
    nonzero: dict[str, int] = {}
    tied: dict[str, Mask] = {}
    for pool in batched(pools, arrays):
        if not pool.ties:
            pruned = _prune_pool(arrays, pool, method, outs, previous, checked=checked)
            masks |= pruned.masks
            nonzero |= pruned.nonzero
            continue
        for name, mask in select_tied(
            arrays,
            pool.sparsity_of(pool.names[0]),
            pool.ties,
            score=lambda name, pool=pool: score_tensor(  # type: ignore[misc]
                method, name, arrays[name], transposed=name in pool.transposed
            ),
            alone=dict.fromkeys(pool.names, pool.pattern),
            transposed=pool.transposed,
            norm=norm,
            previous=previous,
        ).items():
            tied[name] = tied[name] & mask if name in tied else mask
    # Only now, since a tensor in two couplings is scored twice with its original values.
    nonzero |= {name: mask.write(arrays[name], outs[name]) for name, mask in tied.items()}
    masks |= tied
    if tied or len(pools) > 1:  # The masks of one pool are in that order already.
        masks = {name: masks[name] for name in arrays if name in masks}
    return Pruned(masks, nonzero)


def _prune_pool(
    arrays: Mapping[str, NDArray[Any]],
    pool: Pool,
    method: Scorer,
    outs: Mapping[str, NDArray[Any]],
    previous: Mapping[str, Mask] | None,
    *,
    checked: bool,
) -> Pruned:
    """`prune_pools` for one pool without ties."""
    norm, pattern, scope = scores.traits(method).norm, pool.pattern, pool.scope
    transposed = pool.transposed.intersection(pool.names)
    to_transpose = transposed if scope == "row" or pattern != Unstructured() else frozenset()
    ranked = {
        name: score_tensor(method, name, arrays[name], transposed=name in transposed) for name in pool.names
    }
    if to_transpose:
        within = [name for name in ranked if name in to_transpose]
        _refuse_nan(
            [ranked[name] for name in within], within
        )  # With its place in the tensor as it is stored.
    fused = (
        previous is None
        and not to_transpose
        and all(map(is_, ranked.values(), map(arrays.__getitem__, ranked)))
    )

    if fused and not checked:
        check_outputs(ranked, outs)

    def select(scored: dict[str, NDArray[Any]]) -> Pruned:
        viewed = (
            scored | {name: outputs_first(scored[name]) for name in to_transpose} if to_transpose else scored
        )
        found = select_into(
            viewed, pool.sparsity, pattern, scope=scope, norm=norm, out=outs if fused else None
        )
        if not to_transpose:
            return found
        return Pruned(
            found.masks | {name: mask_as_stored(found.masks[name]) for name in to_transpose}, found.nonzero
        )

    chosen, nonzero = select(ranked)
    if previous is not None and any((mask & ~previous[name]).count for name, mask in chosen.items()):
        chosen = select({name: pruned_last(ranked[name], previous[name], norm) for name in ranked}).masks
    if not fused:
        nonzero = {name: mask.write(arrays[name], outs[name]) for name, mask in chosen.items()}
    return Pruned(chosen, nonzero)


def describe(
    arrays: Mapping[str, NDArray[Any]],
    masks: Mapping[str, Mask],
    pools: Collection[Pool],
    nonzero: Mapping[str, int] = MappingProxyType({}),
    shared: Mapping[str, str] = MappingProxyType({}),
) -> Report:
    """Returns the report on the pruned tensors, and on those left dense.

    Tensors in `nonzero` (name -> count of nonzero weights) are not read again. `shared` maps the later name
    of a shared tensor to the first; it is counted once.
    """
    patterns: dict[str, str] = {}
    for pool in pools:
        patterns |= dict.fromkeys(pool.names, str(pool.pattern))
    patterns |= tied_patterns(tied for pool in pools for tied in pool.ties)
    # The deferred rows are made from these: nothing that may change until then, and nothing large.
    shapes, dtypes = [array.shape for array in arrays.values()], [array.dtype for array in arrays.values()]
    kept = {name: mask.count for name, mask in masks.items()}
    uncounted = [name for name in arrays if name not in nonzero and name not in shared]
    nonzero = {**nonzero, **{name: count_nonzero(arrays[name]) for name in uncounted}}

    def rows() -> Iterator[LayerStats]:
        for name, shape, dtype in zip(names, shapes, dtypes, strict=True):
            if name in shared:
                yield LayerStats(name, 0, 0, 0.0, shape, dtype.name, f"shared with {shared[name]}")
            else:
                pruned = math.prod(shape) - kept[name] if name in kept else 0
                yield row_of(name, shape, dtype, pruned, nonzero[name], patterns.get(name, "dense"))

    names = list(arrays)
    return Report.deferred(rows)


@standard_floats
def _prune(
    weights: Mapping[str, Any],
    arrays: Mapping[str, NDArray[Any]],
    config: PruningConfig,
    *,
    inplace: bool,
    min_rank: int,
) -> PruningResult[dict[str, Any], dict[str, Mask]]:
    pools = make_pools(arrays, config, min_rank=min_rank)
    pooled = {name for pool in pools for name in pool.names}
    names = [name for name in arrays if name in pooled]
    if min_rank:
        warn_of_flags(arrays, names, stacklevel=4)  # One for `standard_floats`.
    shared: dict[str, str] = {}
    if inplace:
        for name in names:
            check_writeable(name, weights[name], arrays[name])
        outs = {name: arrays[name] for name in names}
        _check_separate_memory(arrays, outs)
    else:
        shared = find_shared(arrays, pools)
        if shared:
            first = {name: array for name, array in arrays.items() if name not in shared}
            pools = make_pools(first, config, min_rank=min_rank)
        outs = {name: np.empty_like(arrays[name], order="C") for name in names if name not in shared}
    masks, nonzero = prune_pools(arrays, pools, scores.resolve(config.method), outs, checked=True)
    report = describe({**arrays, **outs}, masks, pools, nonzero, shared)
    if shared:
        masks = {name: masks[shared.get(name, name)] for name in names}
    if inplace:
        return PruningResult(dict(weights), masks, report)
    pruned = {
        name: out if weights[name] is arrays[name] or not is_tensor(weights[name]) else to_torch(out)
        for name, out in outs.items()
    }
    pruned |= {name: pruned[other] for name, other in shared.items()}
    return PruningResult({**weights, **pruned}, masks, report)
