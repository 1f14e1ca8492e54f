"""Copies of a model that share its memory, so that the model itself does not change while the copy runs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from sparsam.torch.pruning.prunable import PrunableWeight
from torch import Tensor, nn

__all__ = ["Twin"]


class Twin:
    """A copy of a model in evaluation mode, whose Parameters initially share the original's memory.

    Buffers are copied. Parameters are new objects, so new values can replace theirs without changing the
    original; shared Parameters stay shared.

    Attributes:
        model: The copy.
        weights: Name -> the weight in the copy.
    """

    def __init__(self, model: nn.Module, weights: Sequence[PrunableWeight]) -> None:
        """Makes the copy; ValueError for a model that `copy.deepcopy` cannot copy."""
        memo: dict[int, object] = {}
        for parameter in model.parameters():
            if type(parameter) is nn.Parameter:
                memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        try:
            self.model = copy.deepcopy(model, memo).eval()
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
            msg = f"model: expected one that copy.deepcopy can copy; got {got}; remove what prevents it"
            raise ValueError(msg) from error
        _keep_no_cache(self.model)
        modules = dict(self.model.named_modules())
        self.weights: dict[str, PrunableWeight] = {}
        for weight in weights:
            path = weight.name.removesuffix(weight.attribute).removesuffix(".")
            self.weights[weight.name] = PrunableWeight(
                weight.name, modules[path], weight.attribute, weight.kind, weight.transposed, weight.groups
            )


def _keep_no_cache(model: nn.Module) -> None:
    """Makes Hugging Face decoders run without a cache, which would hold keys and values of all layers."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False) is True:
            config.use_cache = False  # a copy, not the model's


def set_values(parameter: Tensor, values: Tensor) -> None:
    """Assigns new values, in separate memory, to a tensor of a twin."""
    parameter.data = values.to(parameter.dtype).contiguous()


class Rows:
    """A weight as (out, in, ...) and its bias, however the layer stores them.

    Attributes:
        weight: The weight in a twin.
        mean_of: The batch norm that directly follows, whose running mean can absorb a bias; or None.
    """

    def __init__(self, weight: PrunableWeight, mean_of: nn.Module | None = None) -> None:
        self.weight = weight
        self.mean_of = mean_of

    def matrix(self) -> Tensor:
        """The weight as (out, in, ...), a view."""
        tensor = self.weight.parameter.detach()
        return tensor.T if self.weight.transposed else tensor

    def bias(self) -> Tensor | None:
        """The bias, (out,); zeros if a batch norm can absorb one; None if there is no place for a bias."""
        place = self._bias_place()
        if place is not None:
            tensor, rows = place
            return tensor.detach()[rows]
        return torch.zeros(len(self.matrix())) if self.mean_of is not None else None

    def put(self, weights: Tensor, bias: Tensor | None) -> None:
        """Sets new values; a bias without a Parameter is subtracted from the running mean."""
        tensor = self.weight.parameter
        set_values(tensor, weights.T if self.weight.transposed else weights)
        place = self._bias_place()
        if bias is None:
            return
        if place is not None:
            parameter, rows = place
            values = parameter.detach().clone()
            values[rows] = bias.to(values.dtype)
            parameter.data = values
        else:
            assert self.mean_of is not None
            mean = self.mean_of._buffers["running_mean"]
            assert mean is not None
            mean -= bias.to(mean.dtype)

    def places(self) -> list[tuple[nn.Module, str]]:
        """The module and the attribute of each tensor that `put` may change."""
        found = [(self.weight.module, self.weight.attribute)]
        if (name := self._bias_name()) is not None:
            found.append((self.weight.module, name))
        elif self.mean_of is not None:
            found.append((self.mean_of, "running_mean"))
        return found

    def _bias_name(self) -> str | None:
        module, attribute = self.weight.module, self.weight.attribute
        name = "bias"
        if self.weight.kind == "recurrent":
            name = attribute.replace("weight", "bias")
        elif attribute.endswith("proj_weight"):
            name = "in_proj_bias"
        return None if module._parameters.get(name) is None else name

    def _bias_place(self) -> tuple[nn.Parameter, slice] | None:
        """The Parameter that holds the bias, and its rows for this weight."""
        name, attribute = self._bias_name(), self.weight.attribute
        if name is None:
            return None
        rows = slice(None)
        if attribute.endswith("proj_weight") and attribute != "in_proj_weight":
            size = len(self.weight.parameter)
            start = ("q_proj_weight", "k_proj_weight", "v_proj_weight").index(attribute) * size
            rows = slice(start, start + size)
        found: nn.Parameter = self.weight.module._parameters[name]  # type: ignore[assignment]
        return found, rows
