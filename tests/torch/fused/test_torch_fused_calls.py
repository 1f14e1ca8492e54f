"""Calls of fused modules that are not as the example's, and modules that were changed: right in any case."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
from fused_models import PreNorm, counted, made
from torch_cases import pruned

import torch
from sparsam.torch import accelerate, pack
from sparsam.torch.fused.installation import fused_modules
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("fusing", "one_thread")


class Wrapped(nn.Module):
    """A block, the module around it, and the same block packed but not fused."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.block = PreNorm(heads=heads)
        self.last = nn.Conv1d(32, 1, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        return self.last(self.block(x, mask)[0].transpose(1, 2))


@pytest.fixture
def blocks() -> tuple[Any, Any]:
    """A fused block, and its twin that is packed only."""
    torch.manual_seed(0)
    model: Any = pruned(Wrapped()).requires_grad_(requires_grad=False)
    twin = copy.deepcopy(model.block)
    for layer in twin.modules():
        if isinstance(layer, nn.Linear):
            pack(layer)
    report = accelerate(model, {"x": torch.randn(2, 7, 32), "mask": None}, verbose=False)
    assert report.fused is not None
    assert list(fused_modules(model)) == ["block"]
    return model.block, twin


def check(blocks: tuple[Any, Any], *args: Any, fused: bool, **kwargs: Any) -> Any:
    """Compares both blocks, and whether the steps ran."""
    block, twin = blocks
    with counted() as calls:
        found = block(*args, **kwargs)
    wanted = twin(*args, **kwargs)
    assert calls.computed == fused
    assert type(found) is tuple
    assert found[1] is None
    torch.testing.assert_close(found[0], wanted[0], atol=1e-5, rtol=1e-4)
    assert found[0].stride() == wanted[0].stride()
    return found[0]


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (5, 1), (3, 4), (4, 3), (1, 512), (2, 40)])
def test_other_shapes(blocks: tuple[Any, Any], shape: tuple[int, int]) -> None:
    x = torch.randn(*shape, 32)
    check(blocks, x, None, fused=True)
    for sizes in ((shape[0], 1), (1, 1), (shape[0], 2)):
        mask = torch.rand(*sizes, shape[1], shape[1]) < 0.6
        mask[..., 0] = True
        check(blocks, x, mask, fused=sizes[1] == 1)  # a mask for each head is not what was followed
        check(blocks, x, torch.where(mask, 0.0, -1e30), fused=False)  # nor one of numbers
    keys = torch.ones(shape[0], 1, 1, shape[1], dtype=torch.bool)
    keys[..., shape[1] // 2 + 1 :] = False
    check(blocks, x, keys, fused=True)
    check(blocks, x, keys.expand(-1, -1, shape[1], -1), fused=True)


def test_a_mask_that_hides_everything_from_a_query(blocks: tuple[Any, Any]) -> None:
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[0, 0, 2] = False
    check(blocks, torch.randn(2, 4, 32), mask, fused=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(0, 7, 32),
        lambda: torch.randn(2, 0, 32),
        lambda: torch.randn(7, 2, 32).transpose(0, 1),
        lambda: torch.randn(2, 7, 64)[..., ::2],
        lambda: torch.randn(2, 7, 36)[..., 4:],
        lambda: torch.randn(2, 513, 32),
        lambda: torch.randn(2, 7, 32, requires_grad=True),
    ],
)
def test_inputs_of_another_kind(blocks: tuple[Any, Any], make: Callable[[], Tensor]) -> None:
    check(blocks, make(), None, fused=False)


def test_other_ways_to_call_it(blocks: tuple[Any, Any]) -> None:
    x = torch.randn(2, 5, 32)
    check(blocks, x, fused=False)
    check(blocks, x=x, mask=None, fused=False)
    check(blocks, x, mask=None, fused=False)
    check(blocks, nn.Parameter(x), None, fused=False)
    check(blocks, x, torch.ones(5, 5, dtype=torch.bool), fused=False)
    with pytest.raises(TypeError):
        blocks[0](x, None, [])
    with pytest.raises(Exception, match=r"32|shape"):
        blocks[0](torch.randn(2, 5, 31), None)
    check(blocks, x, None, fused=True)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_other_dtypes_raise_as_they_do_without(blocks: tuple[Any, Any]) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        x = torch.randn(2, 5, 32, dtype=dtype)
        results = []
        for block in blocks:
            try:
                results.append(block(x, None)[0].dtype)
            except (RuntimeError, TypeError) as error:
                results.append(type(error))
        assert results[0] == results[1]


