"""The measurements of a sensitivity sweep for one tensor or group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

__all__ = ["SensitivityCurve", "SensitivityPoint"]


class SensitivityPoint(NamedTuple):
    """One measurement.

    Attributes:
        name: The tensor or group that was pruned, everything else being dense; "" for the dense weights.
        sparsity: The requested sparsity.
        pruned: How many weights were pruned.
        score: What `eval_fn` returned.
    """

    name: str
    sparsity: float
    pruned: int
    score: float


@dataclass(frozen=True)
class SensitivityCurve:
    """The measurements of one tensor or group.

    Attributes:
        name: The name of the tensor, or of the group.
        tensors: The names of its tensors and how many weights each has.
        points: The measurements, in rising order of sparsity; the dense weights are not among them.
        all_or_nothing: Whether the sparsities measured are the only ones possible, as for N:M.
    """

    name: str
    tensors: tuple[tuple[str, int], ...]
    points: tuple[SensitivityPoint, ...]
    all_or_nothing: bool = False

    @property
    def params(self) -> int:
        """How many weights its tensors have."""
        return sum(size for _, size in self.tensors)

    def in_groups(self, groups: Mapping[str, int]) -> SensitivityCurve:
        """Returns the curve counted in groups of a pattern instead of weights; `groups`: tensor -> number."""
        tensors = tuple((name, groups[name]) for name, _ in self.tensors)
        count = sum(size for _, size in tensors)
        points = tuple(
            point._replace(pruned=round(point.pruned / self.params * count)) for point in self.points
        )
        return replace(self, tensors=tensors, points=points)

    def score(self, sparsity: float) -> float | None:
        """The score measured at exactly this sparsity; None where it was not measured."""
        return next((point.score for point in self.points if point.sparsity == sparsity), None)

    def losses(self, dense_score: float) -> list[float]:
        """At each point the largest drop of the score below `dense_score` up to there, at least 0."""
        drops = [0.0, *(dense_score - point.score for point in self.points)]
        return [float(drop) for drop in np.maximum.accumulate(drops)][1:]
