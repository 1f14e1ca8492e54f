"""Models on the meta device: which tensors have no memory, and giving it to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

import torch
from sparsam.torch.layers.packed_parameter import packed_parameters
from torch import Tensor, nn

__all__ = ["compute", "materialize", "tie", "unsaved_tensors", "without_values"]

_LARGE = 1 << 12  # elements; smaller tensors are made, and moved afterwards


def unsaved_tensors(model: nn.Module) -> Iterator[str]:
    """The names of tensors on the meta device that are not Parameters: buffers and plain attributes."""
    for prefix, module in model.named_modules():
        computed = _computed(module)
        for own in (module._buffers, vars(module)):
            for name, value in own.items():
                if isinstance(value, Tensor) and value.is_meta and name not in computed:
                    yield f"{prefix}.{name}".removeprefix(".")


def without_values(build: Callable[[], nn.Module]) -> nn.Module:
    """Makes a model whose Parameters are on the meta device, and whose buffers have their values.

    Args:
        build: Makes the model. Tensors made by `torch.empty`, as layers make their weights, take no memory.
    """
    with _Unfilled(), torch.no_grad():
        model = build()
    moved: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not parameter.is_meta:
                made = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
                setattr(module, name, moved.setdefault(id(parameter), (parameter, made))[1])
    return model


class _Unfilled(TorchFunctionMode):
    """Makes large tensors without values on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None and _count(args) >= _LARGE:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _count(sizes: Any) -> int:
    """The elements of a tensor of these sizes, given one by one or together."""
    flat = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    return math.prod(flat)


def tie(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Shares Parameters on the meta device again, which `init_empty_weights` separates.

    Args:
        model: The model.
        tied: Name of a tensor -> the name of the tensor whose memory it shares.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, source in tied.items():
        one, other = parameters.get(name), parameters.get(source)
        if one is not None and other is not None and one.is_meta and other.is_meta:
            prefix, _, own = name.rpartition(".")
            setattr(model.get_submodule(prefix), own, other)


def materialize(model: nn.Module) -> None:
    """Allocates memory for tensors on the meta device, except for dense weights behind packed ones.

    Shared tensors stay shared. Their values are undefined.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # holds the old tensor too, so that its id is not reused

    def real(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty_like(tensor, device="cpu")
            made[id(tensor)] = tensor, _like(tensor, empty)
        return made[id(tensor)][1]

    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                setattr(module, name, real(parameter))
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = real(buffer)
    for module in model.modules():
        for weight in packed_parameters(module):
            content = weight.tensor._content
            if (dense := content.original) is None or not dense.is_meta:
                continue
            if id(dense) in made:
                content.original = made[id(dense)][1]  # type: ignore[assignment]
            else:
                empty = _like(dense, torch.empty(0, dtype=dense.dtype, device="cpu"))
                content.original, content.released = empty, True  # type: ignore[assignment]


def compute(model: nn.Module) -> None:
    """Computes the weights on the meta device that hooks of torch.nn.utils would compute in the next call."""
    for module in model.modules():
        for name, hook in _computed(module).items():
            if not getattr(module, name).is_meta:
                continue
            if isinstance(hook, SpectralNorm):
                value = hook.compute_weight(module, do_power_iteration=False)  # as it was when it was saved
            elif isinstance(hook, WeightNorm):
                value = hook.compute_weight(module)
            else:
                value = hook.apply_mask(module)
            setattr(module, name, value)


def _computed(module: nn.Module) -> dict[str, Any]:
    """The hooks of torch.nn.utils that compute a weight before each call, by its name."""
    found: dict[str, Any] = {}
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            found[hook._tensor_name] = hook
        elif isinstance(hook, (SpectralNorm, WeightNorm)):
            found[hook.name] = hook
    return found


def _like(old: Tensor, new: Tensor) -> Tensor:
    """The new tensor as a Parameter where the old one is one."""
    if not isinstance(old, nn.Parameter):
        return new
    parameter = nn.Parameter(new, requires_grad=old.requires_grad)
    vars(parameter).update(vars(old))
    return parameter
