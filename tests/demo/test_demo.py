from __future__ import annotations

import base64
import dataclasses
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from sparsam.cli import main

pytest.importorskip("sklearn")
from sparsam.demo import digits as demo
from sparsam.report import Report
from sparsam.schedules import sample

TIMES = ("selection_seconds", "partition_seconds", "matmuls", "seconds")


@pytest.fixture(scope="module")
def result() -> demo.DemoResult:
    return demo.run(seed=0)


def test_the_network_learns_the_digits(result: demo.DemoResult) -> None:
    assert result.train_images + result.test_images == 1797
    assert result.dense_accuracy > 0.95


def test_steps_follow_the_cubic_schedule(result: demo.DemoResult) -> None:
    curve = sample(
        "cubic", num_iterations=demo.STEPS, initial=demo.INITIAL_SPARSITY, final=demo.FINAL_SPARSITY
    )
    assert [step.iteration for step in result.steps] == list(range(1, demo.STEPS + 1))
    assert np.allclose([step.sparsity for step in result.steps], curve, atol=1e-5)


def test_recovery_pays(result: demo.DemoResult) -> None:
    last = result.steps[-1]
    assert last.iterative > 0.9
    assert last.iterative > last.one_shot
    assert {step.iterative for step in result.steps} <= {
        i / result.test_images for i in range(result.test_images + 1)
    }


def test_the_report_is_of_the_final_network(result: demo.DemoResult) -> None:
    shapes = {layer.name: layer.shape for layer in result.report.layers}
    assert shapes == {
        "layers.0.weight": (512, 64),
        "layers.0.bias": (512,),
        "layers.1.weight": (256, 512),
        "layers.1.bias": (256,),
        "layers.2.weight": (10, 256),
        "layers.2.bias": (10,),
    }
    matrices = [layer for layer in result.report.layers if len(layer.shape) == 2]
    pruned, size = (
        sum(getattr(layer, field) for layer in matrices) for field in ("pruned_params", "total_params")
    )
    assert pruned == round(0.95 * size)
    assert all(layer.dtype == "float32" for layer in result.report.layers)


def test_sensitivity_and_the_smallest_networks(result: demo.DemoResult) -> None:
    report = result.sensitivity
    assert [curve.name for curve in report.curves] == [f"layers.{i}.weight" for i in range(3)]
    assert report.evaluations == 16
    one_shot, allocated, recovered = result.smallest
    for found in result.smallest:
        assert found.train_accuracy >= report.dense_score - demo.ALLOWED_LOSS
        assert 0.5 < found.sparsity < 1
        assert found.test_accuracy > 0.9
        assert found.evaluations <= 20
    assert recovered.sparsity > one_shot.sparsity
    assert allocated.method != one_shot.method


class Page(HTMLParser):
    """The tags, attributes and texts of a page, every tag being closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.pictures: list[bytes] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in {"meta", "img"}:
            self.open.append(tag)
        for name, value in attributes:
            if name in {"src", "href"}:
                start, _, data = str(value).partition(",")
                self.links.append(start)
                self.pictures.append(base64.b64decode(data, validate=True))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in {"td", "th"}:
            self.cells.append(data)


def test_the_page(
    result: demo.DemoResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    odd = dataclasses.replace(result.report.layers[0], name="<script>alert(1)</script>")
    strange = dataclasses.replace(result, report=Report([odd, *result.report.layers[1:]]))
    monkeypatch.setattr(demo, "run", lambda *_: strange)
    file = tmp_path / "demo.html"
    assert main(["demo", "--html", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 0
    text = file.read_text(encoding="utf-8")
    assert "<script" not in text
    page = Page(text)
    assert set(page.links) == {"data:image/svg+xml;base64"}
    assert len(page.pictures) == 4
    assert all(ET.fromstring(picture).tag.endswith("svg") for picture in page.pictures)
    for step in result.steps:
        assert {f"{step.sparsity:.2%}", f"{step.iterative:.2%}", f"{step.one_shot:.2%}"} <= set(page.cells)
    for found in result.smallest:
        assert {found.method, f"{found.sparsity:.2%}", f"{found.test_accuracy:.2%}"} <= set(page.cells)
    for timing in result.matmuls:
        assert f"{timing.row.speedup:.2f}x" in page.cells
    for curve in result.sensitivity.curves:
        assert {f"{point.score:.2%}" for point in curve.points} <= set(page.cells)
    assert "<script>alert(1)</script>" in page.cells


def test_a_page_that_cannot_be_written_is_known_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "run", pytest.fail)
    assert main(["demo", "--html", str(tmp_path / "nowhere" / "demo.html")]) == 2
    assert "no such directory" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["demo", "--html", str(tmp_path / "demo.html")]) == 2
    assert "pip install 'sparsam[plot]'" in capsys.readouterr().err


def test_time(result: demo.DemoResult) -> None:
    assert 0 < result.selection_seconds < result.seconds
    assert 0 < result.partition_seconds < result.seconds


def test_matmuls(result: demo.DemoResult) -> None:
    rows = [timing.row for timing in result.matmuls]
    assert [(row.name, row.rows, row.cols, row.batch) for row in rows] == [
        ("layers.0.weight", 512, 64, 450),
        ("layers.1.weight", 256, 512, 450),
        ("layers.2.weight", 10, 256, 450),
        ("random", 3072, 768, 1),
        ("random", 3072, 768, 128),
    ]
    layers = {layer.name: layer for layer in result.report.layers}
    for row in rows[:3]:
        assert row.sparsity == pytest.approx(layers[row.name].sparsity)
    assert rows[3].sparsity == rows[4].sparsity == pytest.approx(0.95, abs=1e-4)
    for timing in result.matmuls:
        assert min(timing.row.linear_ms, timing.row.dense_ms) > 0
        assert timing.break_even is None or 0 <= timing.break_even <= 1


def test_the_command_prints_what_the_same_seed_gave(
    result: demo.DemoResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    again: list[demo.DemoResult] = []
    original = demo.run

    def run(*arguments: Any) -> demo.DemoResult:
        again.append(original(*arguments))
        return again[0]

    monkeypatch.setattr(demo, "run", run)
    assert main(["demo", "--seed", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    same = dataclasses.replace(again[0], **{field: getattr(result, field) for field in TIMES})
    assert same == result

    monkeypatch.setattr(demo, "run", lambda *_: result)
    assert f"{result.dense_accuracy:.2%}" in captured.out
    assert str(result.report) in captured.out
    for step in result.steps:
        row = f"{step.iteration} {step.sparsity:.2%} {step.iterative:.2%} {step.one_shot:.2%}".split()
        assert row in [line.split() for line in captured.out.splitlines()]

    assert str(result.sensitivity) in captured.out
    for found in result.smallest:
        assert re.search(rf"{found.method} +{found.sparsity:.2%} +{found.train_accuracy:.2%} ", captured.out)

    for timing in result.matmuls:
        shape = f"{timing.row.rows}x{timing.row.cols}"
        assert re.search(rf"{timing.row.name} +{shape} +{timing.row.batch} +\d+\.\d% ", captured.out)

    assert main(["demo", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads(json.dumps(result.to_dict()))
    assert list(content)[:2] == ["seed", "layers"]


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "sparsam.demo.digits")
    monkeypatch.delattr("sparsam.demo.digits")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["demo"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "expected scikit-learn" in captured.err
    assert "pip install 'sparsam[demo]'" in captured.err
