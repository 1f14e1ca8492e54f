"""Activations that follow a packed layer: found in a run of the model, recognised by their values."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import torch
from sparsam.torch.acceleration.candidates import Place, has_hooks
from sparsam.torch.acceleration.model_runner import ModelRunner, removed
from sparsam.torch.layers.modules import SparseLayer
from sparsam.torch.layers.operators import ACTIVATIONS
from torch import Tensor, nn

__all__ = ["Fused", "Fusion", "find", "find_in_sequences", "recognise_activation"]

_TOLERANCE = 1e-6
_FUNCTION = 0  # the reader of an output that is no module
_ABOUT = (torch.Size, torch.dtype, torch.device, torch.layout, bool, int)
_FAR = (8.5, 10.5, 13.0, 20.5, 60.0, 200.0, 1e4)  # where clipped activations would show


class Fused(nn.Module):
    """The place of an activation that a packed layer computes: returns its input.

    Attributes:
        original: The activation.
        layers: The packed layers that compute it. Neither it nor they are submodules.
        into: The names that the layers had.
    """

    def __init__(self, original: nn.Module, layers: tuple[SparseLayer, ...], into: tuple[str, ...]) -> None:
        super().__init__()
        self._hidden = (original, layers)  # in a tuple, lest it become a submodule
        self.into = into
        self.training = original.training

    @property
    def original(self) -> nn.Module:
        """The activation."""
        return self._hidden[0]

    @property
    def layers(self) -> tuple[SparseLayer, ...]:
        """The packed layers that compute it."""
        return self._hidden[1]

    def restored(self) -> nn.Module:
        """`original`, in the mode that this module is in."""
        return self.original.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """X itself."""
        return x

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{type(self.original).__name__}, fused into {', '.join(self.into)}"


@dataclass(frozen=True)
class Fusion:
    """An activation that could become part of packed layers.

    Attributes:
        activation: Which one it is.
        replacement: What stands in its place then; knows the module, and the packed layers whose outputs,
            and nothing else, that is called with.
        places: Where it is in the model.
    """

    activation: str
    replacement: Fused
    places: tuple[Place, ...]

    def install(self) -> None:
        """Makes it part of the layers."""
        for layer in self.replacement.layers:
            layer.activation = self.activation
        for parent, attribute in self.places:
            setattr(parent, attribute, self.replacement)

    def remove(self) -> None:
        """Puts everything back."""
        for layer in self.replacement.layers:
            layer.activation = None
        for parent, attribute in self.places:
            setattr(parent, attribute, self.replacement.original)


def recognise_activation(module: nn.Module) -> str | None:
    """The activation that a module computes, in training as in eval mode; None if it is none of ours."""
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return None
    far = [sign * x for x in _FAR for sign in (1, -1)]
    wide: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    x = torch.cat([torch.linspace(-8, 8, 4001, **wide), torch.tensor(far, **wide)])
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        try:
            found = [copy.deepcopy(module).train(mode)(x.clone()) for mode in (False, True)]
        except Exception:  # a module that cannot take such a tensor
            return None
        for name, function in ACTIVATIONS.items():
            wanted = function(x)
            close = _TOLERANCE * wanted.abs().clamp(min=1)
            if name and all(_matches(y, wanted, close) for y in found):
                return name
    return None


def _matches(y: Any, wanted: Tensor, close: Tensor) -> bool:
    return isinstance(y, Tensor) and y.shape == wanted.shape and bool(((y - wanted).abs() <= close).all())


def find(
    model: nn.Module,
    session: ModelRunner,
    layers: Mapping[str, SparseLayer],
    where: Mapping[int, list[Place]],
) -> list[Fusion]:
    """The fusions that a run of the examples shows.

    An activation counts if each of its calls gets the output of a packed layer, the very tensor, and if each
    call of that layer is followed by one of it and no other module, nor a function, gets the tensor.

    Args:
        model: The model, with the packed layers in it.
        session: Runs it.
        layers: The packed layers by name.
        where: The places of modules in the model, as `candidates.places` finds them.
    """
    trace = _Trace(layers)
    with removed(trace.watch(model)), _Functions(trace):
        session.outputs()
    names = {id(layer): name for name, layer in layers.items()}
    fusions = []
    for module, fed_by in trace.followers():
        if id(module) not in where or has_hooks(module):
            continue
        if activation := recognise_activation(module):
            fused = Fused(module, tuple(fed_by), tuple(names[id(layer)] for layer in fed_by))
            fusions.append(Fusion(activation, fused, tuple(where[id(module)])))
    return fusions


class _Trace:
    """Which modules the outputs of packed layers go to."""

    def __init__(self, layers: Mapping[str, SparseLayer]) -> None:
        self._layers = {id(layer): layer for layer in layers.values()}
        self._outputs: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}  # by id: (tensor, layer, call)
        self._layer_calls: Counter[int] = Counter()
        self._module_calls: Counter[int] = Counter()
        self._modules: dict[int, nn.Module] = {}
        self._readers: dict[tuple[int, int], list[int]] = defaultdict(list)  # of a (layer, call)
        self._sole: Counter[int] = Counter()  # calls with an output and no other argument
        self._depth = 0  # how many of the modules run

    def watch(self, model: nn.Module) -> Iterator[Any]:
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule) or any(True for _ in module.children()):
                continue
            yield module.register_forward_pre_hook(self._called, with_kwargs=True)
            yield module.register_forward_hook(self._returned)

    def followers(self) -> Iterator[tuple[nn.Module, list[SparseLayer]]]:
        """Modules that are called with nothing but outputs of layers, and those layers."""
        fed: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
        for (layer, call), readers in self._readers.items():
            if len(readers) == 1 and readers[0] != _FUNCTION:
                fed[readers[0]][layer].add(call)
        for reader, layers in fed.items():
            complete = all(len(calls) == self._layer_calls[layer] for layer, calls in layers.items())
            every = sum(map(len, layers.values())) == self._module_calls[reader] == self._sole[reader]
            if complete and every and reader not in self._layers:
                yield self._modules[reader], [self._layers[layer] for layer in layers]

    def used(self, values: Any) -> None:
        """Notes that a function got values; within a module, that is the module's affair."""
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


class _Functions(TorchFunctionMode):
    """Tells a trace which tensors functions and methods get, unless these only ask for a shape or so."""

    def __init__(self, trace: _Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, _ABOUT):
            self._trace.used((args, kwargs))
        return result


def find_in_sequences(
    model: nn.Module, layers: Mapping[str, SparseLayer], where: Mapping[int, list[Place]]
) -> list[Fusion]:
    """The fusions that need no run: an activation right after a packed layer in an `nn.Sequential`.

    Args:
        model: The model, with the packed layers in it.
        layers: The packed layers by name.
        where: As for `find`.
    """
    names = {id(layer): name for name, layer in layers.items()}
    fusions = []
    for parent in model.modules():
        if type(parent) is not nn.Sequential:
            continue
        children = list(parent._modules.items())
        for (_, layer), (attribute, module) in itertools.pairwise(children):
            if module is None or id(layer) not in names or len(where[id(module)]) != 1 or has_hooks(module):
                continue
            assert isinstance(layer, SparseLayer)
            once = len(where[id(layer.original)]) == 1
            activation = recognise_activation(module) if once else None
            if activation:
                fused = Fused(module, (layer,), (names[id(layer)],))
                fusions.append(Fusion(activation, fused, ((parent, attribute),)))
    return fusions
