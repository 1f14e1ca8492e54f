"""Checkpoints on disk: one safetensors file, or several of them under an index.

The `safetensors` library parses and validates every header before a byte of data is read. Added here: shards,
files that are replaced completely or not at all, and errors that say what a file is when it is not a
checkpoint.
bfloat16 comes and goes as `ml_dtypes.bfloat16`. docs/formats.md describes the bytes.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from numpy.typing import NDArray

from sparsam.checkpoint import safetensors_format
from sparsam.checkpoint.atomic import publish
from sparsam.checkpoint.layout import read_layout
from sparsam.checkpoint.locks import real_path
from sparsam.checkpoint.shard_index import check_placed, find_shard, listed, read_index

__all__ = ["FILE_NAME", "INDEX_NAME", "Checkpoint", "Shards", "load", "overwrites", "save", "stream"]

FILE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

StrPath: TypeAlias = "str | os.PathLike[str]"


@dataclass(frozen=True)
class Shards:
    """How a checkpoint is divided into files, according to its index.

    Attributes:
        index_name: File name of the index.
        index_metadata: The index's own metadata; `save` recomputes `total_size` in it.
        weight_map: Tensor name -> file name of the shard that holds it.
        metadata: File name of a shard -> that shard's metadata, in the order of the file names.
    """

    index_name: str
    index_metadata: dict[str, Any]
    weight_map: dict[str, str]
    metadata: dict[str, dict[str, str]]


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint.

    Attributes:
        weights: Tensor name -> array, sorted by name. The caller may change the arrays.
        metadata: The text that the file carries beside its tensors; of several shards, the union.
        shards: How the checkpoint was divided into files; None if it was one file.
    """

    weights: dict[str, NDArray[Any]]
    metadata: dict[str, str]
    shards: Shards | None = None


def load(path: StrPath) -> Checkpoint:
    """Reads a whole checkpoint; memory holds each tensor once.

    Args:
        path: A safetensors file, the index of a sharded checkpoint (`*.json`), or a directory that holds
            `model.safetensors` or `model.safetensors.index.json`.

    Returns:
        Every tensor as it is stored: float16, bfloat16, float32, float64, integers and bools.

    Raises:
        ValueError: A file is truncated, hostile or of another kind, or the index and its shards disagree.
        OSError: A file cannot be read.
    """
    file, shards = resolve(path)
    if shards is None:
        with safetensors_format.open_file(file) as handle:
            metadata = dict(handle.metadata() or {})
    else:
        metadata = {key: text for own in shards.metadata.values() for key, text in own.items()}
    return Checkpoint(dict(sorted(_tensors(file, shards))), metadata, shards)


