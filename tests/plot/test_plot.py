from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import network
from sparsam.analysis.sweep import SensitivityReport, sensitivity
from sparsam.pruner import prune
from sparsam.selection import threshold

pytest.importorskip("matplotlib")
from sparsam import plot

REPORT = sensitivity(network.weights(), network.accuracy, (0.5, 0.9))
PRUNED = prune(network.weights(), target_sparsity=0.7, scope="global", exclude=("version",)).report
EMPTY = SensitivityReport(1.0, ())
NAN = float("nan")


def many(n: int) -> SensitivityReport:
    """A report on tensors with long names, not all measured everywhere, one of them destroyed."""
    curves = [
        {
            "name": f"model.decoder.layers.{i}.self_attn.query_key_value_projection.weight",
            "tensors": {f"t{i}": 100},
            "all_or_nothing": False,
            "points": [
                {"sparsity": s / 10, "pruned": 10 * s, "score": 1 - i * s / (10 * n) if i else "-inf"}
                for s in range(1 + i % 2, 10, 1 + i % 2)
            ],
        }
        for i in range(n)
    ]
    return SensitivityReport.from_json(
        json.dumps(
            {"sparsam_sensitivity": 2, "dense_score": 1.0, "method": "", "pattern": "", "curves": curves}
        )
    )


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


DRAWN: dict[str, Callable[..., Any]] = {
    "degradation": lambda *file: plot.degradation({"a": [(0.5, 0.9)]}, *file),
    "map": lambda *file: plot.sensitivity_map(REPORT, *file),
    "curves": lambda *file: plot.sensitivity_curves(REPORT, *file),
    "bars": lambda *file: plot.sparsity_per_tensor(PRUNED, *file),
    "histogram": lambda *file: plot.histogram(network.weights()["in.weight"], 0.5, *file),
}


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_files(name: str, ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"picture.{ending}"
    figure = DRAWN[name](file)
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert file.read_bytes().startswith(start)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    axes = figure.axes[0]
    assert axes.get_xlabel()
    assert axes.get_ylabel() or len(axes.get_yticklabels()) == 3


@pytest.mark.parametrize("name", DRAWN)
def test_without_a_file_and_with_a_bad_one(name: str, tmp_path: Path) -> None:
    assert type(DRAWN[name]()).__name__ == "Figure"
    with pytest.raises(ValueError, match=r"picture\.doc: expected a name that ends in one of"):
        DRAWN[name](tmp_path / "picture.doc")
    with pytest.raises(FileNotFoundError):
        DRAWN[name](tmp_path / "nowhere" / "picture.png")


@pytest.mark.parametrize("name", DRAWN)
def test_matplotlib_is_an_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ValueError, match=r"pictures: expected matplotlib; got .*; run pip install 'sparsam\[plot\]'"
    ):
        DRAWN[name]()


def test_degradation() -> None:
    curves = {"with recovery": [(0.9, 0.7), (0.0, 1.0), (0.5, 0.9)], "without": [(0.5, 0.8), (0.9, -np.inf)]}
    figure = plot.degradation(curves, dense_score=1.0, min_score=0.75, score="accuracy")
    (axes,) = figure.axes
    recovered, plain, dense, wanted = axes.lines
    assert recovered.get_xydata().tolist() == [[0, 1.0], [50, 0.9], [90, 0.7]]
    assert plain.get_xydata()[0].tolist() == [50, 0.8]
    assert np.isnan(plain.get_xydata()[1, 1])
    assert list(dense.get_ydata()) == [1.0, 1.0]
    assert list(wanted.get_ydata()) == [0.75, 0.75]
    assert recovered.get_color() != plain.get_color()
    assert recovered.get_marker() != plain.get_marker()
    assert axes.get_ylabel() == "accuracy"
    assert "%" in axes.get_xlabel()
    with pytest.raises(ValueError, match="curves: expected at least one"):
        plot.degradation({"a": []})


def test_map() -> None:
    axes, _ = plot.sensitivity_map(REPORT).axes
    order = list(reversed(REPORT.ranking()))
    assert [label.get_text() for label in axes.get_yticklabels()] == order
    assert [label.get_text() for label in axes.get_xticklabels()] == ["50", "90"]
    curves = {curve.name: curve for curve in REPORT.curves}
    expected = [[REPORT.dense_score - point.score for point in curves[name].points] for name in order]
    assert np.allclose(axes.images[0].get_array(), expected)
    assert texts(axes) == [f"{loss:.2g}" for row in expected for loss in row]
    assert "hatched" not in axes.get_xlabel()
    with pytest.raises(ValueError, match="report: expected at least one measurement"):
        plot.sensitivity_map(EMPTY)


