"""Hooks for accelerated models of Hugging Face transformers, without importing transformers."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

__all__ = ["announce", "withdraw"]


def announce(model: nn.Module) -> None:
    """Lets the model's `save_pretrained` write packed weights, if it has that method."""
    if (huggingface := sys.modules.get("sparsam.torch.huggingface")) is not None:
        huggingface.attach(model)


def withdraw(model: nn.Module) -> None:
    """Undoes `announce`."""
    for module in model.modules():
        quantizer: Any = vars(module).get("hf_quantizer")
        if type(quantizer).__module__ == "sparsam.torch.huggingface":
            quantizer.take_off(module)
