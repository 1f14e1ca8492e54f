"""The row of one layer in the report of `accelerate`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LayerRow"]


@dataclass(frozen=True)
class LayerRow:
    """The measurements of one layer, and whether it was swapped.

    Attributes:
        name: The layer's name in the model.
        kind: The name of its class.
        shape: The shape of its weight.
        density: The share of nonzero weights.
        pattern: The pattern recognised in them; "" for a layer that was not packed.
        inputs: (shape of the input, number of calls) for each shape that the example inputs produced.
        dense_bytes: The size of the dense weight.
        packed_bytes: The size of the packed weight in all its forms; None if there is none. Layers whose
            weights are tied share it.
        kernel: The kernel in use: "panels", "bitmask", "slots", "dense", or several if that depends on the
            input; "rows" for an embedding, whose rows are looked up.
        dense_ms: Milliseconds that the dense layer takes for all example inputs, with the activation after it
            where that is fused, or, where there were none, the geometric mean over `inputs`; None where not
            timed.
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
