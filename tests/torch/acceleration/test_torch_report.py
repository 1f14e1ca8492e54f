from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch_cases import Clock, count_packed, mlp, packed, state

import torch
from sparsam.torch import AccelerationReport, LayerRow, restore
from sparsam.torch.acceleration import measurement
from sparsam.torch.acceleration.model_runner import difference
from sparsam.torch.acceleration.report_text import fold, folded_name
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


def layer_row(name: str, **more: Any) -> LayerRow:
    return LayerRow(name, "Linear", more.pop("shape", (8, 4)), 0.25, **more)


def report_of(*rows: LayerRow, summary: str = "") -> AccelerationReport:
    return AccelerationReport(rows, 2.0, 1.0, 10, 5, 1e-7, disturbed=False, summary=summary)


def test_like_layers_are_one_line() -> None:
    timed: dict[str, Any] = {"dense_ms": 2.0, "sparse_ms": 0.5, "kernel": "panels", "swapped": True}
    report = report_of(
        *(layer_row(f"encoder.layer.{i}.attention.self.query", **timed) for i in range(6)),
        *(layer_row(f"encoder.layer.{i}.up", **timed, activation="gelu") for i in (0, 1, 3)),
        layer_row("encoder.layer.2.up", reason="gain under 1.05"),
        layer_row("head", shape=(2, 2), **timed),
        *(
            layer_row(f"h.{i}.x{j}.7", reason=f"outputs differ by {i}")
            for i in range(2)
            for j in range(1, 9, 2)
        ),
    )
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines[2:7]] == [
        "encoder.layer.{0-5}.attention.self.query",
        "encoder.layer.{0,1,3}.up",
        "encoder.layer.2.up",
        "head",
        "h.{0-1}.x{1,3,5,7}.7",
    ]
    assert [line.split()[1] for line in lines[2:7]] == ["x6", "x3", "8x4", "2x2", "x8"]
    assert lines[2].split()[-4:] == ["12.000", "3.000", "4.00", "swapped"]
    assert max(map(len, lines)) <= 100
    assert folded_name([f"{i}" for i in (0, 2, 4, 6, 9)]) == "{0,2,4,..,9}  x5"


@given(
    names=st.lists(st.text("ab.019", min_size=1, max_size=90), unique=True, min_size=1, max_size=6),
    reason=st.text("ab ", max_size=150),
    sizes=st.lists(st.integers(1, 100_000), min_size=1, max_size=4),
    inputs=st.integers(0, 4),
    summary=st.text("ab ", max_size=300),
)
def test_a_report_is_at_most_100_columns_wide(
    names: list[str], reason: str, sizes: list[int], inputs: int, summary: str
) -> None:
    seen = tuple(((n, *sizes), n) for n in range(1, 1 + inputs))
    rows = [
        layer_row(
            name, shape=tuple(sizes), inputs=seen, pattern="unstructured", kernel="bitmask", reason=reason
        )
        for name in names
    ]
    text = str(report_of(*rows, layer_row("timed", dense_ms=1e6, sparse_ms=1e5), summary=summary))
    assert max(map(len, text.splitlines())) <= 100
    assert set("".join(reason.split())) <= set(text)
    assert sum(map(len, fold(rows))) == len(names)


def test_a_report_in_a_notebook() -> None:
    report = report_of(*(layer_row(f"<{i}>", reason="a & b") for i in range(2)), summary="1 < 2")
    page = ET.fromstring(f"<div>{report._repr_html_()}</div>")
    assert [cell.text for cell in page.iter("th")][:3] == ["layer", "kind", "shape"]
    assert [cell.text for cell in page.iter("td")][:3] == ["<{0-1}>  x2", "Linear", "8x4"]
    assert [cell.text for cell in page.iter("td")][-1] == "a & b"
    assert "".join(page.itertext()).rstrip().endswith("1 < 2")


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
    monkeypatch.setattr(measurement, "interruptions", lambda: next(count))
    report = accelerate(mlp(), torch.randn(5, 24))
    assert report.disturbed
    assert "times    may mislead" in str(report)
    monkeypatch.setattr(measurement, "interruptions", lambda: 5)
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


REAL = {name: getattr(measurement, name) for name in ("layer_times", "model_times", "compare")}


@pytest.fixture
def real_times(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in REAL.items():
        monkeypatch.setattr(measurement, name, function)
    for name in ("_LAYERS", "_MODEL", "_SINGLE"):
        monkeypatch.setattr(measurement, name, (2, 3, 0.0))


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
    assert report.swapped == count_packed(model)
    if examples is not None:
        assert report.speedup is not None
        assert report.speedup > 1 or (report.speedup == 1 and report.swapped == 0)
    assert float(difference(model(x), dense) or 0) < 1e-5
    restore(model)
    assert state(model) == before
