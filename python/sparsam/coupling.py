"""Couplings (`Tied`): whether they fit the tensors, and which of their groups are pruned.

One rule over several tensors: `round(sparsity * n)` of the n groups that compete are pruned, those with the
lowest scores; among equal scores the lower index of a group is kept, and across rivals (couplings or single
tensors) the one whose first tensor comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam import _core
from sparsam.config import PruningConfig
from sparsam.inputs.names import NamePatterns, closest
from sparsam.masks import Mask
from sparsam.orientation import mask_as_stored, outputs_first
from sparsam.patterns import Block, Pattern, Slices, Tied
from sparsam.selection import _refuse_nan, _select_entries
from sparsam.tiles import count_groups, tile_sizes, tiling_of

# The smallest positive score, for kept groups: equal scores of zero then never revive a pruned group.
_SMALLEST_POSITIVE = 2.0**-1074


def check_ties(ties: Iterable[Tied], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Raises ValueError where couplings do not fit the tensors, or each other.

    Args:
        ties: The couplings.
        arrays: Name -> array; only the shapes are used.

    Raises:
        ValueError: A member is not a tensor, or lacks the axis, or its length is not a multiple of the slice
            size; members differ in their number of groups; a tensor is in two couplings across one axis.
    """
    seen: set[tuple[str, int]] = set()
    for tied in ties:
        counts = {}
        for name, slices in tied.members.items():
            if name not in arrays:
                msg = f"ties: expected names of tensors as members; got {name!r}; {closest(name, arrays)}"
                raise ValueError(msg)
            shape = arrays[name].shape
            tiling_of(name, shape, slices)
            axis = slices.axis % len(shape)
            if (name, axis) in seen:
                msg = (
                    f"ties: tensor {name!r}: expected one tie across axis {axis}, since only one can decide; "
                    "got two; make them one Tied, or take the tensor out of one"
                )
                raise ValueError(msg)
            seen.add((name, axis))
            counts[name] = shape[axis] // slices.size
        if len(set(counts.values())) > 1:
            have = ", ".join(
                f"{name!r} of shape {arrays[name].shape} has {n} ({tied.members[name]})"
                for name, n in counts.items()
            )
            msg = (
                f"ties: expected members with the same number of groups; got {have}; change an axis or a size"
            )
            raise ValueError(msg)


def tied_sparsities(config: PruningConfig, arrays: Mapping[str, NDArray[Any]]) -> tuple[float | None, ...]:
    """Returns the sparsity that overrides give each coupling of a configuration; None where they give none.

    Raises:
        ValueError: As `check_ties`; a member is excluded; overrides are not one sparsity for all members.
    """
    check_ties(config.ties, arrays)
    if not config.ties:
        return ()
    excluded, overridden = NamePatterns(config.exclude), NamePatterns(config.overrides)
    for name in members(config.ties):
        pattern = excluded.last(name)
        if pattern is not None:
            msg = (
                f"ties: tensor {name!r}: expected members that are pruned; got {pattern!r} in exclude; "
                "narrow that pattern, or take the tensor out of that Tied"
            )
            raise ValueError(msg)
    return tuple(_own_sparsity(tied, config, overridden, arrays) for tied in config.ties)


def _own_sparsity(
    tied: Tied, config: PruningConfig, overridden: NamePatterns, arrays: Mapping[str, NDArray[Any]]
) -> float | None:
    """The sparsity of the coupling, which equals the override of each member to within one weight."""
    keys = {name: key for name in tied.members if (key := overridden.last(name)) is not None}
    values = {name: config.overrides[key] for name, key in keys.items()}
    if not values:
        return None
    sizes = {name: arrays[name].size for name in tied.members}
    numbers = {
        name: own.sparsity for name, own in values.items() if own.sparsity is not None and own.pattern is None
    }
    if len(numbers) == len(sizes):
        if len(set(numbers.values())) == 1:
            return next(iter(numbers.values()))
        mean = sum(value * sizes[name] for name, value in numbers.items()) / max(sum(sizes.values()), 1)
        if all(abs(value - mean) * sizes[name] < 1 + 1e-6 for name, value in numbers.items()):
            return min(mean, 1.0)
    msg = (
        f"ties: overrides of the tied {list(tied.members)!r}: expected one sparsity for all of them, or "
        f"none; got {values!r}; narrow the patterns, or take a tensor out of the tie"
    )
    raise ValueError(msg)


def members(ties: Iterable[Tied]) -> tuple[str, ...]:
    """Returns the names of all members, each once."""
    return tuple(dict.fromkeys(name for tied in ties for name in tied.members))


def tied_patterns(ties: Iterable[Tied]) -> dict[str, str]:
    """Returns name -> the pattern of a coupled tensor as a report shows it."""
    found: dict[str, list[str]] = {}
    for tied in ties:
        for name, slices in tied.members.items():
            found.setdefault(name, []).append(f"tied {slices}")
    return {name: ", ".join(texts) for name, texts in found.items()}


