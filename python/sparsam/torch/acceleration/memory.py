"""What the weights of a model take, and freeing dense ones while packed ones stand in for them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from sparsam.torch.layers.modules import SparseLayer
from torch import Tensor, nn

__all__ = ["parameter_bytes", "release"]


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, each counted once, of packed weights and of what is kept behind them."""
    tensors: dict[tuple[int, int], int] = {}
    packed: dict[int, int] = {}
    for module in model.modules():
        owners = [module]
        if isinstance(module, SparseLayer):
            packed[id(module.packed)] = module.packed.nbytes
            owners.append(module.original)
        for owner in owners:
            for parameter in owner.parameters():
                tensors[_memory(parameter)] = _nbytes(parameter)
    return sum(tensors.values()) + sum(packed.values())


def _memory(parameter: Tensor) -> tuple[int, int]:
    """What two Parameters have in common that are one in memory."""
    strided = parameter.layout is torch.strided
    return (parameter.data_ptr() if strided else 0) or id(parameter), _nbytes(parameter)


def _nbytes(parameter: Tensor) -> int:
    """Bytes of a Parameter of any layout."""
    if parameter.layout is torch.sparse_coo:
        parts = (parameter._indices(), parameter._values())
        return sum(part.nbytes for part in parts)
    return parameter.numel() * parameter.itemsize


def release(model: nn.Module, layers: Sequence[SparseLayer]) -> None:
    """Frees the dense weights behind packed layers of which nothing else holds the Parameter."""
    in_use = {id(parameter) for parameter in model.parameters()}
    holders = Counter(id(layer.original._parameters.get("weight")) for layer in layers)
    for layer in layers:
        parameters = layer.original._parameters
        key = id(parameters.get("weight"))
        if "weight" not in parameters or key in in_use or not _owns_memory(parameters["weight"]):
            continue
        if _references(parameters) - _ONCE + 1 <= holders[key]:
            layer.release()


def _owns_memory(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.untyped_storage().nbytes() == tensor.nbytes


def _references(parameters: Mapping[str, Tensor | None]) -> int:
    """How many references Python knows to the weight."""
    return sys.getrefcount(parameters["weight"])


# What that is where one dictionary holds it and nothing else.
_ONCE = _references({"weight": nn.Parameter(torch.empty(1))})
