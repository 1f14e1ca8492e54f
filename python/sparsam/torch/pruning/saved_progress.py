"""The saved progress of an interrupted `prune`: one file for each group of weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils import _pytree as pytree

import torch
from sparsam import checkpoint
from sparsam._core import __version__
from sparsam.checkpoint.atomic import open_folder
from sparsam.config import PruningConfig
from sparsam.torch.layers.packed_tensor import PackedTensor
from sparsam.torch.pruning.calibration import Batch
from sparsam.torch.pruning.layer_fits import NewLayer
from sparsam.training.run_identity import RunIdentity
from torch import Tensor, nn

__all__ = ["BatchDigest", "SavedProgress", "digest_of", "function_digest", "identify"]


class SavedProgress:
    """A folder with the new values of the groups that are done."""

    def __init__(self, folder: str | Path, identity: str) -> None:
        """Opens or makes the folder.

        Args:
            folder: The folder.
            identity: The digest from `identify`.

        Raises:
            ValueError: There is a file in its place.
        """
        self._folder, self._identity = open_folder("state_dir", folder), identity

    def load(self, place: int, names: Iterable[str]) -> list[NewLayer] | None:
        """Returns the new values of a group, or None if it is not done.

        Raises:
            ValueError: The file belongs to another model, calibration or configuration, or is damaged.
        """
        path = self._path(place)
        if not path.exists():
            return None
        saved = checkpoint.load(path)
        if saved.metadata.get("identity") != self._identity:
            msg = (
                f"state_dir: {path}: expected what a call with this model, calibration and configuration "
                "saved; got another's; use a new folder, or the same call"
            )
            raise ValueError(msg)
        found = []
        for name in names:
            said = json.loads(saved.metadata[name])
            found.append(
                NewLayer(
                    name,
                    saved.weights[f"weights:{name}"],
                    saved.weights.get(f"bias:{name}"),
                    said["error"],
                    said["damping"],
                    said["targets"],
                )
            )
        return found

    def save(self, place: int, layers: Iterable[NewLayer]) -> None:
        """Saves the new values of a group, atomically."""
        arrays: dict[str, Any] = {}
        metadata = {"identity": self._identity}
        for layer in layers:
            arrays[f"weights:{layer.name}"] = layer.weights
            if layer.bias is not None:
                arrays[f"bias:{layer.name}"] = layer.bias
            metadata[layer.name] = json.dumps(
                {"error": layer.error, "damping": layer.damping, "targets": layer.targets}
            )
        checkpoint.save(self._path(place), arrays, metadata=metadata)

    def _path(self, place: int) -> Path:
        return self._folder / f"group-{place:05d}.safetensors"


def identify(model: nn.Module, batches: Iterable[Batch], config: PruningConfig, targets: str = "") -> str:
    """A digest of the model's values, the calibration and the settings, including scores."""
    word = config.method if isinstance(config.method, str) else ""
    # Methods that fit have no scorer, so any other takes its place.
    settings = RunIdentity.of(config.with_changes(method="magnitude") if word else config, [], {})
    digest = hashlib.blake2b(digest_size=16)
    versions = f"{__version__} {torch.__version__}"
    digest.update(f"{versions} {word} {config.target_sparsity!r} {targets} {settings!r}".encode())
    digest.update(digest_of(model.state_dict()))
    seen = BatchDigest()
    for batch in batches:
        seen.add(batch)
    digest.update(seen.hex().encode())
    return digest.hexdigest()


class BatchDigest:
    """A digest of the inputs of batches, one after the other."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, batch: Batch) -> None:
        """Adds one."""
        self._digest.update(f"{len(batch.args)} {list(batch.kwargs)}".encode())
        for leaf in pytree.tree_leaves((batch.args, batch.kwargs)):
            if isinstance(leaf, Tensor):
                _update(self._digest, leaf)
            else:
                self._digest.update(repr(leaf).encode())

    def hex(self) -> str:
        """The digest of those so far."""
        return self._digest.hexdigest()


def function_digest(function: Callable[..., Any]) -> str:
    """The identity of a function: its name and code, not the values that it refers to."""
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    if code is None:
        return str(name)
    plain = [value for value in code.co_consts if isinstance(value, (int, float, str, type(None)))]
    return hashlib.blake2b(
        f"{name} {code.co_code!r} {code.co_names} {plain}".encode(), digest_size=16
    ).hexdigest()


def digest_of(state: Mapping[str, Any]) -> bytes:
    """A digest of the names and values of a state_dict."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in state.items():
        digest.update(name.encode())
        _update(digest, tensor)
    return digest.digest()


def _update(digest: Any, tensor: Any) -> None:
    plain = isinstance(tensor, Tensor) and not isinstance(tensor, PackedTensor)
    if not plain or tensor.layout is not torch.strided or tensor.device.type == "meta":
        digest.update(repr(type(tensor)).encode())
        return
    digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    flat = tensor.detach().cpu().reshape(-1).contiguous()
    digest.update(np.ascontiguousarray(flat.view(torch.uint8).numpy()) if flat.numel() else b"")
