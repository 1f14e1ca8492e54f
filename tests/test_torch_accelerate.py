from __future__ import annotations

import copy
import gc
import json
import math
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize, prune

import sparsam.torch
from sparsam.torch import SparseConv2d, SparseLinear, accelerate, restore, timing
from sparsam.torch.exchange import Exchange
from sparsam.torch.fusion import Fused, recognise_activation
from sparsam.torch.session import Session, as_examples, difference
from sparsam.torch.weight import PackedWeight

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
}


class Clock:
    """Says how long things take, in place of a clock."""

    def __init__(self) -> None:
        self.gains: dict[str, float] = {}
        self.model = 2.0

    def layer_times(
        self, model: nn.Module, session: Session, exchange: Exchange
    ) -> dict[str, tuple[float, float]]:
        exchange.install()
        return {name: (self.gains.get(name, 2.0), 1.0) for name in exchange.layers}

    def model_times(self, session: Session, exchange: Exchange) -> tuple[float, float]:
        exchange.install()
        return self.model, 1.0

    def compare(self, layer: Any, x: Tensor) -> tuple[float, float]:
        layer(x)
        return self.gains.get(str(len(x)), 2.0), 1.0


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Every layer wins by 2, unless a test says otherwise, and no choice depends on time."""
    clock = Clock()
    for name in ("layer_times", "model_times", "compare"):
        monkeypatch.setattr(timing, name, getattr(clock, name))
    monkeypatch.setattr(PackedWeight, "_fastest", lambda self, dtype, runs, dense: next(iter(runs)))
    return clock


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are no work for two, and a busy machine makes them wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def pruned(model: nn.Module, sparsity: float = 0.75) -> nn.Module:
    """The model in eval mode, with random zeros in its matrices."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(torch.rand_like(parameter) >= sparsity).add_(0.0)  # no -0.0
    return model.eval()


def mlp(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    return pruned(nn.Sequential(nn.Linear(24, 32), activation(), nn.Linear(32, 16), activation()))


def conv_net() -> nn.Module:
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, groups=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 9, 10),
    ]
    return pruned(nn.Sequential(*layers))


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that must come back: objects by name, values, flags."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
        "buffers": {name: id(buffer) for name, buffer in model.named_buffers()},
        "training": {name: module.training for name, module in model.named_modules()},
        "attributes": {
            name: {key: repr(value) for key, value in vars(module).items() if not key.startswith("_")}
            for name, module in model.named_modules()
        },
        "values": {name: value.numpy().tobytes() for name, value in model.state_dict().items()},
    }


def row(report: sparsam.torch.AccelerationReport, name: str) -> sparsam.torch.LayerRow:
    return next(row for row in report.layers if row.name == name)


@torch.no_grad()
def check_round_trip(model: nn.Module, *examples: Any) -> sparsam.torch.AccelerationReport:
    """Accelerates; outputs agree, copies and pickles too, and restoring gives back the very same."""
    before = state(model)
    calls = [as_examples(example)[0] for example in examples]
    training = [module.training for module in model.modules()]
    model.eval()
    dense = [model(*call.fresh().args, **call.fresh().kwargs) for call in calls]
    for module, flag in zip(model.modules(), training, strict=True):
        module.training = flag
    report = accelerate(model, list(examples))
    assert {name: m.training for name, m in model.named_modules()} == before["training"]
    copies = [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for accelerated in copies:
        assert (
            sum(isinstance(m, (SparseLinear, SparseConv2d)) for m in accelerated.modules()) == report.swapped
        )
        outputs = [accelerated.eval()(*call.fresh().args, **call.fresh().kwargs) for call in calls]
        assert (difference(outputs, dense) or 0) < 1e-5
        model.train(mode=False)
    for other in copies[1:]:
        assert restore(other) == report.swapped
        assert not any(isinstance(m, (SparseLinear, SparseConv2d, Fused)) for m in other.modules())
        assert {n: v.numpy().tobytes() for n, v in other.state_dict().items()} == before["values"]
    for (_, module), flag in zip(model.named_modules(), training, strict=True):
        module.training = flag
    assert restore(model) == report.swapped
    assert state(model) == before
    assert restore(model) == 0
    return report


# --- swapping and restoring


def test_mlp() -> None:
    report = check_round_trip(mlp(), torch.randn(5, 24), torch.randn(1, 24))
    assert report.swapped == len(report.layers) == 2
    first = report.layers[0]
    assert (first.name, first.kind, first.shape, first.activation) == ("0", "Linear", (32, 24), "relu")
    assert first.inputs == (((5, 24), 1), ((1, 24), 1))
    assert first.gain == 2
    assert first.reason == ""
    assert report.speedup == 2
    assert report.difference is not None
    assert report.difference < 1e-5


def test_conv_net_with_batch_norm_and_groups() -> None:
    model = conv_net().train()
    report = check_round_trip(model, torch.randn(2, 3, 8, 8))
    assert [r.kind for r in report.layers] == ["Conv2d", "Conv2d", "Linear"]
    assert [r.activation for r in report.layers] == [None, "relu", None]


def test_conv1d_of_torch() -> None:
    model = pruned(nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv1d(8, 4, 1)))
    assert check_round_trip(model, torch.randn(2, 4, 20)).swapped == 2