def stream(path: StrPath) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yields (name, array) for each tensor of a checkpoint; memory holds only one at a time.

    Args:
        path: As for `load`, with the same errors. Tensors come sorted by name, shard by shard.
    """
    yield from _tensors(*resolve(path))


def save(
    path: StrPath,
    weights: Mapping[str, NDArray[Any]],
    metadata: Mapping[str, str] | None = None,
    *,
    like: Checkpoint | None = None,
) -> None:
    """Writes a checkpoint, completely or not at all.

    Every file is written beside its target, flushed to the disk and then renamed, the index of a sharded
    checkpoint last. After a failure the new files are removed and `path` is as it was.

    Args:
        path: The file to write, or a directory that takes a `model.safetensors`. Where `like` is sharded: the
            directory, which is made if it is missing, or the index in it.
        weights: Tensor name -> array of any shape and strides, of a dtype that `load` returns.
        metadata: Text to store beside the tensors. None: that of `like`, shard by shard.
        like: A checkpoint whose metadata and division into files are used. Its weights are not.

    Raises:
        TypeError: A dtype that the format lacks; names or metadata that are not text.
        ValueError: `weights` and a sharded `like` name different tensors; a file to replace is a folder, pipe
            or device.
        OSError: The files cannot be written.
    """
    arrays = {name: safetensors_format.storable(name, array) for name, array in weights.items()}
    shards = None if like is None else like.shards
    *files, last = _targets(path, shards)
    if shards or last.name == FILE_NAME:
        check_readable(last.parent, shards)
    if shards is None:
        if metadata is None:
            metadata = {} if like is None else like.metadata
        publish({last: partial(safetensors_format.write, arrays=arrays, metadata=metadata)})
        return

    if odd := sorted(arrays.keys() ^ shards.weight_map.keys()):
        msg = f"weights: expected exactly the tensors of `like`; got others: {listed(odd)}; align them"
        raise ValueError(msg)
    parts: dict[str, dict[str, NDArray[Any]]] = defaultdict(dict)
    for name, array in arrays.items():
        parts[shards.weight_map[name]][name] = array
    texts = shards.metadata if metadata is None else dict.fromkeys(parts, metadata)
    writers = {
        f: partial(safetensors_format.write, arrays=parts[f.name], metadata=texts[f.name]) for f in files
    }
    total_size = sum(array.nbytes for array in arrays.values())
    index = {"metadata": shards.index_metadata | {"total_size": total_size}, "weight_map": shards.weight_map}
    content = json.dumps(index, indent=2, sort_keys=True) + "\n"
    with _directory(last.parent):
        publish({**writers, last: lambda file: file.write_text(content, encoding="utf-8")})


def overwrites(path: StrPath, source: StrPath) -> bool:
    """Whether `save(path, ..., like=load(source))` replaces a file of `source`, under any name or link."""
    file, shards = resolve(source)
    sources = [file] if shards is None else [file, *(file.parent / shard for shard in shards.metadata)]
    targets = [target for target in _targets(path, shards) if target.exists()]
    return any(target.samefile(other) for target in targets for other in sources)


def check_readable(folder: Path, shards: Shards | None) -> None:
    """Checks that a folder can be read once a checkpoint is in it.

    Raises:
        ValueError: It holds a checkpoint of the other kind, or two shards would go through links to one file.
    """
    other = INDEX_NAME if shards is None else FILE_NAME
    new = FILE_NAME if shards is None else shards.index_name
    if new in (FILE_NAME, INDEX_NAME) and (folder / other).exists():
        msg = f"{folder}: expected a folder without {other}, since {new} goes there; got both; choose another"
        raise ValueError(msg)
    places = [real_path(folder / shard) for shard in (shards.metadata if shards else ())]
    if len(set(places)) < len(places):
        twice = next(str(place) for place in places if places.count(place) > 1)
        msg = f"{folder}: expected a file for each shard; got links to one, {twice}; unlink them"
        raise ValueError(msg)


def resolve(path: StrPath) -> tuple[Path, Shards | None]:
    """Returns the file or the index that `path` refers to, and the content of the index; raises as `load`."""
    file = Path(path)
    real_path(file)  # a link to itself has neither a content nor a kind
    if file.is_dir():
        found = [file / name for name in (FILE_NAME, INDEX_NAME) if (file / name).exists()]
        if len(found) != 1:
            came = "both" if found else "neither"
            msg = (
                f"{file}: expected a directory with {FILE_NAME} or {INDEX_NAME}; got one with {came}; name "
                "the file to read"
            )
            raise ValueError(msg)
        file = found[0]
    return file, _read_index(file) if file.suffix == ".json" else None


def _targets(path: StrPath, shards: Shards | None) -> list[Path]:
    """The files that `save` writes, the index last."""
    file = Path(path)
    if shards is None:
        return [file / FILE_NAME if file.is_dir() else file]
    index = file if file.suffix == ".json" and not file.is_dir() else file / shards.index_name
    return [*(index.parent / shard for shard in shards.metadata), index]


def _tensors(file: Path, shards: Shards | None) -> Iterator[tuple[str, NDArray[Any]]]:
    for part in [file] if shards is None else [file.parent / shard for shard in shards.metadata]:
        yield from safetensors_format.tensors(part)


def _read_index(file: Path) -> Shards:
    """Parses an index and compares it with the header of every shard that it names."""
    index = read_index(file)
    texts = {shard: _read_shard(file, shard, names) for shard, names in index.placed().items()}
    return Shards(file.name, index.metadata, index.weight_map, texts)


def _read_shard(index: Path, shard: str, placed: set[str]) -> dict[str, str]:
    """The metadata of a shard, which must hold the tensors that the index places in it and no others."""
    file = find_shard(index, shard)
    layout = read_layout(file)
    check_placed(index, file, placed, [entry.name for entry in layout.entries])
    return layout.metadata


@contextmanager
def _directory(folder: Path) -> Iterator[None]:
    """Makes a folder if it is missing, and removes it again if the block fails."""
    made = not folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise
