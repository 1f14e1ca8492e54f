"""Pruning: configuration and weights in, pruned weights, masks and a report out.

This is where the stages meet: a `plan` says which tensors share one selection, scores and selection turn each
pool of them into masks, and the masks are applied.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Generic, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsam import scores
from sparsam._checks import to_arrays
from sparsam.allocation import _allocate
from sparsam.config import Override, PruningConfig, Scorer
from sparsam.coupling import members, select_tied, tied_patterns, tied_sparsities
from sparsam.masks import Mask, _check_apart
from sparsam.patterns import NM, Block, Pattern, Slices, Tied
from sparsam.report import LayerStats, Report, measure
from sparsam.selection import DTYPES, count_pruned, is_weight_dtype, pruned_last, score_tensor, select_many

SINGLE = "weights"
"""What a tensor that came without a name is called."""

WeightsT = TypeVar("WeightsT")
MasksT = TypeVar("MasksT")


@dataclass(frozen=True)
class PruningResult(Generic[WeightsT, MasksT]):
    """What `prune` returns.

    Attributes:
        weights: Name -> pruned array, dtypes and shapes as they came; tensors left dense are the caller's own
            objects. One array if one array was given.
        masks: Name -> `Mask` of each tensor that was pruned. One mask if one array was given.
        report: The statistics of every tensor; `print` it.
    """

    weights: WeightsT
    masks: MasksT
    report: Report


@dataclass(frozen=True)
class Pool:
    """Tensors that share one selection: one threshold and one exact count, or those of each row.

    A name stands in two pools if it is in two ties.
    """

    names: tuple[str, ...]
    sparsity: float
    pattern: Pattern
    ties: tuple[Tied, ...] = ()
    scope: str = "global"


@overload
def prune(
    weights: Mapping[str, ArrayLike],
    config: PruningConfig | None = ...,
    *,
    inplace: bool = ...,
    **changes: Any,
) -> PruningResult[dict[str, NDArray[Any]], dict[str, Mask]]: ...
@overload
def prune(
    weights: ArrayLike, config: PruningConfig | None = ..., *, inplace: bool = ..., **changes: Any
) -> PruningResult[NDArray[Any], Mask]: ...
def prune(
    weights: Mapping[str, ArrayLike] | ArrayLike,
    config: PruningConfig | None = None,
    *,
    inplace: bool = False,
    **changes: Any,
) -> PruningResult[Any, Any]:
    """Prunes weights to the target sparsity of a configuration, at once.

    In each pool of tensors (one tensor, or in global scope all of them) exactly `round(sparsity * n)` of the
    n groups of the pattern are zeroed, in scope "row" of each row; an allocation gives each tensor a sparsity
    of its own, such that the total is `round(target_sparsity * N)` of all N groups. Among equal scores the
    earlier tensor and the lower flat index are kept. Tensors tied by `ties` of the configuration are pruned
    together, group by group.

    Args:
        weights: Name -> array of float16, bfloat16, float32 or float64, of any shape and strides; or one
            array. What is no array (nested lists) goes through NumPy, integers as float64. Tensors with fewer
            than two axes stay dense unless named in `overrides`; one array given by itself is pruned whatever
            its shape, and patterns know it as "weights".
        config: What to do; `PruningConfig()` if left out.
        inplace: Zero the pruned weights in the caller's arrays and return those. If a tensor turns out to be
            unfit, the ones before it are pruned already.
        **changes: Fields of `PruningConfig` to set on top of `config`: `prune(w, target_sparsity=0.9)`.

    Returns:
        The pruned weights, their masks and a report. Arrays are new, but for `inplace` and tensors left
        dense.

    Raises:
        ValueError: An override matches no tensor; a tensor has a NaN, or a shape that the pattern does not
            divide; ties do not fit the tensors, `exclude` or `overrides`; `inplace` meets what is read-only,
            no array, or in the memory of another tensor; a field of the configuration is wrong.
        TypeError: A tensor to be pruned has another dtype.

    Warns:
        UserWarning: A pattern in `exclude` matches no tensor, or one in `overrides` only excluded ones.
    """
    settings = configured(config, changes)
    named = weights if isinstance(weights, Mapping) else {SINGLE: weights}
    arrays = to_arrays(named)
    check_patterns(settings, arrays, stacklevel=2)
    result = _prune(named, arrays, settings, inplace=inplace, min_rank=2 if named is weights else 0)
    if named is weights:
        return result
    mask = result.masks.get(SINGLE, Mask.ones(arrays[SINGLE].shape))
    return PruningResult(result.weights[SINGLE], mask, result.report)


class MagnitudePruner:
    """Prunes one layer at a time by magnitude, and keeps the statistics.

    Attributes:
        config: The configuration; its method is "magnitude", its scope "layer" or "row", its allocation
            "uniform".
        stats: The statistics of each call of `prune_layer`, in order.
    """

    def __init__(self, config: PruningConfig | None = None) -> None:
        """Takes the configuration, or the default; ValueError for what is not about magnitudes in a layer."""
        self.config = configured(config, {})
        self.stats: list[LayerStats] = []
        if not isinstance(scores.resolve(self.config.method), scores.Magnitude):
            msg = (
                f"MagnitudePruner: expected method 'magnitude'; got {self.config.method!r}; use sparsam.prune"
            )
            raise ValueError(msg)
        if self.config.scope == "global" or self.config.allocation != "uniform" or self.config.ties:
            wanted = "scope 'layer' or 'row', allocation 'uniform' and no ties"
            msg = f"MagnitudePruner sees one layer: expected {wanted}; use sparsam.prune"
            raise ValueError(msg)

    def prune_layer(self, name: str, weights: ArrayLike) -> tuple[NDArray[Any], LayerStats]:
        """Prunes one tensor, whatever its shape.

        Args:
            name: What `exclude` and `overrides` of the configuration know the tensor as.
            weights: Anything that NumPy can turn into an array; integers become float64. Not modified.

        Returns:
            The pruned array, and its statistics, which are also appended to `stats`.

        Raises:
            ValueError: A NaN, or a shape that the pattern does not divide.
            TypeError: A dtype other than float16, bfloat16, float32, float64 and integers.
        """
        array = to_arrays({name: weights})[name]
        arrays = {name: array.astype(np.float64) if array.dtype.kind in "biu" else array}
        result = _prune(arrays, arrays, self.config, inplace=False, min_rank=0)
        (stats,) = result.report.layers
        self.stats.append(stats)
        return result.weights[name], stats


def configured(config: PruningConfig | None, changes: Mapping[str, Any]) -> PruningConfig:
    """Returns `config`, or the default one, with the changes applied."""
    if config is None:
        return PruningConfig(**changes)
    if not isinstance(config, PruningConfig):
        msg = (
            f"config: expected a PruningConfig; got {config!r}; fields go by name, as in target_sparsity=0.9"
        )
        raise TypeError(msg)
    return replace(config, **changes) if changes else config


def check_patterns(config: PruningConfig, names: Collection[str], *, stacklevel: int) -> None:
    """Raises for an override that matches no name; warns of an exclude or override without effect."""
    for pattern in config.overrides:
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            hint = f"the closest names are {', '.join(map(repr, close))}" if close else "there are no tensors"
            msg = f"overrides: {pattern!r} matches no tensor; {hint}"
            raise ValueError(msg)
        if all(_excluded(name, config) for name in matches):
            msg = f"overrides: {pattern!r} matches only tensors that exclude leaves dense"
            warnings.warn(msg, UserWarning, stacklevel=stacklevel + 1)
    for pattern in config.exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            warnings.warn(f"exclude: {pattern!r} matches no tensor", UserWarning, stacklevel=stacklevel + 1)


def _excluded(name: str, config: PruningConfig) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in config.exclude)


def plan(
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
        min_rank: Tensors with fewer axes are pruned only when named in overrides.
        previous: Masks of an earlier step: an allocation other than uniform leaves no tensor fewer pruned
            groups than these have. What that is too much for the total is taken from what others would gain.

    Raises:
        ValueError: Ties or an allocation do not fit the tensors, or ties exclude or overrides.
        TypeError: A tensor to be pruned has a dtype that cannot be.
    """
    shares = tied_sparsities(config, arrays)
    tied = frozenset(members(config.ties))
    pooled: list[str] = []
    pools: list[Pool] = []
    scope = "row" if config.scope == "row" else "global"
    for name, array in arrays.items():
        if _excluded(name, config):
            continue
        own = [value for pattern, value in config.overrides.items() if fnmatchcase(name, pattern)]
        if own and name not in tied:
            sparsity, pattern = _own(own[-1], config)
            grouped = isinstance(pattern, (Block, Slices))
            pools.append(Pool((name,), sparsity, pattern, scope="global" if grouped else scope))
        elif array.ndim >= min_rank and name not in tied:
            pooled.append(name)
        elif name not in tied:
            continue
        if not is_weight_dtype(array.dtype):
            msg = (
                f"tensor {name!r} has dtype {array.dtype}: expected {', '.join(DTYPES)} in native byte "
                "order; convert it with .astype(), or exclude the tensor"
            )
            raise TypeError(msg)
    target, pattern = config.target_sparsity, config.pattern
    ties = tuple(tie for tie, own in zip(config.ties, shares, strict=True) if own is None)
    pools = [
        *(
            Pool(members((tie,)), own, pattern, (tie,))
            for tie, own in zip(config.ties, shares, strict=True)
            if own is not None
        ),
        *pools,
    ]
    if config.scope != "global":
        allocated = _shares({name: arrays[name] for name in pooled}, config, previous)
        each = [Pool((name,), allocated[name], pattern, scope=scope) for name in pooled]
        return [*each, *(Pool(members((tie,)), target, pattern, (tie,)) for tie in ties), *pools]
    together = isinstance(pattern, (Block, Slices))
    groups = [(pooled, ties)] if together else [(pooled, ()), ([], ties)]
    rivals = [(names, own) for names, own in groups if names or own]
    return [Pool((*names, *members(own)), target, pattern, own) for names, own in rivals] + pools


