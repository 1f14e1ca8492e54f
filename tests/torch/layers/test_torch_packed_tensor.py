"""A packed weight is a tensor: what asks about it, changes it, or multiplies with it by another way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch.nn import functional
from torch_cases import pruned

import torch
from sparsam.torch import PackedTensor, pack, restore
from sparsam.torch.layers.packed_weight import PackedWeight
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_asking_unpacks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, conv = pruned(nn.Linear(8, 6)), pruned(nn.Conv2d(8, 6, 3, groups=2))
    dense = copy.deepcopy([linear, conv])

    def unpack(_: object) -> Tensor:
        raise AssertionError

    pack(linear)
    pack(conv)
    monkeypatch.setattr(PackedWeight, "unpack", unpack)
    for layer, plain in zip((linear, conv), dense, strict=True):
        found: Any = layer.weight
        wanted: Any = plain.weight
        for name in (
            "shape",
            "dtype",
            "device",
            "layout",
            "ndim",
            "is_leaf",
            "is_sparse",
            "itemsize",
        ):
            assert getattr(found, name) == getattr(wanted, name), name
        for method in (
            "size",
            "stride",
            "dim",
            "numel",
            "is_contiguous",
            "is_floating_point",
            "element_size",
        ):
            assert getattr(found, method)() == getattr(wanted, method)(), method
        assert not found.requires_grad
        assert next(layer.parameters()) is found
        assert isinstance(found, nn.Parameter)
        kept: Any = found  # isinstance narrowed its type
        assert kept.packed_data.data_ptr() == kept.data.packed_data.data_ptr() != 0
        public = {name for name in dir(plain) if not name.startswith("_")}
        assert public <= set(dir(layer))
        assert repr(layer) == repr(plain)
    assert conv.kernel_size == (3, 3)  # and all else that the forward code of models reads
    assert isinstance(conv, nn.Conv2d)


CHANGES: dict[str, Callable[[Any], object]] = {
    "mul_": lambda w: w.mul_(2),
    "data, in place": lambda w: w.data.add_(torch.ones(6, 1) @ torch.ones(1, 8)),
    "data +=": lambda w: w.data.__iadd__(1),
    "data =": lambda w: setattr(w, "data", torch.eye(6, 8)),
    "copy_": lambda w: w.copy_(torch.eye(6, 8)),
    "copy_ of another type": lambda w: w.copy_(torch.eye(6, 8, dtype=torch.float64)),
    "a row": lambda w: w[2].fill_(3.0),
    "a column of the transpose": lambda w: w.T[:, 1:3].mul_(0.0),
    "an element": lambda w: w.data.__setitem__((3, 4), 5.0),
    "a mask": lambda w: w.data.__setitem__(w.detach() > 0, 0.0),
    "a flat view": lambda w: w.view(-1)[3:9].zero_(),
    "a chunk": lambda w: w.chunk(2)[1].neg_(),
    "unbind": lambda w: w.unbind(0)[1].neg_(),
    "diagonal": lambda w: w.diagonal().fill_(1.0),
    "foreach": lambda w: torch._foreach_mul_([w.data, torch.ones(2)], 3.0),
    "out=": lambda w: torch.mul(w.detach(), 2, out=w.data),
    "an initialiser": nn.init.ones_,
    "index_add_": lambda w: w.data.index_add_(0, torch.tensor([1, 1]), torch.ones(2, 8)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("forms", [("panels",), ("bitmask",), ("bitmask", "panels"), ("slots",)])
def test_changes_in_place(change: str, forms: tuple[str, ...]) -> None:
    dense = pruned(nn.Linear(8, 6))
    layer: Any = pack(copy.deepcopy(dense))
    layer.weight._content.data = layer.weight.packed.with_forms(forms)
    parameter, x = layer.weight, torch.randn(3, 8)
    for weight in (layer.weight, dense.weight):
        with torch.no_grad():
            CHANGES[change](weight)
    assert layer.weight is parameter
    assert parameter.packed.forms == forms
    assert torch.equal(parameter.to_dense(), dense.weight)  # type: ignore[arg-type]
    torch.testing.assert_close(layer(x), dense(x))
    restore(layer)
    assert torch.equal(layer.weight, dense.weight)  # type: ignore[arg-type]


def test_a_lora_merge() -> None:
    dense = pruned(nn.Linear(8, 6))
    layer: Any = pack(copy.deepcopy(dense))
    a, b, x = torch.randn(2, 8), torch.randn(6, 2), torch.randn(3, 8)
    for one in (layer, dense):
        one.weight.data += b @ a  # type: ignore[operator]
    torch.testing.assert_close(layer(x), dense(x))


def test_changes_of_a_tied_weight_reach_all_layers() -> None:
    model: Any = pruned(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    pack(model[0])
    model[1].weight = model[0].weight
    x = torch.randn(3, 8)
    with torch.no_grad():
        model[1].weight.mul_(2)
    torch.testing.assert_close(model[0](x), x @ model[1].weight.to_dense().T + model[0].bias)
    twin = copy.deepcopy(model)
    assert twin[0].weight is twin[1].weight
    assert len(list(twin.parameters())) == 3


def test_views_refuse_what_they_cannot_do() -> None:
    weight: Any = PackedTensor.pack(torch.eye(4, 8))
    with pytest.raises(ValueError, match=r"data: expected shape \(4, 8\); got \(2, 2\)"):
        weight.data = torch.ones(2, 2)
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(weight)[0, 0] = 2.0
    with pytest.raises(ValueError, match="read-only"):
        weight.numpy()[0, 0] = 2.0
    assert weight.tolist() == torch.eye(4, 8).tolist()


class Scaled(nn.Linear):
    """A plain subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias) * 0.5


