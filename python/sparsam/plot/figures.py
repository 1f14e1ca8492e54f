"""Pictures, drawn with matplotlib, which is an extra.

Every function returns its `matplotlib.figure.Figure` and, if told a file, also writes it; the ending says as
what: .png, .svg, .pdf. Colours are told apart by colour-blind readers, and lines also by their markers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from itertools import cycle
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsam.checkpoint.atomic import check_target, publish
from sparsam.inputs.checks import check_sparsity
from sparsam.plot.axis_labels import labels, shortened
from sparsam.plot.shapes import Sensitivity, Speedup
from sparsam.report import Report
from sparsam.selection import threshold

StrPath: TypeAlias = str | PathLike[str]

__all__ = [
    "degradation",
    "histogram",
    "sensitivity_curves",
    "sensitivity_map",
    "sparsity_per_tensor",
    "speedups",
]

# Okabe and Ito's palette, "Color universal design", 2008, without its yellow, which is faint on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vPX"
_CURVES = 14
"""More lines than that are no picture: the most sensitive ones are drawn."""
_LABELLED_CELLS = 240
_ROW = 0.24
_TALLEST = 60
_LABEL = 0.13
"""Inches: a row, the tallest picture, and a label in the smallest row; of more tensors some are not named."""

_DPI = 150
_BINS = 101


def check(file: StrPath) -> None:
    """Checks that a picture can be drawn and saved, before hours of measuring.

    Raises:
        ValueError: matplotlib is not installed, or knows no such ending; the name is that of a folder.
        OSError: There is no such folder.
    """
    file = Path(file)
    endings = new_figure().canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in endings:
        expected = ", ".join(f".{ending}" for ending in sorted(endings))
        msg = f"{file}: expected a name that ends in one of {expected}"
        raise ValueError(msg)
    check_target(file)


def speedups(rows: Iterable[Speedup], file: StrPath, caption: str) -> Any:
    """Draws the speed-up over the dense product against sparsity: a line for each shape and batch.

    Args:
        rows: What `sparsam.bench.multiply` yields.
        file: Where the picture goes.
        caption: Stands under the axis: the machine, the versions.

    Raises:
        ValueError: As `check`.
        OSError: The file cannot be written.
    """
    check(file)
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        label = f"{row.rows}x{row.cols}, batch {row.batch}" if row.name == "random" else f"batch {row.batch}"
        lines.setdefault(label, []).append((100 * row.sparsity, row.speedup))
    figure = new_figure()
    axes = figure.subplots()
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=label)
    axes.axhline(1, color="grey", linewidth=1, linestyle="--", label="dense")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}x")
    axes.set_xlabel(f"weights pruned, %\n{caption}", fontsize="small")
    axes.set_ylabel("times faster than the dense product")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
    return _finished(figure, file)


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
        file: Where the picture goes, if anywhere.
        dense_score: A line at the score of the dense weights.
        min_score: A line at the score that is asked for.
        score: What the vertical axis is, with its unit.

    Raises:
        ValueError: There is nothing to draw, a sparsity is outside [0, 1], or as `check`.
        OSError: The file cannot be written.
    """
    lines = {
        label: sorted((check_sparsity(f"curves[{label!r}]", s), float(y)) for s, y in points)
        for label, points in curves.items()
    }
    if not any(lines.values()):
        msg = "curves: expected at least one with a pair (sparsity, score)"
        raise ValueError(msg)
    figure, axes = _axes(file)
    for (label, points), style in zip(lines.items(), _styles(), strict=False):
        at = [100 * s for s, _ in points]
        axes.plot(at, [_finite(y) for _, y in points], label=shortened(label), **style)
    _reference(axes, dense_score, min_score)
    _percent_axis(axes)
    axes.set_ylabel(score)
    _legend(axes)
    return _finished(figure, file)


