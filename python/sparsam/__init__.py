"""sparsam prunes neural-network weights exactly and makes the pruned weights run faster on CPUs.

import sparsam

result = sparsam.prune(weights, target_sparsity=0.8, scope="global")  # {name: array} in
print(result.report)
"""

from __future__ import annotations

from sparsam import checkpoint
from sparsam._core import __version__
from sparsam.config import PruningConfig
from sparsam.iterative import HistoryRow, IterativePruner, IterativeResult
from sparsam.masks import Mask
from sparsam.matrix import SparseMatrix
from sparsam.patterns import NM, Block, Slices, Unstructured
from sparsam.pruner import MagnitudePruner, PruningResult, prune
from sparsam.report import LayerStats, Report
from sparsam.runtime import (
    BuildInfo,
    available_isas,
    build_info,
    isa,
    num_threads,
    set_num_threads,
    use_isa,
)
from sparsam.schedules import Polynomial
from sparsam.scores import Magnitude, Random
from sparsam.selection import Threshold, select, select_many, threshold

__all__ = [
    "NM",
    "Block",
    "BuildInfo",
    "HistoryRow",
    "IterativePruner",
    "IterativeResult",
    "LayerStats",
    "Magnitude",
    "MagnitudePruner",
    "Mask",
    "Polynomial",
    "PruningConfig",
    "PruningResult",
    "Random",
    "Report",
    "Slices",
    "SparseMatrix",
    "Threshold",
    "Unstructured",
    "__version__",
    "available_isas",
    "build_info",
    "checkpoint",
    "isa",
    "num_threads",
    "prune",
    "select",
    "select_many",
    "set_num_threads",
    "threshold",
    "use_isa",
]


def __dir__() -> list[str]:
    return __all__
