"""Pictures of weights: how much of each tensor is pruned, and which values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsam.inputs.checks import check_sparsity
from sparsam.plot.axis_labels import shortened
from sparsam.plot.canvas import COLOURS, StrPath, chart_height, finished, name_axis, new_axes, percent_axis
from sparsam.report import Report
from sparsam.selection import threshold

_BINS = 101


def sparsity_per_tensor(sparsities: Report | Mapping[str, float], file: StrPath | None = None) -> Any:
    """Draws a bar for each tensor: how much of it is pruned.

    Args:
        sparsities: A report, whose dense tensors are left out and whose total is marked; or tensor ->
            sparsity in [0, 1].
        file: The file to write; None for none.

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
        msg = "sparsities: expected at least one tensor that is pruned; got none; prune one"
        raise ValueError(msg)
    figure, axes = new_axes(file, height=chart_height(bars))
    places = range(len(bars))
    axes.barh(places, [100 * value for value in bars.values()], color=COLOURS[0], height=0.75)
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
        axes.axvline(100 * total, color=COLOURS[1], linestyle="--", label=f"all tensors: {total:.1%}")
        figure.legend(loc="outside upper right", fontsize="small", frameon=False)
    name_axis(axes, list(bars))
    axes.set_ylim(len(bars) - 0.5, -0.5)
    percent_axis(axes)
    axes.grid(visible=False, axis="y")
    return finished(figure, file)


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
        file: The file to write; None for none.
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
        msg = f"weights: expected at least one finite value; got {flat.size} others; leave such tensors out"
        raise ValueError(msg)
    figure, axes = new_axes(file)
    # Symmetric, with the middle bin around zero.
    reach = max(float(np.abs(finite).max()), float(np.finfo(np.float32).tiny))
    counts, edges = np.histogram(finite, bins=_BINS, range=(-reach, reach))
    axes.stairs(counts, edges, fill=True, color=COLOURS[0], label=f"{flat.size:,} weights")
    if found.k and math.isfinite(found.value):
        axes.axvspan(
            -found.value,
            found.value,
            facecolor=COLOURS[5],
            alpha=0.35,
            label=f"pruned at {sparsity:.4g}: |w| up to {found.value:.4g}",
        )
        for side in (-found.value, found.value):
            axes.axvline(side, color=COLOURS[1], linestyle="--", linewidth=1)
    axes.set_yscale("log")
    axes.set_xlabel("weight" + (f" of {shortened(name)}" if name else ""))
    axes.set_ylabel("number of weights per bin (logarithmic)")
    axes.grid(visible=True, alpha=0.3)
    figure.legend(loc="outside upper right", fontsize="small", frameon=False, ncols=2)
    return finished(figure, file)
