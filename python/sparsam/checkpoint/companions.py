"""The other files of a model's directory: its configuration, its tokenizer, and so on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sparsam.inputs.system import sync

__all__ = ["copy", "files_beside"]

_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".keras", ".msgpack", ".npz", ".npy", ".gguf"),
    *(".onnx", ".onnx_data", ".data", ".tflite", ".ot", ".pb", ".mlmodel", ".index.json"),
)
"""The endings of files with weights: those of the dense model must not be copied beside the pruned ones."""


def files_beside(folder: Path, leave: Path) -> Iterator[Path]:
    """Yields the regular files of a directory that hold no weights, are not hidden and not in `leave`."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and Path(place, name).resolve() != leave.resolve()
        )
        for name in sorted(names):
            path = Path(place, name)
            if not name.startswith(".") and not name.lower().endswith(_WEIGHTS) and path.is_file():
                yield path


def copy(source: Path, target: Path, *, leave: Path) -> None:
    """Copies the companions of a directory into another one, following links, except the folder `leave`.

    Raises:
        OSError: A file cannot be read or written.
    """
    for path in files_beside(source, leave):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
        sync(place)
