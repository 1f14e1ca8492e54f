"""Checkpoints of other kinds, read whole and written whole: of torch.save, NumPy and ONNX.

The ending of the name decides: `.pt`, `.pth` and `.bin` are PyTorch's, as is an index `.bin.index.json`;
`.npz` is NumPy's, `.onnx` is a graph with its weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sparsam.checkpoint import files, onnx_files, torch_files
from sparsam.checkpoint.atomic import publish
from sparsam.checkpoint.foreign_content import Foreign
from sparsam.checkpoint.safetensors_format import DTYPES, check_regular

__all__ = ["kind_of", "read", "source_of", "write"]

Kind: TypeAlias = Literal["safetensors", "torch", "npz", "onnx"]

_KINDS: dict[str, Kind] = {".pt": "torch", ".pth": "torch", ".bin": "torch", ".npz": "npz", ".onnx": "onnx"}


def kind_of(path: str | os.PathLike[str]) -> Kind:
    """Returns the kind of a file by its name; for a directory and for other names, safetensors."""
    file = Path(path)
    if file.is_dir():
        return "safetensors"
    if file.name.endswith(torch_files.INDEX_SUFFIX):
        return "torch"
    return _KINDS.get(file.suffix.lower(), "safetensors")


def source_of(path: Path) -> Path:
    """Returns the file to read: of a directory without safetensors, `pytorch_model.bin` or its index."""
    ours = (files.FILE_NAME, files.INDEX_NAME)
    if path.is_dir() and not any((path / name).exists() for name in ours):
        theirs = (torch_files.FILE_NAME, torch_files.FILE_NAME + ".index.json")
        return next((path / name for name in theirs if (path / name).exists()), path)
    return path


def read(path: Path) -> Foreign:
    """Reads a file that is not safetensors; of PyTorch's, only content that `weights_only` allows.

    Raises:
        ValueError: It is not such a file, or damaged; the package that reads it is not installed.
        OSError: It cannot be read.
    """
    check_regular(path)
    kind = kind_of(path)
    if kind == "onnx":
        return onnx_files.read(path)
    if kind == "torch":
        return torch_files.read(path)
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
            return Foreign({name: archive[name] for name in archive.files})
    except OSError:
        raise
    except Exception as error:  # zipfile and NumPy raise many kinds
        msg = f"{path}: expected a NumPy archive without objects; got another file ({error}); get it again"
        raise ValueError(msg) from error


def write(path: Path, weights: Mapping[str, NDArray[Any]], like: Foreign | None = None) -> None:
    """Writes a file of the kind that its name says, completely or not at all.

    Args:
        path: The file, not a safetensors file.
        weights: Name -> array.
        like: The content that was read. Other content of a torch.save file is kept, and so are tensors that
            share memory; for ONNX it has the graph, and is required.

    Raises:
        ValueError: The package that writes it is not installed; ONNX weights without a graph; an index.
        TypeError: A dtype that the file cannot hold.
        OSError: It cannot be written.
    """
    kind = kind_of(path)
    if kind == "onnx":
        onnx_files.write(path, weights, like)
    elif kind == "torch":
        torch_files.write(path, weights, like)
    else:
        _write_archive(path, weights)


def _write_archive(path: Path, weights: Mapping[str, NDArray[Any]]) -> None:
    for name, array in weights.items():
        if array.dtype.name == "bfloat16" or array.dtype.name not in DTYPES.values():
            msg = (
                f"{path}: tensor {name!r}: expected a dtype of NumPy's own; got {array.dtype}; write "
                ".safetensors, or convert it with .astype()"
            )
            raise TypeError(msg)

    def save(file: Path) -> None:
        with file.open("wb") as handle:
            np.savez(handle, **weights)  # type: ignore[arg-type]

    publish({path: save})
