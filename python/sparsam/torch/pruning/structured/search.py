"""Finds the structures of a model by running it with example inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sparsam.torch.acceleration.model_runner import Example
from sparsam.torch.layers.packed_tensor import PackedTensor
from sparsam.torch.pruning.structured.attention import find_heads
from sparsam.torch.pruning.structured.dependencies import find_dependencies
from sparsam.torch.pruning.structured.structures import Structure
from torch import nn

__all__ = ["check_model", "find_structures", "without_cache"]


def check_model(model: object) -> nn.Module:
    """Returns the model; raises if it cannot be cut."""
    if not isinstance(model, nn.Module):
        msg = f"model: expected a torch.nn.Module; got {type(model).__name__}; pass the model itself"
        raise TypeError(msg)
    if isinstance(model, torch.jit.ScriptModule) or type(model).__name__ == "OptimizedModule":
        msg = f"model: expected one that is not compiled; got a {type(model).__name__}; shrink, then compile"
        raise TypeError(msg)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, PackedTensor):
            msg = f"{name}: expected dense weights; got packed ones; shrink before accelerate, or restore"
            raise ValueError(msg)
        if isinstance(parameter, nn.UninitializedParameter):
            msg = f"{name}: expected a model that ran before; got one without a shape; call it once before"
            raise ValueError(msg)
    return model


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Makes Hugging Face models return no cache of keys and values during the block."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    try:
        if before:
            config.use_cache = False  # type: ignore[union-attr]
        yield
    finally:
        if before:
            config.use_cache = before  # type: ignore[union-attr]


def find_structures(
    model: nn.Module, example: Example, kinds: Collection[str]
) -> tuple[list[Structure], dict[str, str]]:
    """Finds the structures that can be cut.

    Args:
        model: The model, in eval mode.
        example: An example of its inputs.
        kinds: The kinds of structures to find.

    Returns:
        The structures, in the order of the model's modules; and for each layer or attention whose outputs or
        heads cannot be removed, name -> reason.
    """

    def run() -> Any:
        args, kwargs = example.fresh()
        with torch.random.fork_rng(devices=[]):
            return model(*args, **kwargs)

    with without_cache(model):
        with torch.no_grad():
            heads, refused, taken = find_heads(model, run)
        found = list(heads) if "heads" in kinds else []
        refused = refused if "heads" in kinds else {}
        if set(kinds) - {"heads"}:
            others, why = find_dependencies(model, run, taken)
            found += [structure for structure in others if structure.kind in kinds]
            refused |= why
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    sharing = _sharing(model)
    structures = []
    for structure in sorted(found, key=lambda structure: order[structure.name]):
        shared = [sharing[member.name] for member in structure.members if member.name in sharing]
        if shared:
            refused[structure.name] = shared[0]
        elif structure.units > 1:
            structures.append(structure)
    return structures, dict(sorted(refused.items(), key=lambda item: order[item[0]]))


def _sharing(model: nn.Module) -> dict[str, str]:
    """Name of each parameter that several modules share -> the reason to report."""
    held = [
        (id(parameter), f"{name}.{attribute}" if name else attribute)
        for name, module in model.named_modules()
        for attribute, parameter in module._parameters.items()
        if parameter is not None
    ]
    counts = Counter(key for key, _ in held)
    return {name: f"{name} is shared with another module" for key, name in held if counts[key] > 1}
