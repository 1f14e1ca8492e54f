"""Marks outputs to which a layer has applied the next activation, for the module that replaces that."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_activated", "mark_activated"]

_MARK = "_sparsam_activated"


def mark_activated(y: Tensor) -> Tensor:
    """Marks an output, with its present content, and returns it; does not mark while compiling."""
    if not torch.compiler.is_compiling():
        setattr(y, _MARK, _version(y))
    return y


def is_activated(x: Tensor) -> bool:
    """Whether a tensor was marked and is unchanged since; always True while compiling."""
    return torch.compiler.is_compiling() or getattr(x, _MARK, None) == _version(x)


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version  # inference tensors count no changes
