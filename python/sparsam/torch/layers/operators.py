"""The products as functions of tensors, and as operators that torch.compile, export and autograd know.

`sparsam::linear`, `sparsam::conv2d`, `sparsam::embedding`, `sparsam::unpack` and those of
`convolution_operators` take the bytes of a packed
weight as a tensor, so that a graph owns its weights. In eager mode packed tensors call the functions
themselves: the dispatcher would cost more than a small product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch.nn import functional

import torch
from sparsam._core import Packed, linear_of_tensors, use_tensors
from sparsam.torch.layers.packed_weight import DTYPES, PackedWeight
from torch import Tensor

__all__ = [
    "ACTIVATIONS",
    "NO_DERIVATIVE",
    "check",
    "conv2d",
    "convolved_shape",
    "define",
    "embedding",
    "linear",
    "plain_bias",
    "unpack",
]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}

NO_DERIVATIVE = (
    "backward or forward-mode differentiation: expected dense layers; got a packed one, whose weights have "
    "no gradient; call sparsam.torch.restore(model) before training, or run it under torch.no_grad()"
)

_READ = frozenset(DTYPES)
_LAST = torch.channels_last

_library = torch.library.Library("sparsam", "DEF")  # type: ignore[no-untyped-call]
_tags = (torch.Tag.pt2_compliant_tag,)


def linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    activation: str,
    first: int = 0,
    outs: int | None = None,
) -> Tensor:
    """activation(x W^T + bias) in the dtype of x; sums are float32.

    Args:
        x: (..., in), float32, bfloat16 or float16.
        weight: W (out, in).
        bias: (outs,) or None.
        activation: "", "relu", "gelu", "gelu_tanh" or "silu".
        first: The first of the rows of W to multiply with.
        outs: How many; all that follow if None. Both must be whole groups.
    """
    parts = weight.parts
    if len(parts) == 1:
        plain: Tensor | None = linear_of_tensors(parts[0], weight.kernel, x, bias, activation)
        if plain is not None:
            return plain
    check(x)
    shape = x.shape
    if not shape or shape[-1] != weight.cols:
        whole = (weight.groups * weight.rows, weight.cols)
        msg = f"x: expected shape (..., {weight.cols}); got {tuple(shape)}; the weight is {whole}"
        raise ValueError(msg)
    if x.dtype is torch.float16:
        return linear(x.float(), weight, bias, activation, first, outs).half()
    x = x.contiguous()
    rows = weight.rows
    if len(parts) == 1:
        return _multiply(x, weight, parts[0], plain_bias(bias, rows), activation)
    parts = parts[first // rows :][: None if outs is None else outs // rows]
    bias = plain_bias(bias, len(parts) * rows)
    biases = [None] * len(parts) if bias is None else torch.split(bias, rows)
    found = [_multiply(x, weight, part, add, activation) for part, add in zip(parts, biases, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def _multiply(x: Tensor, weight: PackedWeight, part: Packed, bias: Tensor | None, activation: str) -> Tensor:
    """The product with one group."""
    out = x.new_empty(*x.shape[:-1], weight.rows)  # numbers, which PyTorch reads faster than a tuple
    size = out.numel()
    if not size:
        return out
    batch = size // weight.rows
    part.linear_at(
        weight.kernel(batch),
        x.data_ptr(),
        x.dtype is torch.bfloat16,
        batch,
        0 if bias is None else bias.data_ptr(),
        activation,
        out.data_ptr(),
    )
    return out


def conv2d(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    taps: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    """Activation of a convolution of images with zeros around them, in the dtype of x; sums are float32.

    With int8 values the result is in channels_last where x is, else contiguous.

    Args:
        x: (n, in, height, width), float32, bfloat16 or float16.
        weight: W (out, in / groups, kernel height, kernel width).
        bias: (out,) or None.
        taps: Height and width of the kernel.
        stride: The vertical and the horizontal stride.
        padding: Rows of zeros above and below, columns of zeros left and right.
        dilation: The vertical and the horizontal distance of taps.
        activation: As for `linear`.
    """
    if x.dtype in {torch.float16, torch.bfloat16}:
        return conv2d(x.float(), weight, bias, taps, stride, padding, dilation, activation).to(x.dtype)
    check(x)
    outs, groups = weight.groups * weight.rows, weight.groups
    bias = plain_bias(bias, outs)
    channels = groups * weight.cols // math.prod(taps)
    shape = convolved_shape(x, channels, outs, taps, stride, padding, dilation)
    last = weight.dtype is torch.int8 and not x.is_contiguous() and x.is_contiguous(memory_format=_LAST)
    x = x if last else x.contiguous()
    out = torch.empty(shape, device="cpu", memory_format=_LAST) if last else x.new_empty(shape)
    if not out.numel():
        return out
    geometry: Any = (tuple(x.shape[2:]), tuple(taps), tuple(stride), tuple(padding), tuple(dilation))
    x_stride, out_stride = x[0].numel(), out[0].numel()
    for group, part in enumerate(weight.parts):
        # Where the channels of a group begin, which are neighbours or planes.
        first, first_out = group * (channels // groups), group * weight.rows
        part.conv2d_at(  # type: ignore[call-arg]
            x.data_ptr() + first * x.stride(1) * x.itemsize,
            x_stride,
            x.shape[0],
            *geometry,
            0 if bias is None else bias.data_ptr() + first_out * bias.itemsize,
            activation,
            out.data_ptr() + first_out * out.stride(1) * out.itemsize,
            out_stride,
            channels if last else 1,
            outs if last else 1,
        )
    return out


def embedding(indices: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Rows of a weight in a dtype, indices.shape + (cols,).

    Raises:
        TypeError: `indices` are not int32 or int64, or not on the CPU.
        IndexError: An index is out of range.
    """
    if indices.dtype not in {torch.int64, torch.int32} or not indices.is_cpu:
        got = f"{indices.dtype} on {indices.device}"
        msg = (
            f"indices: expected int64 or int32 on the CPU; got {got}; convert them with indices.long().cpu()"
        )
        raise TypeError(msg)
    wanted = indices.long().contiguous()
    out = torch.empty(*indices.shape, weight.cols, device="cpu")
    weight.parts[0].look_up_at(wanted.data_ptr(), wanted.numel(), out.data_ptr())
    return out.to(dtype)


