"""Outputs to which a layer has applied the activation after it, so that the activation's place knows them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_activated", "mark_activated"]

_MARK = "_sparsam_activated"


def mark_activated(y: Tensor) -> Tensor:
    """Returns an output with the mark on this very tensor and what it holds now; none while compiling."""
    if not torch.compiler.is_compiling():
        setattr(y, _MARK, _version(y))
    return y


def is_activated(x: Tensor) -> bool:
    """Whether it is a tensor that was marked, unchanged since; while compiling it is taken for one."""
    return torch.compiler.is_compiling() or getattr(x, _MARK, None) == _version(x)


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version  # inference tensors count no changes