def sensitivity_map(report: Sensitivity, file: StrPath | None = None) -> Any:
    """Draws losses as colours: a row for each tensor or group, the most sensitive at the top.

    Cells show their numbers as long as there are few; a hatched cell was not measured.

    Args:
        report: What `sparsam.sensitivity` returned.
        file: Where the picture goes, if anywhere.

    Raises:
        ValueError: The report has no measurements, or as `check`.
        OSError: The file cannot be written.
    """
    curves = {curve.name: curve for curve in report.curves}
    names = list(reversed(report.ranking()))
    sparsities = report.sparsities
    if not sparsities:
        msg = "report: expected at least one measurement"
        raise ValueError(msg)
    losses = np.full((len(names), len(sparsities)), np.nan)
    for i, name in enumerate(names):
        for point in curves[name].points:
            losses[i, sparsities.index(point.sparsity)] = _finite(max(report.dense_score - point.score, 0.0))
    figure, axes = _axes(file, height=_tall(names), width=8)
    axes.set_facecolor("0.85")
    axes.patch.set_hatch("////")
    axes.patch.set_edgecolor("white")
    image = axes.imshow(losses, aspect="auto", cmap="cividis_r", vmin=0, interpolation="none")
    axes.set_xticks(range(len(sparsities)), [f"{100 * s:.4g}" for s in sparsities])
    _name_axis(axes, names)
    hatched = "; hatched: not measured" if np.isnan(losses).any() else ""
    axes.set_xlabel(f"weights pruned of this tensor alone, %{hatched}")
    figure.colorbar(image, label=f"loss of score (dense: {report.dense_score + 0.0:.4g})")
    if losses.size <= _LABELLED_CELLS:
        middle = np.nanmax(losses, initial=0) / 2
        for (i, j), loss in np.ndenumerate(losses):
            if not math.isnan(loss):
                colour = "white" if loss > middle else "black"
                axes.text(j, i, f"{loss:.2g}", ha="center", va="center", color=colour, fontsize=7)
    return _finished(figure, file)


def sensitivity_curves(report: Sensitivity, file: StrPath | None = None) -> Any:
    """Draws the score against the sparsity of each tensor alone; of many, the most sensitive ones.

    Args:
        report: What `sparsam.sensitivity` returned.
        file: Where the picture goes, if anywhere.

    Raises:
        ValueError: The report has no measurements, or as `check`.
        OSError: The file cannot be written.
    """
    curves = {curve.name: curve for curve in report.curves if curve.points}
    if not curves:
        msg = "report: expected at least one measurement"
        raise ValueError(msg)
    shown = [name for name in reversed(report.ranking()) if name in curves][:_CURVES]
    figure, axes = _axes(file, width=9)
    for name, label, style in zip(shown, labels(shown), _styles(), strict=False):
        points = [(0.0, report.dense_score), *((p.sparsity, p.score) for p in curves[name].points)]
        axes.plot([100 * s for s, _ in points], [_finite(y) for _, y in points], label=label, **style)
    _reference(axes, report.dense_score, None)
    _percent_axis(axes)
    axes.set_xlabel("weights pruned of one tensor alone, %")
    axes.set_ylabel("score")
    if len(shown) < len(curves):
        axes.set_title(f"the {len(shown)} most sensitive of {len(curves)}", fontsize="medium")
    _legend(axes, outside=True)
    return _finished(figure, file)