def test_only_what_wins_is_swapped(clock: Clock) -> None:
    model = mlp()
    clock.gains = {"0": 1.04, "2": 1.06}
    report = check_round_trip(model, torch.randn(5, 24))
    assert [r.swapped for r in report.layers] == [False, True]
    assert report.layers[0].reason == "gain under 1.05"
    assert report.layers[0].gain == 1.04
    assert report.layers[0].dense_ms == 1040
    clock.gains = {"0": 1.5, "2": 1.6}
    assert [r.swapped for r in accelerate(model, torch.randn(5, 24), min_gain=1.55).layers] == [False, True]


def test_a_model_that_gains_nothing_is_left(clock: Clock) -> None:
    model = mlp()
    before = state(model)
    clock.gains = {"0": 0.5, "2": 0.9}
    report = accelerate(model, torch.randn(5, 24))
    assert state(model) == before
    assert report.swapped == 0
    assert report.speedup == 1
    assert report.weights_after == report.weights_before == 4 * (24 * 32 + 32 + 32 * 16 + 16)
    assert "nothing swapped" in report.summary


def test_layers_that_win_in_a_model_that_loses(clock: Clock) -> None:
    model = mlp()
    before = state(model)
    clock.model = 0.9
    report = accelerate(model, torch.randn(5, 24))
    assert state(model) == before
    assert report.swapped == 0
    assert report.before_ms == report.after_ms == 900
    assert "1,000.00 ms" in report.summary
    assert all("faster by itself" in r.reason and r.gain == 2 for r in report.layers)


def test_a_layer_for_which_only_dense_was_chosen_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedWeight, "_fastest", lambda self, dtype, runs, dense: "dense")
    report = check_round_trip(mlp(), torch.randn(5, 24))
    assert [r.reason for r in report.layers] == ["no kernel beats dense"] * 2


def test_layers_with_few_zeros_are_left() -> None:
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 20))
    with torch.no_grad():
        model[0].weight.view(-1)[:199] = 0  # one less than a tenth
        model[1].weight.view(-1)[:100] = 0
    report = check_round_trip(model, torch.randn(3, 40))
    assert [r.swapped for r in report.layers] == [False, True]
    assert report.layers[0].reason == "too few zeros"
    assert report.layers[0].density == 1 - 199 / 2000


def test_all_zeros() -> None:
    model = pruned(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), sparsity=2.0)
    assert check_round_trip(model, torch.randn(3, 8)).swapped == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models(dtype: torch.dtype) -> None:
    model = mlp(nn.GELU).to(dtype)
    x = torch.randn(4, 24, dtype=dtype)
    with torch.no_grad():
        dense = model(x)
        report = accelerate(model, x)
        ours = model(x)
    assert report.swapped == 2
    assert report.layers[0].activation == "gelu"
    assert ours.dtype == dtype
    assert difference(ours, dense) is not None
    assert float(difference(ours, dense) or 0) < 0.02


def test_values_stored_as_bfloat16() -> None:
    model = mlp()
    x = torch.randn(4, 24)
    with torch.no_grad():
        dense = model(x)
        weight = model.get_parameter("0.weight").clone()
        report = accelerate(model, x, dtype=torch.bfloat16)
        assert 1e-5 < float(difference(model(x), dense) or 0) < 0.02
    assert report.swapped == 2
    restore(model)  # not from the rounded values
    assert torch.equal(model.get_parameter("0.weight"), weight)


