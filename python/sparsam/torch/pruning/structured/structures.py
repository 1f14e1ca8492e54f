"""The units that can be cut from a model: each is a set of slices of parameters that are removed together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["KINDS", "Attribute", "Cuts", "Heads", "Kind", "Member", "Structure", "cuts_of"]

Kind: TypeAlias = Literal["heads", "neurons", "channels"]
KINDS: tuple[Kind, ...] = ("heads", "neurons", "channels")


@dataclass(frozen=True, eq=False)
class Member:
    """The part of a parameter or buffer that belongs to a structure.

    Attributes:
        name: Its key in the model's state_dict.
        axis: The axis that gets shorter.
        indices: (units, width), int64: the indices along that axis that each unit owns.
    """

    name: str
    axis: int
    indices: NDArray[np.int64]


class Heads(NamedTuple):
    """The heads in one unit of an attention.

    Attributes:
        queries: The number of query heads.
        keys: The number of key-value heads; 0 if all units share one.
        size: The length of a head.
    """

    queries: int
    keys: int
    size: int


@dataclass(frozen=True)
class Attribute:
    """An attribute of a module that holds a length.

    Attributes:
        module: The module's name.
        name: The attribute's name.
        for_each: How much it decreases with each unit that is removed.
    """

    module: str
    name: str
    for_each: int


@dataclass(frozen=True, eq=False)
class Structure:
    """Units of one kind that compete: the heads of an attention, the neurons or channels of a layer.

    Attributes:
        name: The name of the attention, or of the first layer that has these outputs.
        kind: "heads", "neurons" (of linear layers) or "channels" (if a convolution is involved).
        units: The number of units.
        members: The slices that a unit consists of.
        attributes: The attributes that depend on the number of units.
        heads: The heads in one unit of an attention; else None.
    """

    name: str
    kind: Kind
    units: int
    members: tuple[Member, ...]
    attributes: tuple[Attribute, ...]
    heads: Heads | None = None


@dataclass(frozen=True, eq=False)
class Cuts:
    """What is removed from tensors, and how much attributes decrease.

    Attributes:
        removed: (name of a parameter or buffer, axis) -> the indices to remove, in ascending order.
        lowered: (module, attribute) -> how much it decreases.
    """

    removed: Mapping[tuple[str, int], NDArray[np.int64]]
    lowered: Mapping[tuple[str, str], int]


def cuts_of(structures: Iterable[Structure], gone: Mapping[str, NDArray[np.int64]]) -> Cuts:
    """Returns the changes to tensors and modules of a model that removing some units requires.

    Args:
        structures: The structures.
        gone: Name of a structure -> its units to remove.
    """
    removed: dict[tuple[str, int], list[NDArray[np.int64]]] = {}
    lowered: dict[tuple[str, str], int] = {}
    for structure in structures:
        units = gone[structure.name]
        if not len(units):
            continue
        for member in structure.members:
            removed.setdefault((member.name, member.axis), []).append(member.indices[units].ravel())
        for attribute in structure.attributes:
            key = attribute.module, attribute.name
            lowered[key] = lowered.get(key, 0) + attribute.for_each * len(units)
    return Cuts({key: np.unique(np.concatenate(found)) for key, found in removed.items()}, lowered)
