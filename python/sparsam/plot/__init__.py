"""Pictures, drawn with matplotlib (the extra `plot`), of anything that has the fields they show.

Imports the pipeline and `checkpoint`, and no other folder: reports and benchmarks import this one.
"""

from __future__ import annotations

from sparsam.plot.figures import (
    check,
    degradation,
    histogram,
    new_figure,
    sensitivity_curves,
    sensitivity_map,
    sparsity_per_tensor,
    speedups,
)

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