def _flag(block: Any) -> None:
    block.doubled = True


def _scale(block: Any) -> None:
    block.scale = 0.25


def _bias(block: Any) -> None:
    block.up.bias = nn.Parameter(torch.ones(48))


def _norm(block: Any) -> None:
    block.after = nn.LayerNorm(32)


def _weight(block: Any) -> None:
    block.down.weight = nn.Parameter(torch.randn(32, 48, generator=torch.Generator().manual_seed(1)))


def _forward(block: Any) -> None:
    block.down.forward = lambda x: x.new_zeros(*x.shape[:-1], 32)


def _hook(block: Any) -> None:
    block.up.register_forward_hook(lambda _m, _x, y: y + 1)


def _pre_hook(block: Any) -> None:
    block.out.register_forward_pre_hook(lambda _, x: (x[0] * 2,))


def _class(block: Any) -> None:
    block.after.__class__ = Doubled


class Doubled(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", [_flag, _scale, _bias, _norm, _weight, _forward, _hook, _pre_hook, _class])
def test_a_change_of_the_module_is_seen(blocks: tuple[Any, Any], change: Callable[[Any], None]) -> None:
    x = torch.randn(2, 5, 32)
    before = check(blocks, x, None, fused=True)
    with torch.no_grad():
        for block in blocks:
            change(block)
        assert not torch.allclose(check(blocks, x, None, fused=False), before)


def test_changes_of_numbers_are_seen(blocks: tuple[Any, Any]) -> None:
    x = torch.randn(2, 5, 32)
    before = check(blocks, x, None, fused=True)
    with torch.no_grad():
        for block in blocks:
            block.before.bias.add_(1)
            block.after.weight.mul_(2)
        middle = check(blocks, x, None, fused=True)
        for block in blocks:
            block.out.bias.data = torch.full((32,), 3.0)
        again = check(blocks, x, None, fused=True)
        for block in blocks:
            block.down.weight.mul_(2)
        last = check(blocks, x, None, fused=True)
    results = (before, middle, again, last)
    assert not any(torch.allclose(a, b) for i, a in enumerate(results) for b in results[:i])


def test_a_flag_that_is_changed_back(blocks: tuple[Any, Any]) -> None:
    x = torch.randn(2, 5, 32)
    for block in blocks:
        block.doubled = True
    check(blocks, x, None, fused=False)
    for block in blocks:
        block.doubled = False
    check(blocks, x, None, fused=True)


def test_hooks_of_the_module_itself_and_of_all(blocks: tuple[Any, Any]) -> None:
    x = torch.randn(2, 5, 32)
    handles = [block.register_forward_hook(lambda _m, _x, y: (y[0] + 1, y[1])) for block in blocks]
    check(blocks, x, None, fused=True)
    for handle in handles:
        handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    check(blocks, x, None, fused=False)
    handle.remove()
    check(blocks, x, None, fused=True)


@contextmanager
def _default_device() -> Iterator[None]:
    with torch.device("cpu"):
        yield


@pytest.mark.parametrize(
    "context",
    [lambda: torch.autocast("cpu", dtype=torch.bfloat16), _default_device],
    ids=["autocast", "mode"],
)
def test_contexts(blocks: tuple[Any, Any], context: Callable[[], Any]) -> None:
    x = torch.randn(2, 5, 32)
    with torch.no_grad(), context(), counted() as calls:
        found, wanted = blocks[0](x, None)[0], blocks[1](x, None)[0]
    assert calls.computed == 0
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)


