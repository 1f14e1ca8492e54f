from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
from torch.nn import functional
from torch_cases import Clock, check_round_trip, conv_net, count_packed, mlp, packed, pruned, state

import torch
from sparsam.torch import pack, restore
from sparsam.torch.acceleration import measurement, memory, workflow
from sparsam.torch.acceleration.model_runner import as_examples, difference
from sparsam.torch.acceleration.workflow import accelerate
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("clock", "one_thread")


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


def test_layers_with_few_zeros_are_left() -> None:
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 20))
    with torch.no_grad():
        model.get_parameter("0.weight").view(-1)[:199] = 0  # one less than a tenth
        model.get_parameter("1.weight").view(-1)[:100] = 0
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


class Halved(nn.Module):
    """Computes with autocast that it switches on itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y: Tensor = self.model(x)
        return y


def test_autocast_within_the_model() -> None:
    model = Halved(mlp(nn.GELU)).eval()
    x = torch.randn(4, 24)
    with torch.no_grad():
        dense = model(x)
        report = accelerate(model, x)
        ours = model(x)
    assert report.swapped == 2
    assert ours.dtype == torch.bfloat16
    assert float(difference(ours, dense) or 0) < 0.02


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


def test_reasons() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(8, 8)
            self.unused = nn.Linear(8, 8)
            self.hooked = nn.Linear(8, 8)
            self.patched = nn.Linear(8, 8)
            self.wide = nn.Linear(8, 8).double()
            self.pairs = nn.Bilinear(8, 8, 8)
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
    model.patched.forward = functools.partial(old)  # type: ignore[method-assign]
    report = accelerate(model, torch.randn(5, 8))
    assert {r.name: r.reason for r in report.layers} == {
        "used": "",
        "unused": "not called with the example inputs",
        "hooked": "has hooks",
        "patched": "has hooks",
        "wide": "its weight is float64",
        "pairs": "no kernel for Bilinear",
        "away": "its weight is on meta",
        "empty": "it has no weights",
    }


class Aside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.aside = [self.fc]

    def forward(self, x: Tensor) -> Tensor:
        return self.aside[0](self.fc(x))  # type: ignore[no-any-return]


def test_a_layer_held_outside_the_tree_is_packed_too() -> None:
    model = pruned(Aside())
    assert check_round_trip(model, torch.randn(5, 8)).swapped == 1
    accelerate(model, torch.randn(5, 8))
    assert packed(model, "fc").layer is model.aside[0]  # type: ignore[index]


def test_a_module_at_several_places() -> None:
    shared = nn.Linear(8, 8)
    model = pruned(nn.Sequential(shared, nn.Tanh(), shared, nn.Sequential(shared)))
    report = check_round_trip(model, torch.randn(5, 8))
    assert [(r.name, r.inputs) for r in report.layers] == [("0", (((5, 8), 3),))]
    accelerate(model, torch.randn(5, 8))
    assert count_packed(model) == 1
    assert model[0] is model[2] is model[3][0]  # type: ignore[index]


def test_a_second_call_leaves_what_is_packed() -> None:
    model = mlp(nn.Tanh)
    before = state(model)
    accelerate(model, torch.randn(5, 24))
    report = accelerate(model, torch.randn(5, 24))
    assert [r.reason for r in report.layers] == ["packed already"] * 2
    assert restore(model) == 2
    assert state(model) == before


@pytest.mark.parametrize("fails", ["model", "timing", "freeing"])
def test_an_error_leaves_the_model_as_it_was(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(mlp(), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).train()
    before = state(pruned(model).train())

    def broken(*_: Any) -> Any:
        assert (count_packed(model) > 0) == (fails != "model")
        raise KeyboardInterrupt

    if fails == "freeing":

        def release(model: nn.Module, layers: Any, *, rounded: bool) -> None:
            memory.release(model, layers, rounded=rounded)
            assert not layers[0].weight.original.numel()
            broken()

        monkeypatch.setattr(workflow, "release", release)
    elif fails == "timing":
        monkeypatch.setattr(measurement, "layer_times", broken)
    else:
        model.register_forward_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        accelerate(model, torch.randn(2, 5, 24))
    assert state(model) == before


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


def test_wrong_arguments() -> None:
    x = torch.randn(5, 24)
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


def test_a_bare_layer() -> None:
    linear = pruned(nn.Linear(24, 16))
    check_round_trip(linear, torch.randn(5, 24))
    assert accelerate(linear, torch.randn(5, 24)).layers[0].name == ""


def test_restore_what_was_never_accelerated() -> None:
    model = mlp()
    before = state(model)
    assert restore(model) == 0
    assert state(model) == before
    with pytest.raises(TypeError, match="got int"):
        restore(3)  # type: ignore[arg-type]
    weight = (linear := nn.Linear(4, 4)).weight
    assert restore(nn.Sequential(pack(linear))) == restore(pack(linear)) == 1
    assert linear.weight is weight


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
