"""The identity of a run (weights, configuration, schedule), compared when it is resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from sparsam import scores
from sparsam.checkpoint.json_state import Share
from sparsam.config import PruningConfig
from sparsam.patterns import Tied
from sparsam.statistics import InputStatistics

__all__ = ["RunIdentity", "describe"]

_CHUNK = 1 << 18


class TiedIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A `Tied` as text."""

    members: dict[str, str]
    scored: list[str] | None


class RunIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The identity of a run or a sweep, as JSON stores it.

    Attributes:
        schedule: The sparsity of each iteration; of a sweep none.
        weights: Tensor -> a hash of its dense content.
        groups: Of a sweep: curve -> its tensors.

    The others are the fields of the configuration, as text.
    """

    method: str
    pattern: str
    scope: str
    allocation: str
    exclude: list[str]
    overrides: list[tuple[str, str]]
    ties: list[TiedIdentity]
    schedule: list[Share]
    weights: dict[str, str]
    transposed: list[str] = []
    groups: dict[str, list[str]] | None = None

    @classmethod
    def of(
        cls,
        config: PruningConfig,
        schedule: Sequence[float],
        weights: Mapping[str, NDArray[Any]],
        groups: Mapping[str, Sequence[str]] | None = None,
    ) -> RunIdentity:
        """The identity of a run with this configuration, the schedule as numbers, and these dense weights."""
        return cls(
            method=describe(scores.resolve(config.method)),
            pattern=str(config.pattern),
            scope=config.scope,
            allocation=config.allocation
            if isinstance(config.allocation, str)
            else _content(config.allocation),
            exclude=list(config.exclude),
            transposed=list(config.transposed),
            overrides=[(pattern, repr(value)) for pattern, value in config.overrides.items()],
            ties=[_tied(tied) for tied in config.ties],
            schedule=list(schedule),
            weights={name: _digest(array) for name, array in weights.items()},
            groups=None if groups is None else {name: list(tensors) for name, tensors in groups.items()},
        )

    def differences(self, before: RunIdentity) -> list[str]:
        """What differs from an earlier run, in words."""
        names = [name for name in self.__struct_fields__ if name != "weights"]
        pairs = [(name, getattr(before, name), getattr(self, name)) for name in names]
        found = [f"{name} was {old}, now {new}" for name, old, new in pairs if old != new]
        tensors = [
            name
            for name in {**before.weights, **self.weights}
            if before.weights.get(name) != self.weights.get(name)
        ]
        if tensors:
            found.append(f"the dense weights differ in {', '.join(map(repr, tensors[:5]))}")
        return found


def _tied(tied: Tied) -> TiedIdentity:
    members = {name: str(slices) for name, slices in tied.members.items()}
    return TiedIdentity(members, None if tied.scored is None else sorted(tied.scored))


def describe(value: object) -> str:
    """The repr of a value, or the name of its class where the repr would hold an address.

    Arrays and statistics that its fields hold by name are compared by their content.
    """
    kind = type(value)
    if is_dataclass(value):
        held = [(field.name, getattr(value, field.name)) for field in fields(value) if field.init]
        if any(isinstance(content, Mapping) for _, content in held):
            inner = ", ".join(f"{name}={_content(content)}" for name, content in held)
            return f"{kind.__qualname__}({inner})"
    return f"{kind.__module__}.{kind.__qualname__}" if kind.__repr__ is object.__repr__ else repr(value)


def _content(value: object) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name!r}: {_content(entry)}' for name, entry in value.items())}}}"
    if isinstance(value, InputStatistics):
        return f"{value.count} inputs {_digest(value.sum_squares)}"
    if isinstance(value, (np.ndarray, list)) or hasattr(value, "__array__"):
        return _digest(np.asarray(value))
    return describe(value)


def _digest(array: NDArray[Any]) -> str:
    """A hash of dtype, shape and the elements in C order, whatever the memory layout."""
    digest = hashlib.blake2b(f"{array.dtype.name} {array.shape}".encode(), digest_size=16)
    for start in range(0, array.size, _CHUNK):
        digest.update(array.flat[start : start + _CHUNK].tobytes())
    return digest.hexdigest()
