"""Layers in which the weight is packed: how it gets there, what follows it, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch.nn import functional
from torch.nn.utils import parametrize, prune

import torch
from sparsam.torch.layers import products
from sparsam.torch.layers.operators import ACTIVATIONS
from sparsam.torch.layers.packed_tensor import PackedTensor
from sparsam.torch.layers.packed_weight import PackedWeight
from torch import Tensor, nn

__all__ = [
    "PackedLayer",
    "can_activate",
    "clean",
    "dense_class",
    "is_packed",
    "is_transposed",
    "pack",
    "packed_weight",
]

_CONVOLUTIONS = (nn.Conv1d.forward, nn.Conv2d.forward)
_SCRIPT = "__prepare_scriptable__"  # what torch.jit.script calls


def pack(
    layer: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    activation: str | None = None,
    batches: Sequence[int] = (),
) -> nn.Module:
    """Packs the weight of one layer in place: `layer.weight` is a `PackedTensor` then.

    `sparsam.torch.restore` gives back the Parameter that was there.

    Args:
        layer: A `torch.nn.Linear` (or the Conv1D of Hugging Face's GPT-2), `Conv1d` or `Conv2d`, or one of a
            subclass; on the CPU, float32, bfloat16 or float16. Its zeros are what is skipped.
        dtype: What to store the values as, `torch.bfloat16` say; by default as they are. Sums are float32.
        activation: Applied to the layer's result: None, "relu", "gelu", "gelu_tanh" or "silu".
        batches: The numbers of rows that a linear layer will be called with, see `PackedTensor.prepare`.

    Returns:
        `layer`.

    Raises:
        TypeError: Another kind of layer or of numbers; a layer that is packed already.
        ValueError: The layer is not on the CPU; an unknown activation; a batch below 1.
    """
    packed = PackedLayer.of(layer, dtype=dtype)
    packed.activation = activation
    if batches:
        packed.weight.prepare(batches)
    packed.install()
    return layer


class PackedLayer:
    """A layer and its packed weight, which can be put in and taken out.

    Attributes:
        layer: The layer.
        weight: Its packed weight.
    """

    def __init__(self, layer: nn.Module, weight: PackedTensor) -> None:
        """With a weight that is there already; `of` packs one."""
        self.layer = layer
        self.weight = weight
        self._activation = ""

    @classmethod
    def of(cls, layer: nn.Module, *, dtype: torch.dtype | None = None) -> PackedLayer:
        """Packs the weight of a dense layer, and leaves the layer as it is. Errors as for `pack`."""
        name = dense_class(layer).__name__
        if packed_weight(layer) is not None:
            msg = f"layer: expected a dense one; got a packed {name}; call sparsam.torch.restore first"
            raise TypeError(msg)
        transposed = is_transposed(layer)
        if not (isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)) or transposed):
            msg = f"layer: expected a torch.nn.Linear, Conv1d or Conv2d; got a {name}; leave it dense"
            raise TypeError(msg)
        groups = getattr(layer, "groups", 1)
        weight: Any = layer.weight
        return cls(layer, PackedTensor.pack(weight, dtype=dtype, groups=groups, transposed=transposed))

    @classmethod
    def find(cls, layer: nn.Module) -> PackedLayer | None:
        """The layer as it is, if its weight is packed."""
        weight = packed_weight(layer)
        if weight is None:
            return None
        found = cls(layer, weight)
        found._activation = _installed_activation(layer)
        return found

    @property
    def activation(self) -> str | None:
        """The activation of the layer's result, which it computes itself while it is packed."""
        return self._activation or None

    @activation.setter
    def activation(self, name: str | None) -> None:
        if name is not None and (not name or name not in ACTIVATIONS):
            known = ", ".join(repr(known) for known in ACTIVATIONS if known)
            msg = f"activation: expected None or one of {known}; got {name!r}; pass one of them"
            raise ValueError(msg)
        self._activation = name or ""
        if is_packed(self.layer):
            self._show_activation()

    @property
    def packed(self) -> PackedWeight:
        """The matrices that are multiplied with."""
        return self.weight.packed

    def install(self) -> None:
        """Puts the packed weight in, and the activation."""
        own, layer = vars(self.layer), self.layer
        if not is_packed(layer):
            if parametrize.is_parametrized(layer, "weight"):
                lists: Any = layer.parametrizations
                lists._modules["weight"] = _Computed(lists.weight, self.weight)
            elif hooks := _pruning_hooks(layer):
                for key, hook in hooks.items():
                    layer._forward_pre_hooks[key] = _Pruned(hook, self.weight, _versions(layer))
                own["weight"] = self.weight
            else:
                layer._parameters["weight"] = self.weight  # type: ignore[assignment]
            layer.register_state_dict_post_hook(_dense_state)  # type: ignore[no-untyped-call]
            own[_SCRIPT] = _refuse_script
        self._show_activation()

    def _show_activation(self) -> None:
        own = vars(self.layer)
        if _installed_activation(self.layer):
            del own["forward"]
        if self._activation:
            own["forward"] = partial(_forward_and_activate, self.layer, self._activation)

    def remove(self) -> None:
        """Takes it out: the layer is what it was, but for the memory that was released."""
        layer = self.layer
        if not is_packed(layer):
            return
        if parametrize.is_parametrized(layer, "weight"):
            lists: Any = layer.parametrizations
            lists._modules["weight"] = lists.weight.original
        elif hooks := _packed_hooks(layer):
            for key, hook in hooks.items():
                layer._forward_pre_hooks[key] = hook.original
                hook.original(layer, ())
        else:
            content = self.weight._content
            if content.original is None:
                content.original, content.changed = nn.Parameter(self.weight.to_dense()), False
            layer._parameters["weight"] = content.original
        clean(layer)

    def release(self) -> bool:
        """Frees the dense weight if it can be unpacked again exactly; returns whether it is free."""
        content = self.weight._content
        dense = content.original
        if dense is None or content.released:
            return content.released
        if not torch.equal(dense.detach(), self.weight.to_dense()):
            return False
        content.released = True  # first: an interrupt in between must not lose the weight
        dense.data = dense.data.new_empty(0)
        return True

    def restore(self) -> None:
        """Takes it out, and gives the dense weight the numbers that the packed one has now."""
        content = self.weight._content
        self.remove()
        dense = content.original
        if dense is None:
            return
        if content.released or content.changed:
            dense.data = self.weight.to_dense()
            content.released = content.changed = False
        if dense.requires_grad and not content.learns:
            dense.requires_grad_(requires_grad=False)  # type: ignore[call-arg]


def clean(layer: nn.Module) -> None:
    """Takes from a layer what `PackedLayer.install` gave it, but for the weight."""
    for key, hook in list(layer._state_dict_hooks.items()):
        if hook is _dense_state:
            del layer._state_dict_hooks[key]
    vars(layer).pop(_SCRIPT, None)
    if _installed_activation(layer):
        del vars(layer)["forward"]


def packed_weight(layer: nn.Module) -> PackedTensor | None:
    """The packed weight of a layer, if it has one."""
    found: Any = layer._parameters.get("weight")
    if found is None:
        found = vars(layer).get("weight")
    if found is None and (lists := layer._modules.get("parametrizations")) is not None:
        found = getattr(lists._modules.get("weight"), "packed", None)
    return found if type(found) is PackedTensor else None


def is_packed(layer: nn.Module) -> bool:
    """Whether the weight of a layer is packed."""
    return packed_weight(layer) is not None


def is_transposed(layer: nn.Module) -> bool:
    """Whether it is Hugging Face's Conv1D, a linear layer with the weight (in, out)."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
        for kind in type(layer).__mro__
    )


def dense_class(layer: nn.Module) -> type[Any]:
    """Its class, before torch.nn.utils.parametrize changed that."""
    return type(layer).__bases__[0] if parametrize.is_parametrized(layer) else type(layer)


def can_activate(layer: nn.Module) -> bool:
    """Whether its forward is the product and nothing else, so that an activation can be part of that."""
    forward = type(layer).forward
    known = forward is nn.Linear.forward or forward in _CONVOLUTIONS or _is_conv1d_of_transformers(forward)
    return known and "forward" not in vars(layer)


def _is_conv1d_of_transformers(forward: Any) -> bool:
    where = getattr(forward, "__module__", ""), getattr(forward, "__qualname__", "")
    return where == ("transformers.pytorch_utils", "Conv1D.forward")


class _Computed(nn.Module):
    """In the place of the parametrization that computes a weight: has its state, and returns the packed one.

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
    """In the place of a hook of torch.nn.utils.prune, which computes the weight before each call.

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
        if (versions := _versions(module)) != self._versions:  # what it is computed from was changed
            self.original(module, inputs)
            with torch.no_grad():
                dense: Any = module.weight
                self.packed = self.packed.to(dense.dtype)  # type: ignore[assignment]
                self.packed.copy_(dense)
            self._versions = versions
        module.weight = self.packed


def _versions(layer: Any) -> tuple[int, ...]:
    """Changes when the tensors that torch.nn.utils.prune computes a weight from do."""
    sources = (layer.weight_orig, layer.weight_mask)
    return tuple(n for t in sources for n in (t.data_ptr(), 0 if t.is_inference() else t._version))


def _pruning_hooks(layer: nn.Module) -> dict[int, Any]:
    hooks = layer._forward_pre_hooks.items()
    return {
        key: hook
        for key, hook in hooks
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == "weight"
    }


def _packed_hooks(layer: nn.Module) -> dict[int, _Pruned]:
    return {key: hook for key, hook in layer._forward_pre_hooks.items() if isinstance(hook, _Pruned)}


def _installed_activation(layer: nn.Module) -> str:
    forward = vars(layer).get("forward")
    known = isinstance(forward, partial) and forward.func is _forward_and_activate
    return forward.args[1] if known else ""  # type: ignore[union-attr]


def _forward_and_activate(layer: Any, activation: str, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a layer and the activation after it; in one where the weight is packed."""
    weight, found = layer.weight, NotImplemented
    x = args[0] if args else next(iter(kwargs.values()))
    forward = type(layer).forward
    if forward is nn.Linear.forward:
        found = products.linear(x, weight, layer.bias, activation)
    elif forward in _CONVOLUTIONS:
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x = functional.pad(x, layer._reversed_padding_repeated_twice, layer.padding_mode)
            padding = 0
        geometry = (layer.stride, padding, layer.dilation, layer.groups)
        found = products.convolve(x, weight, layer.bias, *geometry, activation)
    elif _is_conv1d_of_transformers(forward):
        found = products.addmm(layer.bias, x, weight, activation=activation)
    if found is not NotImplemented:
        return found
    return ACTIVATIONS[activation](forward(layer, *args, **kwargs))


def _dense_state(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """State dicts have dense weights, for all who read them; with `keep_vars` what the layer has."""
    weight = state.get(key := prefix + "weight")
    if isinstance(weight, PackedTensor) and weight is not module._parameters.get("weight"):  # type: ignore[comparison-overlap]
        state[key] = weight.to_dense()


def _refuse_script() -> None:
    msg = "torch.jit.script: expected dense layers; got a packed one; call sparsam.torch.restore(model) first"
    raise RuntimeError(msg)
