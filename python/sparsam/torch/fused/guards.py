"""Whether a module is still as it was when its steps were found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.nn.modules import module as of_modules

import torch
from sparsam._core import unchanged, vector_addresses
from sparsam.torch.fused.program import Vector
from sparsam.torch.fused.reads import ABSENT, HOOKS, Dependencies
from torch import Tensor

__all__ = ["Guard", "Vectors"]

_EVERYWHERE = tuple(
    getattr(of_modules, f"_global{name}") for name in HOOKS if hasattr(of_modules, f"_global{name}")
)
_QUICK = hasattr(Tensor, "__dlpack_c_exchange_api__")  # PyTorch 2.10 and later, see `layers.operators`


class Guard:
    """Compares what the steps depend on, object by object."""

    def __init__(self, depends: Dependencies, contents: Sequence[Any]) -> None:
        """Takes everything as it is now; `Guard.of` checks first that it is as it was."""
        live = {
            (id(read.where()), read.name): (read.where(), read.name, read.now()) for read in depends.reads
        }
        for content in contents:
            live[id(content), "data"] = (vars(content), "data", content.data)
        tables, names, values = zip(*live.values(), strict=True)
        hooks = tuple(vars(one)[name] for one in depends.modules[1:] for name in HOOKS)
        hooks += _EVERYWHERE
        self._known = (tables, names, values, ABSENT, hooks, depends.modules, depends.kinds)
        self._modules = tuple(vars(one)["_modules"] for one in depends.modules)
        self._children = depends.children
        self._forwards = depends.forwards

    @classmethod
    def of(cls, depends: Dependencies, contents: Sequence[Any]) -> Guard | None:
        """A guard for a module as it is now; None if it is not as it was."""
        if not all(read.holds() for read in depends.reads):
            return None
        made = cls(depends, contents)
        return made if made.holds() else None  # classes and hooks are watched there alone

    def holds(self) -> bool:
        """Whether everything is as it was."""
        return (
            unchanged(*self._known)
            and tuple(map(len, self._modules)) == self._children
            and all(kind.forward is forward for kind, forward in self._forwards)
        )


class Vectors:
    """Where the biases and weights of norms are, at each call anew: they may be moved and replaced."""

    def __init__(self, vectors: Sequence[Vector]) -> None:
        self._tensors = tuple(vector.tensor for vector in vectors)
        self._sizes = tuple(vector.tensor.numel() for vector in vectors)
        self._starts = tuple(vector.start for vector in vectors)

    def addresses(self) -> list[int] | None:
        """Where they are now; None if one is not what the core reads."""
        if _QUICK:
            return vector_addresses(self._tensors, self._sizes, self._starts)
        found = []
        for tensor, size, start in zip(self._tensors, self._sizes, self._starts, strict=True):
            plain = tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous()
            if not plain or tensor.shape != (size,):
                return None
            found.append(tensor.data_ptr() + 4 * start)
        return found
