"""Selection of units to remove: exact counts, by the scores of their weights or by measured importance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sparsam.config import PruningConfig
from sparsam.inputs.names import NamePatterns, closest, matching
from sparsam.inputs.tensors import to_numpy
from sparsam.patterns import Unstructured
from sparsam.ranking import score_tensor
from sparsam.scores import resolve, traits
from sparsam.selection import _select_entries
from sparsam.torch.pruning.structured.structures import KINDS, Structure
from torch import Tensor

__all__ = ["check_config", "select_units"]


def check_config(config: PruningConfig) -> None:
    """Raises ValueError for a field that has no meaning for whole units."""
    for name, value, plain in (
        ("pattern", config.pattern, Unstructured()),
        ("allocation", config.allocation, "uniform"),
        ("schedule", config.schedule, None),
        ("ties", config.ties, ()),
        ("transposed", config.transposed, ()),
    ):
        if value != plain:
            msg = f"config: {name}: expected {plain!r} for whole units; got {value!r}; leave it out"
            raise ValueError(msg)
    if config.scope == "row":
        msg = "config: scope: expected 'layer' or 'global', for units have no rows; got 'row'; choose one"
        raise ValueError(msg)
    for pattern, own in config.overrides.items():
        if own.sparsity is None or own.pattern is not None:
            msg = f"config: overrides[{pattern!r}]: expected a sparsity; got {own!r}; pass a number"
            raise ValueError(msg)


def select_units(
    structures: Sequence[Structure],
    tensors: Mapping[str, Tensor],
    config: PruningConfig,
    importance: Mapping[str, NDArray[np.float64]],
) -> dict[str, NDArray[np.int64]]:
    """Chooses the units to remove.

    In scope "layer", and of a structure with an override, `round(sparsity * units)` of each; in scope
    "global" that many of all heads, of all neurons and of all channels, by score per weight, but the best
    unit of each structure is kept. A unit's score is the sum of the scores (with norm 2 of their squares) of
    the weights of two axes or more that it owns. Among equal scores the lower index and the earlier structure
    are kept.

    Args:
        structures: The structures to prune, in the order that decides between equal scores.
        tensors: The model's state_dict.
        config: A configuration that `check_config` accepted.
        importance: Name of a structure -> its units' importance, in place of scores.

    Returns:
        Name -> the units to remove, in ascending order.

    Raises:
        ValueError: No unit of a structure would be left; NaN among weights or scores; an override or an
            importance matches no structure.
    """
    names = [structure.name for structure in structures]
    for what, patterns in (("config: overrides", config.overrides), ("importance", importance)):
        for pattern in patterns:
            if not matching(pattern, names):
                msg = (
                    f"{what}: expected names of structures to be pruned; got {pattern!r}, which matches "
                    f"none; {closest(pattern, names)}"
                )
                raise ValueError(msg)
    sums = {
        structure.name: _measured(structure, importance[structure.name])
        if structure.name in importance
        else _scores(structure, tensors, config)
        for structure in structures
    }
    own = NamePatterns(config.overrides)
    gone: dict[str, NDArray[np.int64]] = {}
    pools: dict[str, list[Structure]] = {kind: [] for kind in KINDS}
    for structure in structures:
        key = own.last(structure.name)
        if key is None and config.scope == "global":
            pools[structure.kind].append(structure)
        else:
            sparsity = config.target_sparsity if key is None else config.overrides[key].sparsity
            gone |= _lowest([structure], sums, float(sparsity or 0.0))
    for kind, pool in pools.items():
        if len({structure.name in importance for structure in pool}) > 1:
            known = [structure.name for structure in pool if structure.name in importance]
            msg = f"importance: expected that of all {kind}, competing globally; got {known}; add the rest"
            raise ValueError(msg)
        gone |= _lowest(pool, sums, config.target_sparsity)
    return {name: gone[name] for name in names}


def _lowest(
    pool: Sequence[Structure], sums: Mapping[str, NDArray[np.float64]], sparsity: float
) -> dict[str, NDArray[np.int64]]:
    """The units with the lowest scores, without the best of each structure."""
    if not pool:
        return {}
    total = sum(structure.units for structure in pool)
    if round(sparsity * total) > total - len(pool):
        kind, most = pool[0].kind, (total - len(pool)) / total
        msg = (
            f"{pool[0].name}: expected a sparsity that leaves one of the {kind} of each structure, at most "
            f"{most:.4g}; got {sparsity:g} of {total}; lower it, or exclude the structure"
        )
        raise ValueError(msg)
    least = min(float(sums[structure.name].min()) for structure in pool)
    ranked = {}
    for structure in pool:
        # Importance may be negative: only the order counts.
        values = sums[structure.name] - min(least, 0.0)
        values[int(np.argmax(values))] = np.inf
        ranked[structure.name] = values
    masks = _select_entries(ranked, sparsity, None).masks
    return {name: np.flatnonzero(~mask.to_array()).astype(np.int64) for name, mask in masks.items()}


def _measured(structure: Structure, values: object) -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if array.shape != (structure.units,) or not np.isfinite(array).all():
        msg = (
            f"importance[{structure.name!r}]: expected {structure.units} finite numbers, one for each unit; "
            f"got {array!r}; pass what head_importance measured, or one number for each"
        )
        raise ValueError(msg)
    return array


def _scores(
    structure: Structure, tensors: Mapping[str, Tensor], config: PruningConfig
) -> NDArray[np.float64]:
    """The score of each unit: the sum over its weights, in scope "global" divided by their number."""
    scorer = resolve(config.method)
    power = traits(scorer).norm
    total, size = np.zeros(structure.units), 0
    scored = [member for member in structure.members if tensors[member.name].ndim > 1]
    for member in scored or structure.members:
        array = to_numpy(f"tensor {member.name!r}", tensors[member.name])
        ranked = score_tensor(scorer, member.name, array, transposed=member.name in _stored(structure))
        lines = np.moveaxis(ranked, member.axis, 0).reshape(array.shape[member.axis], -1)
        sums = (np.abs(lines.astype(np.float64)) ** power).sum(axis=1)
        if np.isnan(sums).any():
            msg = f"tensor {member.name!r}: expected scores that are numbers; got NaN; repair the weights"
            raise ValueError(msg)
        total += sums[member.indices].sum(axis=1)
        size += member.indices.shape[1] * lines.shape[1]
    return total / size if config.scope == "global" else total


def _stored(structure: Structure) -> frozenset[str]:
    """The members that are stored as (in, out)."""
    return frozenset(f"{a.module}.weight" for a in structure.attributes if a.name in {"nf", "nx"})
