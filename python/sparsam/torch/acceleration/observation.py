"""Observation of the dense model: its outputs, the inputs of its layers, and what follows them."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import torch
from sparsam.torch.acceleration.candidate_layers import Candidate, Place, has_hooks
from sparsam.torch.acceleration.fusion import Follower, recognise_activation
from sparsam.torch.acceleration.installation import fast_paths_off
from sparsam.torch.acceleration.model_runner import ModelRunner, removed
from torch import Tensor, nn

__all__ = ["Observation", "observe", "observe_sequences"]

_FUNCTION = 0  # stands for the reader of an output that is a function, not a module
_ABOUT = (torch.Size, torch.dtype, torch.device, torch.layout, bool, int)


@dataclass(frozen=True)
class Observation:
    """The observations while the dense model ran the examples.

    Attributes:
        outputs: The model's outputs for each example.
        calls: Name of a layer -> shape of its input, or of the query of attention -> number of calls. The
            shape is None for a call with anything but one plain tensor, named `input` if at all.
        to_itself: Names of the attention layers whose query is always also the key and the value.
        followers: Activations that could be fused into layers.
        autocast: Whether some layer was called under autocast.
    """

    outputs: Sequence[Any]
    calls: Mapping[str, Counter[Any]]
    to_itself: frozenset[str]
    followers: tuple[Follower, ...]
    autocast: bool


def observe(
    model: nn.Module,
    runner: ModelRunner,
    found: Sequence[Candidate],
    where: Mapping[int, Sequence[Place]],
) -> Observation:
    """Runs the model twice: as it is, and with everything watched, without its fast paths.

    Args:
        model: The dense model.
        runner: Runs it.
        found: The layers to watch.
        where: The places of modules in the model, as `candidates.places` finds them.
    """
    outputs = runner.first_outputs()
    trace = _Trace({id(candidate.layer): candidate.name for candidate in found})
    with fast_paths_off(model), removed(trace.watch(model)), _Functions(trace):
        runner.outputs()
    followers = []
    for module, layers in trace.followers():
        if id(module) in where and not has_hooks(module) and (activation := recognise_activation(module)):
            followers.append(Follower(module, activation, layers))
    return Observation(outputs, trace.calls, trace.to_itself(), tuple(followers), trace.autocast)


def observe_sequences(
    model: nn.Module, found: Sequence[Candidate], where: Mapping[int, Sequence[Place]]
) -> tuple[Follower, ...]:
    """The activations right after a layer in an `nn.Sequential`, which need no run to be found."""
    names = {id(candidate.layer): candidate.name for candidate in found}
    followers = []
    for parent in model.modules():
        if type(parent) is not nn.Sequential:
            continue
        for layer, module in itertools.pairwise(parent):
            alone = id(layer) in names and len(where[id(layer)]) == len(where[id(module)]) == 1
            if alone and not has_hooks(module) and (activation := recognise_activation(module)):
                followers.append(Follower(module, activation, (names[id(layer)],)))
    return tuple(followers)


class _Trace:
    """The inputs of layers, and the modules that use their outputs."""

    def __init__(self, layers: Mapping[int, str]) -> None:
        self._layers = layers  # names by id
        self.calls: dict[str, Counter[Any]] = {name: Counter() for name in layers.values()}
        self._outputs: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}  # by id: (tensor, layer, call)
        self._layer_calls: Counter[int] = Counter()
        self._module_calls: Counter[int] = Counter()
        self._modules: dict[int, nn.Module] = {}
        self._readers: dict[tuple[int, int], list[int]] = defaultdict(list)  # of a (layer, call)
        self._sole: Counter[int] = Counter()  # calls with an output and no other argument
        self._to_itself: Counter[int] = Counter()  # calls of attention with one tensor
        self.autocast = False
        self._depth = 0  # how many of the modules run

    def watch(self, model: nn.Module) -> Iterator[Any]:
        for module in model.modules():
            leaf = not any(True for _ in module.children()) or id(module) in self._layers
            if leaf and not isinstance(module, torch.jit.ScriptModule):
                yield module.register_forward_pre_hook(self._called, with_kwargs=True)
                yield module.register_forward_hook(self._returned)

    def to_itself(self) -> frozenset[str]:
        """The attention layers that are only called with one tensor for queries, keys and values."""
        calls = self._to_itself.items()
        return frozenset(self._layers[key] for key, n in calls if n == self._module_calls[key])

    def followers(self) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
        """Modules that are called with nothing but outputs of layers, and those layers.

        Each call of such a layer is followed by one of the module, and no other module, nor a function, gets
        its output.
        """
        fed: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
        for (layer, call), readers in self._readers.items():
            if len(readers) == 1 and readers[0] != _FUNCTION:
                fed[readers[0]][layer].add(call)
        for reader, layers in fed.items():
            complete = all(len(calls) == self._layer_calls[layer] for layer, calls in layers.items())
            every = sum(map(len, layers.values())) == self._module_calls[reader] == self._sole[reader]
            if complete and every and reader not in self._layers:
                yield self._modules[reader], tuple(self._layers[layer] for layer in layers)

    def used(self, values: Any) -> None:
        """Records that a function read values; inside of a module this does not count."""
        if self._depth == 0:
            for value in pytree.tree_leaves(values):
                self._read(value, _FUNCTION)

    def _read(self, value: Any, reader: int) -> bool:
        known = self._outputs.get(id(value))
        if known is None or known[0]() is not value:
            return False
        self._readers[known[1:]].append(reader)
        return True

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        key = id(module)
        self._modules[key] = module
        self._module_calls[key] += 1
        self._depth += 1
        if key in self._layers:
            inputs = _inputs(module, args, kwargs)
            x = inputs[0] if inputs else None
            shape = tuple(x.shape) if type(x) is Tensor and not x.is_nested else None
            self.calls[self._layers[key]][shape] += 1
            self.autocast |= torch.is_autocast_enabled("cpu")
            if isinstance(module, nn.MultiheadAttention) and all(one is x for one in inputs):
                self._to_itself[key] += 1
        for value in (*args, *kwargs.values()):
            if self._read(value, key):
                self._sole[key] += len(args) == 1 and not kwargs

    def _returned(self, module: nn.Module, _: Any, output: Any) -> None:
        key = id(module)
        self._depth -= 1
        if key not in self._layers:  # what was computed in place is no output of a layer any more
            self._outputs.pop(id(output), None)
            return
        if isinstance(output, Tensor):
            self._outputs[id(output)] = (weakref.ref(output), key, self._layer_calls[key])
        self._layer_calls[key] += 1


def _inputs(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The tensors that a layer multiplies with; none if it is called in an unknown way."""
    if isinstance(module, nn.MultiheadAttention):
        return _attention_inputs(*args, **kwargs)
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return [_recurrent_input(*args, **kwargs)]
    if len(args) + len(kwargs) != 1:
        return []
    return [args[0] if args else kwargs.get("input")]


def _attention_inputs(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> list[Any]:
    return [query, key, value]


def _recurrent_input(input: Any, *_: Any, **__: Any) -> Any:
    """The input; of a packed sequence, its data."""
    return input.data if isinstance(input, PackedSequence) else input


class _Functions(TorchFunctionMode):
    """Tells a trace which tensors functions and methods read, unless they only return shapes and the like."""

    def __init__(self, trace: _Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, _ABOUT):
            self._trace.used((args, kwargs))
        return result
