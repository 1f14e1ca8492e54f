"""The products as functions of tensors, and as operators that torch.compile and autograd know.

`sparsam::linear` and `sparsam::conv2d` take the number of a `PackedWeight` in place of a tensor. `learns`, a
tensor that requires a gradient, makes going backward an error even where x requires none. In eager mode
without gradients the layers call the functions themselves: the dispatcher would cost more than a small
product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

from torch.autograd import forward_ad
from torch.nn import functional

import torch
from sparsam.sparse import cost_model
from sparsam.torch.layers.packed_weight import DTYPES, PackedWeight, find
from torch import Tensor

__all__ = ["ACTIVATIONS", "conv2d", "is_plain", "linear", "refuse"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}

_NO_DERIVATIVE = (
    "backward or forward-mode differentiation through a packed layer: its weights are fixed and have no "
    "gradient; call sparsam.torch.restore(model) before training, or run it under torch.no_grad()"
)

_library = torch.library.Library("sparsam", "DEF")  # type: ignore[no-untyped-call]
_tags = (torch.Tag.pt2_compliant_tag,)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str) -> Tensor:
    """activation(x W^T + bias) in the dtype of x; sums are float32.

    Args:
        x: (..., in), float32, bfloat16 or float16.
        weight: W (out, in).
        bias: (out,) or None.
        activation: "", "relu", "gelu", "gelu_tanh" or "silu".
    """
    _check(x)
    *leading, last = x.shape if x.ndim else (0,)
    rows, cols = weight.rows, weight.cols
    if last != cols or not x.ndim:
        msg = f"x has shape {tuple(x.shape)}: expected (..., {cols}) for a weight {weight.shape}"
        raise ValueError(msg)
    if x.dtype is torch.float16:
        return linear(x.float(), weight, bias, activation).half()
    x = x.contiguous()
    bias = _plain_bias(bias, rows)
    out = x.new_empty((*leading, rows))
    batch = math.prod(leading)
    if not batch or not rows:
        return out
    narrow = x.dtype is torch.bfloat16
    kernel = weight.kernel((batch, narrow)) or _choose_linear(x, weight, batch)
    if kernel == "dense":
        y = functional.linear(x, weight.dense(x.dtype), None if bias is None else bias.to(x.dtype))
        return ACTIVATIONS[activation](y)
    add = 0 if bias is None else bias.data_ptr()
    weight.parts[0].linear_at(kernel, x.data_ptr(), narrow, batch, add, activation, out.data_ptr())
    return out


def _choose_linear(x: Tensor, weight: PackedWeight, batch: int) -> str:
    """Times the kernels on x itself; batches of about that size share the choice."""
    narrow = x.dtype is torch.bfloat16
    out = x.new_empty((batch, weight.rows))

    def run(kernel: str) -> None:
        weight.parts[0].linear_at(kernel, x.data_ptr(), narrow, batch, 0, "", out.data_ptr())

    kernels = ["bitmask", "panels"] if batch <= 16 else ["panels"]
    return weight.choose(
        (batch, narrow),
        (cost_model.bucket(batch), narrow),
        x.dtype,
        {name: partial(run, name) for name in reversed(kernels)},
        lambda matrix: functional.linear(x, matrix),
    )


def conv2d(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    """Activation of a convolution of images with zeros around them, in the dtype of x; sums are float32.

    Args:
        x: (n, in, height, width), float32, bfloat16 or float16.
        weight: W (out, in / groups, kernel height, kernel width).
        bias: (out,) or None.
        stride: For height and width, and so are
        padding: zeros on either side, and
        dilation: the distance of taps.
        activation: As for `linear`.
    """
    if x.dtype in {torch.float16, torch.bfloat16}:
        return conv2d(x.float(), weight, bias, stride, padding, dilation, activation).to(x.dtype)
    _check(x)
    x = x.contiguous()
    bias = _plain_bias(bias, weight.shape[0])
    out = x.new_empty(_conv2d_shape(x, weight, stride, padding, dilation))
    if not out.numel():
        return out
    images, channels, *image = x.shape
    taps = _taps(weight)
    geometry = (tuple(image), taps, tuple(stride), tuple(padding), tuple(dilation))
    x_stride, out_stride = channels * image[0] * image[1], out[0].numel()

    def run() -> None:
        for group, part in enumerate(weight.parts):
            part.conv2d_at(
                x.data_ptr() + group * (x_stride // weight.groups) * x.itemsize,
                x_stride,
                images,
                *geometry,  # type: ignore[arg-type]
                0 if bias is None else bias.data_ptr() + group * weight.rows * bias.itemsize,
                activation,
                out.data_ptr() + group * (out_stride // weight.groups) * out.itemsize,
                out_stride,
            )

    def dense(kernels: Tensor) -> Tensor:
        kernels = kernels.reshape(*kernels.shape[:2], *taps)
        y = functional.conv2d(x, kernels, bias, stride, padding, dilation, weight.groups)
        return ACTIVATIONS[activation](y)

    key = (images, *geometry)
    kernel = weight.kernel(key)
    if kernel is None:
        # Sizes of signals and images come in any number: those alike, to a power of two, share the choice.
        alike = (cost_model.bucket(images), *(size.bit_length() for size in image), *geometry[1:])
        kernel = weight.choose(key, alike, x.dtype, {"panels": run}, dense)
    if kernel == "dense":
        return dense(weight.dense(x.dtype))
    run()
    return out


def is_plain(x: Tensor) -> bool:
    """Whether a function of memory may be called for x: nobody traces, differentiates or watches."""
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not (x.requires_grad and torch.is_grad_enabled())
        and not x.is_neg()
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
    )


def refuse(x: Tensor) -> None:
    """Raises for an x that is no plain tensor and that an operator would answer wrongly, or with a riddle.

    Forward-mode AD and the transforms of torch.func would take the product for a constant. Going backward is
    an error of its own.
    """
    if torch.compiler.is_compiling():
        return
    if type(x) is Tensor:
        _check(x)
    kinds = {str(level.key()) for level in torch._C._functorch.get_interpreter_stack() or ()}
    dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
    if dual or not kinds.isdisjoint({"TransformType.Grad", "TransformType.Jvp"}):
        raise RuntimeError(_NO_DERIVATIVE)


def _check(x: Tensor) -> None:
    if x.device.type != "cpu":
        msg = f"x is on {x.device}: expected the CPU, where packed weights are; use x.cpu()"
        raise ValueError(msg)
    if x.dtype not in DTYPES:
        msg = f"x is {x.dtype}: expected one of {', '.join(map(str, DTYPES))}"
        raise TypeError(msg)
    if x.layout is not torch.strided:
        msg = f"x is {x.layout}: expected a dense tensor; use x.to_dense()"
        raise TypeError(msg)


def _plain_bias(bias: Tensor | None, outputs: int) -> Tensor | None:
    """The bias as kernels read it: contiguous float32."""
    if bias is None:
        return None
    if bias.numel() != outputs or bias.ndim != 1:
        msg = f"bias has shape {tuple(bias.shape)}: expected ({outputs},)"
        raise ValueError(msg)
    return bias.float().contiguous()


def _conv2d_shape(
    x: Tensor, weight: PackedWeight, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    out, channels, *_ = weight.shape
    kernel = _taps(weight)
    if x.ndim != 4 or x.shape[1] != channels * weight.groups:
        msg = f"x has shape {tuple(x.shape)}: expected (n, {channels * weight.groups}, height, width)"
        raise ValueError(msg)
    sizes = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    if min(sizes) < 1:
        msg = f"x has shape {tuple(x.shape)}: expected images of at least the size of the kernel {kernel}"
        raise ValueError(msg)
    return [x.shape[0], out, *sizes]


def _taps(weight: PackedWeight) -> tuple[int, int]:
    """Height and width of a kernel; those of a Conv1d are one row high."""
    taps = weight.shape[2:]
    return (1, taps[0]) if len(taps) == 1 else (taps[0], taps[1])


def _refuse(ctx: Any, *grads: Tensor) -> NoReturn:  # noqa: ARG001
    raise RuntimeError(_NO_DERIVATIVE)


def _register() -> None:
    _library.define(  # type: ignore[no-untyped-call]
        "linear(Tensor x, int weight, Tensor? bias, str activation, Tensor? learns=None) -> Tensor",
        tags=_tags,
    )
    _library.define(  # type: ignore[no-untyped-call]
        "conv2d(Tensor x, int weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, "
        "str activation, Tensor? learns=None) -> Tensor",
        tags=_tags,
    )
    _library.impl("linear", lambda x, w, b, act, _=None: linear(x, find(w), b, act), "CPU")  # type: ignore[no-untyped-call]
    _library.impl("conv2d", lambda x, w, *rest: conv2d(x, find(w), *rest[:5]), "CPU")  # type: ignore[no-untyped-call]
    fakes: dict[str, Callable[..., Tensor]] = {
        "linear": lambda x, w, *_: x.new_empty((*x.shape[:-1], find(w).rows)),
        "conv2d": lambda x, w, b, *rest: x.new_empty(_conv2d_shape(x, find(w), *rest[:3])),  # noqa: ARG005
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"sparsam::{name}", fake, lib=_library)
        torch.library.register_autograd(f"sparsam::{name}", _refuse, lib=_library)


_register()