def test_autocast() -> None:
    model = mlp(nn.GELU)
    x = torch.randn(4, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        dense = model(x)
        report = accelerate(model, x)
        ours = model(x)
    assert report.swapped == 2
    assert ours.dtype == torch.bfloat16
    assert float(difference(ours, dense) or 0) < 0.02


@given(
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    kinds=st.lists(
        st.sampled_from([None, "relu", "gelu", "gelu_tanh", "silu", "tanh"]), min_size=4, max_size=4
    ),
    bias=st.booleans(),
    batch=st.integers(1, 5),
)
@settings(max_examples=15, deadline=None)
def test_any_sequence(widths: list[int], kinds: list[str | None], bias: bool, batch: int) -> None:
    layers: list[nn.Module] = []
    for (inputs, outputs), kind in zip(zip(widths, widths[1:], strict=False), kinds, strict=False):
        layers.append(nn.Linear(inputs, outputs, bias=bias))
        if kind:
            layers.append({**ACTIVATIONS, "tanh": nn.Tanh}[kind]())
    report = check_round_trip(pruned(nn.Sequential(*layers)), torch.randn(batch, widths[0]))
    fused = [name for name in kinds[: len(widths) - 1] if name in ACTIVATIONS]
    found = [r.activation for r in report.layers if r.activation]
    # Where every weight of a layer is left, it is not packed.
    assert len(found) <= len(fused)
    if report.swapped == len(widths) - 1:
        assert found == fused


# --- without examples


def test_without_examples(clock: Clock) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()
            self.conv = pruned(nn.Conv2d(3, 4, 1))
            self.loose = pruned(nn.Linear(8, 8))

    model = Net().eval()
    before = state(model)
    clock.gains = {"1": 1.0, "16": 2.0, "128": 4.0}  # by rows
    report = accelerate(model)
    assert [r.swapped for r in report.layers] == [True, True, False, True]
    assert report.layers[0].gain == pytest.approx(2)
    assert report.layers[0].inputs == (((1, 24), 1), ((16, 24), 1), ((128, 24), 1))
    assert [r.activation for r in report.layers] == ["relu", "relu", None, None]
    assert report.layers[2].reason == "needs example_inputs"
    assert report.before_ms is None
    assert report.speedup is None
    assert "model  " not in str(report)
    assert restore(model) == 3
    assert state(model) == before
    clock.gains = {"1": 0.5, "16": 1.0, "128": 2.0}
    assert accelerate(model).swapped == 0
    assert state(model) == before


def test_a_shared_activation_without_examples_is_not_fused() -> None:
    act = nn.ReLU()
    model = nn.Sequential(pruned(nn.Linear(8, 8)), act, pruned(nn.Linear(8, 8)), act)
    assert [r.activation for r in accelerate(model).layers] == [None, None]


# --- activations


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

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        if self.how == "also added":
            return self.act(y) + y
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
    assert check_round_trip(pruned(Uses("plainly")), torch.randn(5, 16)).layers[0].activation == "relu"


def test_one_bad_fusion_does_not_spoil_the_others() -> None:
    model = nn.ModuleDict({"a": pruned(Uses("also added")), "b": pruned(Uses("plainly"))})
    net = nn.Sequential(*model.values())
    report = check_round_trip(net, torch.randn(5, 16))
    assert [r.activation for r in report.layers] == [None, "relu"]


def test_an_activation_after_several_layers() -> None:
    act = nn.SiLU()
    model = nn.Sequential(pruned(nn.Linear(8, 8)), act, pruned(nn.Linear(8, 8)), act)
    report = check_round_trip(model, torch.randn(5, 8))
    assert [r.activation for r in report.layers] == ["silu", "silu"]
    report = accelerate(model, torch.randn(5, 8))
    assert "fused into 0, 2" in repr(model)


def test_nothing_is_fused_where_outputs_cannot_be_compared() -> None:
    class Index(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x)
            return y.argmax(-1)

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


# --- what is left, and why


def test_reasons() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(8, 8)
            self.unused = nn.Linear(8, 8)
            self.hooked = nn.Linear(8, 8)
            self.patched = nn.Linear(8, 8)
            self.wide = nn.Linear(8, 8).double()
            self.volume = nn.Conv3d(1, 1, 1)
            self.lstm = nn.LSTM(8, 8)
            self.away = nn.Linear(8, 8, device="meta")
            self.empty = nn.Linear(0, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.patched(self.hooked(self.used(x)))
            return self.wide(y.double())  # type: ignore[no-any-return]

    with pytest.warns(UserWarning, match="Initializing zero-element"):
        model = Net()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "weight" in name and not parameter.is_meta:
                parameter.mul_(torch.rand_like(parameter) > 0.7)
    model.hooked.register_forward_hook(lambda *_: None)
    old = model.patched.forward
    model.patched.forward = lambda x: old(x)  # type: ignore[method-assign]
    report = accelerate(model, torch.randn(5, 8))
    assert {r.name: r.reason for r in report.layers} == {
        "used": "",
        "unused": "not called with the example inputs",
        "hooked": "has hooks",
        "patched": "has hooks",
        "wide": "its weight is float64",
        "volume": "no kernel for Conv3d",
        "lstm": "no kernel for LSTM",
        "away": "its weight is on meta",
        "empty": "it has no weights",
    }


def test_a_layer_held_outside_the_tree_is_left() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.aside = [self.fc]

        def forward(self, x: Tensor) -> Tensor:
            return self.aside[0](self.fc(x))  # type: ignore[no-any-return]

    model = pruned(Net())
    report = accelerate(model, torch.randn(5, 8))
    assert report.layers[0].reason == "also called through a reference outside the tree of modules"
    assert type(model.fc) is nn.Linear


def test_a_module_at_several_places() -> None:
    shared = nn.Linear(8, 8)
    model = pruned(nn.Sequential(shared, nn.Tanh(), shared, nn.Sequential(shared)))
    report = check_round_trip(model, torch.randn(5, 8))
    assert [(r.name, r.inputs) for r in report.layers] == [("0", (((5, 8), 3),))]
    accelerate(model, torch.randn(5, 8))
    assert sum(type(child) is SparseLinear for child in model.children()) == 1
    assert model[0] is model[2] is model[3][0]  # type: ignore[index]


def test_a_second_call_leaves_what_is_packed() -> None:
    model = mlp(nn.Tanh)
    before = state(model)
    accelerate(model, torch.randn(5, 24))
    report = accelerate(model, torch.randn(5, 24))
    assert [r.reason for r in report.layers] == ["packed already"] * 2
    assert restore(model) == 2
    assert state(model) == before


@pytest.mark.parametrize("fails", ["model", "timing"])
def test_an_error_leaves_the_model_as_it_was(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(mlp(), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).train()
    before = state(pruned(model).train())

    def broken(*_: Any) -> Any:
        assert any(isinstance(m, SparseLinear) for m in model.modules()) == (fails == "timing")
        raise KeyboardInterrupt

    if fails == "timing":
        monkeypatch.setattr(timing, "layer_times", broken)
    else:
        model.register_forward_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        accelerate(model, torch.randn(2, 5, 24))
    assert state(model) == before


# --- what a run may not change


def test_runs_leave_no_trace() -> None:
    class Net(nn.Module):
        counter: Tensor
        cache: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.fc = pruned(nn.Linear(8, 8))
            self.norm = nn.BatchNorm1d(8)
            self.drop = nn.Dropout(0.5)
            self.register_buffer("counter", torch.zeros(()))
            self.register_buffer("cache", torch.zeros(1))

        def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
            self.counter += 1
            self.cache = x.sum(0)
            seen.append(x)
            x.add_(1)
            y = functional.dropout(self.norm(self.fc(x)), 0.5, training=True)
            assert len(seen) == 1
            return y

    model = Net().train()
    model.drop.eval()
    x, seen = torch.randn(5, 8), list[Tensor]()
    kept = x.clone()
    before, random = state(model), torch.get_rng_state()
    report = accelerate(model, (x, seen))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, kept)
    assert seen == []
    assert report.difference is not None
    assert report.difference < 1e-5  # the dropout was the same each time
    restore(model)
    assert state(model) == before


def test_under_inference_mode() -> None:
    model = mlp()
    with torch.inference_mode():
        report = accelerate(model, torch.randn(5, 24))
    assert report.swapped == 2
    before = model(torch.ones(1, 24))
    restore(model)
    torch.testing.assert_close(model(torch.ones(1, 24)), before)
    model(torch.ones(1, 24)).sum().backward()
    assert model.get_parameter("0.weight").grad is not None


# --- weights that are tied, computed, held


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.fc = nn.Linear(16, 16)
        self.again = nn.Linear(16, 16)
        self.again.weight = self.fc.weight
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.again(self.fc(self.embedding(ids)).tanh()))  # type: ignore[no-any-return]


def test_tied_weights() -> None:
    model = pruned(Tied())
    ids = torch.randint(0, 20, (2, 5))
    assert check_round_trip(model, ids).swapped == 3
    report = accelerate(model, ids)
    fc, again, head = (model.get_submodule(name) for name in ("fc", "again", "head"))
    assert isinstance(fc, SparseLinear)
    assert isinstance(again, SparseLinear)
    assert isinstance(head, SparseLinear)
    assert fc.packed is again.packed
    assert fc.original.get_parameter("weight").numel() == 0  # freed
    assert head.original.weight is model.get_parameter("embedding.weight")
    assert model.get_parameter("embedding.weight").shape == (20, 16)  # not freed
    embedding, biases = 4 * 20 * 16, 2 * 4 * 16
    assert report.weights_before == embedding + 4 * 16 * 16 + biases
    assert report.weights_after == embedding + biases + fc.packed.nbytes + head.packed.nbytes
    model.load_state_dict(model.state_dict())
    restore(model)
    assert model.get_submodule("fc").weight is model.get_submodule("again").weight


def test_a_tied_layer_that_stays_dense_keeps_the_weight(clock: Clock) -> None:
    model = pruned(Tied())
    clock.gains = {"again": 1.0}
    check_round_trip(model, torch.randint(0, 20, (2, 5)))
    accelerate(model, torch.randint(0, 20, (2, 5)))
    assert model.get_parameter("again.weight").shape == (16, 16)


def test_a_weight_that_something_else_holds_is_not_freed() -> None:
    model = mlp()
    optimizer = torch.optim.SGD([model.get_parameter("2.weight")])
    report = accelerate(model, torch.randn(5, 24))
    sizes = [model.get_submodule(name).original.get_parameter("weight").numel() for name in ("0", "2")]  # type: ignore[operator, union-attr]
    assert sizes == [0, 32 * 16]
    packed = [model.get_submodule(name).packed.nbytes for name in ("0", "2")]  # type: ignore[union-attr]
    assert report.weights_after == sum(packed) + 4 * (32 + 32 * 16 + 16)
    assert len(optimizer.param_groups) == 1


def test_freed_weights_are_freed() -> None:
    model = mlp()
    storage = weakref.ref(model.get_parameter("0.weight").untyped_storage())
    accelerate(model, torch.randn(5, 24))
    gc.collect()
    assert storage() is None
    assert model.get_submodule("0").original.get_parameter("weight").numel() == 0  # type: ignore[operator, union-attr]


def test_weights_pruned_by_torch() -> None:
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16))
    for name in ("0", "2"):
        prune.l1_unstructured(model.get_submodule(name), "weight", 0.8)  # type: ignore[no-untyped-call]
    prune.random_unstructured(model.get_submodule("2"), "bias", 0.5)  # type: ignore[no-untyped-call]
    x = torch.randn(5, 24)
    with torch.no_grad():
        dense = model(x)
        hooks = [id(hook) for hook in model[0]._forward_pre_hooks.values()]
        before = {name: id(p) for name, p in model.named_parameters()}
        report = accelerate(model, x)
        assert report.swapped == 2
        assert report.layers[0].density == pytest.approx(0.2, abs=0.01)
        assert float(difference(model(x), dense) or 0) < 1e-5
        restored = copy.deepcopy(model)
        for other in (restored, model):
            assert restore(other) == 2
            assert torch.equal(other(x), dense)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert [id(hook) for hook in model[0]._forward_pre_hooks.values()] == hooks
    model(x).sum().backward()
    assert model.get_parameter("0.weight_orig").grad is not None
    assert accelerate(model).swapped == 2


