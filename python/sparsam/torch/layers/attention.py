"""Attention for short sequences by the core, as a function of tensors and as an operator for graphs.

`nn.MultiheadAttention` with packed projections computes with it; so do models of Hugging Face transformers
where `accelerate` finds it faster, or that are told to (`transformers_attention`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from torch._C import _are_functorch_transforms_active, _len_torch_function_stack
from torch.compiler import is_compiling
from torch.nn import functional
from torch.overrides import handle_torch_function

import torch
from sparsam._core import attention_at
from sparsam.torch.layers.products import is_plain
from torch import Tensor, is_grad_enabled

__all__ = ["HANDLERS", "attend"]

_LONGEST = 512  # keys whose scores for some queries, and which themselves, stay in the L2 cache
_MULTIPLE = 16  # what the size of a head is one of

_library = torch.library.Library("sparsam", "FRAGMENT")  # type: ignore[no-untyped-call]


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor | None:
    """softmax(scale Q K^T + mask) V, positions before heads; None for what the core does not compute.

    It computes float32 on the CPU, at most 512 keys (in a graph, PyTorch computes longer ones), heads of a
    multiple of 16 numbers, as many of keys as of queries, and no gradient. A query that sees no key gets
    zeros, as from PyTorch.

    Args:
        query: Q (batch, heads, queries, depth).
        key: K (batch, heads, keys, depth).
        value: V, of the shape of K.
        mask: What can be expanded to (batch, heads, queries, keys): False where a query does not see a key,
            or float32 that is added; None if all see all.
        scale: By default 1 / sqrt(depth).

    Returns:
        (batch, queries, heads, depth), contiguous.
    """
    if not _computes(query, key, value, mask):
        return None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if is_compiling():
        found: Tensor = torch.ops.sparsam.attention(query, key, value, mask, scale)
        return found
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    if not all(map(is_plain, tensors)):
        return None
    if _len_torch_function_stack():  # somebody follows what is computed
        followed: Tensor | None = handle_torch_function(attend, tensors, query, key, value, mask, scale)
        return followed
    return _attend(query, key, value, mask, scale)


def _computes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the core computes that, or in a graph its operator does."""
    if (
        (is_grad_enabled() and any(x.requires_grad for x in (query, key, value, mask) if x is not None))
        or _are_functorch_transforms_active()
        or torch.is_autocast_enabled("cpu")
        or torch.onnx.is_in_onnx_export()
    ):
        return False
    return _reads(query, key, value, mask) and (is_compiling() or key.shape[2] <= _LONGEST)


def _reads(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the core can read these tensors."""
    if not all(x.dtype is torch.float32 and x.is_cpu and x.ndim == 4 for x in (query, key, value)):
        return False
    batch, heads, _, depth = query.shape
    keys = key.shape[2]
    if key.shape != value.shape or key.shape != (batch, heads, keys, depth):
        return False
    if depth % _MULTIPLE or depth == 0:
        return False
    if mask is None:
        return True
    wanted = (batch, heads, query.shape[2], keys)
    # Not a set: sizes that vary in a graph have no hash.
    fits = mask.ndim == 4 and all(n in (1, w) for n, w in zip(mask.shape, wanted, strict=True))
    return fits and mask.dtype in {torch.bool, torch.float32} and mask.is_cpu


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    batch, heads, queries, depth = query.shape
    shape = (batch, heads, queries, key.shape[2], depth)
    out = query.new_empty(batch, queries, heads, depth)
    query, key, value = map(_side_by_side, (query, key, value))
    shown = (0, False, (0, 0, 0))
    if mask is not None:
        mask = _side_by_side(mask.expand(shape[:4]))
        shown = (mask.data_ptr(), mask.dtype is torch.bool, _strides(mask))
    attention_at(
        shape,
        query.data_ptr(),
        _strides(query),
        key.data_ptr(),
        _strides(key),
        value.data_ptr(),
        _strides(value),
        *shown,
        scale,
        out.data_ptr(),
    )
    return out


def _in_graph(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """As `_attend`, for whatever tensors a graph is run with after it was traced with others."""
    if key.shape[2] <= _LONGEST and _reads(query, key, value, mask):
        return _attend(query, key, value, mask, scale)
    y = functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    return y.transpose(1, 2).contiguous()


def _side_by_side(x: Tensor) -> Tensor:
    """X with the numbers of its last axis next to each other."""
    return x if x.stride(3) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    batch, heads, positions, _ = x.stride()
    return batch, heads, positions


_library.define(  # type: ignore[no-untyped-call]
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("attention", _in_graph, "CPU")  # type: ignore[no-untyped-call]


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """Raises when it runs, not when it is traced into a graph."""
    return *(torch.ops.sparsam.refuse(gradient, saved) for saved in ctx.saved_tensors), None, None


torch.library.register_autograd("sparsam::attention", _backward, setup_context=_keep_inputs, lib=_library)


def _fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:  # noqa: ARG001
    batch, heads, queries, depth = query.shape
    return query.new_empty(batch, queries, heads, depth)


torch.library.register_fake("sparsam::attention", _fake, lib=_library)


def _scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool
) -> Tensor:
    """As the function of PyTorch, the way that its attention layer calls that."""
    found = None if dropout_p or is_causal else attend(query, key, value, attn_mask)
    if found is not None:
        return found.transpose(1, 2)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal)


# PyTorch's attention layer as a function. It does not check again whether a tensor overrides functions: those
# that it calls do, so that its products are those of packed weights. The attention between them is the core's
# where the core computes it.
_LAYER = FunctionType(
    functional.multi_head_attention_forward.__code__,
    {
        **vars(functional),
        "has_torch_function": lambda _: False,
        "scaled_dot_product_attention": _scaled_dot_product_attention,
    },
    "multi_head_attention_forward",
    functional.multi_head_attention_forward.__defaults__,
)


def _layer(*args: Any, **kwargs: Any) -> Any:
    return _LAYER(*args, **kwargs)


HANDLERS: Mapping[Any, Callable[..., Any]] = {functional.multi_head_attention_forward: _layer}
