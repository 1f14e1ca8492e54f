"""Activations on disk: outputs of modules in memory-mapped files."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from sparsam.checkpoint.atomic import open_folder
from torch import Tensor, nn

__all__ = ["spill_outputs", "spilled"]

_LEAST = 1 << 16  # bytes; smaller outputs stay in memory


def spill_outputs(model: nn.Module, folder: str | Path, blocks: Collection[str] = ()) -> None:
    """Registers hooks that put the outputs of a twin's innermost modules, and of blocks, into files.

    Each file is unlinked as soon as it is open, so its space is freed with the tensor, whatever happens.

    Args:
        model: The twin.
        folder: The folder; made if needed.
        blocks: Names of other modules.
    """
    place = open_folder("spill_dir", folder)
    for name, module in model.named_modules():
        if name in blocks or not any(True for _ in module.children()):
            module.register_forward_hook(lambda _, args, output: _spilled(args, output, place))


def _spilled(args: Sequence[Any], output: Any, folder: Path) -> Any:
    """The output as a tensor in a mapped file; unchanged if it is small, not a plain tensor, or an input."""
    if type(output) is not Tensor or output.nbytes < _LEAST or any(output is value for value in args):
        return output
    return spilled(output, folder)


def spilled(output: Tensor, folder: Path) -> Tensor:
    """A copy of a tensor, in a mapped file unless it is small."""
    if output.nbytes < _LEAST:
        return output.clone()
    with tempfile.NamedTemporaryFile(dir=folder, prefix="activations-") as file:
        file.truncate(output.nbytes)
        mapped = torch.from_file(file.name, shared=True, size=output.numel(), dtype=output.dtype)
    return mapped.view(output.shape).copy_(output)
