"""The results of the demo as one self-contained page of tables and pictures."""

from __future__ import annotations

from pathlib import Path

from sparsam import plot
from sparsam.bench import machine
from sparsam.checkpoint.atomic import check_target
from sparsam.demo.digits import ALLOWED_LOSS, DemoResult, SmallestNetwork
from sparsam.plot import html_page
from sparsam.plot.html_page import document, paragraph, picture, table

__all__ = ["check", "render", "write"]


def check(file: Path) -> None:
    """Checks that the page can be written, before anything is measured.

    Raises:
        ValueError: matplotlib is not installed, or `file` is a folder.
        OSError: The folder of `file` does not exist.
    """
    plot.new_figure()
    check_target(file)


def write(result: DemoResult, file: Path) -> None:
    """Writes the page, completely or not at all; OSError if it cannot be written."""
    html_page.write(render(result), file)


def render(result: DemoResult) -> str:
    """Returns the page as HTML; ValueError if matplotlib is not installed."""
    total = result.report.total
    trained_on = result.recovery_passes * len(result.steps)
    parts = [
        "<h1>sparsam demo</h1>",
        paragraph(
            f"A {'-'.join(map(str, result.layers))} network on scikit-learn's digits, seed {result.seed}: "
            f"{result.train_images} images to train on, {result.test_images} others to test on. Dense, "
            f"after {result.training_passes} passes of training, {result.dense_accuracy:.2%} of the test "
            f"images are right; after {trained_on} more passes {result.longer_accuracy:.2%}."
        ),
        paragraph(f"Measured on {machine()}, in {result.seconds:.1f} s."),
        "<h2>Accuracy against sparsity</h2>",
        paragraph(
            f"With recovery: {result.recovery_passes} passes of training under the masks after each step. "
            "Without: the dense weights pruned at once."
        ),
        picture(
            plot.degradation(
                {
                    "with recovery": [(step.sparsity, step.iterative) for step in result.steps],
                    "without": [(step.sparsity, step.one_shot) for step in result.steps],
                },
                dense_score=result.dense_accuracy,
                score="accuracy on the test images",
            ),
            "accuracy against sparsity, with recovery and without",
        ),
        table(
            ("step", "sparsity", "with recovery", "without"),
            (
                (step.iteration, f"{step.sparsity:.2%}", f"{step.iterative:.2%}", f"{step.one_shot:.2%}")
                for step in result.steps
            ),
        ),
        "<h2>Sensitivity</h2>",
        paragraph("Accuracy on the training images with one matrix pruned, all others dense."),
        _sensitivity(result),
        picture(plot.sensitivity_map(result.sensitivity), "loss of each matrix at each sparsity"),
        picture(plot.sensitivity_curves(result.sensitivity), "accuracy against the sparsity of each matrix"),
        "<h2>The smallest networks</h2>",
        paragraph(
            f"The highest sparsity at which at most {ALLOWED_LOSS:.0%} of the training images is lost. The "
            "test images had no part in the choice."
        ),
        table(SmallestNetwork.COLUMNS, (found.cells() for found in result.smallest), texts=1),
        "<h2>The network pruned step by step</h2>",
        _report(result),
        paragraph(
            f"{total.dense_bytes:,} bytes dense, {total.packed_bytes:,} packed: "
            f"{total.dense_bytes / total.packed_bytes:.1f} times smaller."
        ),
        picture(plot.sparsity_per_tensor(result.report), "sparsity of each matrix"),
        "<h2>Time</h2>",
        paragraph(
            f"Selection of what to keep, {len(result.steps)} times over all matrices: "
            f"{result.selection_seconds * 1e3:.2f} ms; np.partition on the same arrays: "
            f"{result.partition_seconds * 1e3:.2f} ms. Products x W^T, medians in milliseconds; even: "
            "the share of zeros from which sparse is faster than dense."
        ),
        _matmuls(result),
    ]
    return document("sparsam demo", parts)


def _sensitivity(result: DemoResult) -> str:
    report = result.sensitivity
    curves = {curve.name: curve for curve in report.curves}
    tolerated = report.tolerated()
    rows = []
    for name in report.ranking():
        scores = (curves[name].score(sparsity) for sparsity in report.sparsities)
        cells = ("-" if score is None else f"{score:.2%}" for score in scores)
        rows.append((name, f"{curves[name].params:,}", *cells, f"{tolerated[name]:.0%}"))
    header = ("matrix", "weights", *(f"{s:.0%}" for s in report.sparsities), "tolerates")
    return table(header, rows, texts=1)


def _report(result: DemoResult) -> str:
    header = ("tensor", "shape", "pattern", "weights", "pruned", "sparsity", "dense, bytes", "packed, bytes")
    rows = [
        (
            row.name,
            "x".join(map(str, row.shape)),
            row.pattern,
            f"{row.total_params:,}",
            f"{row.pruned_params:,}",
            f"{row.sparsity:.2%}",
            f"{row.dense_bytes:,}",
            f"{row.packed_bytes:,}",
        )
        for row in (*result.report.layers, result.report.total)
    ]
    return table(header, rows, texts=3)


def _matmuls(result: DemoResult) -> str:
    header = ("matrix", "shape", "batch", "zeros", "kernel", "sparsam", "dense", "speed-up", "even")
    rows = [
        (
            row.name,
            f"{row.rows}x{row.cols}",
            row.batch,
            f"{row.sparsity:.1%}",
            row.kernel,
            f"{row.linear_ms:.3f}",
            f"{row.dense_ms:.3f}",
            f"{row.speedup:.2f}x",
            "-" if timing.break_even is None else f"{timing.break_even:.0%}",
        )
        for timing in result.matmuls
        for row in (timing.row,)
    ]
    return table(header, rows, texts=2)
