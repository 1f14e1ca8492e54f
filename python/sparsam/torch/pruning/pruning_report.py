"""The report of `prune`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sparsam.inputs.display import printable
from sparsam.report import LayerStats, Report
from sparsam.torch.pruning.layer_fits import NewLayer

__all__ = ["DistilledBlock", "PrunedWeight", "PruningReport"]

_RULE = "embeddings, norms, biases and heads of language models stay dense; exclude= leaves more"

_VALUES = {
    "int8": 'int8, scaled floats that accelerate(..., values="int8") packs without rounding again',
    "int4": 'int4, scaled floats that accelerate(..., values="int4") packs; groups of 32 are rounded again',
}


@dataclass(frozen=True)
class PrunedWeight(LayerStats):
    """The statistics of one weight.

    Attributes:
        error: The squared difference from the target outputs on held-out inputs, relative to their squared
            norm; None if it was not measured.
        note: The kind of target outputs, "dense targets" or "own targets"; or why the weight is dense.
    """

    error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class DistilledBlock:
    """A block that was trained after pruning, towards the outputs of the dense network's.

    Attributes:
        name: Its name.
        steps: Of the training.
        before: The squared difference from those outputs on held-out inputs, relative to their squared norm.
        after: The same after the training.
    """

    name: str
    steps: int
    before: float
    after: float

    @property
    def final(self) -> float:
        """The error of the values that it has."""
        return min(self.before, self.after)

    @property
    def improved(self) -> bool:
        """Whether it has the values that it was trained to; otherwise those from before."""
        return self.after < self.before


@dataclass(frozen=True)
class PruningReport(Report):
    """The statistics of every weight of two or more axes, pruned or dense; `print(report)` shows a table.

    Attributes:
        layers: A `PrunedWeight` for each weight, in the order of the model.
        calibration: A description of the calibration; "" without.
        seconds: The time of the call, in seconds.
        warnings: The texts of the warnings.
        values: "int8" or "int4" where weights were rounded; "" where not.
        distilled: The blocks that `prune_files` trained.
    """

    layers: tuple[PrunedWeight, ...]
    calibration: str = ""
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    values: str = ""
    distilled: tuple[DistilledBlock, ...] = ()

    def __init__(
        self,
        layers: Iterable[PrunedWeight],
        calibration: str = "",
        seconds: float = 0.0,
        warnings: Iterable[str] = (),
        values: str = "",
        distilled: Iterable[DistilledBlock] = (),
    ) -> None:
        super().__init__(layers)
        object.__setattr__(self, "calibration", calibration)
        object.__setattr__(self, "seconds", seconds)
        object.__setattr__(self, "warnings", tuple(warnings))
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "distilled", tuple(distilled))

    @property
    def pruned(self) -> tuple[PrunedWeight, ...]:
        """The rows of the weights that are not dense."""
        return tuple(row for row in self.layers if row.pattern != "dense")

    @property
    def pruned_sparsity(self) -> float:
        """The fraction of zeros among the weights that are not dense."""
        total = sum(row.total_params for row in self.pruned)
        return sum(row.pruned_params for row in self.pruned) / total if total else 0.0

    def __str__(self) -> str:
        lines = [super().__str__(), f"rule: {_RULE}"]
        if self.calibration:
            lines.append(f"calibration: {printable(self.calibration)}")
        if self.values:
            lines.append(f"values: {_VALUES[self.values]}")
        if self.distilled:
            before, after = (
                sum(getattr(block, what) for block in self.distilled) / len(self.distilled)
                for what in ("before", "final")
            )
            better = sum(block.improved for block in self.distilled)
            lines.append(
                f"distilled: {better} of {len(self.distilled)} blocks are better, mean error of outputs "
                f"{before:.3g} -> {after:.3g}"
            )
        lines += [f"warning: {printable(text)}" for text in self.warnings]
        return "\n".join([*lines, f"{self.seconds:.1f} s"])

    def to_dict(self) -> dict[str, Any]:
        """Returns the dict of `Report` with the other attributes, in plain types."""
        more = {"calibration": self.calibration, "seconds": self.seconds, "warnings": list(self.warnings)}
        more["values"] = self.values
        more["distilled"] = [asdict(block) for block in self.distilled]
        return super().to_dict() | more

    def _columns(self) -> tuple[str, ...]:
        return (*super()._columns(), "error", "note")

    def _rows(self) -> list[tuple[str, ...]]:
        *rows, total = super()._rows()
        more = [
            ("" if layer.error is None else f"{layer.error:.4f}", printable(layer.note))
            for layer in self.layers
        ]
        return [*((*row, *cells) for row, cells in zip(rows, more, strict=True)), (*total, "", "")]


def described(stats: LayerStats, new: NewLayer | None, reason: str) -> PrunedWeight:
    """The statistics with the error, the kind of targets, and the reason if it is dense."""
    plain = asdict(stats)
    if reason:
        return PrunedWeight(**plain, note=reason)
    if new is None:
        return PrunedWeight(**plain)
    return PrunedWeight(**plain, error=new.error, note=f"{new.targets} targets")