def sparsity_per_tensor(sparsities: Report | Mapping[str, float], file: StrPath | None = None) -> Any:
    """Draws a bar for each tensor: how much of it is pruned.

    Args:
        sparsities: A report, whose dense tensors are left out and whose total is marked; or tensor ->
            sparsity in [0, 1].
        file: Where the picture goes, if anywhere.

    Raises:
        ValueError: There is no tensor to draw, a sparsity is outside [0, 1], or as `check`.
        OSError: The file cannot be written.
    """
    total = None
    if isinstance(sparsities, Report):
        total = sparsities.total.sparsity
        bars = {layer.name: layer.sparsity for layer in sparsities.layers if layer.pattern != "dense"}
    else:
        bars = {name: check_sparsity(name, value) for name, value in sparsities.items()}
    if not bars:
        msg = "sparsities: expected at least one tensor that is pruned"
        raise ValueError(msg)
    figure, axes = _axes(file, height=_tall(bars))
    places = range(len(bars))
    axes.barh(places, [100 * value for value in bars.values()], color=_COLOURS[0], height=0.75)
    for place, value in zip(places, bars.values(), strict=True):
        inside = value > 0.85
        axes.annotate(
            f"{value:.1%}",
            (100 * value, place),
            xytext=(-3 if inside else 3, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            color="white" if inside else "black",
            fontsize=7,
            bbox=None if inside else {"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            zorder=3,
        )
    if total is not None:
        axes.axvline(100 * total, color=_COLOURS[1], linestyle="--", label=f"all tensors: {total:.1%}")
        figure.legend(loc="outside upper right", fontsize="small", frameon=False)
    _name_axis(axes, list(bars))
    axes.set_ylim(len(bars) - 0.5, -0.5)
    _percent_axis(axes)
    axes.grid(visible=False, axis="y")
    return _finished(figure, file)


def histogram(
    weights: ArrayLike | Mapping[str, ArrayLike],
    sparsity: float,
    file: StrPath | None = None,
    *,
    name: str = "",
) -> Any:
    """Draws how often each weight value occurs, and the threshold of a sparsity: what lies inside is pruned.

    Args:
        weights: One array, or several that share one threshold, as in global scope.
        sparsity: In [0, 1].
        file: Where the picture goes, if anywhere.
        name: What the picture is of.

    Raises:
        ValueError: There are no weights, a weight is NaN, the sparsity is out of range, or as `check`.
        TypeError: The dtype is not one that can be pruned.
        OSError: The file cannot be written.
    """
    values = weights.values() if isinstance(weights, Mapping) else [weights]
    arrays = [np.asarray(array) for array in values]
    found = threshold(arrays, sparsity)
    flat: NDArray[np.float64] = np.concatenate(
        [np.zeros(0), *(array.ravel().astype(np.float64) for array in arrays)]
    )
    finite = flat[np.isfinite(flat)]
    if not finite.size:
        msg = "weights: expected at least one finite value"
        raise ValueError(msg)
    figure, axes = _axes(file)
    # Symmetric, with the middle bin around zero.
    reach = max(float(np.abs(finite).max()), float(np.finfo(np.float32).tiny))
    counts, edges = np.histogram(finite, bins=_BINS, range=(-reach, reach))
    axes.stairs(counts, edges, fill=True, color=_COLOURS[0], label=f"{flat.size:,} weights")
    if found.k and math.isfinite(found.value):
        axes.axvspan(
            -found.value,
            found.value,
            facecolor=_COLOURS[5],
            alpha=0.35,
            label=f"pruned at {sparsity:.4g}: |w| up to {found.value:.4g}",
        )
        for side in (-found.value, found.value):
            axes.axvline(side, color=_COLOURS[1], linestyle="--", linewidth=1)
    axes.set_yscale("log")
    axes.set_xlabel("weight" + (f" of {shortened(name)}" if name else ""))
    axes.set_ylabel("number of weights per bin (logarithmic)")
    axes.grid(visible=True, alpha=0.3)
    figure.legend(loc="outside upper right", fontsize="small", frameon=False, ncols=2)
    return _finished(figure, file)


def new_figure(width: float = 7, height: float = 4.5) -> Any:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError as error:
        msg = f"pictures need matplotlib ({error}); install it with: pip install 'sparsam[plot]'"
        raise ValueError(msg) from error
    return Figure(figsize=(width, height), layout="constrained")


def _axes(file: StrPath | None, *, width: float = 7, height: float = 4.5) -> tuple[Any, Any]:
    """A figure with one pair of axes, after a check that its file can be written."""
    if file is not None:
        check(file)
    figure = new_figure(width, height)
    return figure, figure.subplots()


def _finished(figure: Any, file: StrPath | None) -> Any:
    """The figure, written if there is a file."""
    if file is not None:
        target = Path(file)
        ending = target.suffix[1:].lower()
        publish({target: lambda path: figure.savefig(path, dpi=_DPI, format=ending)})
    return figure


def _styles() -> Iterable[dict[str, Any]]:
    """Colour, marker and dashes of one line after the other."""
    for i, (colour, marker) in enumerate(cycle(zip(_COLOURS, _MARKERS, strict=True))):
        line = ("-", "--", ":")[i // len(_COLOURS) % 3]
        yield {"color": colour, "marker": marker, "markersize": 4, "linestyle": line, "linewidth": 1.4}


def _reference(axes: Any, dense_score: float | None, min_score: float | None) -> None:
    if dense_score is not None:
        axes.axhline(
            dense_score, color="0.4", linewidth=1, linestyle="--", label=f"dense: {dense_score + 0.0:.4g}"
        )
    if min_score is not None:
        axes.axhline(min_score, color="0.4", linewidth=1, linestyle=":", label=f"asked for: {min_score:.4g}")


def _percent_axis(axes: Any) -> None:
    axes.set_xlim(0, 100)
    axes.set_xlabel("weights pruned, %")
    axes.grid(visible=True, alpha=0.3)


def _name_axis(axes: Any, names: Sequence[str]) -> None:
    step = math.ceil(len(names) * _LABEL / _tall(names))
    axes.set_yticks(range(0, len(names), step), labels(names)[::step], fontsize=8)


def _tall(names: Sized) -> float:
    """The height of a picture with a row for each name."""
    return min(max(2.5, 1.4 + _ROW * len(names)), _TALLEST)


def _legend(axes: Any, *, outside: bool = False) -> None:
    if outside:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    else:
        axes.legend(fontsize="small")


def _finite(value: float) -> float:
    """What is infinite is left out of a picture."""
    return value if math.isfinite(value) else math.nan
