"""The results of the steps of `accelerate`, as rows and summary of the report."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsam.torch.acceleration.attention import AttentionRow
from sparsam.torch.acceleration.candidate_layers import Candidate
from sparsam.torch.acceleration.decision import Decision
from sparsam.torch.acceleration.fused_modules import FusedRow
from sparsam.torch.acceleration.installation import LayerSwap
from sparsam.torch.acceleration.layer_row import LayerRow
from sparsam.torch.acceleration.verification import DIFFERS, Gain
from torch import nn

__all__ = ["Outcome", "closing", "in_order", "rows_of"]

_PADDED = (
    "; nn.TransformerEncoder puts zeros where inputs are padded, but only in its fast path, which packed "
    "layers cannot use: if those do not matter, call torch.backends.mha.set_fastpath_enabled(False) first"
)


@dataclass(frozen=True)
class Outcome:
    """The results of the steps.

    Attributes:
        calls: Shapes of the inputs of each candidate, with the number of calls.
        decision: About those that were measured.
        reasons: Why candidates were rejected before that.
        gain: Of the whole model; None where it was not timed.
        difference: Of the outputs; None where they could not be compared.
        attention: Of Hugging Face models; None where there was nothing to choose.
        fused: Of modules as a whole; None where none can be fused.
    """

    calls: Mapping[str, Counter[Any]]
    decision: Decision
    reasons: Mapping[str, str]
    gain: Gain | None = None
    difference: float | None = None
    attention: AttentionRow | None = None
    fused: FusedRow | None = None

    @property
    def final_attention(self) -> AttentionRow | None:
        """The attention of the model in the end: PyTorch's if no layer is packed."""
        if self.attention is None or not self.attention.swapped or self.swapped:
            return self.attention
        return dataclasses.replace(self.attention, swapped=False, reason="no layer is packed")

    @property
    def final_fused(self) -> FusedRow | None:
        """The fused modules in the end: none if no layer is packed."""
        if self.fused is None or not self.fused.swapped or self.swapped:
            return self.fused
        return dataclasses.replace(self.fused, swapped=False, reason="no layer is packed")

    @property
    def swapped(self) -> tuple[str, ...]:
        """The names of the layers that are packed in the end."""
        return self.decision.swap if self.gain is None else self.gain.swap


def rows_of(found: Sequence[Candidate], swap: LayerSwap, outcome: Outcome) -> dict[str, LayerRow]:
    """The rows of candidates by name, for the final state of the model."""
    return {candidate.name: _row(candidate, swap, outcome) for candidate in found}


def in_order(model: nn.Module, rows: Mapping[str, LayerRow]) -> tuple[LayerRow, ...]:
    """Rows of layers and Parameters in the order of the model."""
    order = (
        name
        for layer, module in model.named_modules()
        for name in (layer, *(f"{layer}.{own}".removeprefix(".") for own in module._parameters))
    )
    return tuple(rows[name] for name in order if name in rows)


def closing(model: nn.Module, rows: Mapping[str, LayerRow], outcome: Outcome) -> str:
    """The summary in a sentence, with the reason if nothing was packed."""
    slower = None if outcome.gain is None else outcome.gain.slower
    differs = any(row.reason.startswith(DIFFERS) for row in rows.values())
    padded = differs and any(isinstance(module, nn.TransformerEncoder) for module in model.modules())
    hint = _PADDED if padded else ""
    won, swapped = len(outcome.decision.swap), len(outcome.swapped)
    if swapped:
        fewer = f"; {won - swapped} more win by themselves, but not in the model" if slower else ""
        return f"{swapped} of {len(rows)} layers swapped{fewer}{hint}"
    if slower is not None:
        would = f"the model would take {1e3 * slower:,.2f} ms"
        return f"nothing swapped: with the {won} layers that are faster by themselves, {would}{hint}"
    reasons = Counter(row.reason for row in rows.values())
    found = "; ".join(f"{why} ({n} layer{'s' * (n > 1)})" for why, n in reasons.most_common())
    return f"nothing swapped: {found or 'the model has no layer of a kind that can be packed'}{hint}"


def _row(candidate: Candidate, swap: LayerSwap, outcome: Outcome) -> LayerRow:
    name = candidate.name
    row = dataclasses.replace(
        candidate.row(outcome.reasons.get(name) or outcome.decision.reasons.get(name, "")),
        inputs=tuple((shape, n) for shape, n in outcome.calls.get(name, {}).items() if shape is not None),
    )
    if name not in swap.layers:
        return row
    layer, seconds = swap.layers[name], outcome.decision.times[name]
    swapped = name in outcome.swapped
    return dataclasses.replace(
        row,
        pattern=str(layer.packed.pattern),
        packed_bytes=layer.nbytes,
        kernel="/".join(layer.packed.forms),
        dense_ms=1e3 * seconds.dense,
        sparse_ms=1e3 * seconds.packed,
        activation=layer.activation if swapped else None,
        swapped=swapped,
        reason="" if swapped else row.reason or "faster by itself, but see below",
    )
