"""Neurons and channels that depend on each other, from Torch-Pruning's dependency graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils import _pytree as pytree

import torch
from sparsam.torch.pruning.structured.layer_slices import input_slices, is_linear, output_slices
from sparsam.torch.pruning.structured.structures import Attribute, Kind, Member, Structure
from torch import Tensor, nn

__all__ = ["find_dependencies"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def find_dependencies(
    model: nn.Module, run: Callable[[], Any], excluded: set[nn.Module]
) -> tuple[list[Structure], dict[str, str]]:
    """Finds the neurons and channels that can be removed together.

    Args:
        model: The model, in eval mode.
        run: Runs it and returns its outputs.
        excluded: Layers whose outputs are kept.

    Returns:
        The structures, in the order in which the model has its layers; and for each layer whose outputs
        cannot be removed, name -> reason.

    Raises:
        ImportError: Torch-Pruning is not installed.
        ValueError: It cannot follow the model.
    """
    graph, outputs = _graph(model, run)
    found: list[Structure] = []
    refused: dict[str, str] = {}
    seen: set[nn.Module] = set()
    for name, layer in model.named_modules():
        if not (is_linear(layer) or isinstance(layer, _CONVOLUTIONS)) or layer in excluded or layer in seen:
            continue
        if layer not in graph.module2node:
            refused[name] = "it does not run with the example inputs"
            continue
        try:
            reached = _followed(graph, layer, outputs, excluded)
            found.append(_structure(graph, layer, reached))
        except _Unsuitable as reason:
            refused[name] = str(reason)
        else:
            seen.update(node.module for node, output in reached if output)
    return found, refused


class _Unsuitable(Exception):
    """Raised with the reason why units cannot be removed."""


Reached = dict[tuple[Any, bool], dict[int, int]]


def _followed(graph: Any, layer: nn.Module, outputs: set[Any], excluded: set[nn.Module]) -> Reached:
    """What depends on a layer's outputs: (node, whether its outputs) -> index -> unit.

    Torch-Pruning's own search compares whole lists of indices, and does not end in a reasonable time where
    an attention with rotary embeddings is reached; this one visits every index of a node once.

    Raises:
        _Unsuitable: Something that depends on them cannot be cut.
    """
    from torch_pruning import _helpers  # noqa: PLC0415 - an extra

    pruner = graph.get_pruner_of_module(layer)
    indices = [_helpers._HybridIndex(i, i) for i in range(pruner.get_out_channels(layer))]
    stack = [(graph.module2node[layer], pruner.prune_out_channels, indices)]
    reached: Reached = {(stack[0][0], True): {index.idx: index.root_idx for index in indices}}
    while stack:
        node, side, indices = stack.pop()
        _check(graph, node, side, outputs, excluded if node.module is not layer else set())
        for dependency in node.dependencies:
            if not dependency.is_triggered_by(side):
                continue
            mapped = indices
            for mapping in dependency.index_mapping:
                mapped = mapped if mapping is None else mapping(mapped)
            target = dependency.target
            known = reached.setdefault((target, _is_output(graph, target, dependency.handler)), {})
            new = [index for index in mapped if index.idx not in known]
            known |= {index.idx: index.root_idx for index in new}
            if any(index.root_idx is None or known[index.idx] != index.root_idx for index in mapped):
                msg = f"they mix before {target.name}"
                raise _Unsuitable(msg)
            if new:
                stack.append((target, dependency.handler, new))
    return reached


def _is_output(graph: Any, node: Any, side: Any) -> bool:
    return bool(side == graph.get_pruner_of_module(node.module).prune_out_channels)


def _check(graph: Any, node: Any, side: Any, outputs: set[Any], excluded: set[nn.Module]) -> None:
    """Raises _Unsuitable if a node's outputs (or inputs) cannot be cut."""
    module = node.module
    if _is_output(graph, node, side) and (not node.outputs or node.grad_fn in outputs):
        msg = "the model returns them"
        raise _Unsuitable(msg)
    if module in excluded:
        msg = f"the attention with {graph._module2name[module]} depends on them"
        raise _Unsuitable(msg)
    if not _is_operation(module):
        cut = output_slices if _is_output(graph, node, side) else input_slices
        found = cut(_name(graph, module), module, np.zeros((1, 1), np.int64))
        if isinstance(found, str):
            raise _Unsuitable(found)