def _shares(
    arrays: Mapping[str, NDArray[Any]], config: PruningConfig, previous: Mapping[str, Mask] | None
) -> dict[str, float]:
    """The sparsity of each tensor: the target itself where it is uniform, as each tensor rounds by itself."""
    if config.allocation == "uniform":
        return dict.fromkeys(arrays, config.target_sparsity)
    pattern = config.pattern
    assert not isinstance(pattern, NM)  # which PruningConfig refuses
    floors = {name: count_pruned(name, previous[name], pattern) for name in arrays} if previous else None
    return _allocate(arrays, config.target_sparsity, config.allocation, pattern, floors=floors)


def _own(value: Override, config: PruningConfig) -> tuple[float, Pattern]:
    """The sparsity and the pattern that an override stands for."""
    if isinstance(value, tuple):
        return value
    if isinstance(value, NM):
        return value.sparsity, value
    if isinstance(value, Pattern):
        return config.target_sparsity, value
    return value, config.pattern


def prune_pools(
    arrays: Mapping[str, NDArray[Any]],
    pools: Collection[Pool],
    method: Scorer,
    outs: Mapping[str, NDArray[Any]],
    *,
    previous: Mapping[str, Mask] | None = None,
) -> dict[str, Mask]:
    """Selects in each pool and writes the pruned tensors.

    Args:
        arrays: Name -> array.
        pools: What `plan` returned.
        method: The scorer.
        outs: Name -> where the pruned tensor goes; may be the same array.
        previous: Masks of an earlier step; what they pruned stays pruned, as long as no pool's sparsity
            shrinks.

    Returns:
        Name -> mask of each tensor in a pool, in the order of `arrays`.
    """
    masks: dict[str, Mask] = {}
    norm = method.norm if isinstance(method, scores.Magnitude) else 1
    tied: dict[str, Mask] = {}
    for pool in pools:
        if pool.ties:
            for name, mask in select_tied(
                arrays,
                pool.sparsity,
                pool.ties,
                score=lambda name: score_tensor(method, name, arrays[name]),
                alone=dict.fromkeys(pool.names, pool.pattern),
                norm=norm,
                previous=previous,
            ).items():
                tied[name] = tied[name] & mask if name in tied else mask
            continue
        tensors = {name: arrays[name] for name in pool.names}
        ranked = {name: score_tensor(method, name, tensor) for name, tensor in tensors.items()}
        fused = previous is None and all(ranked[name] is tensor for name, tensor in tensors.items())
        chosen = select_many(
            ranked, pool.sparsity, pool.pattern, scope=pool.scope, norm=norm, out=outs if fused else None
        )
        if previous is not None and any((mask & ~previous[name]).count for name, mask in chosen.items()):
            last = {name: pruned_last(ranked[name], previous[name], norm) for name in pool.names}
            chosen = select_many(last, pool.sparsity, pool.pattern, scope=pool.scope, norm=norm)
        if not fused:
            for name, tensor in tensors.items():
                chosen[name].apply(tensor, out=outs[name])
        masks |= chosen
    # Only now, since a tensor in two ties is scored twice as it was.
    for name, mask in tied.items():
        mask.apply(arrays[name], out=outs[name])
    masks |= tied
    return {name: masks[name] for name in arrays if name in masks}


