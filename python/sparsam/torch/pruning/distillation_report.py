"""The report of a distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsam.report import Readable

__all__ = ["DistillationReport"]


@dataclass(frozen=True)
class DistillationReport(Readable):
    """The result of `distill`; `print` shows it.

    Attributes:
        steps: The number of steps, including those of interrupted runs.
        seconds: The time they took, in seconds.
        stopped: What ended it: "steps", "seconds", or "batches" if an iterator was exhausted.
        losses: The loss of each step: the sum over hidden states and outputs.
        sparsity: The share of zeros among the masked weights (without embeddings), before and after.
    """

    steps: int
    seconds: float
    stopped: str
    losses: tuple[float, ...]
    sparsity: tuple[float, float]

    @property
    def first_loss(self) -> float:
        """The mean loss over the first tenth of the steps."""
        return _mean(self.losses[: max(1, len(self.losses) // 10)])

    @property
    def last_loss(self) -> float:
        """The mean loss over the last tenth of the steps."""
        return _mean(self.losses[-max(1, len(self.losses) // 10) :])

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, and the two means, in plain types."""
        return super().to_dict() | {"first_loss": self.first_loss, "last_loss": self.last_loss}

    def __str__(self) -> str:
        before, after = self.sparsity
        return (
            f"{self.steps} steps in {self.seconds:.1f} s (ended by {self.stopped}): "
            f"loss {self.first_loss:.4g} -> {self.last_loss:.4g}, sparsity {before:.2%} -> {after:.2%}"
        )


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values) if values else 0.0
