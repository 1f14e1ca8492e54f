"""The report of `compress`: quality, bytes and time of the dense model and of each stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsam.inputs.display import printable
from sparsam.report import Readable, plain
from sparsam.torch.acceleration.report import AccelerationReport
from sparsam.torch.compression.quality import Quality
from sparsam.torch.compression.timing import Timing
from sparsam.torch.pruning.pruning_report import PrunedWeight, PruningReport

__all__ = ["CompressionReport", "Stage"]


@dataclass(frozen=True)
class Stage:
    """The model after one stage.

    Attributes:
        name: "dense", "pruned", "distilled" or "accelerated".
        sparsity: The sparsity of the pruned weights.
        quality: The quality on held-out texts.
        nbytes: The bytes of its weight files; None if it was not saved.
        seconds: The time the stage took, in seconds.
    """

    name: str
    sparsity: float
    quality: Quality
    nbytes: int | None
    seconds: float


@dataclass(frozen=True)
class CompressionReport(Readable):
    """The result of `compress`; print it.

    Attributes:
        model: The directory that was read.
        texts: A description of the calibration and held-out texts.
        stages: The dense model and each stage after it.
        curve: (sparsity, quality) of pruning by magnitude, without calibration.
        recovered: (sparsity, quality) of the requested pruning, before any distillation.
        timings: The times of the dense and of the accelerated model.
        pruning: Each weight's sparsity and error.
        acceleration: The report of `accelerate`.
        seconds: The total time, in seconds.
    """

    model: str
    texts: str
    stages: tuple[Stage, ...]
    curve: tuple[tuple[float, float], ...]
    recovered: tuple[tuple[float, float], ...]
    timings: tuple[Timing, ...]
    pruning: PruningReport
    acceleration: AccelerationReport
    seconds: float

    @property
    def pruned_weights(self) -> tuple[PrunedWeight, ...]:
        """The rows of the weights that are not dense."""
        return self.pruning.pruned

    def to_dict(self) -> dict[str, Any]:
        """Returns everything in types of JSON, in the order of the attributes."""
        return super().to_dict() | {
            "timings": [plain(timing) | {"speedup": timing.speedup} for timing in self.timings],
            "pruning": self.pruning.to_dict(),
            "acceleration": self.acceleration.to_dict(),
        }

    def stage_rows(self) -> list[tuple[str, ...]]:
        """The table of stages as text: name, zeros, quality, MiB, seconds."""
        return [
            (
                stage.name,
                f"{stage.sparsity:.1%}",
                str(stage.quality),
                "-" if stage.nbytes is None else f"{stage.nbytes / (1 << 20):.1f}",
                f"{stage.seconds:.0f}",
            )
            for stage in self.stages
        ]

    def timing_rows(self) -> list[tuple[str, ...]]:
        """The table of times as text: texts, tokens, dense, accelerated, speed-up."""
        return [
            (
                str(timing.rows),
                str(timing.tokens),
                f"{timing.dense_ms:.2f}",
                f"{timing.accelerated_ms:.2f}",
                f"{timing.speedup:.2f}x",
            )
            for timing in self.timings
        ]

    def __str__(self) -> str:
        measure = self.stages[0].quality.measure
        return "\n".join(
            [
                f"{printable(self.model)}: {printable(self.texts)}",
                *_aligned([("model", "zeros", measure, "MiB", "seconds"), *self.stage_rows()], texts=1),
                "medians in milliseconds, taken in turn",
                *_aligned(
                    [("texts", "tokens", "dense", "accelerated", "speed-up"), *self.timing_rows()], texts=0
                ),
            ]
        )


def _aligned(rows: list[tuple[str, ...]], *, texts: int) -> list[str]:
    """Rows as lines: the first columns to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
