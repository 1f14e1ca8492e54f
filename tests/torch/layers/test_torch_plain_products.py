"""Products of plain tensors, which the core reads by itself; others are left to the checks in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from packed_layers import packed_copy, pruned
from torch.nn import functional

import torch
from sparsam._core import linear_of_tensors, use_tensors
from sparsam.torch.layers import operators
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")

HAS_TABLE = hasattr(Tensor, "__dlpack_c_exchange_api__")  # PyTorch 2.10 and later

PLAIN: dict[str, Callable[[], Tensor]] = {
    "a matrix": lambda: torch.randn(5, 24),
    "a vector": lambda: torch.randn(24),
    "three axes": lambda: torch.randn(2, 3, 24),
    "one row": lambda: torch.randn(1, 1, 24),
    "bfloat16": lambda: torch.randn(5, 24).bfloat16(),
    "rows of more": lambda: torch.randn(9, 24)[4:],
    "one row of a transposed matrix": lambda: torch.randn(24, 1).T,
    "a Parameter": lambda: nn.Parameter(torch.randn(5, 24)),
}
OTHER: dict[str, Callable[[], Tensor]] = {
    "float16": lambda: torch.randn(5, 24).half(),
    "columns of more": lambda: torch.randn(5, 30)[:, 3:27],
    "transposed": lambda: torch.randn(24, 5).T,
    "expanded": lambda: torch.randn(24).expand(5, 24),
    "no rows": lambda: torch.randn(0, 24),
    "float64": lambda: torch.randn(5, 24).double(),
    "too narrow": lambda: torch.randn(5, 23),
    "a number": lambda: torch.tensor(1.0),
    "sparse": lambda: torch.randn(5, 24).to_sparse(),
    "meta": lambda: torch.empty(5, 24, device="meta"),
}
BIASES: dict[str, Callable[[], Any]] = {
    "float32": lambda: torch.randn(16),
    "none": lambda: None,
    "every other": lambda: torch.randn(32)[::2],
    "bfloat16": lambda: torch.randn(16).bfloat16(),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def layers() -> tuple[nn.Linear, Any]:
    dense = pruned(nn.Linear(24, 16))
    return dense, packed_copy(dense)


def alone(layer: Any, x: Any, bias: Any, activation: str = "") -> Any:
    weight = layer.weight.packed
    return linear_of_tensors(weight.parts[0], weight.kernel, x, bias, activation)


@pytest.mark.skipif(not HAS_TABLE, reason="PyTorch before 2.10 has no table of DLPack's functions")
@pytest.mark.parametrize("activation", operators.ACTIVATIONS)
@pytest.mark.parametrize("how", PLAIN)
def test_the_core_reads_plain_tensors(how: str, activation: str) -> None:
    dense, layer = layers()
    x = PLAIN[how]()
    with torch.no_grad():
        found = alone(layer, x, dense.bias, activation)
        wanted = operators.ACTIVATIONS[activation](functional.linear(x.float(), dense.weight, dense.bias))
    assert (type(found), found.dtype, found.requires_grad) == (Tensor, x.dtype, False)
    torch.testing.assert_close(found, wanted.to(x.dtype), rtol=1e-2 if how == "bfloat16" else 1e-5, atol=1e-5)


@pytest.mark.parametrize("how", OTHER)
def test_it_leaves_others(how: str) -> None:
    dense, layer = layers()
    assert alone(layer, OTHER[how](), dense.bias) is None


@pytest.mark.parametrize("bias", [torch.randn(15), torch.randn(16, 1), torch.randn(16).double(), 3, "bias"])
def test_it_leaves_other_biases(bias: Any) -> None:
    _, layer = layers()
    assert alone(layer, torch.randn(5, 24), bias) is None


@pytest.mark.parametrize("x", [None, 1.0, "x", [[1.0] * 24], torch.nn.Linear])
def test_it_leaves_what_is_no_tensor(x: Any) -> None:
    dense, layer = layers()
    assert alone(layer, x, dense.bias) is None


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("how", [*PLAIN, "float16", "columns of more", "transposed", "expanded", "no rows"])
def test_both_ways_agree(how: str, bias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, layer = layers()
    x, add = (PLAIN | OTHER)[how](), BIASES[bias]()
    with torch.no_grad():
        found = functional.linear(x, layer.weight, add)
        monkeypatch.setattr(operators, "linear_of_tensors", lambda *_: None)
        wanted = functional.linear(x, layer.weight, add)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert torch.equal(found, wanted)


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises((TypeError, ValueError)):
        use_tensors(object())
