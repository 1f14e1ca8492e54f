"""Outputs of weights, followed through a network until they are added to something or rectified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Rectifier", "Residual", "Tracked", "step_of"]

_SAME = ("dropout", "contiguous")


class Tracked:
    """The output of a weight, followed through elementwise functions until it is added to something.

    Attributes:
        name: The weight's name.
        tensor: The current tensor.
        scale: The factor it was multiplied with, per channel; None: 1.
        shift: The constant that was then added, of the same shape; None: 0.
        steps: The functions that it went through.
        norm: The running mean of the batch norm that directly follows the weight.
    """

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.tensor = name, tensor
        self.scale: Tensor | None = None
        self.shift: Tensor | None = None
        self.steps: list[Callable[[Tensor], Tensor]] = []
        self.norm: Tensor | None = None

    def through(self, step: Callable[[Tensor], Tensor], result: Tensor) -> None:
        """Notes that a function was applied."""
        self.steps.append(step)
        self.tensor = result

    def times(self, scale: Tensor, shift: Tensor | None) -> None:
        """Notes that it was multiplied and shifted."""
        before = self.shift if self.shift is not None else torch.zeros(())
        added = before * scale if shift is None else before * scale + shift
        self.scale = scale if self.scale is None else self.scale * scale
        self.shift = added if added.ndim else None


class Residual:
    """A residual sum that includes the output of a weight: own + other."""

    def __init__(self, own: Tracked, other: Tensor) -> None:
        self.own, self.other = own, other

    def wanted(self, total: Tensor, other: Tensor) -> Tensor:
        """The output for which own + `other` equals `total`, in the shape of the weight's output."""
        difference = total - other
        if self.own.shift is not None:
            difference = difference - self.own.shift
        return difference if self.own.scale is None else difference / self.own.scale


class Rectifier:
    """A ReLU that is the only reader of a weight's output, directly or as part of a sum.

    Attributes:
        zero: The output for which the ReLU's input is 0, of a shape that broadcasts to the output's.
        rising: The sign of the slope of the ReLU's input over the output, of such a shape; None: 1.
    """

    def __init__(self, own: Tracked, other: Tensor) -> None:
        """Takes the output and the other summand, which is 0 if there is no sum."""
        self.zero = Residual(own, other).wanted(torch.zeros(()), other)
        self.rising = None if own.scale is None else own.scale.sign()


def step_of(
    name: str, func: Any, args: Any, kwargs: Any, tracked: Tracked
) -> Callable[[Tensor], Tensor] | None:
    """The function of the tracked tensor alone, if it keeps the position of each number."""
    if name == "dropout":
        training = kwargs.get("training", args[2] if len(args) > 2 else True)
        if training:
            return None
    elif name == "batch_norm":
        if not _note_norm(args, kwargs, tracked):
            return None
    elif name == "mul":
        scale = args[1] if len(args) == 2 else None
        if not isinstance(scale, nn.Parameter) or scale.shape != args[0].shape[-1:]:
            return None
        tracked.times(scale, None)
    elif name not in _SAME:
        return None
    return lambda tensor: func(tensor, *args[1:], **kwargs)


def _note_norm(args: Any, kwargs: Any, tracked: Tracked) -> bool:
    """Records a batch norm in evaluation mode."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    bound = dict(zip(names, args, strict=False)) | kwargs
    mean, variance = bound.get("running_mean"), bound.get("running_var")
    if bound.get("training", False) or mean is None or variance is None:
        return False
    scale = torch.rsqrt(variance + bound.get("eps", 1e-5))
    if bound.get("weight") is not None:
        scale = scale * bound["weight"]
    if not (scale.abs() > 1e-6 * scale.abs().max()).all():
        return False
    shift = -mean * scale
    if bound.get("bias") is not None:
        shift = shift + bound["bias"]
    if not tracked.steps:
        tracked.norm = mean
    shape = (1, -1, *[1] * (bound["input"].ndim - 2))
    tracked.times(scale.reshape(shape), shift.reshape(shape))
    return True
