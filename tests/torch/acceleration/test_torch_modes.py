"""Packed layers within what PyTorch may have switched on around them: defaults, transforms, training."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from torch.autograd import forward_ad
from torch_cases import packed, pruned

import torch
from sparsam.torch import pack, restore
from sparsam.torch.acceleration.workflow import accelerate
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("clock", "one_thread")

REFUSED = r"forward-mode differentiation: .*restore\(model\) before training"
SHAPES = ((3, 8), (2, 8, 5, 5))


def layers() -> list[Any]:
    return [
        pack(pruned(nn.Linear(8, 6)), activation="relu"),
        pack(pruned(nn.Conv2d(8, 6, 3, groups=2))),
    ]


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(default: torch.dtype) -> None:
    for layer, shape in zip(layers(), SHAPES, strict=True):
        x = torch.randn(shape)
        expected = layer(x)
        before = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            found = layer(x)
        finally:
            torch.set_default_dtype(before)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)


def test_the_default_device_does_not_matter() -> None:
    model = pruned(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)))
    with torch.device("meta"):
        assert accelerate(model).layers[0].activation == "relu"
    for layer, shape in zip([*layers(), model], (*SHAPES, SHAPES[0]), strict=True):
        x = torch.randn(shape)
        expected = layer(x)
        with torch.device("meta"):
            torch.testing.assert_close(layer(x), expected)
            layer.to(torch.bfloat16)
        assert layer(x.bfloat16()).dtype == torch.bfloat16


def forward_mode(layer: Any, x: Tensor) -> object:
    with forward_ad.dual_level():
        return layer(forward_ad.make_dual(x, torch.ones_like(x)))  # type: ignore[no-untyped-call]


DERIVATIVES: dict[str, Callable[[Any, Tensor], object]] = {
    "dual tensors": forward_mode,
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x,)),
    "grad": lambda layer, x: torch.func.grad(lambda y: layer(y).sum())(x),
    "jacfwd": lambda layer, x: torch.func.jacfwd(layer)(x),
    "grad within vmap": lambda layer, x: torch.vmap(torch.func.grad(lambda y: layer(y[None]).sum()))(x),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("how", DERIVATIVES)
def test_no_derivative_is_lost(how: str) -> None:
    for training in (False, True):
        for layer, shape in zip(layers(), SHAPES, strict=True):
            with pytest.raises(RuntimeError, match=REFUSED):
                DERIVATIVES[how](layer.train(training), torch.randn(shape))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap() -> None:
    for layer, shape in zip(layers(), SHAPES, strict=True):
        x = torch.randn(4, *shape)
        expected = torch.stack([layer(one) for one in x])
        torch.testing.assert_close(torch.vmap(layer)(x), expected)


def test_negated_views() -> None:
    for layer, shape in zip(layers(), SHAPES, strict=True):
        x = torch.randn(shape)
        view = torch._neg_view(-x)
        assert view.is_neg()
        torch.testing.assert_close(layer(view), layer(x))


def test_a_first_layer_that_would_train() -> None:
    for layer, shape in zip(layers(), SHAPES, strict=True):
        model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(2))
        x = torch.randn(shape)
        model(x)
        with pytest.raises(RuntimeError, match=REFUSED):
            model.train()(x).sum().backward()
        with torch.no_grad():
            assert not layer(x).requires_grad
        with pytest.raises(RuntimeError, match=REFUSED):  # as a dense one, it would learn in eval mode too
            model.eval()(x).sum().backward()
        assert not layer.requires_grad_(requires_grad=False)(x).requires_grad
        model(x).sum().backward()  # of a part that is frozen, the outputs are what they are
        assert model.get_parameter("2.weight").grad is not None


def test_a_frozen_first_layer() -> None:
    linear = pruned(nn.Linear(8, 6)).requires_grad_(requires_grad=False)
    model = nn.Sequential(pack(linear), nn.Linear(6, 2)).train()
    model(torch.randn(3, 8)).sum().backward()
    assert model.get_parameter("1.weight").grad is not None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_layer_that_would_train(backend: str) -> None:
    model = nn.Sequential(pack(pruned(nn.Linear(8, 6)))).train()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with pytest.raises(Exception, match=REFUSED):
        compiled(torch.randn(3, 8)).sum().backward()
    torch._dynamo.reset()


def test_tensors_that_are_not_dense() -> None:
    for training in (False, True):
        layer = layers()[0].train(training)
        for x, error in (
            (torch.eye(8).to_sparse(), TypeError),
            (torch.eye(8).to_mkldnn(), TypeError),
            (torch.eye(8, device="meta"), ValueError),
        ):
            with pytest.raises(error, match=r"x: expected .*; got .*"):
                layer(x)


def test_biases_that_kernels_cannot_read() -> None:
    for layer, shape in zip(layers(), SHAPES, strict=True):
        x, bias = torch.randn(shape), torch.randn(6, 3)[:, 0]
        state = {**layer.state_dict(), "bias": bias.clone()}
        layer.load_state_dict(state)
        expected = layer(x)
        layer.bias = nn.Parameter(bias)
        torch.testing.assert_close(layer(x), expected)
        layer.bias = nn.Parameter(torch.ones(5))
        with pytest.raises(ValueError, match=r"bias: expected shape \(6,\); got \(5,\)"):
            layer(x)
        layer.bias = nn.Parameter(torch.ones(6, device="meta"))
        with pytest.raises(ValueError, match=r"bias: expected .* on the CPU, .*; got one on meta; use bias"):
            layer(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model,
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.bfloat16(),
    ],
)
def test_what_was_loaded_is_restored(change: Callable[[nn.Module], nn.Module]) -> None:
    model = pruned(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)))
    accelerate(model, torch.randn(3, 8))
    model = change(model)
    new = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    for assign in (False, True):
        model.load_state_dict(new, assign=assign)
        restore(model)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, new[name])
        accelerate(model, torch.randn(3, 8, dtype=new["0.bias"].dtype))


def test_another_parameter_in_the_place_of_the_packed_one() -> None:
    """By tie_weights() of Hugging Face, say: it counts, and what the layer computes besides stays."""
    for layer, shape in zip(layers(), SHAPES, strict=True):
        x, shown = torch.randn(shape), layer(torch.randn(shape)).min() >= 0
        layer.weight = nn.Parameter(torch.ones_like(layer.weight))
        expected = type(layer).forward(layer, x)
        torch.testing.assert_close(layer(x), expected.relu() if shown else expected)
        assert restore(layer) == 0
        assert "forward" not in vars(layer)
        torch.testing.assert_close(layer(x), expected)
        assert torch.equal(layer.weight, torch.ones_like(layer.weight))


class Named(nn.Module):
    """Calls its layers with a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6)
        self.conv = nn.Conv1d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(input=self.fc(input=x))
        return y


