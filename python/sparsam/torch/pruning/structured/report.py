"""The report of `shrink`: as text, as JSON, and applied to another copy of the original model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from sparsam.inputs.display import printable
from sparsam.report import Readable
from sparsam.torch.pruning.structured.structures import Cuts
from sparsam.torch.pruning.structured.surgery import Surgery
from torch import nn

__all__ = ["ShrinkReport", "StructureRow", "change_config"]


@dataclass(frozen=True)
class StructureRow:
    """The units of one structure before and after.

    Attributes:
        name: The attention, or the first layer that has these outputs.
        kind: "heads", "neurons" or "channels".
        before: The number of units before.
        kept: The kept units, by their original indices.
    """

    name: str
    kind: str
    before: int
    kept: tuple[int, ...]

    @property
    def after(self) -> int:
        """The number of units after."""
        return len(self.kept)


@dataclass(frozen=True)
class ShrinkReport(Readable):
    """What `shrink` removed. `print` it, or `apply` it to the original model, to load a saved small one.

    Attributes:
        structures: All structures that were considered, in the order of the model.
        params_before: The number of parameters before.
        params_after: The number of parameters after.
        seconds_before: Seconds for the example inputs before, measured alternately; None if not measured.
        seconds_after: Seconds for the example inputs after.
        left: Name of a layer or attention -> why none of its outputs or heads could be removed.
        config: Fields of the model's `config` that were changed -> their values.
        removed: (tensor, axis, removed indices).
        lowered: (module, attribute, how much it was reduced by).
    """

    structures: tuple[StructureRow, ...]
    params_before: int
    params_after: int
    seconds_before: float | None
    seconds_after: float | None
    left: Mapping[str, str] = field(repr=False)
    config: Mapping[str, int] = field(repr=False)
    removed: tuple[tuple[str, int, tuple[int, ...]], ...] = field(repr=False)
    lowered: tuple[tuple[str, str, int], ...] = field(repr=False)

    @property
    def speedup(self) -> float | None:
        """seconds_before / seconds_after; None if not measured."""
        if self.seconds_before is None or not self.seconds_after:
            return None
        return self.seconds_before / self.seconds_after

    def apply(self, model: nn.Module) -> None:
        """Cuts another model of the same architecture in the same way, in place.

        To load a saved small model, build the large one, apply the report, and load the state dict.

        Raises:
            ValueError: The model lacks what was removed, or has been cut already; it is then unchanged.
        """
        surgery = Surgery(model, self._cuts())
        with surgery.undone_by_errors():
            surgery.show("cut")
        change_config(model, self.config)

    @classmethod
    def from_json(cls, text: str | bytes) -> ShrinkReport:
        """Reads what `to_json` wrote; ValueError for anything else."""
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.MsgspecError, TypeError) as error:
            msg = f"shrink report: expected what to_json wrote; got something else ({error}); save it again"
            raise ValueError(msg) from error

    def __str__(self) -> str:
        rows = [("structure", "kind", "before", "after")]
        rows += [(printable(row.name), row.kind, str(row.before), str(row.after)) for row in self.structures]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        lines.insert(1, "-" * len(lines[0]))
        share = self.params_after / self.params_before if self.params_before else 1.0
        lines += ["", f"{self.params_before:,} parameters before, {self.params_after:,} after ({share:.1%})"]
        if self.speedup is not None:
            before, after = 1e3 * float(self.seconds_before or 0), 1e3 * float(self.seconds_after or 0)
            lines.append(f"{before:.3g} ms before, {after:.3g} ms after: {self.speedup:.2f} times as fast")
        if self.left:
            lines += ["", "left unchanged:"]
            lines += [f"  {printable(name)}: {printable(why)}" for name, why in self.left.items()]
        return "\n".join(lines)

    def _cuts(self) -> Cuts:
        removed = {(name, axis): np.array(indices, np.int64) for name, axis, indices in self.removed}
        return Cuts(removed, {(module, name): less for module, name, less in self.lowered})


def change_config(model: nn.Module, numbers: Mapping[str, int]) -> None:
    """Replaces the config of the model, and of modules that share it, by a copy with other numbers."""
    if not numbers:
        return
    before: Any = model.config
    after = copy.deepcopy(before)
    for name, value in numbers.items():
        setattr(after, name, value)
    for module in model.modules():
        if getattr(module, "config", None) is before:
            module.config = after
