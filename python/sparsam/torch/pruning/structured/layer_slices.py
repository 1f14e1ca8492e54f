"""The slices of a layer's parameters, and its attributes, that belong to some outputs or inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch.nn.modules.batchnorm import _BatchNorm

from sparsam.torch.layers.packing import is_transposed
from sparsam.torch.pruning.structured.structures import Attribute, Member
from torch import nn

__all__ = ["Slices", "input_slices", "is_linear", "lengths", "output_slices"]

Indices: TypeAlias = NDArray[np.int64]  # (units, width)
Slices: TypeAlias = tuple[list[Member], list[Attribute]]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_linear(layer: object) -> bool:
    """Whether it is nn.Linear or Hugging Face's Conv1D."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Module) and is_transposed(layer))


def lengths(layer: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer."""
    rows, cols = layer.weight.shape  # type: ignore[misc]
    return (cols, rows) if is_transposed(layer) else (rows, cols)


def output_slices(name: str, layer: object, indices: Indices) -> Slices | str:
    """The slices and attributes that are removed with outputs of a layer; or why none can be removed.

    Args:
        name: The layer's name in the model.
        layer: The layer.
        indices: (units, width): the outputs that each unit owns.
    """
    if isinstance(layer, nn.Module) and is_transposed(layer):
        return _slices(name, layer, indices, {"weight": 1, "bias": 0}, "nf")
    if isinstance(layer, nn.Linear):
        return _slices(name, layer, indices, {"weight": 0, "bias": 0}, "out_features")
    if isinstance(layer, _CONVOLUTIONS):
        if layer.groups == 1:
            return _slices(name, layer, indices, {"weight": 0, "bias": 0}, "out_channels")
        if layer.groups == layer.in_channels == layer.out_channels:
            numbers = "in_channels", "out_channels", "groups"
            return _slices(name, layer, indices, {"weight": 0, "bias": 0}, *numbers)
        return f"{name} is a convolution in groups"
    if isinstance(layer, _BatchNorm):
        buffers = {"running_mean": 0, "running_var": 0}
        return _slices(name, layer, indices, {"weight": 0, "bias": 0, **buffers}, "num_features")
    if isinstance(layer, nn.PReLU):
        if layer.num_parameters == 1:
            return [], []
        return _slices(name, layer, indices, {"weight": 0}, "num_parameters")
    return f"{name} ({type(layer).__name__}) reads them, which is not cut"


def input_slices(name: str, layer: object, indices: Indices) -> Slices | str:
    """As `output_slices`, for inputs of a layer."""
    if isinstance(layer, nn.Module) and is_transposed(layer):
        return _slices(name, layer, indices, {"weight": 0}, "nx")
    if isinstance(layer, nn.Linear):
        return _slices(name, layer, indices, {"weight": 1}, "in_features")
    if isinstance(layer, _CONVOLUTIONS) and layer.groups == 1:
        return _slices(name, layer, indices, {"weight": 1}, "in_channels")
    return output_slices(name, layer, indices)


def _slices(
    name: str, layer: nn.Module, indices: Indices, axes: Mapping[str, int], *numbers: str
) -> Slices | str:
    held = {**layer._parameters, **layer._buffers}
    if held.get("weight") is None and "weight" in axes and not isinstance(layer, _BatchNorm):
        return f"{name} has a weight that is computed by hooks, by a parametrization or by torch's pruning"
    prefix = f"{name}." if name else ""
    members = [
        Member(f"{prefix}{own}", axis, indices) for own, axis in axes.items() if held.get(own) is not None
    ]
    width = indices.shape[1]
    return members, [Attribute(name, number, width) for number in numbers if hasattr(layer, number)]
