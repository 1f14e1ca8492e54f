"""Accelerated models on disk: one safetensors file with packed weights (docs/formats.md)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

from safetensors import SafetensorError
from safetensors.torch import save_file

from sparsam.checkpoint import safetensors_format
from sparsam.checkpoint.atomic import publish
from sparsam.inputs.checks import expected
from sparsam.torch.acceleration.fusion import Fused
from sparsam.torch.layers.packing import is_packed
from sparsam.torch.serialization.contents import Contents
from sparsam.torch.serialization.loading import Loaded
from torch import nn

__all__ = ["NAME", "load", "save"]

StrPath: TypeAlias = "str | os.PathLike[str]"

NAME = "sparsam.safetensors"  # not the name that other libraries read


def save(model: nn.Module, directory: StrPath) -> None:
    """Writes a model to `sparsam.safetensors` in a directory, with pruned weights packed.

    Tensors of the state dict that share their memory are written once. Other files in the directory, such as
    a `model.safetensors` of Hugging Face, are not touched. The file is replaced atomically.

    Args:
        model: A model: accelerated, with layers packed by hand, or just pruned.
        directory: The directory, which is made if it is missing.

    Raises:
        TypeError: The state dict holds something other than dense tensors.
        ValueError: The model is itself a packed layer, or lacks the layers that compute a fused activation;
            or the directory has a file of that name that `save` did not write.
        OSError: The file cannot be written.
    """
    _check(model, directory)
    contents = Contents.of(model)
    folder = Path(directory)
    folder.mkdir(exist_ok=True)
    _check_own(folder / NAME)

    def write(file: Path) -> None:
        try:
            save_file(contents.tensors, file, contents.manifest.to_metadata())
        except SafetensorError as error:
            msg = (
                f"{folder}: expected to write {len(contents.tensors)} tensors there; got {error}; make room "
                "there, or take another folder"
            )
            raise OSError(msg) from error

    publish({folder / NAME: write})


def load(directory: StrPath, model: nn.Module) -> int:
    """Reads a file of `save` into a dense model of the same architecture, and installs its packed layers.

    Everything is checked before anything changes. `restore(model)` makes it a dense model with these weights.

    Args:
        directory: The directory with `sparsam.safetensors`.
        model: The dense model, on the CPU, with the dtypes that were saved. Tensors on the meta device
            (`with torch.device("meta")`, Accelerate's `init_empty_weights`) get memory here, packed layers
            only as much as they need.

    Returns:
        The number of packed layers.

    Raises:
        ValueError: The file is damaged or something else, or belongs to another model.
        OSError: It cannot be read.
    """
    _check(model, directory)
    file = Path(directory) / NAME
    if any(is_packed(module) or isinstance(module, Fused) for module in model.modules()):
        msg = f"{file}: expected a dense model to load into; got one with packed layers; restore() it first"
        raise ValueError(msg)
    with safetensors_format.open_file(file, "pt") as handle:
        try:
            loaded = Loaded.read(handle, model)
        except (ValueError, SafetensorError, OverflowError) as error:
            msg = (
                f"{file}: expected an accelerated model as save() writes it, for this model; got another: "
                f"{error}; load it into the model it was made from, or save it again"
            )
            raise ValueError(msg) from error
        return loaded.swap_in(model)


def _check(model: object, directory: object) -> None:
    """Raises TypeError unless the arguments are a model and a path."""
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        msg = f"model: expected a torch.nn.Module; got {got}; call save(model, folder) or load(folder, model)"
        raise TypeError(msg)
    if not isinstance(directory, (str, os.PathLike)):
        raise TypeError(expected("directory", directory, "the path of a folder", "pass text or a Path"))


def _check_own(file: Path) -> None:
    """Raises for a file that `save` did not write."""
    if not file.exists():
        return
    try:
        with safetensors_format.open_file(file) as handle:
            mark = (handle.metadata() or {}).get("sparsam", "")
    except ValueError as error:
        msg = (
            f"{file}: expected a file that save() wrote, to replace it; got another ({error}); use another "
            "directory"
        )
        raise ValueError(msg) from error
    if not mark.startswith("accelerated "):
        msg = f"{file}: expected a file that save() wrote, to replace it; got another; use another directory"
        raise ValueError(msg)
