"""Pictures of scores: against sparsity, and of each tensor pruned by itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sparsam.inputs.checks import check_sparsity
from sparsam.plot.axis_labels import labels, shortened
from sparsam.plot.canvas import (
    StrPath,
    chart_height,
    finished,
    finite,
    legend,
    name_axis,
    new_axes,
    percent_axis,
    reference,
    styles,
)
from sparsam.plot.shapes import Sensitivity

_CURVES = 14
"""The most lines in one picture; of more tensors, the most sensitive ones are drawn."""
_LABELLED_CELLS = 240


def degradation(
    curves: Mapping[str, Iterable[Sequence[float]]],
    file: StrPath | None = None,
    *,
    dense_score: float | None = None,
    min_score: float | None = None,
    score: str = "score",
) -> Any:
    """Draws score against sparsity, a line for each way to prune: with recovery and without, say.

    Args:
        curves: Label -> pairs (sparsity, score), in any order; sparsities in [0, 1].
        file: The file to write; None for none.
        dense_score: A line at the score of the dense weights.
        min_score: A line at the required score.
        score: The label of the vertical axis, with its unit.

    Raises:
        ValueError: There is nothing to draw, a sparsity is outside [0, 1], or as `check`.
        OSError: The file cannot be written.
    """
    lines = {
        label: sorted((check_sparsity(f"curves[{label!r}]", s), float(y)) for s, y in points)
        for label, points in curves.items()
    }
    if not any(lines.values()):
        msg = "curves: expected at least one with a pair (sparsity, score); got none; measure first"
        raise ValueError(msg)
    figure, axes = new_axes(file)
    for (label, points), style in zip(lines.items(), styles(), strict=False):
        at = [100 * s for s, _ in points]
        axes.plot(at, [finite(y) for _, y in points], label=shortened(label), **style)
    reference(axes, dense_score, min_score)
    percent_axis(axes)
    axes.set_ylabel(score)
    legend(axes)
    return finished(figure, file)


def sensitivity_map(report: Sensitivity, file: StrPath | None = None) -> Any:
    """Draws losses as colours: a row for each tensor or group, the most sensitive at the top.

    Cells show their numbers as long as there are few; a hatched cell was not measured.

    Args:
        report: What `sparsam.sensitivity` returned.
        file: The file to write; None for none.

    Raises:
        ValueError: The report has no measurements, or as `check`.
        OSError: The file cannot be written.
    """
    curves = {curve.name: curve for curve in report.curves}
    names = list(reversed(report.ranking()))
    sparsities = report.sparsities
    if not sparsities:
        msg = "report: expected at least one measurement; got none; measure some sparsities"
        raise ValueError(msg)
    losses = np.full((len(names), len(sparsities)), np.nan)
    for i, name in enumerate(names):
        for point in curves[name].points:
            losses[i, sparsities.index(point.sparsity)] = finite(max(report.dense_score - point.score, 0.0))
    figure, axes = new_axes(file, height=chart_height(names), width=8)
    axes.set_facecolor("0.85")
    axes.patch.set_hatch("////")
    axes.patch.set_edgecolor("white")
    image = axes.imshow(losses, aspect="auto", cmap="cividis_r", vmin=0, interpolation="none")
    axes.set_xticks(range(len(sparsities)), [f"{100 * s:.4g}" for s in sparsities])
    name_axis(axes, names)
    hatched = "; hatched: not measured" if np.isnan(losses).any() else ""
    axes.set_xlabel(f"weights pruned of this tensor alone, %{hatched}")
    figure.colorbar(image, label=f"loss of score (dense: {report.dense_score + 0.0:.4g})")
    if losses.size <= _LABELLED_CELLS:
        middle = np.nanmax(losses, initial=0) / 2
        for (i, j), loss in np.ndenumerate(losses):
            if not math.isnan(loss):
                colour = "white" if loss > middle else "black"
                axes.text(j, i, f"{loss:.2g}", ha="center", va="center", color=colour, fontsize=7)
    return finished(figure, file)


def sensitivity_curves(report: Sensitivity, file: StrPath | None = None) -> Any:
    """Draws the score against the sparsity of each tensor alone; of many, the most sensitive ones.

    Args:
        report: What `sparsam.sensitivity` returned.
        file: The file to write; None for none.

    Raises:
        ValueError: The report has no measurements, or as `check`.
        OSError: The file cannot be written.
    """
    curves = {curve.name: curve for curve in report.curves if curve.points}
    if not curves:
        msg = "report: expected at least one measurement; got none; measure some sparsities"
        raise ValueError(msg)
    shown = [name for name in reversed(report.ranking()) if name in curves][:_CURVES]
    figure, axes = new_axes(file, width=9)
    for name, label, style in zip(shown, labels(shown), styles(), strict=False):
        points = [(0.0, report.dense_score), *((p.sparsity, p.score) for p in curves[name].points)]
        axes.plot([100 * s for s, _ in points], [finite(y) for _, y in points], label=label, **style)
    reference(axes, report.dense_score, None)
    percent_axis(axes)
    axes.set_xlabel("weights pruned of one tensor alone, %")
    axes.set_ylabel("score")
    if len(shown) < len(curves):
        axes.set_title(f"the {len(shown)} most sensitive of {len(curves)}", fontsize="medium")
    legend(axes, outside=True)
    return finished(figure, file)
