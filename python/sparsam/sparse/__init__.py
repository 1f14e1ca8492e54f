"""Packed matrices and matmul with them: the matrix, the choice of kernel for each batch, the cost model.

One engine for NumPy and PyTorch: `sparsam.torch` multiplies through it too. Imports the pipeline and
`checkpoint`.
"""

from __future__ import annotations

from sparsam.sparse.matrix import SparseMatrix

__all__ = ["SparseMatrix"]
