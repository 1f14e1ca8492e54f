"""Inputs and outputs of layers as rows: im2col patches for convolutions, at some positions if wide."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F

from sparsam.torch.pruning.layer_inputs import Inputs
from sparsam.torch.pruning.prunable import PrunableWeight
from torch import Tensor

__all__ = ["input_rows", "output_rows", "spacing", "unfolding"]

_PRODUCTS = 2.5e12  # the most products in the second moments of a convolution, about half a minute
_ROWS_PER_INPUT = 4  # the fewest rows for each input


def input_rows(weight: PrunableWeight, inputs: Inputs, places: slice = slice(None)) -> list[Tensor]:
    """The inputs as rows (n, in), one for each part of the weight's outputs that has its own.

    A convolution has one part for each of its groups, and its rows are im2col patches in the order of the
    weight's axes (in, kernel), at the given places: a slice of the positions of each sample.
    """
    if weight.kind != "convolution":
        return [x.reshape(-1, x.shape[-1]) for x in inputs]
    patches = _patches(weight.module, inputs[0]).flatten(1, -2 - len(weight.parameter.shape[2:]))
    chosen = patches[:, places]
    rows = chosen.reshape(chosen.shape[0] * chosen.shape[1], -1)
    return list(rows.chunk(weight.groups, 1))


def _patches(module: Any, x: Tensor) -> Tensor:
    """(samples, places..., in, kernel...): a view of the padded inputs."""
    spatial = len(module.kernel_size)
    if x.ndim == spatial + 1:
        x = x[None]
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    elif any(module.padding):
        x = F.pad(x, [size for size in reversed(module.padding) for _ in range(2)])
    for axis in range(spatial):
        dilation = module.dilation[axis]
        reach = (module.kernel_size[axis] - 1) * dilation + 1
        x = x.unfold(2 + axis, reach, module.stride[axis])[..., ::dilation]
    return x.movedim(1, 1 + spatial)


def output_rows(weight: PrunableWeight, output: Tensor, places: slice = slice(None)) -> Tensor:
    """The outputs as rows (n, out), in the order of the inputs' rows."""
    if weight.kind != "convolution":
        return output.reshape(-1, output.shape[-1])
    module: Any = weight.module
    if output.ndim == len(module.kernel_size) + 1:
        output = output[None]
    return output.flatten(2).transpose(1, 2)[:, places].reshape(-1, output.shape[1])


def spacing(weight: PrunableWeight, inputs: Inputs, batches: int) -> int:
    """The distance of the positions of each sample that are used, so that sums do not take minutes.

    Neighbouring patches overlap and are nearly redundant: of wide convolutions, evenly spaced ones suffice,
    about 2.5e12 / in^2 of them over all batches, and at least four for each input.
    """
    if weight.kind != "convolution":
        return 1
    patches = _patches(weight.module, inputs[0])
    kernel = weight.parameter.shape[2:]
    width = math.prod(patches.shape[-1 - len(kernel) :]) // weight.groups
    rows = batches * math.prod(patches.shape[: -1 - len(kernel)])
    most = max(_PRODUCTS / width**2, _ROWS_PER_INPUT * width)
    return max(1, int(rows / most))


def unfolding(weight: PrunableWeight) -> tuple[Any, ...]:
    """The attributes on which rows depend besides the inputs; weights that agree in these have equal rows."""
    if weight.kind != "convolution":
        return (weight.kind,)
    module: Any = weight.module
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return tuple(getattr(module, name) for name in names)
