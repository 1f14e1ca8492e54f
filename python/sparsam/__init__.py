"""sparsam prunes neural-network weights exactly and makes the pruned weights run faster on CPUs.

import sparsam

result = sparsam.prune(weights, target_sparsity=0.8, scope="global")  # {name: array} in
print(result.report)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsam._core import __version__
from sparsam.allocation import allocate
from sparsam.config import PruningConfig
from sparsam.inputs.late_imports import on_demand
from sparsam.masks import Mask
from sparsam.patterns import NM, Block, Slices, Tied, Unstructured
from sparsam.pruner import MagnitudePruner, PruningResult, prune
from sparsam.report import LayerStats
from sparsam.runtime import available_isas, build_info, isa, num_threads, set_num_threads, use_isa
from sparsam.scores import Magnitude, Random
from sparsam.selection import select, select_many, threshold
from sparsam.shrinking import shrink
from sparsam.sparse.matrix import SparseMatrix
from sparsam.statistics import InputStatistics

if TYPE_CHECKING:
    from sparsam import checkpoint
    from sparsam.analysis.lottery import find_ticket
    from sparsam.analysis.search import find_smallest
    from sparsam.analysis.sweep import sensitivity
    from sparsam.reconstruction import admm, obs, quantize, refit, sparsegpt
    from sparsam.training.iterative import IterativePruner
else:
    __getattr__ = on_demand(
        __name__,
        {
            "IterativePruner": "sparsam.training.iterative",
            "admm": "sparsam.reconstruction",
            "analysis": "sparsam.analysis",
            "checkpoint": "sparsam.checkpoint",
            "find_smallest": "sparsam.analysis.search",
            "find_ticket": "sparsam.analysis.lottery",
            "obs": "sparsam.reconstruction",
            "plot": "sparsam.plot",
            "quantize": "sparsam.reconstruction",
            "reconstruction": "sparsam.reconstruction",
            "refit": "sparsam.reconstruction",
            "sensitivity": "sparsam.analysis.sweep",
            "sparsegpt": "sparsam.reconstruction",
            "training": "sparsam.training",
        },
    )

__all__ = [
    "NM",
    "Block",
    "InputStatistics",
    "IterativePruner",
    "LayerStats",
    "Magnitude",
    "MagnitudePruner",
    "Mask",
    "PruningConfig",
    "PruningResult",
    "Random",
    "Slices",
    "SparseMatrix",
    "Tied",
    "Unstructured",
    "__version__",
    "admm",
    "allocate",
    "available_isas",
    "build_info",
    "checkpoint",
    "find_smallest",
    "find_ticket",
    "isa",
    "num_threads",
    "obs",
    "prune",
    "quantize",
    "refit",
    "select",
    "select_many",
    "sensitivity",
    "set_num_threads",
    "shrink",
    "sparsegpt",
    "threshold",
    "use_isa",
]


def __dir__() -> list[str]:
    return __all__
