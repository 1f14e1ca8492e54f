"""Replacing a weight of a module by its packed form, and putting the dense weight back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch._jit_internal import FunctionModifiers
from torch.nn.utils import parametrize, prune

import torch
from sparsam.torch.layers.packed_tensor import PackedTensor
from sparsam.torch.layers.unpacked_tensor import UnpackedTensor
from torch import Tensor, nn

__all__ = ["PackedParameter", "clean", "is_packed", "packed_parameters"]

_SCRIPT = "__prepare_scriptable__"  # what torch.jit.script calls


class PackedParameter:
    """A packed weight of a module, which can be installed and removed.

    Attributes:
        module: The module.
        name: The name of the weight in the module.
        tensor: The packed weight.
    """

    def __init__(self, module: nn.Module, name: str, tensor: PackedTensor) -> None:
        self.module = module
        self.name = name
        self.tensor = tensor

    def install(self) -> None:
        """Replaces the dense weight by the packed one."""
        own, module, name = vars(self.module), self.module, self.name
        if _packed(module, name) is not None:
            return
        if parametrize.is_parametrized(module, name):
            lists: Any = module.parametrizations
            lists._modules[name] = _Computed(lists[name], self.tensor)
        elif hooks := _pruning_hooks(module, name):
            for key, hook in hooks.items():
                module._forward_pre_hooks[key] = _Pruned(hook, self.tensor, _versions(module, name))
            own[name] = self.tensor
            _list_weight(module, name, self.tensor)
        else:
            _assign(module, name, self.tensor)
            self.tensor._content.place = weakref.ref(module), name
        if _SCRIPT not in own:
            module.register_state_dict_post_hook(_dense_state)  # type: ignore[no-untyped-call]
            own[_SCRIPT] = _TorchScript(module._parameters)

    def remove(self) -> None:
        """Puts the original weight back; if its memory was released, it stays empty."""
        module, name = self.module, self.name
        if _packed(module, name) is None:
            return
        if parametrize.is_parametrized(module, name):
            lists: Any = module.parametrizations
            lists._modules[name] = lists[name].original
        elif hooks := _packed_hooks(module, name):
            for key, hook in hooks.items():
                module._forward_pre_hooks[key] = hook.original
                hook.original(module, ())
        else:
            content = self.tensor._content
            if content.original is None:
                content.original, content.changed = nn.Parameter(self.tensor.to_dense()), False
            _assign(module, name, content.original)
        if not is_packed(module):
            clean(module)

    def release(self) -> bool:
        """Frees the memory of the dense weight if unpacking gives it back exactly; returns whether it is."""
        content = self.tensor._content
        dense = content.original
        if dense is None or content.released:
            return content.released
        if not torch.equal(dense.detach(), self.tensor.to_dense()):
            return False
        content.released = True  # first: an interrupt in between must not lose the weight
        dense.data = dense.data.new_empty(0)
        return True

    def restore(self) -> None:
        """Puts the original weight back, with the values that the packed one has now."""
        content = self.tensor._content
        self.remove()
        dense = content.original
        if dense is None:
            return
        if content.released or content.changed:
            dense.data = self.tensor.to_dense()
            content.released = content.changed = False
        if dense.requires_grad and not content.trainable:
            dense.requires_grad_(requires_grad=False)  # type: ignore[call-arg]


def packed_parameters(module: nn.Module) -> list[PackedParameter]:
    """The packed weights that a module itself has."""
    return [PackedParameter(module, name, tensor) for name, tensor in _every_packed(module)]


def is_packed(module: nn.Module) -> bool:
    """Whether a weight of the module itself is packed."""
    return any(True for _ in _every_packed(module))


def clean(module: nn.Module) -> None:
    """Removes from a module all that `PackedParameter.install` added, except the weight."""
    for key, hook in list(module._state_dict_hooks.items()):
        if hook is _dense_state:
            del module._state_dict_hooks[key]
    vars(module).pop(_SCRIPT, None)


def _every_packed(module: nn.Module) -> Iterator[tuple[str, PackedTensor]]:
    for name, parameter in module._parameters.items():
        if isinstance(parameter, PackedTensor):
            yield name, parameter
    if module._forward_pre_hooks:  # of torch.nn.utils.prune
        yield from ((name, own) for name, own in vars(module).items() if type(own) is PackedTensor)
    if (lists := module._modules.get("parametrizations")) is not None:
        for name, computed in lists._modules.items():
            if isinstance(computed, _Computed):
                yield name, computed.packed


def _assign(module: nn.Module, name: str, weight: Any) -> None:
    module._parameters[name] = weight
    _list_weight(module, name, weight)


def _list_weight(module: nn.Module, name: str, weight: Tensor) -> None:
    """Updates the list from which recurrent layers read their weights."""
    if isinstance(module, nn.RNNBase):
        module._flat_weights[module._flat_weights_names.index(name)] = weight


def _packed(module: nn.Module, name: str) -> PackedTensor | None:
    return dict(_every_packed(module)).get(name)


class _Computed(nn.Module):
    """Replaces the parametrization that computes a weight: keeps its state, returns the packed weight.

    Attributes:
        original: The parametrization.
        packed: The weight that it computes, packed. Neither is a submodule or Parameter of this.
    """

    def __init__(self, original: nn.Module, packed: PackedTensor) -> None:
        super().__init__()
        self._hidden = (original,)
        self._parameters, self._buffers = original._parameters, original._buffers
        self._modules = original._modules
        self.packed = packed
        self.training = original.training
        self.register_load_state_dict_post_hook(_compute_again)  # type: ignore[no-untyped-call]

    @property
    def original(self) -> nn.Module:
        """The parametrization."""
        return self._hidden[0]

    def forward(self) -> Tensor:
        """The packed weight."""
        return self.packed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Computed:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.packed = fn(self.packed)  # type: ignore[assignment]
        return self


def _compute_again(module: Any, _: Any) -> None:
    with torch.no_grad():
        module.packed.copy_(module.original())


class _Pruned:
    """Replaces a hook of torch.nn.utils.prune, which computes the weight before each call.

    Attributes:
        original: The hook.
        packed: The weight that it computes, packed.
    """

    def __init__(
        self, original: prune.BasePruningMethod, packed: PackedTensor, versions: tuple[int, ...]
    ) -> None:
        self.original = original
        self.packed = packed
        self._versions = versions

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        name: str = self.original._tensor_name
        if (versions := _versions(module, name)) != self._versions:  # what it is computed from was changed
            self.original(module, inputs)
            with torch.no_grad():
                dense: Any = getattr(module, name)
                self.packed = self.packed.to(dense.dtype)  # type: ignore[assignment]
                self.packed.copy_(dense)
            self._versions = versions
        setattr(module, name, self.packed)


def _versions(module: nn.Module, name: str) -> tuple[int, ...]:
    """Memory and versions of the tensors from which torch.nn.utils.prune computes a weight."""
    sources: Any = (getattr(module, f"{name}_orig"), getattr(module, f"{name}_mask"))
    return tuple(n for t in sources for n in (t.data_ptr(), 0 if t.is_inference() else t._version))


def _pruning_hooks(module: nn.Module, name: str) -> dict[int, Any]:
    hooks = module._forward_pre_hooks.items()
    return {
        key: hook
        for key, hook in hooks
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name
    }


def _packed_hooks(module: nn.Module, name: str) -> dict[int, _Pruned]:
    return {
        key: hook
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, _Pruned) and hook.original._tensor_name == name
    }


def _dense_state(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Puts dense weights into state dicts, for all readers; with `keep_vars` the Parameters themselves.

    Either way, a change in place changes the module.
    """
    for name, packed in _every_packed(module):
        key = prefix + name
        weight = state.get(key)
        if isinstance(weight, PackedTensor) and weight is not packed:
            state[key] = UnpackedTensor.of(packed._content)


class _TorchScript:
    """Prepares packed weights for TorchScript: an error in torch.jit.script, dense memory in torch.jit.trace.

    A trace has the Parameters of the model, and their memory is read when it is saved. Before it takes them
    it asks every callable of a module for `_torchscript_modifier`; nothing else does.
    """

    def __init__(self, parameters: dict[str, Any]) -> None:
        self._parameters = parameters  # and not the module, which would never be freed by itself then

    def __call__(self) -> None:
        msg = (
            "torch.jit.script: expected dense layers; got a packed one; call sparsam.torch.restore(model) "
            "first"
        )
        raise RuntimeError(msg)

    @property
    def _torchscript_modifier(self) -> FunctionModifiers:
        for weight in self._parameters.values():
            if isinstance(weight, PackedTensor):
                weight.hold_dense()
        return FunctionModifiers.DEFAULT  # type: ignore[return-value]