@pytest.mark.parametrize("n", [60, 500])
def test_many_tensors(n: int, tmp_path: Path) -> None:
    report = many(n)
    figure = plot.sensitivity_map(report, tmp_path / "map.png" if n == 60 else None)
    axes = figure.axes[0]
    assert texts(axes) == []
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(set(labels)) == len(labels) == (60 if n == 60 else 250)
    assert all(len(label) <= 47 for label in labels)
    assert figure.get_figheight() <= 60
    assert axes.get_xlabel().endswith("hatched: not measured")
    curves = plot.sensitivity_curves(report)
    assert len(curves.axes[0].lines) == 15
    styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in curves.axes[0].lines}
    assert len(styles) == 15
    assert curves.axes[0].get_title() == f"the 14 most sensitive of {n}"
    bars = plot.sparsity_per_tensor({f"{i}": i / n for i in range(n)})
    assert len(bars.axes[0].patches) == n


def test_curves() -> None:
    (axes,) = plot.sensitivity_curves(REPORT).axes
    worst = REPORT.ranking()[-1]
    curve = next(curve for curve in REPORT.curves if curve.name == worst)
    assert axes.lines[0].get_label() == worst
    assert axes.lines[0].get_xydata().tolist() == [
        [0.0, REPORT.dense_score],
        *([100 * point.sparsity, point.score] for point in curve.points),
    ]
    with pytest.raises(ValueError, match="report: expected at least one measurement"):
        plot.sensitivity_curves(EMPTY)


def test_bars() -> None:
    (axes,) = plot.sparsity_per_tensor(PRUNED).axes
    layers = [layer for layer in PRUNED.layers if layer.pattern != "dense"]
    assert len(layers) == 3
    assert [bar.get_width() for bar in axes.patches] == [100 * layer.sparsity for layer in layers]
    assert [label.get_text() for label in axes.get_yticklabels()] == [layer.name for layer in layers]
    assert texts(axes) == [f"{layer.sparsity:.1%}" for layer in layers]
    assert axes.lines[0].get_xdata()[0] == 100 * PRUNED.total.sparsity
    with pytest.raises(ValueError, match="sparsities: expected at least one tensor"):
        plot.sparsity_per_tensor({})


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_histogram(dtype: Any) -> None:
    weights = np.random.default_rng(0).standard_normal((50, 40)).astype(dtype)
    figure = plot.histogram({"a": weights[:20], "b": weights[20:]}, 0.8, name="both")
    (axes,) = figure.axes
    assert axes.patches[0].get_data().values.sum() == 2000
    value = threshold(weights, 0.8).value
    assert sorted(line.get_xdata()[0] for line in axes.lines) == [-value, value]
    assert axes.get_xlabel() == "weight of both"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["2,000 weights", f"pruned at 0.8: |w| up to {value:.4g}"]


def test_histograms_at_the_edges() -> None:
    assert not plot.histogram(np.ones(3), 0.0).axes[0].lines
    assert plot.histogram(np.zeros((2, 2)), 1.0).axes[0].patches[0].get_data().values.sum() == 4
    assert plot.histogram(np.array([1.0, np.inf]), 0.5).axes[0].patches[0].get_data().values.sum() == 1
    with pytest.raises(ValueError, match="weights: expected at least one finite value"):
        plot.histogram(np.zeros(0), 0.5)
    with pytest.raises(ValueError, match="NaN"):
        plot.histogram(np.array([1.0, NAN]), 0.5)
    with pytest.raises(ValueError, match="sparsity: expected"):
        plot.histogram(np.ones(3), 2)


def test_report_plot(tmp_path: Path) -> None:
    assert len(REPORT.plot(tmp_path / "a.svg").axes) == 2
    assert (tmp_path / "a.svg").exists()
    assert len(REPORT.plot(str(tmp_path / "b.png"), kind="curves").axes) == 1
    with pytest.raises(ValueError, match="kind: expected 'map' or 'curves'; got 'pie'"):
        REPORT.plot(kind="pie")


def test_names_with_an_underscore_stand_in_the_legend() -> None:
    axes = plot.degradation({"_compiled": [(0.5, 1.0)], "plain": [(0.5, 0.9)]}).axes[0]
    assert [text.get_text().strip() for text in axes.get_legend().get_texts()] == ["_compiled", "plain"]


def test_sparsities_are_checked_and_paths_may_be_text(tmp_path: Path) -> None:
    plot.sparsity_per_tensor({"a": 0.5}, str(tmp_path / "bars.png"))
    assert (tmp_path / "bars.png").stat().st_size
    with pytest.raises(ValueError, match=r"curves\['a'\]: expected a number from 0"):
        plot.degradation({"a": [(50, 1.0)]})
    with pytest.raises(ValueError, match="a: expected a number from 0"):
        plot.sparsity_per_tensor({"a": float("nan")})
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match="expected a regular file to replace"):
        plot.check(tmp_path / "folder.png")


def test_dollars_are_no_mathematics(tmp_path: Path) -> None:
    plot.sparsity_per_tensor({"$\\frac{": 0.5, "a\x1b[2J": 0.1}, tmp_path / "a.png")
    plot.degradation({"$x_": [(0.1, 1.0)]}, tmp_path / "a.png", score="score")
