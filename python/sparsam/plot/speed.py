"""The picture of measured products: how much faster than dense, by sparsity."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sparsam.plot.canvas import StrPath, check, finished, new_figure
from sparsam.plot.shapes import Speedup


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
    return finished(figure, file)
