"""Protocols of what can be drawn: any object with these fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Speedup(Protocol):
    """A measured matrix product beside a dense one; `sparsam.bench.MatmulRow` is one."""

    @property
    def name(self) -> str:
        """The name of the matrix; "random" for a random one."""

    @property
    def rows(self) -> int:
        """Rows of the matrix."""

    @property
    def cols(self) -> int:
        """Columns of the matrix."""

    @property
    def batch(self) -> int:
        """Rows of the input."""

    @property
    def sparsity(self) -> float:
        """The share of zeros, in [0, 1]."""

    @property
    def speedup(self) -> float:
        """Time of the dense product divided by the time of the sparse one."""


class Point(Protocol):
    """The score at a sparsity."""

    @property
    def sparsity(self) -> float:
        """The share of the tensor that is pruned, in [0, 1]."""

    @property
    def score(self) -> float:
        """The score of the network at that sparsity."""


class Curve(Protocol):
    """The scores with one tensor or group pruned."""

    @property
    def name(self) -> str:
        """The name of the tensor or group."""

    @property
    def points(self) -> Sequence[Point]:
        """Scores, by rising sparsity."""


class Sensitivity(Protocol):
    """What pruning each tensor alone costs; `sparsam.sensitivity` returns one."""

    @property
    def dense_score(self) -> float:
        """The score of the dense network."""

    @property
    def sparsities(self) -> Sequence[float]:
        """All sparsities that were measured, rising."""

    @property
    def curves(self) -> Sequence[Curve]:
        """One for each tensor or group."""

    def ranking(self) -> Sequence[str]:
        """Returns the names, the least sensitive first."""
