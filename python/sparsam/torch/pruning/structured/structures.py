"""What can be cut from a model: units, each a set of slices of parameters that go together."""

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
        axis: Which axis gets shorter.
        indices: (units, width), int64: the indices along that axis that each unit owns.
    """

    name: str
    axis: int
    indices: NDArray[np.int64]


class Heads(NamedTuple):
    """What one unit of an attention is.

    Attributes:
        queries: Its query heads.
        keys: Its key-value heads; 0 where one serves all units.
        size: The length of a head.
    """

    queries: int
    keys: int
    size: int


@dataclass(frozen=True)
class Attribute:
    """A number of a module that says how long something is.

    Attributes:
        module: The module's name.
        name: The attribute's.
        for_each: How much it falls with each unit that is cut.
    """

    module: str
    name: str
    for_each: int


@dataclass(frozen=True, eq=False)
class Structure:
    """Units of one kind that compete: the heads of an attention, the neurons or channels of a layer.

    Attributes:
        name: The module that says it best: the attention, or the first layer whose outputs these are.
        kind: "heads", "neurons" (of linear layers) or "channels" (where a convolution takes part).
        units: How many there are.
        members: The slices that a unit consists of.
        attributes: The numbers that follow.
        heads: Of an attention: what one unit is.
    """

    name: str
    kind: Kind
    units: int
    members: tuple[Member, ...]
    attributes: tuple[Attribute, ...]
    heads: Heads | None = None


@dataclass(frozen=True, eq=False)
class Cuts:
    """What is cut, of tensors and of numbers.

    Attributes:
        removed: (name of a parameter or buffer, axis) -> the indices that go, rising.
        lowered: (module, attribute) -> by how much it falls.
    """

    removed: Mapping[tuple[str, int], NDArray[np.int64]]
    lowered: Mapping[tuple[str, str], int]


def cuts_of(structures: Iterable[Structure], gone: Mapping[str, NDArray[np.int64]]) -> Cuts:
    """Returns what cutting some units means for the tensors and modules of a model.

    Args:
        structures: The structures.
        gone: Name of a structure -> the units of it that go.
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
