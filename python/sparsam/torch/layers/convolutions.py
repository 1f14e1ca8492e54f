"""PyTorch's convolutions with a packed weight, with their arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.nn import functional

import torch
from sparsam.torch.layers import convolution_operators, operators, products
from sparsam.torch.layers.packed_content import Content
from torch import Tensor, is_grad_enabled

__all__ = ["HANDLERS", "convolve", "convolve_transposed"]


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str = "",
) -> Any:
    """Activation of a convolution with a packed weight; for others NotImplemented.

    Its inputs are signals, images or volumes.
    """
    content = _content(input, weight, groups)
    if content is None or content.layout.phases is not None:
        return NotImplemented
    rank = weight.ndim - 2
    taps, steps, reach = (_each(value, rank) for value in (content.layout.shape[2:], stride, dilation))
    x = _of_rank(input, rank)
    if isinstance(padding, str):
        x, around = _pad(x, padding, taps, reach)
    else:
        around = _each(padding, rank)
    geometry = (taps, steps, around, reach)
    batch = x if x.ndim == rank + 2 else x[None]
    if rank == 1:  # signals are images of one row
        images = tuple((first, *one) for first, one in zip((1, 1, 0, 1), geometry, strict=True))
        y = _multiply(
            "conv2d", batch[:, :, None], content, bias, content.layout.shape[0], (*images, activation)
        )[:, :, 0]
    else:
        y = _multiply(f"conv{rank}d", batch, content, bias, content.layout.shape[0], (*geometry, activation))
    return y if x.ndim == rank + 2 else y[0]


def convolve_transposed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    activation: str = "",
) -> Any:
    """Activation of a transposed convolution where the weight is packed, else NotImplemented.

    That is also returned for another geometry than the one that the weight was packed for.
    """
    content = _content(input, weight, groups)
    if content is None or (phases := content.layout.phases) is None:
        return NotImplemented
    rank = weight.ndim - 2
    steps, around, reach, more = (_each(value, rank) for value in (stride, padding, dilation, output_padding))
    known = (phases.stride, phases.padding, phases.dilation) == (steps, around, reach)
    if not known or any(n >= max(step, d) for n, step, d in zip(more, steps, reach, strict=True)):
        return NotImplemented
    x = _of_rank(input, rank)
    outs, kernel = content.layout.shape[1] * groups, content.layout.shape[2:]
    batch = x if x.ndim == rank + 2 else x[None]
    y = _multiply(
        "conv_transposed", batch, content, bias, outs, (kernel, steps, around, reach, more, activation)
    )
    return y if x.ndim == rank + 2 else y[0]


def _content(input: Tensor, weight: Tensor, groups: int) -> Content | None:
    """What is packed in a weight, if such a convolution can multiply with it."""
    content = getattr(weight, "_content", None)
    if content is None or weight._views or content.layout.groups != groups or hasattr(input, "_content"):  # type: ignore[attr-defined]
        return None
    found: Content = content
    return found


def _of_rank(input: Tensor, rank: int) -> Tensor:
    """The input as autocast would pass it, if it has the right number of axes."""
    if input.ndim not in {rank + 1, rank + 2}:
        axes = f"{rank + 1} axes, or {rank + 2} with a batch"
        msg = f"x: expected {axes}; got shape {tuple(input.shape)}; reshape it"
        raise ValueError(msg)
    return products.autocast(input)


_EAGER: Mapping[str, Callable[..., Tensor]] = {
    "conv2d": operators.conv2d,
    "conv3d": convolution_operators.conv3d,
    "conv_transposed": convolution_operators.conv_transposed,
}


def _multiply(
    name: str, x: Tensor, content: Content, bias: Tensor | None, outs: int, rest: tuple[Any, ...]
) -> Tensor:
    """The result of an operator; of the function behind it where nothing watches."""
    if not products.is_plain(x):
        products.refuse(x)
        found: Tensor = getattr(torch.ops.sparsam, name)(x, content.data, bias, outs, *rest)
        return found
    if not (is_grad_enabled() and products.needs_gradient(x, content, bias)):
        return _EAGER[name](x, content.weight, bias, *rest)
    with torch.no_grad():
        y = _EAGER[name](x, content.weight, bias, *rest)
    return products.frozen(y, x, bias)


def _pad(
    x: Tensor, padding: str, taps: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, tuple[int, ...]]:
    """Pads x if "same" needs unequal padding on both sides; returns x and the padding left to the kernel."""
    total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(taps, dilation, strict=True)]
    if all(n % 2 == 0 for n in total):
        return x, tuple(n // 2 for n in total)
    sides = [(n // 2, n - n // 2) for n in reversed(total)]
    return functional.pad(x, [n for side in sides for n in side]), (0,) * len(total)


def _each(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """One number for each axis."""
    if isinstance(value, int):
        return (value,) * rank
    values = tuple(value)
    return values if len(values) == rank else values * rank


def _of(function: Callable[..., Any], rank: int) -> Callable[..., Any]:
    """The function, for weights of a rank."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        weight: Tensor = args[1] if len(args) > 1 else kwargs["weight"]
        return function(*args, **kwargs) if weight.ndim == rank + 2 else NotImplemented

    return guarded


HANDLERS: Mapping[Any, Callable[..., Any]] = {
    functional.conv1d: _of(convolve, 1),
    functional.conv2d: _of(convolve, 2),
    functional.conv3d: _of(convolve, 3),
    functional.conv_transpose1d: _of(convolve_transposed, 1),
    functional.conv_transpose2d: _of(convolve_transposed, 2),
    functional.conv_transpose3d: _of(convolve_transposed, 3),
}
