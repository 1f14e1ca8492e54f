"""Models with which packed layers do not go well: rows of the report, never an exception."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch_cases import Clock, check_round_trip, mlp, pruned, row, state

import torch
from sparsam.torch import restore
from sparsam.torch.acceleration import measurement
from sparsam.torch.acceleration.workflow import accelerate
from sparsam.torch.layers.packing import is_packed
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("clock", "one_thread")


class Particular(nn.Module):
    """Calls its layers, and looks at the class of one."""

    def __init__(self, raises: type[BaseException] | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.raises = raises

    def forward(self, x: Tensor) -> Tensor:
        packed = is_packed(self.blocks[1])
        if packed and self.raises:
            self.get_buffer("calls").add_(1)  # must be put back
            raise self.raises("what is\nthis? " + "long " * 99)
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x) + (1 if packed else 0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("raises", [AttributeError, StopIteration, KeyError, RuntimeError, None])
def test_a_layer_with_which_the_model_fails_stays_dense(raises: type[Exception] | None) -> None:
    model = pruned(Particular(raises))
    report = check_round_trip(model, torch.randn(5, 8))
    assert [r.swapped for r in report.layers] == [True, False, True, True]
    reason = row(report, "blocks.1").reason
    assert len(reason) <= 120
    start = (
        f"does not run with it packed: {raises.__name__}:" if raises else "with it packed, outputs differ by"
    )
    assert reason.startswith(start)
    assert report.summary == "3 of 4 layers swapped"


def test_an_interrupt_is_no_failure_of_a_layer() -> None:
    model = pruned(Particular(KeyboardInterrupt))
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        accelerate(model, torch.randn(5, 8))
    assert state(model) == before


def test_inputs_that_the_model_cannot_be_called_with() -> None:
    model = mlp()
    wanted = (
        r"example_inputs: expected .* called with; got RuntimeError: .*cannot be multiplied.*; pass the arg"
    )
    with pytest.raises(ValueError, match=wanted) as caught:
        accelerate(model, torch.randn(5, 23))
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(ValueError, match=r"got TypeError: .*positional arguments.*; pass the"):
        accelerate(model, (torch.randn(5, 24), 1))


def test_a_model_that_wants_a_parameter_keeps_one() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x.to(next(self.parameters()).dtype)))  # type: ignore[no-any-return]

    model = pruned(Net())
    before = state(model)
    report = accelerate(model, torch.randn(5, 8))
    assert report.swapped >= 1
    assert all(r.swapped or r.reason.startswith("does not run with it packed") for r in report.layers)
    restore(model)
    assert state(model) == before


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))  # type: ignore[no-any-return]


def test_the_fast_path_of_an_encoder_is_measured_where_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "layer_times", layer_times)
    seen: list[measurement.Times] = []

    def watched(*args: Any) -> measurement.Times:
        seen.append(layer_times(*args))
        return seen[-1]

    monkeypatch.setattr(measurement, "layer_times", watched)
    accelerate(pruned(Encoder()), torch.randn(2, 5, 8))
    accelerate(mlp(), torch.randn(5, 24))
    assert [set(times.fast_paths) for times in seen] == [{"encoder"}, set()]
    assert all(lost >= 0 for times in seen for lost in times.fast_paths.values())
    inside = {f"encoder.layers.{i}.{layer}" for i in (0, 1) for layer in ("self_attn", "linear1", "linear2")}
    assert set(seen[0].layers) == {*inside, "head"}


layer_times, model_times = measurement.layer_times, measurement.model_times


def test_layers_that_save_less_than_the_fast_path_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(_: Any, __: Any, swap: Any, ___: Any) -> measurement.Times:
        times = {name: measurement.LayerTime(2.0, 1.0) for name in swap.layers}
        return measurement.Times(times, {"encoder": 6.0})

    monkeypatch.setattr(measurement, "layer_times", slow)
    model = pruned(Encoder())
    report = check_round_trip(model, torch.randn(2, 5, 8))
    assert [r.name for r in report.layers if r.swapped] == ["head"]
    assert "fast path of encoder" in row(report, "encoder.layers.0.linear1").reason


def test_the_best_part_of_what_wins_is_taken(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 16)
            self.down = nn.Linear(16, 8)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.down(self.up(x)))  # type: ignore[no-any-return]

    tried: list[tuple[str, ...]] = []

    def times(_: Any, swap: Any, names: Any, __: Any, **___: Any) -> tuple[float, float]:
        swap.show(names)
        tried.append(tuple(names))
        return 1.0, 2.0 if "down" in names else 0.5

    monkeypatch.setattr(measurement, "model_times", times)
    clock.gains = {"up": 4.0, "down": 3.0, "head": 2.0}
    model = pruned(Net())
    report = accelerate(model, torch.randn(5, 8))
    assert tried == [("up", "down", "head"), ("up", "down"), ("up",)]
    assert [r.swapped for r in report.layers] == [True, False, False]
    assert report.speedup == 2
    assert report.summary == "1 of 3 layers swapped; 2 more win by themselves, but not in the model"
    assert accelerate(pruned(Net()), torch.randn(5, 8), seconds=1e-9).swapped == 0  # nothing more is tried


class Counted(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.runs = 0
        blocks = [module for _ in range(layers) for module in (nn.Linear(16, 16), nn.ReLU())]
        self.net = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.net(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("wins", [True, False])
@pytest.mark.parametrize("layers", [1, 4, 12])
def test_the_model_runs_at_most_fifty_times(layers: int, wins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def gains(*args: Any) -> tuple[float, float]:
        model_times(*args)
        return 2.0, 1.0

    monkeypatch.setattr(measurement, "layer_times", layer_times)
    monkeypatch.setattr(measurement, "model_times", gains)
    model = Counted(layers)
    report = accelerate(pruned(model), torch.randn(5, 16), min_gain=1e-9 if wins else 1e9)
    assert report.swapped == (layers if wins else 0)
    assert 10 <= model.runs <= 50


def test_excluded_layers_stay_dense() -> None:
    model = pruned(Particular(None))
    report = accelerate(copy.deepcopy(model), torch.randn(5, 8), exclude="head")
    assert [r.reason == "excluded" for r in report.layers] == [False, False, False, True]
    report = accelerate(model, torch.randn(5, 8), exclude=["blocks.[01]", "head"])
    assert [r.reason for r in report.layers] == ["excluded", "excluded", "", "excluded"]
    assert report.layers[0].density is not None
    with pytest.warns(
        UserWarning, match=r"exclude: expected patterns of layer names; got 'bocks\.\*', which matches"
    ):
        accelerate(mlp(), torch.randn(5, 24), exclude=["bocks.*"])
    for wrong in (3, [3]):
        with pytest.raises(TypeError, match=r"exclude: expected a name pattern or several; got"):
            accelerate(model, exclude=wrong)  # type: ignore[arg-type]


def test_the_budget_is_checked() -> None:
    for seconds in (0, -1, float("nan"), "1", True):
        with pytest.raises(ValueError, match="seconds: expected a number above 0; got"):
            accelerate(mlp(), seconds=seconds)  # type: ignore[arg-type]


def test_nothing_is_printed_unless_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    report = accelerate(mlp(), torch.randn(5, 24), verbose=False)
    assert capsys.readouterr().out == ""
    assert report.swapped == 2
