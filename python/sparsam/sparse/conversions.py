"""Conversion from and to SciPy's sparse matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam._core import Packed
from sparsam.inputs.float_mode import standard_floats

__all__ = ["csr_of", "dense_of", "keep_of"]


def keep_of(packed: Packed) -> NDArray[np.bool_]:
    """Returns which weights are stored, as a boolean array (rows, cols)."""
    keep = np.unpackbits(packed.bits(), axis=1, count=packed.cols, bitorder="little")
    return keep.view(np.bool_)


@standard_floats
def csr_of(packed: Packed) -> Any:
    """A packed matrix as a `scipy.sparse.csr_array`.

    Raises:
        ImportError: SciPy is not installed.
    """
    sparse = _scipy_sparse()
    keep = keep_of(packed)
    starts = np.concatenate(([0], np.cumsum(keep.sum(axis=1))))
    values = packed.unpack()[keep].astype(np.float32, copy=False)
    return sparse.csr_array((values, np.nonzero(keep)[1], starts), shape=keep.shape)


@standard_floats
def dense_of(matrix: Any) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """The dense content of a SciPy sparse matrix, and which entries it stores.

    Raises:
        ImportError: SciPy is not installed.
        TypeError: It is not a SciPy sparse matrix.
        ValueError: It is not two-dimensional.
    """
    if not _scipy_sparse().issparse(matrix):
        msg = f"matrix: expected a SciPy sparse matrix; got {type(matrix).__name__}; use from_dense"
        raise TypeError(msg)
    if matrix.ndim != 2:
        msg = f"matrix: expected two dimensions (out, in); got shape {matrix.shape}; reshape it"
        raise ValueError(msg)
    csr = matrix.tocsr(copy=True)
    csr.sum_duplicates()
    keep = np.zeros(csr.shape, np.bool_)
    keep[np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr)), csr.indices] = True
    return csr.toarray(), keep


def _scipy_sparse() -> Any:
    try:
        from scipy import sparse  # noqa: PLC0415 - optional, and slow to import
    except ImportError as error:
        msg = "SciPy: expected it to be installed; got none; pip install scipy"
        raise ImportError(msg) from error
    return sparse
