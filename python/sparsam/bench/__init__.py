"""The measurements of `sparsam bench`: an operation and its peers on the same data, with results compared.

Every time is the median of repeated runs after one warm-up. Functions return rows and print nothing.
Imports the pipeline, `checkpoint` and `sparse`.
"""

from __future__ import annotations

from sparsam.bench.int8_matmul import Int8Row, multiply_int8
from sparsam.bench.matmul import (
    MatmulRow,
    Problem,
    break_even,
    geometric_mean,
    machine,
    multiply,
    random_problems,
    read_dlmc,
)
from sparsam.bench.selection import SelectRow, select
from sparsam.bench.timing import median_seconds

__all__ = [
    "Int8Row",
    "MatmulRow",
    "Problem",
    "SelectRow",
    "break_even",
    "geometric_mean",
    "machine",
    "median_seconds",
    "multiply",
    "multiply_int8",
    "random_problems",
    "read_dlmc",
    "select",
]
