"""The results of a sensitivity sweep: ranked, printed, kept as JSON, and turned into sparsities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam.analysis.knapsack import Level, choose, give_back
from sparsam.analysis.report_document import REMEDY, ReportDocument, restored, stored
from sparsam.analysis.sensitivity_curve import SensitivityCurve
from sparsam.apportionment import split_total
from sparsam.checkpoint.atomic import publish
from sparsam.checkpoint.json_state import read
from sparsam.inputs.checks import check_sparsity, expected
from sparsam.inputs.display import as_html, html_table, printable
from sparsam.orientation import as_weights
from sparsam.patterns import Block, Slices, Unstructured
from sparsam.report import Readable
from sparsam.tiles import count_groups

__all__ = ["SensitivityReport"]

_TOLERANCE = 0.01


@dataclass(frozen=True)
class SensitivityReport(Readable):
    """What pruning each tensor by itself costs. `print` it, `plot` it, or `allocate` sparsities by it.

    The *loss* of a tensor at a sparsity is the largest drop of the score below that of the dense weights at
    this sparsity or a measured lower one, and at least 0: a curve that recovers by luck is not trusted, and
    no tensor is credited for scores above the dense one. Between measurements it is linear in the number of
    pruned weights.

    Attributes:
        dense_score: The score of the dense weights, finite.
        curves: One for each tensor or group, in the order of the sweep.
        method: What ranked the weights.
        pattern: The pattern of the configuration.
    """

    dense_score: float
    curves: tuple[SensitivityCurve, ...]
    method: str = ""
    pattern: str = ""

    def __post_init__(self) -> None:
        if not math.isfinite(self.dense_score):
            raise ValueError(
                expected(
                    "dense_score",
                    self.dense_score,
                    "a finite score to compare with",
                    "correct the evaluation",
                )
            )

    @property
    def evaluations(self) -> int:
        """How many evaluations it took, that of the dense weights included."""
        return 1 + sum(len(curve.points) for curve in self.curves)

    @property
    def sparsities(self) -> tuple[float, ...]:
        """All sparsities that some curve was measured at, rising."""
        return tuple(sorted({point.sparsity for curve in self.curves for point in curve.points}))

    @property
    def params(self) -> int:
        """How many weights the curves cover."""
        return sum(curve.params for curve in self.curves)

    @property
    def max_sparsity(self) -> float:
        """The highest total that `allocate` can reach: every curve at its last finite loss."""
        most = sum(levels[-1].pruned for levels in map(self._levels, self.curves))
        return most / self.params if self.params else 0.0

    def mean_losses(self) -> dict[str, float]:
        """Name -> the loss averaged over sparsities from 0 to the highest that was measured (trapezoids)."""
        return {curve.name: self._mean_loss(curve) for curve in self.curves}

    def ranking(self) -> tuple[str, ...]:
        """The names by mean loss, the most tolerant first; equals are in the order of the sweep."""
        means = self.mean_losses()
        return tuple(sorted(means, key=lambda name: means[name]))

    def tolerated(self, max_drop: float | None = None) -> dict[str, float]:
        """Name -> the highest measured sparsity whose loss is at most `max_drop`, 0.0 where none is.

        Args:
            max_drop: In units of the score; left out, 1 % of the dense score's magnitude.

        Raises:
            ValueError: `max_drop` is below 0 or NaN.
        """
        drop = self._max_drop(max_drop)
        found = {}
        for curve in self.curves:
            losses = curve.losses(self.dense_score)
            good = [point.sparsity for point, loss in zip(curve.points, losses, strict=True) if loss <= drop]
            found[curve.name] = good[-1] if good else 0.0
        return found

    def allocate(self, target: float) -> dict[str, float]:
        """Returns the sparsity of each tensor that minimises the predicted loss at a total sparsity.

        The predicted loss is the sum of the losses of all curves, as if they did not influence each other.

        1. Among all ways to give each curve one of its measured sparsities (or 0) such that at least
           `round(target * n)` of the n weights are pruned, the one with the least predicted loss is found by
           dynamic programming; it is the optimum, not an estimate. Among ways of equal loss (to 2^-40 of it)
           the most even one is taken, that with the least sum of pruned^2 / size, so that curves on a plateau
           share the pruning.
        2. The surplus over `round(target * n)` is given back where that saves most: to the curve whose last
           step, from the measured sparsity below, costs most per weight (among equals, the earlier one).

        Curves that are not monotone count as the running maximum of their loss; a score above the dense one
        counts as no loss; a measurement of infinite loss is never chosen.

        Args:
            target: The total sparsity over the tensors of the report.

        Returns:
            Tensor -> sparsity, for `overrides`, in the order of the sweep; tensors of a group all have the
            group's, to within one weight each (`prune` rounds a tie to whole slices). Times the sizes these
            add up to exactly `round(target * n)`. N:M patterns take whole steps: with no other curve to give
            back to, the total stays above that.

        Raises:
            ValueError: The target is outside [0, 1], or above `max_sparsity`; a tensor is in two curves, as
                one that is in two ties.
        """
        needed = round(check_sparsity("target", target) * self.params)
        names = [name for curve in self.curves for name, _ in curve.tensors]
        if twice := [name for name in names if names.count(name) > 1]:
            msg = (
                f"curves: expected each tensor in one; got {twice[0]!r} in two, as of two ties; group both "
                "ties in one"
            )
            raise ValueError(msg)
        levels = [self._levels(curve) for curve in self.curves]
        choice = choose(levels, needed)
        if choice is None:
            msg = (
                f"target: expected at most {self.max_sparsity:.4g}, where every curve is at its last "
                f"measured sparsity; got {target}; measure higher sparsities"
            )
            raise ValueError(msg)
        counts = give_back(levels, choice, needed, [curve.all_or_nothing for curve in self.curves])
        return {
            name: count / size if size else 0.0
            for curve, pruned in zip(self.curves, counts, strict=True)
            for (name, size), count in zip(
                curve.tensors, split_total(pruned, [n for _, n in curve.tensors]), strict=True
            )
        }

    def shares(
        self, weights: Mapping[str, NDArray[Any]], target: float, pattern: Unstructured | Block | Slices, /
    ) -> dict[str, float]:
        """Returns `allocate` over these tensors, in groups of a pattern: a report is an `allocation` itself.

        Curves of other tensors (of ties, of overrides) are left out.

        Raises:
            ValueError: As `allocate`; a tensor has no curve, or another size than in the report, or a group
                of the sweep is among the tensors only in part.
        """
        weights = as_weights(weights)
        groups = {name: count_groups(name, weights.outputs_first(name).shape, pattern) for name in weights}
        sizes = {name: size for curve in self.curves for name, size in curve.tensors}
        for name, array in weights.items():
            if array.size and sizes.get(name) != array.size:
                got = f"one of {sizes[name]} weights" if name in sizes else "none"
                msg = (
                    f"allocation: tensor {name!r}: expected a sensitivity curve of its {array.size} weights; "
                    f"got {got}; exclude the tensor, or measure it too"
                )
                raise ValueError(msg)
        curves = [curve for curve in self.curves if any(name in weights for name, _ in curve.tensors)]
        for curve in curves:
            if outside := [name for name, _ in curve.tensors if name not in weights]:
                msg = (
                    f"allocation: expected all tensors of the group {curve.name!r} to be pruned; got "
                    f"{outside[0]!r} outside the total; exclude the group, or prune all of it"
                )
                raise ValueError(msg)
        counted = replace(self, curves=tuple(curve.in_groups(groups) for curve in curves))
        return {**dict.fromkeys(weights, target), **counted.allocate(target)}

    def predicted_loss(self, sparsities: Mapping[str, float]) -> float:
        """Returns the sum of the losses at these sparsities, linear between measurements.

        Args:
            sparsities: Tensor -> sparsity, as `allocate` returns it; tensors left out are dense.

        Raises:
            ValueError: A curve goes beyond its last finite measurement.
        """
        total = 0.0
        for curve in self.curves:
            pruned = sum(sparsities.get(name, 0.0) * size for name, size in curve.tensors)
            levels = self._levels(curve)
            if pruned > levels[-1].pruned + 0.5:
                msg = (
                    f"{curve.name!r}: expected at most {levels[-1].pruned} weights, where its measurements "
                    f"end; got {pruned:.1f}; measure higher sparsities, or ask for less"
                )
                raise ValueError(msg)
            total += float(np.interp(pruned, [x.pruned for x in levels], [x.cost for x in levels]))
        return total

    def plot(self, file: str | PathLike[str] | None = None, *, kind: str = "map") -> Any:
        """Draws the report with matplotlib and returns the figure.

        Args:
            file: Where the picture goes, if anywhere; the ending says as what: .png, .svg, .pdf.
            kind: "map" (losses as colours, a row for each curve) or "curves" (scores against sparsity).

        Raises:
            ValueError: matplotlib is not installed, or `kind` or the ending is unknown.
            OSError: The file cannot be written.
        """
        from sparsam import plot  # noqa: PLC0415 - matplotlib is an extra

        drawers = {"map": plot.sensitivity_map, "curves": plot.sensitivity_curves}
        if kind not in drawers:
            msg = f"kind: expected 'map' or 'curves'; got {kind!r}; pass one of them"
            raise ValueError(msg)
        return drawers[kind](self, file)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report in plain types; infinite scores as text."""
        return self._document().to_dict()

    def to_json(self, *, indent: int | None = 2) -> str:
        """Returns `to_dict` as JSON, from which `from_json` makes an equal report."""
        return self._document().to_json(indent=indent)

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str = "sensitivity report") -> SensitivityReport:
        """Reads what `to_json` wrote.

        Args:
            text: The JSON.
            source: The name of the document in error messages.

        Raises:
            ValueError: It is not a sensitivity report, has another version, or is damaged; names the field.
        """
        document = ReportDocument.from_json(text, source, REMEDY)
        curves = restored(document.curves, source)
        return cls(document.dense_score, curves, document.method, document.pattern)

    @classmethod
    def load(cls, file: str | PathLike[str]) -> SensitivityReport:
        """Reads what `save` wrote; ValueError as `from_json`, OSError if the file cannot be read."""
        return cls.from_json(read(Path(file), REMEDY), source=str(file))

    def save(self, file: str | PathLike[str]) -> None:
        """Writes `to_json` to a file, completely or not at all."""
        text = self.to_json() + "\n"
        publish({Path(file): lambda path: path.write_text(text, encoding="utf-8")})

    def __str__(self) -> str:
        lines = _aligned(self._rows())
        before, after = self._around()
        return "\n".join([*before, "", lines[0], "-" * len(lines[0]), *lines[1:], "", *after])

    def _repr_html_(self) -> str:
        """The table with the lines around it, as notebooks show it."""
        header, *rows = self._rows()
        before, after = (f"<p>{'<br/>'.join(map(as_html, lines))}</p>" for lines in self._around())
        return "\n".join([before, html_table(header, rows), after])

    def _rows(self) -> list[tuple[str, ...]]:
        """The header and a row for each curve."""
        tolerated, means = self.tolerated(), self.mean_losses()
        curves = {curve.name: curve for curve in self.curves}
        rows = [("pruned alone", "weights", *map(_percent, self.sparsities), "mean loss", "tolerates")]
        for name in self.ranking():
            scores = map(curves[name].score, self.sparsities)
            rows.append(
                (
                    printable(name),
                    f"{curves[name].params:,}",
                    *("-" if score is None else f"{score:.4g}" for score in scores),
                    f"{means[name]:.3g}",
                    _percent(tolerated[name]) if tolerated[name] else "nothing",
                )
            )
        return rows

    def _around(self) -> tuple[list[str], list[str]]:
        """The lines before and after the table."""
        drop, dense = self._max_drop(None), self.dense_score + 0.0  # 0 rather than -0
        before = [
            f"dense score {dense:.6g}; scores with one tensor or group pruned, all else dense",
            f"tolerates: the highest sparsity measured that costs at most {drop:.3g} of the score",
        ]
        return before, self._verdict(self.tolerated(drop))

    def _verdict(self, tolerated: Mapping[str, float]) -> list[str]:
        """Two lines: which curves tolerate the middle one of their sparsities, and which do not."""
        middle = {c.name: float(np.median([p.sparsity for p in c.points])) for c in self.curves if c.points}
        good = [name for name in self.ranking() if name in middle and tolerated[name] >= middle[name]]
        bad = [name for name in reversed(self.ranking()) if name not in good]
        return [
            f"tolerate the middle sparsity or more: {', '.join(map(printable, good)) or 'none'}",
            f"do not: {', '.join(map(printable, bad)) or 'none'}",
        ]

    def _document(self) -> ReportDocument:
        return ReportDocument(self.dense_score, self.method, self.pattern, list(map(stored, self.curves)))

    def _max_drop(self, max_drop: float | None) -> float:
        if max_drop is None:
            return _TOLERANCE * abs(self.dense_score)
        if not max_drop >= 0:
            msg = (
                f"max_drop: expected a drop of at least 0; got {max_drop!r}; pass how far the score may fall"
            )
            raise ValueError(msg)
        return max_drop

    def _mean_loss(self, curve: SensitivityCurve) -> float:
        at = [0.0, *(point.sparsity for point in curve.points)]
        losses = [0.0, *curve.losses(self.dense_score)]
        area = sum(
            (b - a) * (x + y) / 2 for (a, b), (x, y) in zip(pairwise(at), pairwise(losses), strict=True)
        )
        return area / at[-1] if at[-1] else 0.0

    def _levels(self, curve: SensitivityCurve) -> list[Level]:
        """The losses by the number of pruned weights, from (0, 0) on, both rising; finite ones only."""
        levels = [Level(0, 0.0)]
        for point, loss in zip(curve.points, curve.losses(self.dense_score), strict=True):
            if point.pruned > levels[-1].pruned and math.isfinite(loss):
                levels.append(Level(point.pruned, loss))
        return levels


def _percent(sparsity: float) -> str:
    return f"{100 * sparsity:.4g} %"


def _aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Lines of equal columns; the first one is text, the others are numbers."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in table
    ]
