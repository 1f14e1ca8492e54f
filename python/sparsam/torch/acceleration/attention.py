"""The attention of Hugging Face models: PyTorch's or the core's, whichever is faster in the model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sparsam.torch.acceleration import measurement
from sparsam.torch.acceleration.installation import LayerSwap
from sparsam.torch.acceleration.measurement import Budget
from sparsam.torch.acceleration.model_runner import ModelRunner, difference
from sparsam.torch.transformers_switch import AttentionSwitch
from torch import nn

__all__ = ["AttentionRow", "choose_attention"]

_GAIN = 1.01  # of the whole model, at least: less is within what two measurements differ by


@dataclass(frozen=True)
class AttentionRow:
    """The attention of the Hugging Face models in a model.

    Attributes:
        models: The names of those that compute with "sdpa", PyTorch's function, and could with
            "sparsam_sdpa"; "" for the model itself.
        sdpa_ms: Milliseconds of the model with packed layers and PyTorch's attention; None if not timed.
        core_ms: The same with the core's attention.
        swapped: Whether they compute with the core's now.
        reason: Why not; else "".
    """

    models: tuple[str, ...]
    sdpa_ms: float | None
    core_ms: float | None
    swapped: bool
    reason: str = ""

    def __str__(self) -> str:
        if self.sdpa_ms is None or self.core_ms is None:
            return f"sdpa stays: {self.reason}"
        times = f"the model takes {self.core_ms:,.2f} ms with it, {self.sdpa_ms:,.2f} without"
        return f"sparsam_sdpa: {times}" if self.swapped else f"sdpa stays: {self.reason}; {times}"


def choose_attention(
    model: nn.Module,
    runner: ModelRunner,
    swap: LayerSwap,
    names: Collection[str],
    *,
    tolerance: float,
    budget: Budget,
) -> AttentionRow | None:
    """Lets the packed model compute with the core's attention where it runs, computes the same and is faster.

    Args:
        model: The model.
        runner: Runs it.
        swap: Its packed layers; receives the attention if that wins, and is packed in the end.
        names: The layers that win.
        tolerance: The largest accepted difference of an output, relative to the largest output.
        budget: For all measurements.

    Returns:
        What was found; None where there is nothing to choose.
    """
    switch = AttentionSwitch(model)
    if not switch.names:
        return None
    swap.show(names)
    before, outputs = _count(runner)
    swap.attention = switch
    swap.show(names)
    try:
        after, found = _count(runner)
    except Exception as error:  # whatever the model's own code makes of another name of its attention
        reason = f"does not run with sparsam_sdpa: {type(error).__name__}"
    else:
        apart = difference(found, outputs)
        reason = (
            "no call that the core computes"
            if after >= before
            else "with sparsam_sdpa, no output can be compared"
            if apart is None
            else f"with sparsam_sdpa, outputs differ by {apart:.1e} of the largest"
            if apart > tolerance
            else ""
        )
    if reason:
        swap.detach_attention()
        return AttentionRow(switch.names, None, None, swapped=False, reason=reason)
    seconds = measurement.attention_times(runner, switch, budget)
    won = seconds[0] >= _GAIN * seconds[1]
    if not won:
        swap.detach_attention()
        reason = f"gain under {_GAIN:g}"
    sdpa_ms, core_ms = (1e3 * s for s in seconds)
    return AttentionRow(switch.names, sdpa_ms, core_ms, won, reason)


class _Calls(TorchFunctionMode):
    """Counts the calls of PyTorch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def _count(runner: ModelRunner) -> tuple[int, list[Any]]:
    """How often the model calls PyTorch's attention, and its outputs."""
    with _Calls() as calls:
        outputs = runner.outputs()
    return calls.number, outputs
