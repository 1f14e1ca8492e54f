"""PyTorch's functions that multiply with a packed tensor or look up its rows, with their arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import functional

import torch
from sparsam.torch.layers import operators
from sparsam.torch.layers.operators import NO_DERIVATIVE
from sparsam.torch.layers.packed_weight import DTYPES
from torch import Tensor, is_autocast_enabled, is_grad_enabled, nn

if TYPE_CHECKING:
    from sparsam.torch.layers.packed_content import Content

__all__ = [
    "HANDLERS",
    "addmm",
    "autocast",
    "embed",
    "frozen",
    "is_plain",
    "linear",
    "needs_gradient",
    "refuse",
]

_aten = torch.ops.aten
_BIASES = frozenset((nn.Parameter, Tensor, type(None)))
_FROZEN = torch._C._functions.DelayedError  # an identity with a derivative that raises


def linear(
    input: Tensor, weight: Any, bias: Tensor | None = None, activation: str = "", transposed: bool = False
) -> Any:
    """activation(input W^T + bias) where the weight is packed; else NotImplemented.

    Args:
        input: x.
        weight: W (out, in).
        bias: (out,) or None.
        activation: As for `operators.linear`.
        transposed: Whether the weight is (in, out) instead.
    """
    content = getattr(weight, "_content", None)
    plain_bias = type(bias) in _BIASES
    if (
        content is None
        or (type(input) is not Tensor and hasattr(input, "_content"))
        or not (plain_bias or not hasattr(bias, "_content"))
    ):
        return NotImplemented
    if weight._views:
        if (shown := _shown(weight, content, transposed=transposed)) is None:
            return NotImplemented
        first, outs = shown
    elif content.layout.transposed is transposed and content.outs:
        first, outs = 0, content.outs
    else:
        return NotImplemented
    x = autocast(input) if is_autocast_enabled("cpu") else input
    if plain_bias and is_plain(x):
        read = content.read or content.weight
        if not (is_grad_enabled() and needs_gradient(x, content, bias)):
            return operators.linear(x, read, bias, activation, first, outs)
        with torch.no_grad():
            y = operators.linear(x, read, bias, activation, first, outs)
        return frozen(y, x, bias)
    refuse(x)
    return torch.ops.sparsam.linear(x, content.data, bias, outs, activation, first)


def addmm(
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: None = None,
    activation: str = "",
) -> Any:
    """activation(mat1 W + input) where the weight (in, out) is packed; else NotImplemented."""
    if beta != 1 or alpha != 1 or out is not None or input.ndim != 1:
        return NotImplemented
    return linear(mat1, mat2, input, activation, transposed=True)


def _matmul(input: Tensor, other: Tensor, *, out: None = None) -> Any:
    return NotImplemented if out is not None else linear(input, other, transposed=True)


def embed(
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,  # noqa: ARG001 - only affects gradients, of which there are none
    max_norm: float | None = None,
    *_: Any,
    **__: Any,
) -> Any:
    """The rows of a packed weight that an embedding looks up; else NotImplemented."""
    content = getattr(weight, "_content", None)
    if content is None or not content.layout.looked_up or weight._views or max_norm is not None:
        return NotImplemented
    layout = content.layout
    if not is_plain(input):
        refuse(input)
        return torch.ops.sparsam.embedding(input, content.data, layout.shape[1], layout.dtype)
    y = operators.embedding(input, content.weight, layout.dtype)
    return frozen(y) if is_grad_enabled() and content.trainable else y


HANDLERS: Mapping[Any, Callable[..., Any]] = {
    functional.linear: linear,
    functional.embedding: embed,
    torch.addmm: addmm,
    Tensor.addmm: addmm,
    torch.mm: _matmul,
    Tensor.mm: _matmul,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
}


def _shown(weight: Any, content: Content, *, transposed: bool) -> tuple[int, int] | None:
    """The first output that a view of a packed matrix shows, and the number of outputs.

    Args:
        weight: The view.
        content: Its content.
        transposed: Whether it should be (in, out) instead of (out, in).

    Returns:
        None if the view is not whole rows of the matrix, has the other orientation, or begins inside a group.
    """
    layout = content.layout
    if not content.outs or weight.ndim != 2:
        return None
    # Shape, strides and start determine a view.
    width, (height, breadth), strides = layout.shape[1], weight.shape, weight.stride()
    if transposed is not layout.transposed:  # the view is transposed
        height, breadth, strides = breadth, height, strides[::-1]
    if breadth != width or strides != (width, 1) or weight._start % width or height == 0:
        return None
    first, each = weight._start // width, content.outs // layout.groups
    if layout.transposed:
        return (0, content.outs) if (first, height) == (0, layout.shape[0]) else None
    return None if first % each or height % each else (first, height)


def frozen(y: Tensor, *sources: Tensor | None) -> Tensor:
    """Returns y such that a backward pass to any of its sources that require gradients raises."""
    inputs = [y.requires_grad_(), *(x for x in sources if x is not None and x.requires_grad)]
    found = _FROZEN(NO_DERIVATIVE, len(inputs))(*inputs)
    result: Tensor = found if isinstance(found, Tensor) else found[0]
    return result


def needs_gradient(x: Tensor, content: Content, bias: Tensor | None = None) -> bool:
    """Whether a product with x should have a gradient."""
    return x.requires_grad or content.trainable or (bias is not None and bias.requires_grad)


def is_plain(x: Tensor) -> bool:
    """Whether a function that reads the memory of x may be called: x is neither traced nor transformed."""
    return (
        type(x) is Tensor
        and not is_compiling()
        and not x.is_neg()
        and forward_ad._current_level < 0
        and not _are_functorch_transforms_active()
        and _get_tracing_state() is None
        and not _len_torch_dispatch_stack()
    )


def refuse(x: Tensor) -> None:
    """Raises for an x that is not a plain tensor, if the operator would be wrong or its error cryptic.

    Forward-mode AD and the transforms of torch.func would treat the product as a constant. A backward pass
    raises an error of its own.
    """
    if torch.onnx.is_in_onnx_export():
        msg = "ONNX: expected dense layers; got a packed one; call sparsam.torch.restore(model) first"
        raise RuntimeError(msg)
    if is_compiling():
        return
    if type(x) is Tensor and x.is_floating_point():
        operators.check(x)
    kinds = {str(level.key()) for level in torch._C._functorch.get_interpreter_stack() or ()}
    dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
    if dual or not kinds.isdisjoint({"TransformType.Grad", "TransformType.Jvp"}):
        raise RuntimeError(NO_DERIVATIVE)


def autocast(x: Tensor) -> Tensor:
    """Returns x as autocast would pass it to a linear layer."""
    wanted = is_autocast_enabled("cpu") and x.dtype in DTYPES
    return x.to(torch.get_autocast_dtype("cpu")) if wanted else x
