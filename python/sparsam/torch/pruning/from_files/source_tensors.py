"""The weights of a model in the files of a checkpoint, by the names that the model has for them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

import torch
from sparsam.checkpoint.layout import Entry, Layout
from sparsam.checkpoint.shard_passes import read_tensor
from sparsam.torch.layers.packed_weight import from_array
from torch import Tensor, nn

__all__ = ["SourceTensors"]

_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


class SourceTensors:
    """Reads weights on demand.

    Attributes:
        stored: Name of a Parameter or buffer -> the name of its tensor in the files, which is the same for
            all names of a shared tensor.
    """

    def __init__(self, model: nn.Module, layouts: Sequence[Layout]) -> None:
        """Finds the model's tensors.

        Names in files may have the model's `base_model_prefix` and those in the model lack it, or vice versa.

        Raises:
            ValueError: A Parameter is not in the files, or has another shape or an integer dtype there.
        """
        places = {entry.name: (layout, entry) for layout in layouts for entry in layout.entries}
        prefix = str(getattr(model, "base_model_prefix", "")) + "."
        self._place: dict[str, tuple[Layout, Entry]] = {}
        self.stored: dict[str, str] = {}
        for names, tensor in _tensors(model):
            tried = [form for name in names for form in (name, prefix + name, name.removeprefix(prefix))]
            found = next((form for form in tried if form in places), None)
            if found is None:
                if isinstance(tensor, nn.Parameter):
                    msg = (
                        f"tensor {names[0]!r}: expected it in the files; got none of that name; get those "
                        f"of this {type(model).__name__}"
                    )
                    raise ValueError(msg)
                continue
            _check(names[0], tensor, places[found][1])
            self.stored |= dict.fromkeys(names, found)
            self._place |= dict.fromkeys(names, places[found])

    def __contains__(self, name: object) -> bool:
        return name in self._place

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor of floats is stored."""
        return _FLOATS[self._place[name][1].dtype]

    def read(self, name: str) -> Tensor:
        """A tensor, in the dtype in which it is stored."""
        layout, entry = self._place[name]
        with layout.file.open("rb", buffering=0) as source:
            return from_array(read_tensor(source, entry))

    def mapped(self, name: str) -> Tensor | None:
        """A tensor that stays on disk except for the pages in use; None if its data are not aligned."""
        layout, entry = self._place[name]
        kind = entry.numpy_dtype
        if kind is None or entry.begin % kind.itemsize or not entry.nbytes:
            return None
        array = np.memmap(layout.file, kind, "r", entry.begin, entry.shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is not writable, and is not written
            return from_array(array)


def _tensors(model: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """The Parameters and the buffers that are saved, each with all of its names."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    saved = model.state_dict(keep_vars=True)
    both: Mapping[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **{name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name in saved},
    }
    for name, tensor in both.items():
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    for key, tensor in tensors.items():
        yield names[key], tensor


def _check(name: str, tensor: Tensor, entry: Entry) -> None:
    shape = list(tensor.shape)
    if list(entry.shape) != shape:
        msg = (
            f"tensor {name!r}: expected the shape {shape} in the files, as in the model; got "
            f"{list(entry.shape)}; make the model with the configuration of these files"
        )
        raise ValueError(msg)
    if tensor.is_floating_point() and entry.dtype not in _FLOATS:
        msg = (
            f"tensor {name!r}: expected one of {', '.join(_FLOATS)} in the files; got {entry.dtype}; convert "
            "them, as a quantised model cannot be fitted"
        )
        raise ValueError(msg)
