from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import torch
from sparsam import SparseMatrix
from sparsam.torch import from_sparse_tensor, to_sparse_tensor


def weights() -> torch.Tensor:
    w = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    return torch.where(torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < 0.6, 0.0, w)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_there_and_back(dtype: Any) -> None:
    w = weights().to(dtype)
    forms = [w.to_sparse(), w.to_sparse_csr(), w.to_sparse_csc()]
    for tensor in forms:
        matrix = from_sparse_tensor(tensor)
        assert matrix.nnz == int((w != 0).sum())
        again = to_sparse_tensor(matrix)
        assert again.is_coalesced()
        assert again.dtype == (torch.float32 if dtype == torch.float64 else dtype)
        assert torch.equal(again.to_dense(), w.to(again.dtype))


def test_stored_zeros_stay_and_entries_of_one_place_add_up() -> None:
    places = torch.tensor([[0, 1, 1], [2, 0, 0]])
    matrix = from_sparse_tensor(
        torch.sparse_coo_tensor(places, torch.tensor([0.0, 1.0, 2.0]), (2, 3), check_invariants=True)
    )
    assert matrix.nnz == 2
    assert matrix.to_dense().tolist() == [[0, 0, 0], [3, 0, 0]]
    assert to_sparse_tensor(matrix).indices().tolist() == [[0, 1], [2, 0]]
    for shape in ((0, 3), (3, 0), (2, 2)):
        empty = to_sparse_tensor(SparseMatrix.from_dense(np.zeros(shape, np.float32)))
        assert from_sparse_tensor(empty).shape == tuple(empty.shape) == shape


def test_refused() -> None:
    with pytest.raises(TypeError, match=r"tensor: expected a sparse tensor of .*; got torch.strided"):
        from_sparse_tensor(weights())
    with pytest.raises(TypeError, match=r"got torch.sparse_coo of torch.int64"):
        from_sparse_tensor(torch.eye(3, dtype=torch.int64).to_sparse())
    with pytest.raises(ValueError, match=r"tensor: expected two dimensions .*; got \(3,\) on cpu"):
        from_sparse_tensor(torch.ones(3).to_sparse())
