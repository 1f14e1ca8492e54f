"""Packed matrices and their products: the matrix, which kernel multiplies which batch, and what that costs.

One engine for NumPy and PyTorch: `sparsam.torch` multiplies through it too. Imports the pipeline and
`checkpoint`.
"""

from __future__ import annotations

from sparsam.sparse.matrix import SparseMatrix

__all__ = ["SparseMatrix"]