@dataclass(frozen=True)
class _Rival:
    """A competitor in a selection: the tilings of coupled tensors, or that of one tensor by itself.

    A single tensor may be `is_transposed`: stored as (in, out) and viewed as (out, in).
    """

    tilings: Mapping[str, tuple[int, int, int, int]]
    scored: Sequence[str]
    groups: int
    is_transposed: bool = False

    def view(self, array: NDArray[Any]) -> NDArray[Any]:
        return outputs_first(array) if self.is_transposed else array


def select_tied(
    arrays: Mapping[str, NDArray[Any]],
    sparsity: float,
    ties: Sequence[Tied],
    *,
    score: Callable[[str], NDArray[Any]],
    alone: Mapping[str, Pattern] | None = None,
    transposed: Collection[str] = (),
    norm: int = 1,
    previous: Mapping[str, Mask] | None = None,
) -> dict[str, Mask]:
    """Selects among the groups of couplings, and of tensors that compete with them.

    A group's score is the sum of |score| (`norm` 1) or of its square (2) over its weights in the scored
    members, in float64, in the order of `arrays`. If several couplings or tensors compete, it is divided by
    the number of those weights, so that groups of different sizes are compared by score per weight.

    Args:
        arrays: Name -> array of every tensor, in the order that decides between equal scores.
        sparsity: In [0, 1], of all groups together.
        ties: Couplings that `check_ties` accepted.
        score: Name -> scores of that tensor. Called only for scored members.
        alone: Name -> `Block` or `Slices` of the other tensors that compete; members of couplings are left
            out.
        transposed: Which tensors are stored as (in, out). Couplings have the axes of the tensors as stored.
        norm: 1 or 2.
        previous: Name -> mask of an earlier step; groups that it prunes are pruned first.

    Returns:
        Name -> mask of every member and of every tensor in `alone`.

    Raises:
        ValueError: A NaN in a tensor or in its scores, a shape that a pattern does not divide.
    """
    place = {name: i for i, name in enumerate(arrays)}
    rivals = [_tied_rival(tied, arrays) for tied in ties]
    for name, pattern in (alone or {}).items():
        if any(name in tied.members for tied in ties) or not isinstance(pattern, (Block, Slices)):
            continue
        is_transposed = name in transposed
        shape = outputs_first(arrays[name]).shape if is_transposed else arrays[name].shape
        count = count_groups(name, shape, pattern)
        rivals.append(_Rival({name: tiling_of(name, shape, pattern)}, (name,), count, is_transposed))
    rivals.sort(key=lambda rival: min(place[name] for name in rival.tilings))
    names = sorted({name for rival in rivals for name in rival.tilings}, key=place.__getitem__)
    _refuse_nan([arrays[name] for name in names], names)

    sums = {}
    for i, rival in enumerate(rivals):
        total, size = _sums(rival, sorted(rival.scored, key=place.__getitem__), score, norm)
        if len(rivals) > 1:
            total /= np.maximum(size, 1)
        if previous is not None:
            total = np.where(_pruned(rival, previous), 0.0, np.maximum(total, _SMALLEST_POSITIVE))
        sums[str(i)] = total
    chosen = _select_entries(sums, sparsity, None).masks

    masks: dict[str, Mask] = {}
    for rival, groups in zip(rivals, chosen.values(), strict=True):
        for name, tiling in rival.tilings.items():
            if not arrays[name].size:
                masks[name] = Mask.ones(arrays[name].shape)
                continue
            mask = Mask(_core.expand_tiles(groups._words, *tiling), rival.view(arrays[name]).shape)
            mask = mask_as_stored(mask) if rival.is_transposed else mask
            masks[name] = masks[name] & mask if name in masks else mask
    return {name: masks[name] for name in names}


def _tied_rival(tied: Tied, arrays: Mapping[str, NDArray[Any]]) -> _Rival:
    tilings = {name: tiling_of(name, arrays[name].shape, slices) for name, slices in tied.members.items()}
    scored = tied.scored or [name for name in tilings if arrays[name].ndim > 1] or list(tilings)
    name, slices = next(iter(tied.members.items()))
    return _Rival(tilings, scored, arrays[name].shape[slices.axis] // slices.size)


def _sums(
    rival: _Rival, scored: Sequence[str], score: Callable[[str], NDArray[Any]], norm: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The sum of the scores of each group, and the number of weights in it."""
    total, size = np.zeros(rival.groups), np.zeros(rival.groups)
    for name in scored:
        values = rival.view(score(name))
        if not values.size:
            continue
        _refuse_nan([values], [name], by="the score of ")
        tiling = rival.tilings[name]
        total += _core.tile_scores(values, *tiling, norm).reshape(-1)
        size += tile_sizes(*tiling).reshape(-1)
    return total, size


def _pruned(rival: _Rival, previous: Mapping[str, Mask]) -> NDArray[np.bool_]:
    """Which groups have no weight left in any member."""
    kept = np.zeros(rival.groups)
    for name, tiling in rival.tilings.items():
        if previous[name].size:
            keep = rival.view(previous[name].to_array()).astype(np.float32)
            kept += _core.tile_scores(keep, *tiling, 1).reshape(-1)
    return np.asarray(kept == 0)
