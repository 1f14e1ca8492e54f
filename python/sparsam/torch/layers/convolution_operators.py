"""Convolutions of volumes and transposed ones, by convolutions of images; as operators too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.nn import functional

import torch
from sparsam._core import interleave_at
from sparsam.torch.layers import operators
from sparsam.torch.layers.packed_weight import DTYPES, PackedWeight
from sparsam.torch.layers.phases import Phases
from torch import Tensor

__all__ = ["conv3d", "conv_transposed"]

_PIECE = 1 << 20  # floats of images that are unfolded at a time


def conv3d(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    taps: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    """Activation of a convolution of volumes with zeros around them, in the dtype of x; sums are float32.

    Each depth of the result is the convolution of an image, whose channels are those of the depths that it is
    made of: with int8 values, inputs have a scale for each such image.

    Args:
        x: (n, in, depth, height, width), float32, bfloat16 or float16.
        weight: W (out, in / groups, kernel depth, kernel height, kernel width).
        bias: (out,) or None.
        taps: Depth, height and width of the kernel, as in what follows.
        stride: The strides.
        padding: Slices, rows and columns of zeros on both sides.
        dilation: The distances of taps.
        activation: As for `operators.linear`.
    """
    if x.dtype in {torch.float16, torch.bfloat16}:
        return conv3d(x.float(), weight, bias, taps, stride, padding, dilation, activation).to(x.dtype)
    operators.check(x)
    channels, outs = _channels(weight, taps), weight.groups * weight.rows
    shape = operators.convolved_shape(x, channels, outs, taps, stride, padding, dilation)
    geometry = tuple(zip(taps, stride, padding, dilation, strict=True))
    if weight.dtype in DTYPES and (flat := _as_images(x, geometry)) is not None:
        y = operators.conv2d(flat[0], weight, bias, *flat[1], activation)  # type: ignore[call-arg]
        return y.reshape(shape)
    x, bias = x.contiguous(), operators.plain_bias(bias, outs)
    out = x.new_empty(shape)
    if not out.numel():
        return out
    if weight.dtype not in DTYPES:
        _convolve_depths(x, weight, bias, geometry, activation, out)
        return out
    inner, ins = out[0, 0].numel(), channels // weight.groups
    for group, part in enumerate(weight.parts):
        first = group * weight.rows
        part.conv3d_at(
            x.data_ptr() + group * ins * x[0, 0].numel() * x.itemsize,
            x[0].numel(),
            len(x),
            x.shape[2:],
            taps,
            stride,
            padding,
            dilation,
            0 if bias is None else bias.data_ptr() + first * bias.itemsize,
            activation,
            out.data_ptr() + first * inner * out.itemsize,
            out[0].numel(),
        )
    return out


def _convolve_depths(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    geometry: Sequence[tuple[int, ...]],
    activation: str,
    out: Tensor,
) -> None:
    """Writes a convolution with int8 values, of one image for each depth of the result.

    Args:
        x: The volumes.
        weight: The weight.
        bias: The bias.
        geometry: Of each axis the kernel's size, stride, padding and dilation.
        activation: The activation.
        out: The result.
    """
    n, channels, _, height, width = x.shape
    taps, total = geometry[0][0], out.shape[2]
    windows = _windows(x, *geometry[0])
    image_geometry: Any = tuple(zip(*geometry[1:], strict=True))
    pieces = max(1, _PIECE // max(1, channels * taps * height * width))
    volumes, depths = max(1, pieces // total), min(pieces, total)
    for first in range(0, n, volumes):
        for top in range(0, total, depths):
            own = windows[first : first + volumes, top : top + depths]
            images = own.reshape(-1, channels * taps, height, width)
            y = operators.conv2d(images, weight, bias, *image_geometry, activation)  # type: ignore[call-arg]
            into = out[first : first + volumes, :, top : top + depths]
            into.copy_(y.reshape(*own.shape[:2], *y.shape[1:]).transpose(1, 2))


def conv_transposed(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    activation: str,
) -> Tensor:
    """Activation of a transposed convolution, in the dtype of x; sums are float32.

    Args:
        x: (n, in, ...) with one to three axes more, float32, bfloat16 or float16.
        weight: The matrix that `Phases` makes of W (in, out / groups, ...).
        bias: (out,) or None.
        kernel: The kernel of the transposed convolution; the following arguments are those of PyTorch.
        stride: The distances of the pixels of x in the result.
        padding: How many pixels of the result are cut off on both sides.
        dilation: The distances of taps.
        output_padding: Pixels of the result after the last ones.
        activation: As for `operators.linear`.
    """
    if x.dtype in {torch.float16, torch.bfloat16}:
        found = conv_transposed(
            x.float(), weight, bias, kernel, stride, padding, dilation, output_padding, activation
        )
        return found.to(x.dtype)
    operators.check(x)
    phases, rank = Phases(tuple(stride), tuple(padding), tuple(dilation)), len(kernel)
    taps = phases.taps(kernel)
    outs = weight.groups * weight.rows // phases.count
    shape = _transposed_shape(x, _channels(weight, taps), outs, kernel, phases, output_padding)
    if not math.prod(shape):
        return x.new_empty(shape)
    size, sizes, reach = shape[2:], x.shape[2:], phases.reach(kernel)
    counts = [-(-n // step) for n, step in zip(size, phases.stride, strict=True)]
    sides = zip(counts, sizes, reach, strict=True)
    around = [max(last, count - n - first, 0) for count, n, (first, last) in sides]
    offset = [pad - last for pad, (_, last) in zip(around, reach, strict=True)]
    bias = operators.plain_bias(bias, outs)
    if bias is not None:
        bias = bias.repeat_interleave(phases.count)
    flat = rank == 1  # signals are images of one row
    images, ones = x[:, :, None] if flat else x, (1,) * max(rank, 2)
    window, zeros = ((1, *taps), (0, *around)) if flat else (taps, around)
    convolve = conv3d if rank == 3 else operators.conv2d
    z = convolve(images, weight, bias, window, ones, zeros, ones, activation)
    out = x.new_empty(shape)
    single = 3 - rank
    interleave_at(
        z.data_ptr(),
        shape[0] * outs,
        (*(1,) * single, *phases.stride),
        (*(1,) * single, *z.shape[-rank:]),
        (*(0,) * single, *offset),
        (*(1,) * single, *size),
        out.data_ptr(),
    )
    return out


def _as_images(x: Tensor, geometry: Sequence[tuple[int, ...]]) -> tuple[Tensor, Any] | None:
    """Volumes as images, and the geometry of these, if nothing happens along two neighbouring axes.

    Args:
        x: (n, in, depth, height, width).
        geometry: Of each axis the kernel's size, stride, padding and dilation.
    """
    n, channels, depth, height, width = x.shape
    idle = [axis[:3] == (1, 1, 0) for axis in geometry]
    if idle[1] and idle[2]:
        return x.reshape(n, channels, depth, height * width), tuple(zip(*geometry[:2], strict=True))
    if idle[0] and idle[1]:
        return x.reshape(n, channels, depth * height, width), tuple(zip(*geometry[1:], strict=True))
    return None


def _windows(x: Tensor, taps: int, stride: int, padding: int, dilation: int) -> Tensor:
    """The depths that each depth of a result is made of, (n, depths, in, taps, height, width); a view."""
    padded = functional.pad(x, (0, 0, 0, 0, padding, padding)) if padding else x
    return padded.unfold(2, dilation * (taps - 1) + 1, stride)[..., ::dilation].permute(0, 2, 1, 5, 3, 4)


def _channels(weight: PackedWeight, taps: Sequence[int]) -> int:
    return weight.groups * weight.cols // math.prod(taps)


def _transposed_shape(
    x: Tensor,
    channels: int,
    outs: int,
    kernel: Sequence[int],
    phases: Phases,
    output_padding: Sequence[int],
) -> list[int]:
    if x.ndim != len(kernel) + 2 or x.shape[1] != channels:
        axes = ", ".join(("depth", "height", "width")[-len(kernel) :])
        msg = f"x: expected shape (n, {channels}, {axes}); got {tuple(x.shape)}; reshape it"
        raise ValueError(msg)
    size = phases.output_size(x.shape[2:], kernel, output_padding)
    if any(isinstance(n, int) and n < 0 for n in size):  # symbols are known when a graph runs
        msg = f"x: expected more pixels than the padding cuts off; got {tuple(x.shape)}; pass larger ones"
        raise ValueError(msg)
    return [x.shape[0], outs, *size]


def _register() -> None:
    read = PackedWeight.read
    ints = "int[3] taps, int[3] stride, int[3] padding, int[3] dilation"
    operators.define(
        f"conv3d(Tensor x, Tensor weight, Tensor? bias, int out, {ints}, str activation)",
        lambda x, w, b, _, *rest: conv3d(x, read(w), b, *rest),
        lambda x, _, b, out, *rest: x.new_empty(  # noqa: ARG005
            operators.convolved_shape(x, x.shape[1], out, *rest[:4])
        ),
        product=True,
    )

    ints = "int[] kernel, int[] stride, int[] padding, int[] dilation, int[] output_padding"
    operators.define(
        f"conv_transposed(Tensor x, Tensor weight, Tensor? bias, int out, {ints}, str activation)",
        lambda x, w, b, _, *rest: conv_transposed(x, read(w), b, *rest),
        lambda x, _, b, out, kernel, s, p, d, more, __: x.new_empty(  # noqa: ARG005
            _transposed_shape(x, x.shape[1], out, kernel, Phases(s, p, d), more)
        ),
        product=True,
    )


_register()
