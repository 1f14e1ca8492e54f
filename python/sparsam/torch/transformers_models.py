"""Support for Hugging Face transformers' models, without importing transformers for others."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

__all__ = ["announce", "register", "withdraw"]


def register() -> None:
    """Registers packed weights with transformers, if it was imported before and is recent enough."""
    version = getattr(sys.modules.get("transformers"), "__version__", "0")
    if int(version.split(".")[0]) >= 5:
        from sparsam.torch import huggingface  # noqa: F401, PLC0415 - takes seconds


def announce(model: nn.Module) -> None:
    """Lets `save_pretrained` write packed weights, where the model has it."""
    register()
    if (huggingface := sys.modules.get("sparsam.torch.huggingface")) is not None:
        huggingface.attach(model)


def withdraw(model: nn.Module) -> None:
    """Undoes `announce`."""
    for module in model.modules():
        quantizer: Any = vars(module).get("hf_quantizer")
        if type(quantizer).__module__ == "sparsam.torch.huggingface":
            quantizer.take_off(module)