def unpack(data: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """The dense weight (rows, cols), in a dtype, from the bytes of a packed one."""
    return PackedWeight.read(data).unpack().to(dtype).reshape(rows, cols)


def check(x: Tensor) -> None:
    """Raises for an x that kernels cannot read."""
    if x.is_cpu and x.dtype in _READ and x.layout is torch.strided:
        return
    if not x.is_cpu:
        msg = f"x: expected a tensor on the CPU, where packed weights are; got one on {x.device}; use x.cpu()"
        raise ValueError(msg)
    if x.dtype not in DTYPES:
        msg = f"x: expected one of {', '.join(map(str, DTYPES))}; got {x.dtype}; convert it with x.to()"
        raise TypeError(msg)
    msg = f"x: expected a dense tensor; got {x.layout}; use x.to_dense()"
    raise TypeError(msg)


def plain_bias(bias: Tensor | None, outputs: int) -> Tensor | None:
    """The bias as kernels read it: contiguous float32.

    Raises:
        ValueError: It has another shape than (outputs,), or is not on the CPU.
    """
    if bias is None:
        return None
    if bias.numel() != outputs or bias.ndim != 1:
        msg = f"bias: expected shape ({outputs},); got {tuple(bias.shape)}; pass one number for each output"
        raise ValueError(msg)
    if not bias.is_cpu:
        msg = (
            f"bias: expected a tensor on the CPU, where packed weights are; got one on {bias.device}; use "
            "bias.cpu()"
        )
        raise ValueError(msg)
    plain = bias.dtype is torch.float32 and bias.is_contiguous()  # most are, and need no call for it
    return bias if plain else bias.float().contiguous()


def convolved_shape(
    x: Tensor,
    channels: int,
    outs: int,
    taps: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """The shape of a convolution's result, of images or volumes.

    Raises:
        ValueError: `x` has other channels or axes, or is smaller than the kernel.
    """
    if x.ndim != len(taps) + 2 or x.shape[1] != channels:
        axes = ", ".join(("depth", "height", "width")[-len(taps) :])
        msg = f"x: expected shape (n, {channels}, {axes}); got {tuple(x.shape)}; reshape it"
        raise ValueError(msg)
    every = zip(x.shape[2:], taps, stride, padding, dilation, strict=True)
    sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in every]
    if any(isinstance(size, int) and size < 1 for size in sizes):  # symbols are known when a graph runs
        what = "images" if len(taps) == 2 else "volumes"
        least = f"{what} of at least the size of the kernel {tuple(taps)}"
        msg = f"x: expected {least}; got {tuple(x.shape)}; pad it"
        raise ValueError(msg)
    return [x.shape[0], outs, *sizes]


def define(
    schema: str, eager: Callable[..., Tensor], fake: Callable[..., Tensor], *, product: bool = False
) -> None:
    """Registers an operator of this package.

    Args:
        schema: Its name and arguments.
        eager: What it computes on the CPU.
        fake: A tensor like its result, without numbers.
        product: Whether its first arguments are x, a packed weight and a bias; a backward pass then raises.
    """
    name = schema.partition("(")[0]
    _library.define(f"{schema} -> Tensor", tags=_tags)  # type: ignore[no-untyped-call]
    _library.impl(name, eager, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"sparsam::{name}", fake, lib=_library)
    if product:
        torch.library.register_autograd(
            f"sparsam::{name}", _backward, setup_context=_keep_inputs, lib=_library
        )


def _register() -> None:
    read = PackedWeight.read
    define(
        "linear(Tensor x, Tensor weight, Tensor? bias, int out, str activation, int first=0)",
        lambda x, w, b, out, activation, first=0: linear(x, read(w), b, activation, first, out),
        lambda x, _, b, out, *rest: x.new_empty((*x.shape[:-1], out)),  # noqa: ARG005
        product=True,
    )
    geometry = "int[2] taps, int[2] stride, int[2] padding, int[2] dilation"
    define(
        f"conv2d(Tensor x, Tensor weight, Tensor? bias, int out, {geometry}, str activation)",
        # The fake result is contiguous.
        lambda x, w, b, _, *rest: conv2d(x.contiguous(), read(w), b, *rest),
        lambda x, _, b, out, *rest: x.new_empty(convolved_shape(x, x.shape[1], out, *rest[:4])),  # noqa: ARG005
        product=True,
    )
    define(
        "embedding(Tensor indices, Tensor weight, int cols, ScalarType dtype)",
        lambda indices, w, _, dtype: embedding(indices, read(w), dtype),
        lambda i, w, cols, dtype: w.new_empty((*i.shape, cols), dtype=dtype),
    )
    define(
        "unpack(Tensor weight, int rows, int cols, ScalarType dtype)",
        unpack,
        lambda w, rows, cols, dtype: w.new_empty((rows, cols), dtype=dtype),
    )
    define("refuse(Tensor gradient, Tensor like)", _refuse, lambda _, like: torch.empty_like(like))


def _refuse(_: Tensor, like: Tensor) -> Tensor:  # noqa: ARG001
    raise RuntimeError(NO_DERIVATIVE)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, _, bias, *_ = inputs
    ctx.save_for_backward(x, *(() if bias is None else (bias,)))
    ctx.others = len(inputs) - 3


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """Raises when it runs, not when it is traced into a graph."""
    x, *bias = (torch.ops.sparsam.refuse(gradient, saved) for saved in ctx.saved_tensors)
    return x, None, bias[0] if bias else None, *(None,) * ctx.others


_register()
if (_table := getattr(Tensor, "__dlpack_c_exchange_api__", None)) is not None:  # PyTorch 2.10 and later
    use_tensors(_table)
