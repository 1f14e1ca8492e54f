"""Pictures, drawn with matplotlib, which is an extra."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparsam._atomic import publish
from sparsam.bench.matmul import MatmulRow

__all__ = ["speedups"]


def check(file: Path) -> None:
    """Finds out what stands in the way of a picture, before hours of measuring.

    Raises:
        ValueError: matplotlib is not installed, or knows no such ending.
        OSError: There is no such folder.
    """
    endings = _figure().canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in endings:
        expected = ", ".join(f".{ending}" for ending in sorted(endings))
        msg = f"{file}: expected a name that ends in one of {expected}"
        raise ValueError(msg)
    if not file.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such directory", str(file.parent))


def speedups(rows: Iterable[MatmulRow], file: Path, caption: str) -> None:
    """Draws the speed-up over the dense product against sparsity: a line for each shape and batch.

    Args:
        rows: What `sparsam.bench.multiply` yields.
        file: Where the picture goes; the ending says as what: .png, .svg, .pdf.
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
    figure = _figure()
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
    publish({file: lambda path: figure.savefig(path, dpi=150, format=file.suffix[1:].lower())})


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError as error:
        msg = f"pictures need matplotlib ({error}); install it with: pip install 'sparsam[plot]'"
        raise ValueError(msg) from error
    return Figure(figsize=(7, 4.5), layout="constrained")
