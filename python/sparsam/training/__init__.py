"""Pruning step by step with your training in between, regrowth, and runs that survive a kill.

Imports the pipeline and `checkpoint`.
"""

from __future__ import annotations

from sparsam.training.iterative import IterativePruner

__all__ = ["IterativePruner"]
