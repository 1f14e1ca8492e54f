"""Checkpoints of other kinds, read whole and written whole: torch.save's files and NumPy's archives.

What a file is, its name says: `.pt`, `.pth` and `.bin` are PyTorch's, `.npz` is NumPy's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sparsam.checkpoint import files
from sparsam.checkpoint.atomic import publish
from sparsam.checkpoint.safetensors_format import DTYPES, check_regular
from sparsam.inputs.tensors import is_tensor, to_numpy, to_torch

__all__ = ["Foreign", "kind_of", "read", "source_of", "write"]

Kind: TypeAlias = Literal["safetensors", "torch", "npz", "onnx"]

_KINDS: dict[str, Kind] = {".pt": "torch", ".pth": "torch", ".bin": "torch", ".npz": "npz", ".onnx": "onnx"}
_TORCH_NAME = "pytorch_model.bin"
_NESTED = ("state_dict", "model_state_dict", "model", "module")


@dataclass(frozen=True)
class Foreign:
    """The content of a file.

    Attributes:
        weights: Name -> array.
        whole: What torch.load gave, of which the weights are a part; None otherwise.
    """

    weights: dict[str, NDArray[Any]]
    whole: Any = None


def kind_of(path: str | os.PathLike[str]) -> Kind:
    """Returns what the name of a file says it is; of a directory, and of other names, safetensors."""
    file = Path(path)
    return "safetensors" if file.is_dir() else _KINDS.get(file.suffix.lower(), "safetensors")


def source_of(path: Path) -> Path:
    """Returns the file to read: of a directory without safetensors, PyTorch's `pytorch_model.bin`."""
    names = (files.FILE_NAME, files.INDEX_NAME)
    if path.is_dir() and not any((path / name).exists() for name in names) and (path / _TORCH_NAME).exists():
        return path / _TORCH_NAME
    return path


def read(path: Path) -> Foreign:
    """Reads a file that is no safetensors; of torch's, only what `weights_only` allows.

    Raises:
        ValueError: It is no such file, or damaged; ONNX, which is named; PyTorch is not installed.
        OSError: It cannot be read.
    """
    check_regular(path)
    kind = kind_of(path)
    if kind == "onnx":
        raise ValueError(_onnx(path))
    if kind == "npz":
        try:
            with path.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
                return Foreign({name: archive[name] for name in archive.files})
        except OSError:
            raise
        except Exception as error:  # zipfile and NumPy have many
            msg = (
                f"{path}: expected a NumPy archive without objects; got another file ({error}); get it again"
            )
            raise ValueError(msg) from error
    torch = _torch(path)
    try:
        whole = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # pickle and torch have many
        reason = str(error).partition("\n")[0]
        msg = (
            f"{path}: expected tensors by name, as torch.save writes a state dict; got what "
            f"weights_only=True refuses ({reason}); save model.state_dict()"
        )
        raise ValueError(msg) from error
    tensors = _tensors(whole)
    if not tensors:
        msg = f"{path}: expected tensors by name; got {type(whole).__name__} without any; save state_dict()"
        raise ValueError(msg)
    return Foreign({name: to_numpy(f"tensor {name!r}", tensor) for name, tensor in tensors.items()}, whole)


def write(path: Path, weights: Mapping[str, NDArray[Any]], like: Foreign | None = None) -> None:
    """Writes a file of the kind that its name says, wholly or not at all.

    Args:
        path: The file, not a safetensors file.
        weights: Name -> array.
        like: What was read: the rest of what torch.save wrote is kept, and its tensors that share memory.

    Raises:
        ValueError: ONNX, which is named; PyTorch is not installed.
        TypeError: A dtype that the file cannot hold.
        OSError: It cannot be written.
    """
    kind = kind_of(path)
    if kind == "onnx":
        raise ValueError(_onnx(path))
    if kind == "npz":
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
        return
    torch = _torch(path)
    whole = None if like is None else like.whole
    content: Any = {
        name: to_torch(np.require(array, requirements=["C", "W"])) for name, array in weights.items()
    }
    if whole is not None:
        inner = _tensors(whole)
        for name, tensor in inner.items():
            with torch.no_grad():
                tensor.copy_(content[name])
        content = whole
    publish({path: lambda file: torch.save(content, file)})


def _tensors(whole: Any) -> dict[str, Any]:
    """The tensors of a state dict, or of one that a training checkpoint holds."""
    if not isinstance(whole, Mapping):
        return {}
    found = {name: value for name, value in whole.items() if isinstance(name, str) and is_tensor(value)}
    if found:
        return found
    return next((inner for key in _NESTED if (inner := _tensors(whole.get(key)))), {})


def _torch(path: Path) -> Any:
    try:
        import torch  # noqa: PLC0415 - an extra
    except ImportError as error:
        msg = (
            f"{path}: expected PyTorch for this file; got none; install it with: pip install 'sparsam[torch]'"
        )
        raise ValueError(msg) from error
    return torch


def _onnx(path: Path) -> str:
    return (
        f"{path}: expected safetensors, .pt, .bin or .npz; got an ONNX model by its name; prune the "
        "checkpoint that it was exported from, and export it again"
    )
