"""The report of `accelerate`: as text, JSON or plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sparsam.report import Readable, readable_size
from sparsam.torch.acceleration.attention import AttentionRow
from sparsam.torch.acceleration.fused_modules import FusedRow
from sparsam.torch.acceleration.layer_row import LayerRow
from sparsam.torch.acceleration.report_text import paragraphs, table, to_html

__all__ = ["AccelerationReport"]


@dataclass(frozen=True)
class AccelerationReport(Readable):
    """The report of `accelerate`, layer by layer and in total.

    `print(report)` shows an aligned table, a notebook shows one in HTML; similar layers share a line.

    Attributes:
        layers: The layers whose weights multiply, and with int8 values also embeddings, in the order of the
            model, those left dense included.
        before_ms: Median milliseconds of the model for all example inputs before; None where not timed.
        after_ms: The same with the layers that are in the model now; before_ms if none was swapped.
        weights_before: Bytes of the model's parameters before.
        weights_after: Bytes of the parameters after, of the packed weights in all their forms, and of the
            dense weights that are kept for `restore`.
        difference: The largest difference of an output from that of the dense model, relative to the largest
            output; None where no output could be compared.
        disturbed: Whether other work kept the CPUs busy meanwhile. All times are then CPU times of the
            calling thread, those of the whole model minima.
        summary: The result in a sentence.
        attention: Of Hugging Face models: which attention they compute with, and why; None where there was
            nothing to choose.
        fused: The modules that the core computes as a whole, and what that saves; None where none can be.
    """

    layers: tuple[LayerRow, ...]
    before_ms: float | None
    after_ms: float | None
    weights_before: int
    weights_after: int
    difference: float | None
    disturbed: bool
    summary: str
    attention: AttentionRow | None = None
    fused: FusedRow | None = None

    @property
    def swapped(self) -> int:
        """The number of layers that were swapped."""
        return sum(row.swapped for row in self.layers)

    @property
    def speedup(self) -> float | None:
        """before_ms / after_ms; None where the model was not timed."""
        return self.before_ms / self.after_ms if self.before_ms is not None and self.after_ms else None

    def to_dict(self) -> dict[str, Any]:
        """Returns everything in plain types; keys in the order of the attributes."""
        layers = [
            asdict(row)
            | {
                "shape": list(row.shape),
                "inputs": [{"shape": list(shape), "calls": calls} for shape, calls in row.inputs],
                "gain": row.gain,
            }
            for row in self.layers
        ]
        rest = {key: value for key, value in vars(self).items() if key != "layers"}
        if self.attention is not None:
            rest["attention"] = asdict(self.attention) | {"models": list(self.attention.models)}
        if self.fused is not None:
            rest["fused"] = asdict(self.fused) | {"modules": list(self.fused.modules)}
        return {"layers": layers, "swapped": self.swapped, "speedup": self.speedup, **rest}

    def __str__(self) -> str:
        lines = table(self.layers) if self.layers else []
        return "\n".join([*lines, *paragraphs(self._totals())])

    def _repr_html_(self) -> str:
        return to_html(self.layers, self._totals())

    def _totals(self) -> list[str]:
        """The lines about the whole model."""
        lines = []
        if self.speedup is not None:
            after = f"{self.before_ms:,.2f} ms before, {self.after_ms:,.2f} ms after: {self.speedup:.2f}x"
            lines.append(f"model    {after} (medians, all example inputs)")
        if self.attention is not None:
            lines.append(f"attention {self.attention}")
        if self.fused is not None:
            lines.append(f"fused    {self.fused}")
        before, now = readable_size(self.weights_before), readable_size(self.weights_after)
        lines.append(f"weights  {before} before, {now} after")
        if self.difference is not None:
            lines.append(f"outputs  differ from the dense model's by {self.difference:.1e} of the largest")
        if self.disturbed:
            lines.append(
                "times    may mislead: other work kept the CPUs busy; run it again when they are free"
            )
        return [*lines, self.summary]
