"""The parts that all pictures share: the figure, its axes, colours, legend, and the file it is written to.

Colour-blind readers can distinguish the colours; lines also differ in their markers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Sized
from itertools import cycle
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from sparsam.checkpoint.atomic import check_target, publish
from sparsam.plot.axis_labels import labels

StrPath: TypeAlias = str | PathLike[str]

# Okabe and Ito's palette, "Color universal design", 2008, without its yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vPX"
_ROW = 0.24
_TALLEST = 60
_LABEL = 0.13
"""Inches: of a row, of the tallest picture, and of a label; where labels do not fit, some are left out."""

_DPI = 150


def check(file: StrPath) -> None:
    """Checks that a picture can be drawn and saved, before hours of measuring.

    Raises:
        ValueError: matplotlib is not installed, or does not know the suffix; the path is a folder.
        OSError: There is no such folder.
    """
    file = Path(file)
    endings = new_figure().canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in endings:
        known = ", ".join(f".{ending}" for ending in sorted(endings))
        msg = f"{file}: expected a name that ends in one of {known}; got {file.suffix!r}; rename it"
        raise ValueError(msg)
    check_target(file)


def new_figure(width: float = 7, height: float = 4.5) -> Any:
    """A figure of that size in inches; ValueError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError as error:
        msg = f"pictures: expected matplotlib; got {error}; run pip install 'sparsam[plot]'"
        raise ValueError(msg) from error
    return Figure(figsize=(width, height), layout="constrained")


def new_axes(file: StrPath | None, *, width: float = 7, height: float = 4.5) -> tuple[Any, Any]:
    """A figure with one pair of axes, after a check that its file can be written."""
    if file is not None:
        check(file)
    figure = new_figure(width, height)
    return figure, figure.subplots()


def finished(figure: Any, file: StrPath | None) -> Any:
    """The figure, written if there is a file."""
    if file is not None:
        target = Path(file)
        ending = target.suffix[1:].lower()
        publish({target: lambda path: figure.savefig(path, dpi=_DPI, format=ending)})
    return figure


def styles() -> Iterable[dict[str, Any]]:
    """Colour, marker and dashes of one line after the other."""
    for i, (colour, marker) in enumerate(cycle(zip(COLOURS, _MARKERS, strict=True))):
        line = ("-", "--", ":")[i // len(COLOURS) % 3]
        yield {"color": colour, "marker": marker, "markersize": 4, "linestyle": line, "linewidth": 1.4}


def reference(axes: Any, dense_score: float | None, min_score: float | None) -> None:
    """Lines at the score of the dense weights and at the required score."""
    if dense_score is not None:
        axes.axhline(
            dense_score, color="0.4", linewidth=1, linestyle="--", label=f"dense: {dense_score + 0.0:.4g}"
        )
    if min_score is not None:
        axes.axhline(min_score, color="0.4", linewidth=1, linestyle=":", label=f"required: {min_score:.4g}")


def percent_axis(axes: Any) -> None:
    """Sets up the horizontal axis: sparsity in percent."""
    axes.set_xlim(0, 100)
    axes.set_xlabel("weights pruned, %")
    axes.grid(visible=True, alpha=0.3)


def name_axis(axes: Any, names: Sequence[str]) -> None:
    """Names of tensors along the vertical axis, as many as have room."""
    step = math.ceil(len(names) * _LABEL / chart_height(names))
    axes.set_yticks(range(0, len(names), step), labels(names)[::step], fontsize=8)


def chart_height(names: Sized) -> float:
    """The height of a picture with a row for each name."""
    return min(max(2.5, 1.4 + _ROW * len(names)), _TALLEST)


def legend(axes: Any, *, outside: bool = False) -> None:
    """The legend, on the axes or to the right of them."""
    if outside:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    else:
        axes.legend(fontsize="small")


def finite(value: float) -> float:
    """Returns the value, or NaN for an infinite one, which matplotlib then leaves out."""
    return value if math.isfinite(value) else math.nan