def test_inference_mode(blocks: tuple[Any, Any]) -> None:
    x = torch.randn(2, 5, 32)
    with torch.inference_mode():
        found = check(blocks, x, None, fused=True)
    assert found.is_inference()
    check(blocks, torch.randn(2, 5, 32), None, fused=True)


@pytest.mark.filterwarnings("ignore")  # of PyTorch, about batching rules and deprecated traces
def test_transforms_and_traces(blocks: tuple[Any, Any]) -> None:
    block, twin = blocks
    x = torch.randn(3, 2, 5, 32)
    found = torch.vmap(lambda one: block(one, None)[0])(x)
    torch.testing.assert_close(found, torch.stack([twin(one, None)[0] for one in x]), atol=1e-5, rtol=1e-4)
    trace: Any = torch.jit.trace
    traced = trace(lambda x: block(x, None)[0], (x[0],), check_trace=False)
    torch.testing.assert_close(traced(x[1]), twin(x[1], None)[0], atol=1e-5, rtol=1e-4)


def test_gradients() -> None:
    """Dense norms and biases have gradients in the module's own forward."""
    torch.manual_seed(0)
    model: Any = pruned(Wrapped())
    accelerate(model, {"x": torch.randn(2, 7, 32), "mask": None}, verbose=False)
    with counted() as calls:
        y = model(torch.randn(2, 5, 32))
        with torch.no_grad():
            model.block(torch.randn(2, 5, 32), None)
    assert y.requires_grad
    assert calls.computed == 1


def test_training_mode(blocks: tuple[Any, Any]) -> None:
    x = torch.randn(2, 5, 32)
    for block in blocks:
        block.train()
    check(blocks, x, None, fused=True)  # nothing in it reads the flag
    for block in blocks:
        block.eval()
    check(blocks, x, None, fused=True)
    model, example, _ = made("BERT")
    accelerate(model, example, verbose=False)
    model.train()
    with counted() as calls, torch.no_grad():
        model(**example)
    assert calls.computed == 0


def test_copies_have_weights_of_their_own(blocks: tuple[Any, Any]) -> None:
    x = torch.randn(2, 5, 32)
    twins = copy.deepcopy(blocks)
    with torch.no_grad():
        for block in blocks:
            block.before.bias.add_(1)
    changed = check(blocks, x, None, fused=True)
    assert not torch.allclose(check(twins, x, None, fused=True), changed)


class Scaled(nn.Module):
    """A block that reads numbers of a tensor."""

    def __init__(self, read: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.read = read
        self.factor = torch.tensor(1.0)
        self.norm, self.first, self.second = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(self.norm(x)))
        found: Tensor = y + x if self.read(self.factor) > 0.5 else y
        return found


@pytest.mark.parametrize("read", [float, Tensor.item, lambda x: x + 0, lambda x: x.tolist()])
def test_numbers_of_tensors_are_no_constants(read: Callable[[Tensor], Any]) -> None:
    model = pruned(nn.Sequential(Scaled(read), nn.Flatten()))
    x = torch.randn(2, 5, 32)
    accelerate(model, x, verbose=False)
    with torch.no_grad():
        before = model(x)
        cast(Any, model[0]).factor.fill_(0)  # type: ignore[index]
        assert not torch.allclose(model(x), before)


class Counting(nn.Module):
    """A block that changes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.number = 0
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.number += 1
        self.seen.append(len(x))
        found: Tensor = self.second(self.first(self.norm(x)))
        return found


def test_a_module_that_changes_itself_is_not_fused() -> None:
    model: Any = pruned(nn.Sequential(Counting(), nn.Flatten()))
    x = torch.randn(2, 5, 32)
    accelerate(model, x, verbose=False)
    number, length = model[0].number, len(model[0].seen)
    model(x)
    assert (model[0].number, len(model[0].seen)) == (number + 1, length + 1)


def test_heads_that_the_core_does_not_compute() -> None:
    model: Any = pruned(Wrapped(heads=4))
    x = torch.randn(2, 7, 32)
    wanted = model(x)
    accelerate(model, {"x": x}, verbose=False)
    assert "block" not in fused_modules(model)
    torch.testing.assert_close(model(x), wanted, atol=1e-5, rtol=1e-4)
