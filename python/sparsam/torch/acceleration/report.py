"""What `accelerate` measured and did: as text, JSON or plain data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sparsam.report import printable, readable_size

__all__ = ["AccelerationReport", "LayerRow"]

_COLUMNS = (
    "layer",
    "kind",
    "shape",
    "input x calls",
    "density",
    "pattern",
    "kernel",
    "dense ms",
    "sparse ms",
    "gain",
    "what was done",
)
_NUMBERS = {"density", "dense ms", "sparse ms", "gain"}
_SHOWN = 2  # shapes of inputs in a row of text


@dataclass(frozen=True)
class LayerRow:
    """What became of one layer.

    Attributes:
        name: The layer's name in the model.
        kind: The name of its class.
        shape: The shape of its weight.
        density: The share of nonzero weights.
        pattern: The pattern recognised in them; "" for a layer that was not packed.
        inputs: (shape of the input, number of calls) for each shape that the example inputs produced.
        dense_bytes: The size of the dense weight.
        packed_bytes: That of the packed one with what kernels derived from it; None where there is none.
            Layers whose weights are tied share it.
        kernel: What multiplies now: "panels", "bitmask", "dense", or several where that depends on the input.
        dense_ms: Milliseconds that the dense layer takes for all example inputs, or, where there were none,
            the geometric mean over `inputs`; None where not timed.
        sparse_ms: The same for the packed layer.
        activation: The activation that is fused into the packed layer; None if none is.
        swapped: Whether the packed layer is in the model now.
        reason: Why not; "" for a layer that was swapped.
    """

    name: str
    kind: str
    shape: tuple[int, ...] = ()
    density: float | None = None
    pattern: str = ""
    inputs: tuple[tuple[tuple[int, ...], int], ...] = ()
    dense_bytes: int = 0
    packed_bytes: int | None = None
    kernel: str = ""
    dense_ms: float | None = None
    sparse_ms: float | None = None
    activation: str | None = None
    swapped: bool = False
    reason: str = ""

    @property
    def gain(self) -> float | None:
        """dense_ms / sparse_ms; None where not timed."""
        return self.dense_ms / self.sparse_ms if self.dense_ms is not None and self.sparse_ms else None


@dataclass(frozen=True)
class AccelerationReport:
    """What `accelerate` did, layer by layer and in total. `print(report)` shows an aligned table.

    Attributes:
        layers: The layers with weights that multiply, in the order of the model, those left dense included.
        before_ms: Median milliseconds of the model for all example inputs before; None where not timed.
        after_ms: The same with what is in the model now; equal to before_ms where nothing was swapped.
        weights_before: Bytes of the model's parameters before.
        weights_after: Bytes of those that are still there, of the packed weights with what kernels derived
            from them, and of what is kept for `restore`.
        difference: The largest difference of an output from that of the dense model, relative to the largest
            output; None where no output could be compared.
        disturbed: Whether other work kept the CPUs busy meanwhile.
        summary: What came of it, in a sentence.
    """

    layers: tuple[LayerRow, ...]
    before_ms: float | None
    after_ms: float | None
    weights_before: int
    weights_after: int
    difference: float | None
    disturbed: bool
    summary: str

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
        return {"layers": layers, "swapped": self.swapped, "speedup": self.speedup, **rest}

    def to_json(self, *, indent: int | None = 2) -> str:
        """Returns `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        lines = _table([_cells(row) for row in self.layers]) if self.layers else []
        if self.speedup is not None:
            after = f"{self.before_ms:,.2f} ms before, {self.after_ms:,.2f} ms after: {self.speedup:.2f}x"
            lines.append(f"model    {after} (medians, all example inputs)")
        before, now = readable_size(self.weights_before), readable_size(self.weights_after)
        lines.append(f"weights  {before} before, {now} after")
        if self.difference is not None:
            lines.append(f"outputs  differ from the dense model's by {self.difference:.1e} of the largest")
        if self.disturbed:
            lines.append(
                "times    may mislead: other work kept the CPUs busy; run it again when they are free"
            )
        return "\n".join([*lines, self.summary])


def _cells(row: LayerRow) -> tuple[str, ...]:
    done = row.reason
    if row.swapped:
        done = f"swapped, {row.activation} fused" if row.activation else "swapped"
    return (
        printable(row.name),
        row.kind,
        "x".join(map(str, row.shape)),
        _inputs(row),
        "" if row.density is None else f"{row.density:.3f}",
        row.pattern,
        row.kernel,
        _number(row.dense_ms, ".3f"),
        _number(row.sparse_ms, ".3f"),
        _number(row.gain, ".2f"),
        done,
    )


def _inputs(row: LayerRow) -> str:
    shown = [f"{'x'.join(map(str, shape))} x {calls}" for shape, calls in row.inputs[:_SHOWN]]
    more = len(row.inputs) - _SHOWN
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [_COLUMNS, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = [name in _NUMBERS for name in _COLUMNS]
    text = [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    ]
    rule = "-" * max(map(len, text))
    return [text[0], rule, *text[1:], rule]
