"""Parameters of a model and the masks that keep their zeros, stored outside the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

import torch
from sparsam.inputs.float_mode import standard_floats
from sparsam.inputs.tensors import to_numpy
from sparsam.masks import Mask
from torch import Tensor, nn

__all__ = ["MaskedWeights", "plain_model", "to_host", "zeros_of"]


class MaskedWeights:
    """Parameters by name, and the masks of those with zeros to keep.

    Attributes:
        parameters: Name -> Parameter.
        masks: Name -> which of its weights are kept.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Mask] | None = None
    ) -> None:
        self.parameters = dict(parameters)
        self.masks: dict[str, Mask] = {}
        self._elsewhere: dict[str, Tensor] = {}
        self.set(masks or {})

    def set(self, masks: Mapping[str, Mask]) -> None:
        """Replaces the masks of these names."""
        self.masks |= masks
        for name in masks:
            self._elsewhere.pop(name, None)

    def apply(self) -> None:
        """Zeroes the pruned weights."""
        for name, mask in self.masks.items():
            self._zero(name, mask, self.parameters[name])

    def check_model(self, what: str, model: nn.Module) -> None:
        """Raises ValueError if a model, called `what`, lacks some of these Parameters."""
        own = {id(parameter) for parameter in model.parameters()}
        for name, parameter in self.parameters.items():
            if id(parameter) not in own:
                msg = (
                    f"pruner: expected that of the {what}; got one of another model, of which it prunes "
                    f"{name!r}; make one of the model that is trained"
                )
                raise ValueError(msg)

    def mask_gradients(self) -> None:
        """Zeroes the gradients of the pruned weights."""
        for name, mask in self.masks.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                self._zero(name, mask, gradient)

    def _zero(self, name: str, mask: Mask, tensor: Tensor) -> None:
        tensor = tensor.detach()
        if _on_host(tensor):
            array = to_numpy(f"tensor {name!r}", tensor)
            mask.write(array, array)
            return
        pruned = self._elsewhere.get(name)
        if pruned is None or pruned.device != tensor.device:
            pruned = self._elsewhere[name] = torch.from_numpy(~mask.to_array()).to(tensor.device)
        tensor.masked_fill_(pruned, 0)


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def forget(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, where: NDArray[np.bool_]) -> None:
    """Zeroes an optimizer's state for some weights, in each state tensor of the parameter's shape."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
            value[torch.from_numpy(where).to(value.device)] = 0


def plain_model(model: nn.Module) -> nn.Module:
    """Returns the model inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch._dynamo.OptimizedModule, which is slow to import.
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def to_host(name: str, tensor: Tensor) -> NDArray[Any]:
    """Returns a tensor as an array, on the same memory if it is on the CPU; TypeError as for `prune`."""
    if tensor.is_meta:
        msg = f"tensor {name!r}: expected weights; got device meta, which has none; load the model first"
        raise TypeError(msg)
    return to_numpy(f"tensor {name!r}", tensor.detach().cpu())


@standard_floats
def zeros_of(parameters: Mapping[str, Tensor], names: Iterable[str] | None = None) -> dict[str, Mask]:
    """Returns the masks of existing zeros, for weights of two axes or more that have some.

    A tensor of zeros only is left out: it was not pruned, but initialised to zero.
    """
    masks = {}
    for name in parameters if names is None else names:
        tensor = parameters[name]
        if tensor.ndim < 2 or not tensor.is_floating_point():
            continue
        mask = Mask.from_array(to_host(name, tensor) != 0)
        if 0 < mask.count < mask.size:
            masks[name] = mask
    return masks
