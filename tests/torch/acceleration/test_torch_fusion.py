from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch_cases import ACTIVATIONS, check_round_trip, mlp, pruned, row

import torch
from sparsam.torch import restore
from sparsam.torch.acceleration.fusion import recognise_activation
from sparsam.torch.acceleration.workflow import accelerate
from sparsam.torch.layers.packing import is_packed
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("clock", "one_thread")


@given(
    widths=st.lists(st.integers(8, 40), min_size=2, max_size=5),
    kinds=st.lists(
        st.sampled_from([None, "relu", "gelu", "gelu_tanh", "silu", "tanh"]), min_size=4, max_size=4
    ),
    bias=st.booleans(),
    batch=st.integers(4, 8),
)
@settings(max_examples=15, deadline=None)
def test_any_sequence(widths: list[int], kinds: list[str | None], bias: bool, batch: int) -> None:
    layers: list[nn.Module] = []
    for (inputs, outputs), kind in zip(itertools.pairwise(widths), kinds, strict=False):
        layers.append(nn.Linear(inputs, outputs, bias=bias))
        if kind:
            layers.append({**ACTIVATIONS, "tanh": nn.Tanh}[kind]())
    report = check_round_trip(pruned(nn.Sequential(*layers)), torch.randn(batch, widths[0]))
    fused = [name for name in kinds[: len(widths) - 1] if name in ACTIVATIONS]
    found = [r.activation for r in report.layers if r.activation]
    assert report.swapped == len(widths) - 1
    assert found == fused


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_activation_is_fused(name: str) -> None:
    model = mlp(ACTIVATIONS[name])
    report = accelerate(model, torch.randn(5, 24))
    assert [r.activation for r in report.layers] == [name, name]
    assert "fused into 0" in repr(model)
    restore(model)
    assert "fused" not in repr(model)
    check_round_trip(model, torch.randn(5, 24))


class Clipped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(x).clip(-10, 10)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x) + torch.randn_like(x) * self.training


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, x * self.slope)


def test_activations_are_recognised_by_their_values() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    assert recognise_activation(Own()) == "gelu"
    assert recognise_activation(nn.LeakyReLU(0.0)) == "relu"
    assert recognise_activation(nn.Threshold(0.0, 0.0)) == "relu"
    assert recognise_activation(nn.ReLU(inplace=True)) == "relu"
    others = (
        nn.Identity(),
        nn.Tanh(),
        nn.ReLU6(),
        nn.Hardswish(),
        nn.LeakyReLU(1e-3),
        nn.Dropout(),
        nn.GLU(),
    )
    for module in (*others, Clipped(), Noisy(), Gate(), nn.Softmax(-1), nn.Embedding(3, 3), nn.ELU(1e-3)):
        assert recognise_activation(module) is None