def describe(
    arrays: Mapping[str, NDArray[Any]], masks: Mapping[str, Mask], pools: Collection[Pool]
) -> Report:
    """Returns the report on tensors as these masks left them, those left dense included."""
    patterns = {name: str(pool.pattern) for pool in pools for name in pool.names}
    patterns |= tied_patterns(tied for pool in pools for tied in pool.ties)
    pruned = {name: mask.size - mask.count for name, mask in masks.items()}
    return Report(
        measure(name, array, pruned=pruned.get(name, 0), pattern=patterns.get(name, "dense"))
        for name, array in arrays.items()
    )


def _prune(
    weights: Mapping[str, Any],
    arrays: Mapping[str, NDArray[Any]],
    config: PruningConfig,
    *,
    inplace: bool,
    min_rank: int,
) -> PruningResult[dict[str, Any], dict[str, Mask]]:
    pools = plan(arrays, config, min_rank=min_rank)
    names = [name for pool in pools for name in pool.names]
    if inplace:
        for name in names:
            _check_writeable(name, weights[name])
        outs = {name: arrays[name] for name in names}
        _check_apart(arrays, outs)
    else:
        outs = {name: np.empty_like(arrays[name], order="C") for name in names}
    masks = prune_pools(arrays, pools, scores.resolve(config.method), outs)
    pruned = weights if inplace else {**weights, **outs}
    return PruningResult(dict(pruned), masks, describe({**arrays, **outs}, masks, pools))


def _check_writeable(name: str, value: object) -> None:
    if isinstance(value, np.ndarray) and value.flags.writeable:
        return
    what = "a read-only array" if isinstance(value, np.ndarray) else f"of type {type(value).__name__}"
    msg = (
        f"tensor {name!r} is {what}: inplace=True needs a writeable array; pass a copy, or leave inplace out"
    )
    raise ValueError(msg)
