"""How pruning affects a network's score: sensitivity, the smallest sufficient network, lottery tickets.

Tasks are spread over any `concurrent.futures.Executor`. Imports the pipeline, `checkpoint`, `training` and,
for the pictures of a report, `plot`.
"""

from __future__ import annotations

from sparsam.analysis.lottery import find_ticket
from sparsam.analysis.search import find_smallest
from sparsam.analysis.sensitivity_report import SensitivityReport
from sparsam.analysis.sweep import sensitivity

__all__ = ["SensitivityReport", "find_smallest", "find_ticket", "sensitivity"]