@pytest.mark.parametrize("examples", [None, torch.randn(2, 3, 8)])
def test_layers_called_with_a_keyword(examples: Tensor | None) -> None:
    model, x = pruned(Named()), torch.randn(2, 3, 8)
    expected = model(x)
    assert accelerate(model, examples).swapped == (1 if examples is None else 2)
    assert packed(model, "fc").packed.density < 1
    torch.testing.assert_close(model(x), expected)


def test_without_examples_the_random_state_stays() -> None:
    model = pruned(nn.Sequential(nn.Linear(8, 6)))
    before = torch.get_rng_state()
    assert accelerate(model).swapped == 1
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_no_outputs() -> None:
    layer: Any = pack(nn.Linear(5, 0))
    assert layer(torch.ones(3, 5)).shape == (3, 0)
    assert layer.weight.shape == (0, 5)


def test_tied_layers_share_their_weight_in_another_dtype() -> None:
    model = pruned(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    model[1].weight = model[0].weight  # type: ignore[index]
    assert accelerate(model, torch.randn(2, 8)).swapped == 2
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        assert packed(model, "0").weight is packed(model, "1").weight
        assert packed(model, "0").weight.dtype == packed(model, "0").packed.dtype == dtype


def test_lazy_layers() -> None:
    with pytest.raises(ValueError, match=r"0.weight: expected .* that ran before; .* call it once"):
        accelerate(nn.Sequential(nn.LazyLinear(3)))


FORK = """
import os, torch, sparsam.torch
torch.set_num_threads(2)
layer = sparsam.torch.pack(torch.nn.Linear(512, 512), batches=[1, 64])
with torch.no_grad():
    layer(torch.randn(64, 512))
    child = os.fork()
    if not child:
        layer(torch.randn(64, 512))
        layer(torch.randn(7, 512))
        layer.weight.prepare(3)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_child_does_not_hang() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=60)


def test_a_long_signal() -> None:
    conv = nn.Conv1d(1, 2, 10, stride=5)
    x = torch.randn(1, 1, (1 << 20) + 7)
    torch.testing.assert_close(pack(copy.deepcopy(conv))(x), conv(x))
