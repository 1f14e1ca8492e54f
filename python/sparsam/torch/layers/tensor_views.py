"""Tensors without memory, views of packed tensors, and changes of packed tensors and views in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils import _pytree as pytree

import torch
from sparsam.torch.layers.packed_content import Content
from torch import Tensor

__all__ = ["change", "follow", "give_memory", "meta", "view", "without_memory", "written"]

# The device on which PyTorch assumes the memory, so that `dense.data = packed` raises.
_NOWHERE = torch.device("meta")


class _Empty(Tensor):
    """A tensor without memory, or one that PyTorch should treat as such."""

    @classmethod
    def __torch_dispatch__(cls, *_: Any, **__: Any) -> Any:
        """Computes nothing."""
        return NotImplemented


def without_memory(
    kind: type[Any],
    shape: Sequence[int],
    strides: Sequence[int] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """A tensor of a class that overrides functions; reading its memory is an error."""
    empty = Tensor._make_wrapper_subclass(
        _Empty, shape, strides=strides, dtype=dtype, device=device, requires_grad=False, storage_size=0
    )
    with torch._C._DisableTorchDispatch():
        made: Any = Tensor._make_subclass(kind, empty, False, device_for_backend_keys=_NOWHERE)
    torch._C._set_throw_on_mutable_data_ptr(made)
    return made


def give_memory(made: Tensor, dense: Tensor) -> None:
    """Gives a tensor of `without_memory` the memory of a dense one."""
    with torch._C._DisableTorchDispatch():
        held = Tensor._make_subclass(_Empty, dense, False, device_for_backend_keys=_NOWHERE)
        Tensor.data.__set__(made, held)  # type: ignore[attr-defined]


def meta(tensor: Tensor) -> Tensor:
    """A tensor of that shape, without numbers."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def follow(dense: Tensor, views: tuple[tuple[Any, ...], ...]) -> Tensor:
    """The view of a dense tensor."""
    found: Any = dense
    for func, args, kwargs, index in views:
        found = func(found, *args, **dict(kwargs))
        found = found if index is None else found[index]
    return found  # type: ignore[no-any-return]


def view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A view that writes through; its numbers are unpacked on demand."""
    base = args[0]
    shown = func(meta(base), *args[1:], **kwargs)
    step = (func, _frozen(args[1:]), tuple(kwargs.items()))

    def part(index: int | None, one: Tensor) -> Any:
        start = base._start + int(one.storage_offset())
        return type(base)(base._content, (*base._views, (*step, index)), one, start)

    return part(None, shown) if isinstance(shown, Tensor) else [part(*one) for one in enumerate(shown)]


def written(kind: type[Any], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The tensors of a class among the arguments that a function writes to."""
    positions = func._schema.arguments
    named = {argument.name: argument for argument in positions}
    given = [*zip(positions, args, strict=False), *((named[name], value) for name, value in kwargs.items())]
    into = [value for one, value in given if one.alias_info is not None and one.alias_info.is_write]
    return [leaf for leaf in pytree.tree_leaves(into) if isinstance(leaf, kind)]


def _frozen(value: Any) -> Any:
    """Lists as tuples."""
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def change(kind: type[Any], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a function that changes its arguments on dense tensors, and packs the packed ones again.

    Args:
        kind: The class of packed tensors.
        func: The function that changes its arguments.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        msg = f"{func}: expected products with a packed weight in a graph; got a change; make it outside"
        raise RuntimeError(msg)
    bases: dict[int, tuple[Content, Tensor]] = {}
    shown: dict[int, Any] = {}
    shapes: list[tuple[Tensor, Any]] = []

    def dense(tensor: Any) -> Tensor:
        content = tensor._content
        _, base = bases.setdefault(id(content), (content, content.unpack()))
        view = follow(base, tensor._views)
        shown[id(view)] = tensor
        shapes.append((view, (view.shape, view.stride())))
        return view

    changed = {id(tensor._content) for tensor in written(kind, func, args, kwargs)}
    plain_args, plain_kwargs = pytree.tree_map_only(kind, dense, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    if any((view.shape, view.stride()) != before for view, before in shapes):
        msg = f"{func}: expected a change of numbers of a packed weight; got one of its shape; use to_dense()"
        raise RuntimeError(msg)
    for key, (content, base) in bases.items():
        if key in changed:
            content.pack(base)
    return pytree.tree_map_only(Tensor, lambda t: shown.get(id(t), t), result)