def test_parametrized_weights() -> None:
    class Masked(nn.Module):
        def __init__(self, mask: Tensor) -> None:
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.mask  # type: ignore[no-any-return, operator]

    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Conv1d(1, 4, 3))
    model.forward = lambda x: model[2](model[1](model[0](x))[:, None])  # type: ignore[method-assign]
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        mask = (torch.rand_like(layer.weight) > 0.7).float()  # type: ignore[arg-type]
        parametrize.register_parametrization(layer, "weight", Masked(mask))
    x = torch.randn(5, 24)
    with torch.no_grad():
        dense = model(x)
        report = accelerate(model, x)
        assert [r.kind for r in report.layers] == ["Linear", "Conv1d"]
        assert report.swapped == 2
        assert float(difference(model(x), dense) or 0) < 1e-5
        restore(model)
        assert torch.equal(model(x), dense)
    assert parametrize.is_parametrized(model[0], "weight")


# --- transformers


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu", norm_first=norm_first)
    model = pruned(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first))
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = True
    x = torch.randn(2, 6, 32)
    with torch.no_grad():
        dense = model(x, src_key_padding_mask=padding)
    report = check_round_trip(model, x, {"src": x, "src_key_padding_mask": padding})
    swapped = {r.name for r in report.layers if r.swapped}
    assert swapped == {f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}
    assert row(report, "layers.0.self_attn").reason == "no kernel for MultiheadAttention"
    with torch.no_grad():
        accelerate(model, {"src": x, "src_key_padding_mask": padding})
        ours = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(ours[~padding], dense[~padding], atol=1e-5, rtol=1e-5)


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50
    )
    return BertModel(config)  # type: ignore[no-any-return]


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)  # type: ignore[no-any-return]


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=50,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("build", "fused", "swapped"),
    [(bert, {"gelu": 2}, 13), (gpt2, {"gelu_tanh": 2}, 9), (llama, {"silu": 2}, 15)],
)
def test_hugging_face(build: Callable[[], nn.Module], fused: dict[str, int], swapped: int) -> None:
    model = pruned(build())
    ids = torch.randint(0, 50, (2, 7))
    report = check_round_trip(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert report.swapped == swapped
    found = [r.activation for r in report.layers if r.activation]
    assert {name: found.count(name) for name in set(found)} == fused


def test_hugging_face_with_a_cache_that_grows() -> None:
    model = pruned(llama())
    ids = torch.randint(0, 50, (1, 6))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        example = {"input_ids": ids[:, :1], "past_key_values": cache}
        report = accelerate(model, [example, {"input_ids": ids}])
        assert cache.get_seq_length() == 6
        ours = model(ids).logits
        restore(model)
        assert float(difference(ours, model(ids).logits) or 0) < 1e-5
    assert report.swapped == 15
    assert ((1, 1, 32), 1) in row(report, "model.layers.0.mlp.up_proj").inputs
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"Cache that cannot be copied .*no_grad"):
        accelerate(model, {"input_ids": ids[:, :1], "past_key_values": cache})


