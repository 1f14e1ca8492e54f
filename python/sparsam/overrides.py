"""Overrides: sparsities and patterns of single tensors in place of those of the configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from sparsam.inputs.checks import ReadOnly, check_sparsity, expected, set_fields
from sparsam.patterns import NM, Pattern


@dataclass(frozen=True)
class Override:
    """The sparsity and pattern of one tensor, in place of those of the configuration.

    Attributes:
        sparsity: In [0, 1]; None: the target of the configuration. An N:M pattern has its own.
        pattern: None: the pattern of the configuration.

    Raises:
        ValueError: Both are None, one has the wrong type, or the sparsity is not that of the N:M pattern.
    """

    sparsity: float | None = None
    pattern: Pattern | None = None

    def __post_init__(self) -> None:
        if self.sparsity is None and self.pattern is None:
            raise ValueError(
                expected("Override", None, "a sparsity, a pattern or both", "pass sparsity=, say")
            )
        pattern = None if self.pattern is None else check_pattern("Override: pattern", self.pattern)
        sparsity = None if self.sparsity is None else check_sparsity("Override: sparsity", self.sparsity)
        if isinstance(pattern, NM):
            sparsity = _nm_sparsity("Override: sparsity", pattern, sparsity)
        set_fields(self, sparsity=sparsity, pattern=pattern)

    def resolved(self, sparsity: float, pattern: Pattern) -> tuple[float, Pattern]:
        """Returns the sparsity and the pattern that a tensor has, given those of the configuration."""
        return (
            sparsity if self.sparsity is None else self.sparsity,
            pattern if self.pattern is None else self.pattern,
        )

    def at(self, sparsity: float) -> Override:
        """Returns a copy with another sparsity, unless an N:M pattern determines it."""
        if self.sparsity is None or isinstance(self.pattern, NM):
            return self
        return replace(self, sparsity=sparsity)

    def scaled(self, share: float) -> Override:
        """Returns a copy with its sparsity multiplied by `share`; N:M patterns have only one sparsity."""
        return self if self.sparsity is None else self.at(self.sparsity * share)


OverrideLike: TypeAlias = float | Pattern | tuple[float, Pattern] | Override


def as_overrides(value: object, pattern: Pattern) -> Mapping[str, Override]:
    """Returns name or pattern -> `Override` for what a user may pass; the pattern is the configuration's."""
    if not isinstance(value, Mapping):
        raise ValueError(
            expected(
                "overrides",
                value,
                "a mapping from name patterns to sparsities or patterns",
                "pass {'head*': 0.5}, say",
            )
        )
    for name in value:
        if not isinstance(name, str):
            raise ValueError(
                expected(
                    "overrides", name, "names or shell-style patterns as keys", "convert them with str()"
                )
            )
    return ReadOnly({name: _decode(f"overrides[{name!r}]", own, pattern) for name, own in value.items()})


def _decode(what: str, value: object, pattern: Pattern) -> Override:
    """Decodes an override as the user may pass it; the only place that does."""
    if isinstance(value, Pattern):
        return Override(pattern=value)
    if not isinstance(value, Override):
        sparsity, own = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
        number = check_sparsity(what, sparsity)
        if own is not None and isinstance(check_pattern(what, own), NM):
            number = _nm_sparsity(what, own, number)
        value = Override(number, own)
    if value.pattern is None and isinstance(pattern, NM):
        _nm_sparsity(what, pattern, value.sparsity)
    return value


def _nm_sparsity(what: str, pattern: NM, sparsity: float | None) -> float:
    """The sparsity of the pattern; ValueError if another one is requested."""
    if sparsity is not None and not same_sparsity(sparsity, pattern.sparsity):
        wanted = f"{pattern.sparsity}, the sparsity of pattern {pattern}"
        raise ValueError(expected(what, sparsity, wanted, "leave one of them out"))
    return pattern.sparsity


def same_sparsity(a: float, b: float) -> bool:
    """Whether two sparsities are equal up to rounding."""
    return math.isclose(a, b, rel_tol=0, abs_tol=1e-9)


def check_pattern(what: str, value: object) -> Pattern:
    """Returns `value` if it is a pattern, or raises the ValueError that names `what`."""
    if isinstance(value, Pattern):
        return value
    raise ValueError(
        expected(
            what,
            value,
            "Unstructured(), NM(n, m), Block(rows, cols) or Slices(axis, size)",
            "pass one of them",
        )
    )
