"""Files of torch.save: a state dict, a training checkpoint that contains one, or shards under an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam.checkpoint.atomic import publish
from sparsam.checkpoint.files import INDEX_NAME, Checkpoint, Shards
from sparsam.checkpoint.foreign_content import Foreign
from sparsam.checkpoint.shard_index import check_placed, find_shard, read_index
from sparsam.inputs.tensors import is_tensor, to_numpy, to_torch

__all__ = ["FILE_NAME", "INDEX_SUFFIX", "check_name", "read", "write"]

FILE_NAME = "pytorch_model.bin"
INDEX_SUFFIX = ".bin.index.json"
_NESTED = ("state_dict", "model_state_dict", "model", "module")


def read(path: Path) -> Foreign:
    """Reads a file or an index; only content that `weights_only` allows.

    Raises:
        ValueError: It is not such a file, or damaged; index and shards disagree; PyTorch is not installed.
        OSError: It cannot be read.
    """
    if not path.name.endswith(INDEX_SUFFIX):
        whole = _load(path)
        return Foreign(_arrays(path, whole), whole)
    index = read_index(path)
    placed = index.placed()
    weights: dict[str, NDArray[Any]] = {}
    for shard, held in placed.items():
        file = find_shard(path, shard)
        own = _arrays(file, _load(file))
        check_placed(path, file, held, own.keys())
        weights |= own
    names = {shard: _as_safetensors(shard) for shard in placed}
    weight_map = {name: names[shard] for name, shard in index.weight_map.items()}
    metadata: dict[str, dict[str, str]] = {name: {"format": "pt"} for name in sorted(names.values())}
    shards = Shards(INDEX_NAME, index.metadata, weight_map, metadata)
    return Foreign(weights, cut=Checkpoint(weights, {"format": "pt"}, shards))


def write(path: Path, weights: Mapping[str, NDArray[Any]], like: Foreign | None = None) -> None:
    """Writes a state dict, or the object that was read with its tensors replaced.

    Raises:
        ValueError: An index is to be written; PyTorch is not installed.
        OSError: It cannot be written.
    """
    torch = _torch(path)
    check_name(path)
    content: Any = {
        name: to_torch(np.require(array, requirements=["C", "W"])) for name, array in weights.items()
    }
    whole = None if like is None else like.whole
    inner = _tensors(whole)
    if inner:
        for name, tensor in inner.items():
            with torch.no_grad():
                tensor.copy_(content[name])
        content = whole
    publish({path: lambda file: torch.save(content, file)})


def check_name(path: Path) -> None:
    """Raises ValueError for a name that cannot be written: an index."""
    if path.name.endswith(INDEX_SUFFIX):
        msg = f"{path}: expected a file or a directory; got an index of .bin files; write one .bin file"
        raise ValueError(msg)


def _load(path: Path) -> Any:
    torch = _torch(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # pickle and torch raise many kinds
        reason = str(error).partition("\n")[0]
        msg = (
            f"{path}: expected tensors by name, as torch.save writes a state dict; got what "
            f"weights_only=True refuses ({reason}); save model.state_dict()"
        )
        raise ValueError(msg) from error


def _arrays(path: Path, whole: Any) -> dict[str, NDArray[Any]]:
    tensors = _tensors(whole)
    if not tensors:
        msg = f"{path}: expected tensors by name; got {type(whole).__name__} without any; save state_dict()"
        raise ValueError(msg)
    return {name: to_numpy(f"tensor {name!r}", tensor) for name, tensor in tensors.items()}


def _tensors(whole: Any) -> dict[str, Any]:
    """The tensors of a state dict, or of the one inside a training checkpoint."""
    if not isinstance(whole, Mapping):
        return {}
    found = {name: value for name, value in whole.items() if isinstance(name, str) and is_tensor(value)}
    if found:
        return found
    return next((inner for key in _NESTED if (inner := _tensors(whole.get(key)))), {})


def _as_safetensors(shard: str) -> str:
    """The name of the safetensors shard for a shard of PyTorch's, as transformers names them."""
    stem = Path(shard).stem.removeprefix("pytorch_")
    return f"{stem}.safetensors"


def _torch(path: Path) -> Any:
    try:
        import torch  # noqa: PLC0415 - an extra
    except ImportError as error:
        msg = (
            f"{path}: expected PyTorch for this file; got none; install it with: pip install 'sparsam[torch]'"
        )
        raise ValueError(msg) from error
    return torch