# --- the report


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(mlp(), nn.Linear(16, 4))
    report = accelerate(model, torch.randn(5, 24))
    text = str(report)
    assert capsys.readouterr().out == text + "\n"
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["layer", "kind", "shape"]
    assert lines[2].split()[:5] == ["0.0", "Linear", "32x24", "5x24", "x"]
    assert lines[2].endswith("swapped, relu fused")
    assert lines[4].endswith("too few zeros")
    assert "model    2,000.00 ms before, 1,000.00 ms after: 2.00x" in text
    assert lines[-1] == "2 of 3 layers swapped"
    content = json.loads(report.to_json())
    assert content == report.to_dict()
    assert content["speedup"] == 2
    assert content["layers"][0]["inputs"] == [{"shape": [5, 24], "calls": 1}]
    assert content["layers"][0]["gain"] == 2
    assert content["layers"][2]["gain"] is None
    assert list(content)[:3] == ["layers", "swapped", "speedup"]


def test_report_of_a_model_without_layers() -> None:
    report = accelerate(nn.Sequential(nn.ReLU()), torch.randn(3))
    assert report.layers == ()
    assert str(report).startswith("model  ")


def test_names_cannot_command_a_terminal() -> None:
    model = nn.Sequential()
    model.add_module("a\x1b[31m", mlp())
    assert "\x1b" not in str(accelerate(model, torch.randn(2, 24)))


# --- arguments


def test_wrong_arguments() -> None:
    x = torch.randn(5, 24)
    for bare in (nn.Linear(4, 4), nn.Conv2d(1, 1, 1), SparseLinear(nn.Linear(4, 4))):
        with pytest.raises(TypeError, match="Sequential"):
            accelerate(bare, x)
    with pytest.raises(TypeError, match="Module; got list"):
        accelerate([mlp()], x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="compile it"):
        accelerate(torch.compile(mlp(), backend="eager"), x)  # type: ignore[arg-type]
    for gain in (0, -1, math.nan, math.inf, "2", None, True):
        with pytest.raises(ValueError, match="min_gain"):
            accelerate(mlp(), x, min_gain=gain)  # type: ignore[arg-type]
    for dtype in (torch.float64, torch.int8, "bfloat16"):
        with pytest.raises(ValueError, match="dtype"):
            accelerate(mlp(), x, dtype=dtype)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="empty list"):
        accelerate(mlp(), [])
    for odd in (3, "x", np.ones(3), [np.ones(3)]):
        with pytest.raises(TypeError, match="expected a tensor, a tuple"):
            accelerate(mlp(), odd)


def test_restore_what_was_never_accelerated() -> None:
    model = mlp()
    before = state(model)
    assert restore(model) == 0
    assert state(model) == before
    with pytest.raises(TypeError, match=r"\.restored\(\)"):
        restore(SparseLinear(nn.Linear(4, 4)))
    with pytest.raises(TypeError, match="got int"):
        restore(3)  # type: ignore[arg-type]
    by_hand = nn.Sequential(SparseLinear(linear := nn.Linear(4, 4)))
    assert restore(by_hand) == 1
    assert by_hand[0] is linear


def test_examples() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    assert as_examples(x)[0].args == (x,)
    assert as_examples((x, 3))[0].args == (x, 3)
    assert as_examples({"a": x})[0].kwargs == {"a": x}
    assert [example.args for example in as_examples([x, (x, y)])] == [(x,), (x, y)]


def test_difference() -> None:
    inf, nan = math.inf, math.nan
    assert difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])) == 0.5
    assert difference([torch.tensor([inf, nan, 2.0])], [torch.tensor([inf, nan, 2.0])]) == 0
    assert difference(torch.tensor([inf]), torch.tensor([-inf])) == inf
    assert difference(torch.tensor([nan]), torch.tensor([1.0])) == inf
    assert difference(torch.tensor([1.0]), torch.tensor([nan])) == inf
    assert difference(torch.zeros(2), torch.zeros(2)) == 0
    assert difference(torch.ones(2), torch.zeros(2)) == inf
    assert difference(torch.ones(2), torch.ones(3)) == inf
    assert difference(torch.ones(2), [torch.ones(2), torch.ones(2)]) == inf
    assert (
        difference({"a": torch.ones(2, dtype=torch.int64)}, {"a": torch.zeros(2, dtype=torch.int64)}) is None
    )


# --- the clock itself


@pytest.fixture
def real_times(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.undo()
    monkeypatch.setenv("SPARSAM_CALIBRATION", "off")
    for name in ("_LAYERS", "_MODEL", "_SINGLE"):
        monkeypatch.setattr(timing, name, (2, 3, 0.0))
    return


@pytest.mark.usefixtures("real_times")
@pytest.mark.parametrize("examples", [None, torch.randn(3, 24), [torch.randn(3, 24), torch.randn(9, 24)]])
def test_measured(examples: Any) -> None:
    model = mlp()
    before, x = state(model), torch.randn(4, 24)
    dense = model(x)
    report = accelerate(model, examples)
    for found in report.layers:
        assert found.gain is not None
        assert 0 < found.gain == (found.dense_ms or 0) / (found.sparse_ms or 1)
        if found.swapped:
            assert found.gain >= 1.05
    assert report.swapped == sum(type(m) is SparseLinear for m in model.modules())
    if examples is not None:
        assert report.speedup is not None
        assert report.speedup > 1 or (report.speedup == 1 and report.swapped == 0)
    assert float(difference(model(x), dense) or 0) < 1e-5
    restore(model)
    assert state(model) == before
