"""The memory of a model's weights, and freeing dense weights that packed ones replace."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from sparsam.torch.layers.packed_parameter import packed_parameters
from sparsam.torch.layers.packed_tensor import PackedTensor
from sparsam.torch.layers.packing import PackedLayer
from sparsam.torch.layers.unpacked_tensor import UnpackedTensor
from torch import Tensor, nn

__all__ = ["parameter_bytes", "release"]


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, each counted once, of packed weights and of dense ones they keep."""
    tensors: dict[tuple[int, int], int] = {}
    for module in model.modules():
        found = [parameter for parameter in module._parameters.values() if parameter is not None]
        for packed in packed_parameters(module):
            both = (packed.tensor, packed.tensor.original)
            found += [one for one in both if one is not None]  # type: ignore[misc]
        for parameter in found:
            tensors[_memory(parameter)] = _nbytes(parameter)
    return sum(tensors.values())


def _memory(parameter: Tensor) -> tuple[int, int]:
    """A key that is equal for Parameters with the same memory."""
    if isinstance(parameter, PackedTensor):
        return parameter.packed_data.data_ptr(), parameter.nbytes
    strided = parameter.layout is torch.strided
    return (parameter.data_ptr() if strided else 0) or id(parameter), _nbytes(parameter)


def _nbytes(parameter: Tensor) -> int:
    """Bytes of a Parameter of any layout."""
    if isinstance(parameter, PackedTensor):
        return parameter.nbytes
    if parameter.layout is torch.sparse_coo:
        parts = (parameter._indices(), parameter._values())
        return sum(part.nbytes for part in parts)
    return parameter.numel() * parameter.itemsize


def release(model: nn.Module, layers: Sequence[PackedLayer], *, rounded: bool = False) -> None:
    """Frees the dense weights behind packed layers that unpack to them and that nothing else holds.

    Args:
        model: The model.
        layers: Its packed layers.
        rounded: Whether to free dense weights that packing rounded, too.
    """
    if rounded:
        discard(model, [weight.tensor for layer in layers for weight in layer.weights])
        return
    in_use = {id(parameter) for parameter in model.parameters()}
    for weight in (weight for layer in layers for weight in layer.weights):
        if _is_free(weight.tensor, in_use):
            weight.release()


def discard(model: nn.Module, weights: Sequence[PackedTensor]) -> list[PackedTensor]:
    """Frees the dense weights behind packed ones even if they differ; returns those that are still in use."""
    in_use = {id(parameter) for parameter in model.parameters()}
    kept = []
    for weight in weights:
        content = weight._content
        if _is_free(weight, in_use):
            content.released = True
            content.original.data = content.original.data.new_empty(0)  # type: ignore[union-attr]
        else:
            kept.append(weight)
    return kept


def _is_free(weight: PackedTensor, in_use: Collection[int]) -> bool:
    """Whether nothing but the packed weight holds the dense one."""
    content = weight._content
    dense = content.original
    if dense is None or id(dense) in in_use or not _owns_memory(dense):
        return False
    del dense
    return _references(content) <= _ONCE


def _owns_memory(tensor: Tensor) -> bool:
    shared = isinstance(tensor, UnpackedTensor)  # with the packed weight of another model
    return not shared and tensor.untyped_storage().nbytes() == tensor.nbytes


def _references(content: Any) -> int:
    """How many references to the dense weight Python counts."""
    return sys.getrefcount(content.original)


# The count if a single object holds it.
_ONCE = _references(SimpleNamespace(original=nn.Parameter(torch.empty(1))))
