"""The JSON form of a sensitivity report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import msgspec

from sparsam.analysis.sensitivity_curve import SensitivityCurve, SensitivityPoint
from sparsam.checkpoint.json_state import Count, Document, Finite, Number, Share, from_number, to_number

REMEDY = "measure again, or correct it by hand"
_MAX_WEIGHTS = 2**53 - 1  # of all curves together: beyond, float64 does not tell numbers of weights apart


class PointDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A `SensitivityPoint`."""

    sparsity: Share
    pruned: Count
    score: Number


class CurveDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A `SensitivityCurve`."""

    name: str
    tensors: dict[str, Count]
    all_or_nothing: bool
    points: list[PointDocument]


class ReportDocument(Document, frozen=True):
    """A `SensitivityReport`."""

    WHAT: ClassVar[str] = "a sensitivity report"
    MARK: ClassVar[str] = "sparsam_sensitivity"
    VERSION: ClassVar[int] = 2

    dense_score: Finite
    method: str
    pattern: str
    curves: list[CurveDocument]


def stored(curve: SensitivityCurve) -> CurveDocument:
    """Returns the JSON form of a curve."""
    points = [PointDocument(p.sparsity, p.pruned, to_number(p.score)) for p in curve.points]
    return CurveDocument(curve.name, dict(curve.tensors), curve.all_or_nothing, points)


def restored(curves: Sequence[CurveDocument], source: str) -> tuple[SensitivityCurve, ...]:
    """Returns the curves from their JSON form.

    Raises:
        ValueError: Two curves have one name, a curve does not rise, a score is NaN, or numbers of weights
            contradict each other.
    """
    for field, wanted, got in _problems(curves):
        msg = f"{source}: field curves{field}: expected {wanted}; got {got!r:.60}; {REMEDY}"
        raise ValueError(msg)
    return tuple(map(_restored, curves))


def _problems(curves: Sequence[CurveDocument]) -> Iterator[tuple[str, str, object]]:
    """The first contradiction: the field, what is expected there, and what is there."""
    names: set[str] = set()
    weights = 0
    for i, curve in enumerate(curves):
        size = sum(curve.tensors.values())
        weights += size
        if curve.name in names:
            yield f"[{i}].name", "another name for each curve", curve.name
        if weights > _MAX_WEIGHTS:
            yield f"[{i}].tensors", f"at most {_MAX_WEIGHTS} weights in all", weights
        names.add(curve.name)
        last = -1.0
        for j, point in enumerate(curve.points):
            at = f"[{i}].points[{j}]"
            if point.sparsity <= last:
                yield f"{at}.sparsity", f"rising sparsities, here one above {last}", point.sparsity
            if point.pruned > size:
                yield f"{at}.pruned", f"at most the {size} weights of the curve", point.pruned
            if math.isnan(from_number(point.score)):
                yield f"{at}.score", "a score", point.score
            last = point.sparsity


def _restored(curve: CurveDocument) -> SensitivityCurve:
    points = tuple(
        SensitivityPoint(curve.name, p.sparsity, p.pruned, from_number(p.score)) for p in curve.points
    )
    return SensitivityCurve(curve.name, tuple(curve.tensors.items()), points, curve.all_or_nothing)
