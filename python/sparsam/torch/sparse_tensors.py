"""Conversion between SparseMatrix and PyTorch's sparse tensors."""

from __future__ import annotations

import numpy as np

import torch
from sparsam.sparse.conversions import keep_of
from sparsam.sparse.matrix import SparseMatrix
from torch import Tensor

__all__ = ["from_sparse_tensor", "to_sparse_tensor"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def from_sparse_tensor(tensor: Tensor) -> SparseMatrix:
    """Pack a sparse tensor, explicitly stored zeros included.

    Args:
        tensor: (out, in), of any sparse layout, on the CPU: float32, float64, bfloat16 or float16. Duplicate
            entries are summed; float64 is rounded to float32.

    Raises:
        TypeError: It is not a sparse tensor, or has another dtype.
        ValueError: It is not two-dimensional, or not on the CPU.
    """
    if not isinstance(tensor, Tensor):
        got = type(tensor).__name__
        msg = (
            f"tensor: expected a sparse tensor of PyTorch; got {got}; use SparseMatrix.from_dense for arrays"
        )
        raise TypeError(msg)
    if tensor.layout == torch.strided or tensor.dtype not in _DTYPES:
        wanted = "a sparse tensor of float32, float64, bfloat16 or float16"
        msg = f"tensor: expected {wanted}; got {tensor.layout} of {tensor.dtype}; use from_dense or .to"
        raise TypeError(msg)
    if tensor.ndim != 2 or tensor.device.type != "cpu":
        wanted = "two dimensions (out, in), on the CPU"
        msg = f"tensor: expected {wanted}; got {tuple(tensor.shape)} on {tensor.device}; reshape or move it"
        raise ValueError(msg)
    entries = tensor.detach().to_sparse().coalesce()
    rows, cols = entries.indices().numpy()
    keep = np.zeros(tuple(tensor.shape), np.bool_)
    keep[rows, cols] = True
    weights = np.zeros(keep.shape, np.float32)
    weights[rows, cols] = entries.values().float().numpy()
    narrow = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
    return SparseMatrix.from_mask(weights, keep, dtype=narrow.get(tensor.dtype, "float32"))


def to_sparse_tensor(matrix: SparseMatrix) -> Tensor:
    """The matrix as a tensor of layout torch.sparse_coo and its dtype, every stored weight an entry."""
    if not isinstance(matrix, SparseMatrix):
        got = type(matrix).__name__
        msg = f"matrix: expected a SparseMatrix; got {got}; make one with SparseMatrix.from_dense"
        raise TypeError(msg)
    packed = matrix._state.forms.readable()
    values = torch.from_numpy(packed.values().astype(np.float32)).to(getattr(torch, packed.dtype))
    places = torch.from_numpy(np.stack(np.nonzero(keep_of(packed))))
    return torch.sparse_coo_tensor(places, values, matrix.shape, is_coalesced=True, check_invariants=False)
