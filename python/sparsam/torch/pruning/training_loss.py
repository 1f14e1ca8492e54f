"""The loss of a distillation: outputs and hidden states of a student beside those of its teacher."""

from __future__ import annotations

import torch
from sparsam.torch.pruning.calibration import Batch
from sparsam.torch.pruning.hidden_states import unpadded_rows
from torch import Tensor, nn

__all__ = ["distillation_loss"]

_HIDDEN = 0.1  # the weight of hidden states in the loss, relative to outputs


def distillation_loss(
    found: Tensor,
    target: Tensor,
    states: dict[str, Tensor],
    wanted: dict[str, Tensor],
    batch: Batch,
    *,
    divergence: bool,
) -> Tensor:
    """Returns the loss as `distill` defines it.

    Args:
        found: The student's output, (..., features).
        target: The teacher's, of the same shape.
        states: Hidden states of the student, by the names of their blocks.
        wanted: Those of the teacher; blocks that are in one of both only do not count.
        batch: Its mask says which rows count.
        divergence: Whether outputs are logits, compared by their probabilities.

    Raises:
        ValueError: Shapes differ.
    """
    hidden = []
    for name in (name for name in states if name in wanted):
        state = states[name]
        _same_shape(f"hidden state of {name!r}", state, wanted[name], "use layers='outputs'")
        a, b = unpadded_rows(state, batch), unpadded_rows(wanted[name], batch)
        hidden.append(_distance(a, b))
    _same_shape("output of the student", found, target, "distill from a teacher with the same outputs")
    a, b = unpadded_rows(found, batch), unpadded_rows(target, batch)
    if a.shape[-1] == 1:
        loss = _distance(a, b)
    elif divergence:
        a, b = a.log_softmax(-1), b.log_softmax(-1)
        if b.isneginf().any():  # what the teacher rules out counts 0, not 0 x infinity
            least = torch.finfo(b.dtype).min
            a, b = a.clamp_min(least), b.clamp_min(least)
        loss = nn.functional.kl_div(a, b, reduction="batchmean", log_target=True)
    else:
        loss = (1 - nn.functional.cosine_similarity(a, b, dim=-1)).mean()
    return loss + _HIDDEN * torch.stack(hidden).mean() if hidden else loss


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum() / b.square().sum().clamp_min(1e-12)


def _same_shape(what: str, tensor: Tensor, target: Tensor, do: str) -> None:
    if tensor.shape != target.shape:
        msg = f"{what}: expected shape {tuple(target.shape)}; got {tuple(tensor.shape)}; {do}"
        raise ValueError(msg)
