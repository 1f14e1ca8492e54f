"""Cuts a model and restores it: its tensors and attributes, all or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import numpy as np

import torch
from sparsam.torch.pruning.structured.structures import Cuts
from torch import Tensor, nn

__all__ = ["State", "Surgery"]

State: TypeAlias = Literal["whole", "zeroed", "cut"]


class Surgery:
    """A model in three states: whole; with the units to remove zeroed; and cut.

    "whole" has the original Parameter objects. Cut Parameters are new objects, with the same `requires_grad`
    and no gradient.
    """

    def __init__(self, model: nn.Module, cuts: Cuts) -> None:
        """Finds the tensors; changes nothing yet.

        Raises:
            ValueError: The model lacks a tensor, or the tensor is too short for the cuts.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        axes: dict[str, dict[int, Any]] = {}
        for (name, axis), indices in cuts.removed.items():
            axes.setdefault(name, {})[axis] = indices
        self._tensors = [_Place(modules, name, removed) for name, removed in axes.items()]
        self._numbers = []
        for (path, attribute), less in cuts.lowered.items():
            module = modules[path]
            self._numbers.append((module, attribute, getattr(module, attribute), less))

    def show(self, state: State) -> None:
        """Puts the model in a state."""
        for place in self._tensors:
            place.show(state)
        for module, attribute, value, less in self._numbers:
            setattr(module, attribute, value - less if state == "cut" else value)

    @contextmanager
    def undone_by_errors(self) -> Iterator[None]:
        """Restores the whole model if anything is raised inside."""
        try:
            yield
        except BaseException:
            self.show("whole")
            raise


class _Place:
    """A parameter or buffer, and the module that holds it."""

    def __init__(self, modules: dict[str, nn.Module], name: str, removed: dict[int, Any]) -> None:
        path, _, attribute = name.rpartition(".")
        module = modules.get(path)
        held: list[Any] = [] if module is None else [module._parameters, module._buffers]
        self._where: dict[str, Any] = next((own for own in held if own.get(attribute) is not None), {})
        if not self._where:
            msg = f"model: expected a parameter or buffer {name!r}; got none; pass the original model"
            raise ValueError(msg)
        self._attribute = attribute
        self._whole: Tensor = self._where[attribute]
        for axis, indices in removed.items():
            if indices[-1] >= self._whole.shape[axis]:
                msg = (
                    f"{name}: expected more than {indices[-1]} entries along axis {axis}; got shape "
                    f"{tuple(self._whole.shape)}; pass the original model, which is not cut yet"
                )
                raise ValueError(msg)
        self._removed = removed
        self._cut: Tensor | None = None

    def show(self, state: State) -> None:
        if state == "cut":
            self._cut = self._cut if self._cut is not None else self._made(self._shorter())
            self._where[self._attribute] = self._cut
        else:
            self._where[self._attribute] = self._whole if state == "whole" else self._made(self._zeroed())

    def _made(self, tensor: Tensor) -> Tensor:
        """The tensor as a Parameter if the original was one, else as a buffer."""
        if isinstance(self._whole, nn.Parameter):
            return nn.Parameter(tensor, requires_grad=self._whole.requires_grad)
        return tensor

    def _zeroed(self) -> Tensor:
        tensor = self._whole.detach().clone()
        for axis, indices in self._removed.items():
            tensor.index_fill_(axis, torch.from_numpy(indices).to(tensor.device), 0)
        return tensor

    def _shorter(self) -> Tensor:
        tensor = self._whole.detach()
        for axis, indices in self._removed.items():
            kept = np.setdiff1d(np.arange(self._whole.shape[axis]), indices)
            tensor = tensor.index_select(axis, torch.from_numpy(kept).to(tensor.device))
        return tensor