def _is_operation(module: object) -> bool:
    """Whether it is an operation of the graph and not a module of the model."""
    return type(module).__module__ == "torch_pruning.ops"


def _name(graph: Any, module: Any) -> str:
    name = graph._module2name.get(module, "")
    return str(graph._param_to_name.get(module, name) if isinstance(module, nn.Parameter) else name)


def _structure(graph: Any, layer: nn.Module, reached: Reached) -> Structure:
    """The structure whose units are the outputs of a layer."""
    units = len(reached[graph.module2node[layer], True])
    members: list[Member] = []
    attributes: list[Attribute] = []
    kind: Kind = "neurons"
    for (node, output), units_of in reached.items():
        if _is_operation(node.module) or not units_of:
            continue
        if not is_linear(node.module):
            kind = "channels"
        name = _name(graph, node.module)
        cut = output_slices if output else input_slices
        found = cut(name, node.module, _by_unit(name, units, units_of))
        if isinstance(found, str):
            raise _Unsuitable(found)
        members += found[0]
        attributes += found[1]
    return Structure(_name(graph, layer), kind, units, tuple(members), tuple(attributes))


def _by_unit(name: str, units: int, units_of: dict[int, int]) -> NDArray[np.int64]:
    """(units, width): the indices that belong to each unit, in ascending order."""
    indices = np.array(sorted(units_of), np.int64)
    owners = np.array([units_of[int(i)] for i in indices], np.int64)
    if len(indices) % units or (np.bincount(owners, minlength=units) != len(indices) // units).any():
        msg = f"{name} does not have the same share of each"
        raise _Unsuitable(msg)
    return indices[np.argsort(owners, kind="stable")].reshape(units, -1)


def _graph(model: nn.Module, run: Callable[[], Any]) -> tuple[Any, set[Any]]:
    """Torch-Pruning's graph of a run, and the operations whose results the model returns."""
    torch_pruning, base = _library()

    class Conv1DPruner(base):  # type: ignore[misc,valid-type] # of a module without types
        """Describes Hugging Face's Conv1D to the graph; cuts nothing."""

        def prune_out_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
            raise NotImplementedError

        def prune_in_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
            raise NotImplementedError

        def get_out_channels(self, layer: Any) -> int:
            return int(layer.weight.shape[1])

        def get_in_channels(self, layer: Any) -> int:
            return int(layer.weight.shape[0])

    returned: set[Any] = set()

    def forward(*_: object) -> list[Tensor]:
        leaves = [leaf for leaf in pytree.tree_leaves(run()) if isinstance(leaf, Tensor)]
        floats = [leaf for leaf in leaves if leaf.grad_fn is not None]
        returned.update(leaf.grad_fn for leaf in floats)
        return floats

    types = {type(module) for module in model.modules() if is_linear(module)} - {nn.Linear}
    customized = {kind: Conv1DPruner() for kind in types if not issubclass(kind, nn.Linear)}
    graph = torch_pruning.DependencyGraph()
    with _traced(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph.build_dependency(
                model, None, forward_fn=forward, customized_pruners=customized, verbose=False
            )
        except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            msg = (
                f"model: expected one whose dependencies Torch-Pruning finds; got {type(error).__name__} "
                f"from it ({error!s:.120}); pass kinds=('heads',), or cut parts of the model by themselves"
            )
            raise ValueError(msg) from error
    return graph, returned


def _library() -> tuple[Any, Any]:
    """Torch-Pruning, and its base class for descriptions of layers."""
    try:
        import torch_pruning  # noqa: PLC0415 - an extra
        from torch_pruning.pruner.function import BasePruningFunc  # noqa: PLC0415
    except ImportError as error:
        msg = (
            "sparsam.torch.shrink: expected Torch-Pruning to be installed; got an import error; run pip "
            "install 'sparsam[structured]'"
        )
        raise ImportError(msg) from error
    return torch_pruning, BasePruningFunc


@contextmanager
def _traced(model: nn.Module) -> Iterator[None]:
    """Makes parameters require gradients, for autograd's graph, and removes new hooks afterwards."""
    wanted = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    hooks = [(module._forward_hooks, dict(module._forward_hooks)) for module in model.modules()]
    training = [(module, module.training) for module in model.modules()]
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, before in wanted:
            parameter.requires_grad_(before)
        for held, kept in hooks:
            for key in [key for key in held if key not in kept]:
                del held[key]
        for module, flag in training:
            module.training = flag
