"""Pictures, drawn with matplotlib (the extra `plot`), of anything that has the fields they show.

Every function returns its `matplotlib.figure.Figure` and, if given a file, also writes it, in the format
of its ending: .png, .svg, .pdf. Imports the pipeline and `checkpoint`, and no other folder: reports and
benchmarks import this one.
"""

from __future__ import annotations

from sparsam.plot.canvas import check, new_figure
from sparsam.plot.scores import degradation, sensitivity_curves, sensitivity_map
from sparsam.plot.speed import speedups
from sparsam.plot.weights import histogram, sparsity_per_tensor

__all__ = [
    "check",
    "degradation",
    "histogram",
    "new_figure",
    "sensitivity_curves",
    "sensitivity_map",
    "sparsity_per_tensor",
    "speedups",
]
