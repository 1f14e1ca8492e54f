"""The functions of PyTorch that are understood, and the steps that they become.

Each is called with the trace, the function and its arguments, runs the function and notes what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch.nn import functional
from torch.utils import _pytree as pytree

import torch
from sparsam.torch.fused.tracing import Mask, Moments, Rows, Trace, refuse
from sparsam.torch.layers.attention import attend
from sparsam.torch.layers.packing import forward_and_activate
from torch import Tensor

__all__ = ["UNDERSTOOD", "read"]

_MULTIPLE = 16  # what the depth of heads is one of, as in `layers.attention`


def read(_: Trace, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Shapes and other properties: nothing that depends on the numbers."""
    return func(*args, **kwargs)


def _move(trace: Trace, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Views, and copies in another order."""
    known = trace.value(args[0])
    if not isinstance(known, (Rows, Mask)):
        refuse("a view of something else than rows")
    found = func(*args, **kwargs)
    moved = func(known.places, *args[1:], **kwargs)
    for one, where in zip(pytree.tree_leaves(found), pytree.tree_leaves(moved), strict=True):
        if one.dtype is not args[0].dtype:
            refuse("numbers read as others")
        owner = Rows(known.buffer, where) if isinstance(known, Rows) else Mask(known.argument, where)
        trace.know(one, owner)
    return found


def _same(trace: Trace, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Copies and casts that change no number and no shape."""
    found, known = func(x, *args, **kwargs), trace.value(x)
    if known is None or found.dtype is not x.dtype or found.device != x.device or found.shape != x.shape:
        refuse("a cast")
    return trace.know(found, known)


def _dropout(
    trace: Trace, func: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    if training or inplace:
        refuse("dropout while training")
    return _same(trace, func, input, p, training, inplace)


def _matrix(trace: Trace, weight: Any, width: int, *, transposed: bool) -> tuple[int, int]:
    """The number of a packed weight that multiplies rows of a width, and its outputs."""
    content = getattr(weight, "_content", None)
    if content is None or weight._views or content.layout.dtype is not torch.float32:
        refuse("a weight that is not packed")
    if not content.outs or content.layout.transposed is not transposed or content.weight.groups != 1:
        refuse("a packed weight of another layout")
    if content.weight.cols != width:
        refuse("rows of another width")
    return trace.part(weight), content.outs


def _linear(
    trace: Trace,
    func: Any,
    input: Tensor,
    weight: Any,
    bias: Tensor | None = None,
    *,
    run: Callable[[], Tensor] | None = None,
    activation: str = "",
    transposed: bool = False,
) -> Tensor:
    buffer, rows = trace.rows(input)
    part, outs = _matrix(trace, weight, trace.widths[buffer], transposed=transposed)
    vector = trace.vector(bias, outs)
    found = func(input, weight, bias) if run is None else run()
    return trace.result(found, rows, ("linear", part, buffer, vector, activation), 3)


def _addmm(trace: Trace, func: Any, bias: Any, x: Any, weight: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if beta != 1 or alpha != 1:
        refuse("a product with a factor")
    return _linear(trace, func, x, weight, bias, run=partial(func, bias, x, weight), transposed=True)


def _activated(trace: Trace, func: Any, layer: Any, activation: str, *args: Any, **kwargs: Any) -> Any:
    """A packed layer that computes the activation after it."""
    if len(args) + len(kwargs) != 1 or layer.weight.ndim != 2:
        refuse("a layer with several inputs")
    x = args[0] if args else next(iter(kwargs.values()))
    run = partial(func, layer, activation, *args, **kwargs)
    transposed = layer.weight._content.layout.transposed if hasattr(layer.weight, "_content") else False
    return _linear(
        trace, func, x, layer.weight, layer.bias, run=run, activation=activation, transposed=transposed
    )


def _activation(trace: Trace, func: Any, input: Tensor, *, name: str, **options: Any) -> Tensor:
    if options.pop("inplace", False):
        refuse("a change in place")
    if name == "gelu":
        name = {"none": "gelu", "tanh": "gelu_tanh"}[options.pop("approximate", "none")]
        options = {"approximate": "tanh"} if name == "gelu_tanh" else {}
    elif options:
        refuse("an unknown option")
    buffer, rows = trace.rows(input)
    return trace.result(func(input, **options), rows, ("activate", buffer, name), 2)


def _add(trace: Trace, func: Any, input: Any, other: Any, *, alpha: float = 1) -> Any:
    known = trace.value(input)
    if isinstance(known, Moments) and known.what == "means" and type(other) is float and alpha == 1:
        return trace.know(func(input, other), Moments("shifted", known.buffer, known.rows, other))
    (a, rows), (b, others) = trace.rows(input), trace.rows(other)
    if alpha != 1 or not torch.equal(rows, others) or trace.widths[a] != trace.widths[b]:
        refuse("a sum of other rows")
    return trace.result(func(input, other), rows, ("add", a, b), 3)


def _mul(trace: Trace, func: Any, input: Any, other: Any) -> Any:
    found = func(input, other)
    for known, factor in ((trace.value(input), other), (trace.value(other), input)):
        if isinstance(known, Moments) and known.what == "inverse":
            buffer, rows = trace.rows(factor)
            if buffer != known.buffer or not torch.equal(rows, known.rows):
                refuse("a norm of other rows")
            return trace.know(found, Moments("normal", buffer, rows, known.eps))
        if isinstance(known, Moments) and known.what == "normal" and trace.value(factor) is None:
            vector = trace.vector(factor, trace.widths[known.buffer])
            return trace.result(found, known.rows, ("rms_norm", known.buffer, vector, known.eps), 2)
    (a, rows), (b, others) = trace.rows(input), trace.rows(other)
    if not torch.equal(rows, others) or trace.widths[a] != trace.widths[b]:
        refuse("a product of other rows")
    return trace.result(found, rows, ("gate", a, b, ""), 3)


def _pow(trace: Trace, func: Any, input: Tensor, exponent: Any) -> Tensor:
    if exponent != 2:
        refuse("a power")
    return trace.know(func(input, exponent), Moments("squares", *trace.rows(input)))


def _square(trace: Trace, func: Any, input: Tensor) -> Tensor:
    return trace.know(func(input), Moments("squares", *trace.rows(input)))


def _mean(trace: Trace, func: Any, input: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    known = trace.value(input)
    last = dim in (-1, input.ndim - 1) or (isinstance(dim, (tuple, list)) and list(dim) == [-1])
    if not isinstance(known, Moments) or known.what != "squares" or not last or not keepdim:
        refuse("a mean")
    return trace.know(func(input, dim, keepdim), Moments("means", known.buffer, known.rows))


def _rsqrt(trace: Trace, func: Any, input: Tensor) -> Tensor:
    known = trace.value(input)
    if not isinstance(known, Moments) or known.what not in {"means", "shifted"}:
        refuse("a root")
    return trace.know(func(input), Moments("inverse", known.buffer, known.rows, known.eps))


def _layer_norm(
    trace: Trace, func: Any, input: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    buffer, rows = trace.rows(input)
    width = trace.widths[buffer]
    if tuple(shape) != (width,) or not isinstance(eps, (int, float)):
        refuse("a norm over several axes")
    vectors = trace.vector(weight, width), trace.vector(bias, width)
    found = func(input, shape, weight, bias, eps)
    return trace.result(found, rows, ("layer_norm", buffer, *vectors, float(eps)), 2)


def _rms_norm(
    trace: Trace, func: Any, input: Any, shape: Any, weight: Any = None, eps: float | None = None
) -> Tensor:
    buffer, rows = trace.rows(input)
    width = trace.widths[buffer]
    if tuple(shape) != (width,) or not isinstance(eps, (int, float, type(None))):
        refuse("a norm over several axes")
    added = torch.finfo(torch.float32).eps if eps is None else float(eps)
    found = func(input, shape, weight, eps)
    return trace.result(found, rows, ("rms_norm", buffer, trace.vector(weight, width), added), 2)


def _attention(trace: Trace, query: Any, key: Any, value: Any, mask: Any, scale: float | None) -> Any:
    """Notes attention; returns the places of what it gives, (sequences, heads, positions, depth)."""
    if trace.sequences == 0 or query.ndim != 4 or not isinstance(scale, (int, float, type(None))):
        refuse("attention of other tensors")
    heads, depth = query.shape[1], query.shape[3]
    if depth % _MULTIPLE:
        refuse("heads of another depth")
    wanted = _by_heads(trace, heads, depth)
    buffers = []
    for one in (query, key, value):
        known = trace.value(one)
        if not isinstance(known, Rows) or trace.widths[known.buffer] != heads * depth:
            refuse("attention of something else than rows")
        if not torch.equal(known.places, wanted):
            refuse("heads in another order")
        buffers.append(known.buffer)
    _note_mask(trace, mask, heads)
    y = trace.buffer(heads * depth)
    factor = depth**-0.5 if scale is None else float(scale)
    trace.steps.append(("attention", *buffers, y, heads, factor, int(mask is not None)))
    return y, wanted


def _by_heads(trace: Trace, heads: int, depth: int) -> Tensor:
    sizes = (trace.sequences, trace.positions, heads, depth)
    count = trace.sequences * trace.positions * heads * depth
    return torch.arange(count).view(sizes).transpose(1, 2)


def _note_mask(trace: Trace, mask: Any, heads: int) -> None:
    """Notes the mask of attention, which must be that of all in the module."""
    argument = -1
    if mask is not None:
        known = trace.value(mask)
        if not isinstance(known, Mask) or not torch.equal(
            known.places.reshape(-1), torch.arange(mask.numel())
        ):
            refuse("a mask that is computed")
        if known.places.ndim != 4:
            refuse("a mask of another shape")
        argument = known.argument
        if trace.mask >= 0 and trace.mask != argument:
            refuse("two masks")
        trace.heads = trace.heads or heads
        if trace.heads != heads:
            refuse("one mask for different heads")
    trace.mask = max(trace.mask, argument)


def _sdpa(
    trace: Trace,
    func: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p or is_causal or enable_gqa:
        refuse("another attention")
    y, where = _attention(trace, query, key, value, attn_mask, scale)
    found = func(query, key, value, attn_mask, scale=scale)
    return trace.know(found, Rows(y, where))


def _core_attention(
    trace: Trace, func: Any, query: Any, key: Any, value: Any, mask: Any, scale: float | None
) -> Tensor:
    y, where = _attention(trace, query, key, value, mask, scale)
    return trace.know(func(query, key, value, mask, scale), Rows(y, where.transpose(1, 2)))


def _getters(*names: str) -> dict[Any, Any]:
    return {getattr(Tensor, name).__get__: read for name in names}


def _methods(understand: Any, *names: str) -> dict[Any, Any]:
    return {getattr(Tensor, name): understand for name in names}


UNDERSTOOD: Mapping[Any, Callable[..., Any]] = {
    **_getters("shape", "dtype", "device", "ndim", "is_cpu", "is_cuda", "is_meta", "layout", "requires_grad"),
    **_getters("_version", "is_nested", "is_sparse", "is_quantized", "is_leaf"),
    **_methods(read, "size", "dim", "stride", "numel", "is_contiguous", "is_floating_point", "is_neg"),
    **_methods(read, "is_conj", "is_inference", "__len__", "nelement", "storage_offset"),
    **_methods(_move, "view", "reshape", "transpose", "permute", "flatten", "unflatten", "unsqueeze"),
    **_methods(_move, "squeeze", "contiguous", "swapaxes", "movedim", "__getitem__", "view_as", "narrow"),
    **dict.fromkeys((torch.transpose, torch.permute, torch.reshape, torch.flatten, torch.unflatten), _move),
    **dict.fromkeys((torch.unsqueeze, torch.squeeze, torch.swapaxes, torch.movedim), _move),
    **_methods(_same, "to", "float", "type_as", "detach", "clone"),
    **dict.fromkeys((torch.clone, torch.detach), _same),
    functional.dropout: _dropout,
    functional.linear: _linear,
    torch.addmm: _addmm,
    forward_and_activate: _activated,
    functional.gelu: partial(_activation, name="gelu"),
    **dict.fromkeys((functional.relu, torch.relu, Tensor.relu), partial(_activation, name="relu")),
    functional.silu: partial(_activation, name="silu"),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__radd__), _add),
    **dict.fromkeys((torch.mul, torch.multiply, Tensor.mul, Tensor.multiply), _mul),
    **dict.fromkeys((torch.pow, Tensor.pow, Tensor.__pow__), _pow),
    **dict.fromkeys((torch.square, Tensor.square), _square),
    **dict.fromkeys((torch.mean, Tensor.mean), _mean),
    **dict.fromkeys((torch.rsqrt, Tensor.rsqrt), _rsqrt),
    **dict.fromkeys((functional.layer_norm, torch.layer_norm), _layer_norm),
    **dict.fromkeys((functional.rms_norm, torch.rms_norm), _rms_norm),
    functional.scaled_dot_product_attention: _sdpa,
    attend: _core_attention,
}
