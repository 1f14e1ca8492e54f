"""The results of `sparsam compress` as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from sparsam import plot
from sparsam.bench import machine
from sparsam.inputs.display import as_html
from sparsam.plot.html_page import document, paragraph, picture, table
from sparsam.report import Report
from sparsam.torch.compression.compression_report import CompressionReport
from sparsam.torch.pruning.pruning_report import DistilledBlock, PrunedWeight, PruningReport

__all__ = ["render", "render_pruning"]


def render(report: CompressionReport) -> str:
    """Returns the page; ValueError without matplotlib."""
    measure = report.stages[0].quality.measure
    pruned = report.pruned_weights
    parts = [
        f"<h1>{as_html(report.model)}</h1>",
        paragraph(f"{report.texts[0].upper()}{report.texts[1:]}. All of it took {report.seconds:.0f} s."),
        "<h2>Quality and size</h2>",
        table(("model", "zeros", measure, "MiB", "seconds"), report.stage_rows(), texts=1),
        "<h2>Time</h2>",
        paragraph(f"Measured on {machine()}; medians in milliseconds, dense and accelerated in turn."),
        table(("texts", "tokens", "dense", "accelerated", "speed-up"), report.timing_rows()),
        f"<h2>{measure.capitalize()} against sparsity</h2>",
        paragraph("As requested, with calibration; and by magnitude, without."),
        picture(
            plot.degradation(
                {"as requested": list(report.recovered), "magnitude": list(report.curve)},
                dense_score=report.stages[0].quality.value,
                score=measure,
            ),
            f"{measure} against sparsity",
        ),
        *_layers(pruned),
        "<h2>What runs packed</h2>",
        report.acceleration._repr_html_(),
    ]
    return document(f"sparsam compress {report.model}", parts)


def render_pruning(report: PruningReport, model: str) -> str:
    """Returns the page of a model that was pruned block by block; ValueError without matplotlib."""
    parts = [
        f"<h1>{as_html(model)}</h1>",
        paragraph(
            f"Pruned block by block from its files, in {report.seconds:.0f} s: {report.pruned_sparsity:.1%} "
            f"of the weights that were pruned are zeros. Calibration: {report.calibration or 'none'}."
        ),
        paragraph(
            "Left out, because they need the whole model in memory: its quality on held-out texts, pruning "
            "by magnitude beside it, what runs packed, and times."
        ),
        *_blocks(report.distilled),
        *map(paragraph, report.warnings),
        *_layers(report.pruned),
    ]
    return document(f"sparsam compress {model}", parts)


def _blocks(distilled: Sequence[DistilledBlock]) -> list[str]:
    """The error of each block before and after its training."""
    if not distilled:
        return []
    return [
        "<h2>Training</h2>",
        paragraph(
            "Each block was trained towards the outputs of the dense network's. Error: the squared "
            "difference from these on held-out calibration, as a share of their energy. A block that is not "
            "better keeps the values from before."
        ),
        table(
            ("block", "steps", "error before", "error after"),
            ((one.name, f"{one.steps:,}", f"{one.before:.2e}", f"{one.after:.2e}") for one in distilled),
            texts=1,
        ),
    ]


def _layers(pruned: Sequence[PrunedWeight]) -> list[str]:
    """How sparse each weight is, and its error."""
    return [
        "<h2>Layers</h2>",
        paragraph(
            "Error: the squared difference from the target outputs over held-out calibration, as a share of "
            "their energy."
        ),
        picture(plot.sparsity_per_tensor(Report(pruned)), "sparsity of each weight"),
        table(
            ("weight", "shape", "weights", "zeros", "error"),
            (
                (
                    row.name,
                    "x".join(map(str, row.shape)),
                    f"{row.total_params:,}",
                    f"{row.sparsity:.2%}",
                    "-" if row.error is None else f"{row.error:.2e}",
                )
                for row in pruned
            ),
            texts=2,
        ),
    ]
