"""Checkpoints of any kind, read and written whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from sparsam.checkpoint import companions, files, foreign
from sparsam.checkpoint.files import Checkpoint
from sparsam.checkpoint.foreign_content import Foreign

__all__ = ["Whole", "read", "tensors", "write"]


class Whole(NamedTuple):
    """A checkpoint in memory, and its properties besides its weights."""

    weights: Mapping[str, NDArray[Any]]
    like: Checkpoint | None
    foreign: Foreign | None


def read(file: Path) -> Whole:
    """Reads a file of any kind; raises as `checkpoint.load` and `foreign.read`."""
    if foreign.kind_of(file) == "safetensors":
        like = files.load(file)
        return Whole(like.weights, like, None)
    content = foreign.read(file)
    return Whole(content.weights, content.cut, content)


def tensors(file: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yields the tensors of a file of any kind, one in memory at a time where the kind allows it."""
    if foreign.kind_of(file) == "safetensors":
        yield from files.stream(file)
    else:
        yield from foreign.read(file).weights.items()


def write(source: Path, output: Path, weights: Mapping[str, NDArray[Any]], whole: Whole) -> None:
    """Writes weights in the kind of file that `output` names; a directory keeps its shards and other files.

    Args:
        source: The path that was read; if it is a directory, its other files are copied to a directory.
        output: A file, or a directory, which is made if it is missing.
        weights: Name -> array.
        whole: The content that was read.
    """
    if foreign.kind_of(output) != "safetensors":
        foreign.write(output, weights, whole.foreign)
        return
    metadata = None if whole.foreign is None else {"format": "pt"}
    if output.suffix in (".safetensors", ".json") or output.is_file():
        files.save(output, weights, metadata, like=None if whole.foreign else whole.like)
        return
    output.mkdir(exist_ok=True)
    if source.is_dir():
        companions.copy(source, output, leave=output)
    files.save(output, weights, metadata, like=whole.like)
