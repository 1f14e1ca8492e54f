from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from torch_cases import Clock, mlp, packed, state

import torch
from sparsam.torch import SparseLinear, restore
from sparsam.torch.acceleration import measure
from sparsam.torch.acceleration.model_runner import difference
from sparsam.torch.acceleration.workflow import accelerate
from torch import nn

pytestmark = pytest.mark.usefixtures("clock", "one_thread")


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


def test_sizes() -> None:
    model = mlp()
    report = accelerate(model, torch.randn(5, 24))
    assert [r.dense_bytes for r in report.layers] == [4 * 24 * 32, 4 * 32 * 16]
    assert [r.packed_bytes for r in report.layers] == [
        packed(model, name).packed.nbytes for name in ("0", "2")
    ]
    assert report.weights_after == sum(r.packed_bytes or 0 for r in report.layers) + 4 * (32 + 16)


def test_a_disturbed_measurement_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    count = itertools.count(step=1000)
    monkeypatch.setattr(measure, "_switches", lambda: next(count))
    report = accelerate(mlp(), torch.randn(5, 24))
    assert report.disturbed
    assert "times    may mislead" in str(report)
    monkeypatch.setattr(measure, "_switches", lambda: 5)
    report = accelerate(mlp(), torch.randn(5, 24))
    assert not report.disturbed
    assert "may mislead" not in str(report)


def test_report_of_a_model_without_layers() -> None:
    report = accelerate(nn.Sequential(nn.ReLU()), torch.randn(3))
    assert report.layers == ()
    assert str(report).startswith("model  ")


def test_names_cannot_command_a_terminal() -> None:
    model = nn.Sequential()
    model.add_module("a\x1b[31m", mlp())
    assert "\x1b" not in str(accelerate(model, torch.randn(2, 24)))


REAL = {name: getattr(measure, name) for name in ("layer_times", "model_times", "compare")}


@pytest.fixture
def real_times(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in REAL.items():
        monkeypatch.setattr(measure, name, function)
    for name in ("_LAYERS", "_MODEL", "_SINGLE"):
        monkeypatch.setattr(measure, name, (2, 3, 0.0))


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