PRODUCTS: dict[str, Callable[[Tensor, Any, Tensor], Tensor]] = {
    "linear": functional.linear,
    "linear, keywords": lambda x, w, b: functional.linear(input=x, weight=w, bias=b),
    "@ T": lambda x, w, b: x @ w.T + b,
    "matmul": lambda x, w, b: torch.matmul(x, w.transpose(0, 1)) + b,
    "matmul, permuted": lambda x, w, b: x.matmul(w.permute(1, 0)) + b,
    "mm": lambda x, w, b: torch.mm(x, w.t()) + b,
    "addmm": lambda x, w, b: torch.addmm(b, x, w.t()),
    "addmm, scaled": lambda x, w, b: torch.addmm(b, x, w.t(), alpha=1.0, beta=2.0) - b,
    "from the left": lambda x, w, b: (w @ x.T).T + b,
    "einsum": lambda x, w, b: torch.einsum("bi,oi->bo", x, w) + b,
    "rows": lambda x, w, b: torch.cat([functional.linear(x, part) for part in w.chunk(3)], 1) + b,
    "no transposition": lambda x, w, b: x @ w.transpose(0, 0).T + b,
}
FAST = {
    name
    for name in PRODUCTS
    if name not in {"addmm, scaled", "from the left", "einsum", "rows", "no transposition"}
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("how", PRODUCTS)
def test_products(how: str, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = torch.randn(6, 8) * (torch.rand(6, 8) < 0.5)
    packed: Any = PackedTensor.pack(dense.T.contiguous() if transposed else dense, transposed=transposed)
    x, bias = torch.randn(3, 8), torch.randn(6)
    found = PRODUCTS[how](x, packed.T if transposed else packed, bias)
    torch.testing.assert_close(found, PRODUCTS[how](x, dense, bias), rtol=1e-5, atol=1e-5)
    if how in FAST and not transposed:
        monkeypatch.delattr(PackedWeight, "unpack")  # goes straight to the kernel
        PRODUCTS[how](x, packed, bias)


def test_a_subclass_with_a_forward_of_its_own() -> None:
    dense = pruned(Scaled(8, 6))
    x = torch.randn(3, 8)
    torch.testing.assert_close(pack(copy.deepcopy(dense))(x), dense(x))
    torch.testing.assert_close(pack(copy.deepcopy(dense), activation="relu")(x), dense(x).relu())


def test_functional_call() -> None:
    dense: Any = pruned(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2)))
    model = copy.deepcopy(dense)
    pack(model[0], activation="relu")
    x = torch.randn(3, 8)
    expected = dense[1](dense[0](x).relu())
    for state in (dict(model.named_parameters()), model.state_dict(), dense.state_dict()):
        torch.testing.assert_close(torch.func.functional_call(model, state, (x,)), expected)
    torch.testing.assert_close(
        torch.func.functional_call(dense, dict(model.named_parameters()), (x,)), dense(x)
    )
