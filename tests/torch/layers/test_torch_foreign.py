"""Weights of other libraries: classes of tensors that say themselves what is computed with them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from torch.nn import functional
from torch_cases import mlp, row

import torch
from sparsam import PruningConfig
from sparsam.torch import Pruner, accelerate, load, pack, prune, restore, save
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("clock", "one_thread")


class Rounded(Tensor):
    """Integers with a scale for each row; like those of torchao it knows linear layers, and little else."""

    numbers: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, scales: Tensor) -> Rounded:  # noqa: PYI034
        made: Rounded = Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scales.dtype)
        made.numbers, made.scales = numbers, scales
        return made

    @classmethod
    def of(cls, weight: Tensor) -> Rounded:
        scales = weight.detach().abs().amax(1, keepdim=True) / 127
        return cls((weight.detach() / scales).round().to(torch.int8), scales)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return "Rounded()"

    def numpy(self, **_: Any) -> Any:
        msg = ".numpy() is not supported for tensor subclasses."
        raise RuntimeError(msg)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is functional.linear:
            x, weight, bias = args
            return functional.linear(x, weight.numbers * weight.scales, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in {torch.ops.aten.detach.default, torch.ops.aten.clone.default}:
            return cls(args[0].numbers, args[0].scales)
        msg = f"Rounded dispatch: attempting to run unimplemented operator/function: {func=}"
        raise NotImplementedError(msg)


def rounded() -> Any:
    """A pruned model of two layers, the first of them rounded."""
    torch.manual_seed(0)
    model: Any = mlp()
    model[0].weight = nn.Parameter(Rounded.of(model[0].weight), requires_grad=False)
    assert type(model[0].weight) is Rounded
    return model


def test_accelerate_leaves_it() -> None:
    model, x = rounded(), torch.randn(3, 24)
    wanted = model(x).detach()
    report = accelerate(model, x, verbose=False)
    assert row(report, "0").reason == "its weight is a Rounded"
    assert row(report, "2").swapped
    torch.testing.assert_close(model(x), wanted)
    assert restore(copy.deepcopy(model)) == restore(model) == 1
    assert type(model[0].weight) is Rounded


def test_prune_leaves_it_where_it_is_excluded() -> None:
    model = rounded()
    before = model[0].weight
    report = prune(model, target_sparsity=0.9, exclude=["0.weight"])
    assert model[0].weight is before
    assert [layer.name for layer in report.layers] == ["2.weight"]
    assert int((model[2].weight == 0).sum()) == round(0.9 * model[2].weight.numel())


REFUSED: dict[str, tuple[Callable[[Any, Path], Any], type[Exception], str]] = {
    "pack": (
        lambda m, _: pack(m[0]),
        TypeError,
        "weight: expected a dense tensor; got one of class Rounded; leave it as it is",
    ),
    "save": (
        save,
        TypeError,
        r"0\.weight: expected a dense tensor in the state dict; got Rounded; save it apart",
    ),
    "load": (
        lambda m, path: (save(mlp(), path), load(path, m)),  # type: ignore[func-returns-value]
        ValueError,
        r"tensor '0\.weight': expected a dense one in the model; got a Rounded",
    ),
    "prune": (
        lambda m, _: prune(m, target_sparsity=0.5),
        ValueError,
        r"weight '0\.weight': expected a dense floating-point Parameter; got a Rounded; exclude it",
    ),
    "Pruner": (
        lambda m, _: Pruner(m, PruningConfig(target_sparsity=0.5), end=2),
        ValueError,
        r"weight '0\.weight': expected a dense floating-point Parameter; got a Rounded; exclude it",
    ),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_needs_dense_weights_says_so(how: str, tmp_path: Path) -> None:
    call, kind, words = REFUSED[how]
    model = rounded()
    kept = model[0].weight
    with pytest.raises(kind, match=words):
        call(model, tmp_path)
    assert model[0].weight is kept