class Uses(nn.Module):
    """A layer whose output, before the activation, is used in some way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.fc = nn.Linear(16, 16)
        self.act = nn.ReLU()
        self.drop = nn.Dropout(0.5)
        self.other = nn.Tanh()

    def forward(self, x: Tensor) -> Any:
        y: Tensor = self.fc(x)
        if self.how == "also added":
            return self.act(y) + y
        if self.how == "also added, hardly":
            return self.act(y) + 1e-9 * y
        if self.how == "also read by a method":
            return self.act(y) + 1e-9 * y.mean().item()
        if self.how == "only its shape is read":
            return self.act(y)[: y.shape[0], : y.size(-1)] + (0 if y.is_floating_point() and y.ndim else 1)
        if self.how == "changed before":
            y[y.abs() < 1e-6] = 0
        if self.how == "also read by a module":
            return self.act(y) + 1e-9 * self.other(y)
        if self.how == "through a view":
            return self.act(y[:])
        if self.how == "after a dropout":
            return self.act(self.drop(y))
        if self.how == "activation used twice":
            return self.act(y) + self.act(x)
        if self.how == "layer called again":
            return self.act(y) + self.fc(x + 1)
        return self.act(y)


USES = (
    "also added",
    "also added, hardly",
    "also read by a method",
    "changed before",
    "also read by a module",
    "through a view",
    "after a dropout",
    "activation used twice",
    "layer called again",
)


@pytest.mark.parametrize("how", USES)
def test_activations_that_must_not_be_fused(how: str) -> None:
    model = pruned(Uses(how))
    report = check_round_trip(model, torch.randn(5, 16))
    assert row(report, "fc").swapped
    assert row(report, "fc").activation is None
    for fine in ("plainly", "only its shape is read"):
        assert check_round_trip(pruned(Uses(fine)), torch.randn(5, 16)).layers[0].activation == "relu"


def test_one_bad_fusion_does_not_spoil_the_others() -> None:
    model = nn.ModuleDict({"a": pruned(Uses("also added")), "b": pruned(Uses("plainly"))})
    net = nn.Sequential(*model.values())
    report = check_round_trip(net, torch.randn(5, 16))
    assert [r.activation for r in report.layers] == [None, "relu"]


def test_activations_in_place() -> None:
    layers = [nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 8), nn.ReLU(inplace=True), nn.Dropout()]
    report = check_round_trip(pruned(nn.Sequential(*layers)), torch.randn(5, 16))
    assert [r.activation for r in report.layers] == ["relu", "relu"]


def test_an_activation_after_several_layers() -> None:
    act = nn.SiLU()
    model = nn.Sequential(pruned(nn.Linear(8, 8)), act, pruned(nn.Linear(8, 8)), act)
    report = check_round_trip(model, torch.randn(5, 8))
    assert [r.activation for r in report.layers] == ["silu", "silu"]
    report = accelerate(model, torch.randn(5, 8))
    assert "fused into 0, 2" in repr(model)


def test_nothing_is_fused_where_outputs_cannot_be_compared() -> None:
    class Index(nn.Sequential):
        def forward(self, input: Tensor) -> Any:
            return self[1](self[0](input)).argmax(-1)

    model = pruned(Index(nn.Linear(8, 8), nn.ReLU()))
    report = accelerate(model, torch.randn(5, 8))
    assert report.difference is None
    assert report.layers[0].swapped
    assert report.layers[0].activation is None


def test_an_activation_with_hooks_is_not_fused() -> None:
    model = mlp()
    seen: list[int] = []
    model.get_submodule("1").register_forward_hook(lambda *_: seen.append(1))
    report = accelerate(model, torch.randn(5, 24))
    assert [r.activation for r in report.layers] == [None, "relu"]


def test_an_accelerated_model_can_be_compiled_whole() -> None:
    model = mlp(nn.GELU)
    x = torch.randn(5, 24)
    accelerate(model, x)
    with torch.no_grad():
        compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))


class Adapted(nn.Module):
    """What LoRA puts in the place of a layer."""

    def __init__(self, layer: nn.Linear, in_place: bool) -> None:
        super().__init__()
        self.layer, self.in_place = layer, in_place
        self.low = nn.Linear(layer.in_features, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y.add_(self.low(x)) if self.in_place else y + self.low(x)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_what_comes_between_a_layer_and_its_fused_activation_is_noticed(in_place: bool, grad: bool) -> None:
    model: Any = mlp(nn.ReLU)
    x = torch.randn(5, 24)
    accelerate(model, x)
    dense = model[0]
    model[0] = Adapted(dense, in_place)
    between = pytest.raises(RuntimeError, match=r"ReLU: expected the unchanged output of 0,")
    with torch.set_grad_enabled(grad), between:
        model(x)
    model[0] = dense
    restore(model)
    model[0] = Adapted(dense, in_place)
    with torch.no_grad():
        wanted = model(x)
        accelerate(model, x)
        torch.testing.assert_close(model(x), wanted)


def test_symbolic_traces() -> None:
    """torch.fx calls layers as they are, and the activation's place still notices what comes between."""
    model, x = mlp(), torch.randn(3, 24)
    wanted = model(x).detach()
    assert accelerate(model, x, verbose=False).swapped == 2
    traced: Any = torch.fx.symbolic_trace(model)
    assert is_packed(traced.get_submodule("0"))
    torch.testing.assert_close(traced(x), wanted)
    torch.testing.assert_close(copy.deepcopy(traced)(x), wanted)
    layer = next(node for node in traced.graph.nodes if node.op == "call_module")
    with traced.graph.inserting_after(layer):
        between = traced.graph.call_function(torch.neg, (layer,))
    layer.replace_all_uses_with(between, delete_user_cb=lambda node: node is not between)
    traced.recompile()
    with pytest.raises(RuntimeError, match="ReLU: expected the unchanged output of 0"):
        traced(x)
