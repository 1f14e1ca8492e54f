"""Times of dense and packed layers, measured alternately so that other work disturbs both equally."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sparsam.inputs.system import interruptions
from sparsam.torch.acceleration.installation import LayerSwap, fast_path_owners, fast_paths_off
from sparsam.torch.acceleration.model_runner import ModelRunner, Seconds
from sparsam.torch.fused.installation import FusedSwitch
from sparsam.torch.layers.packing import PackedLayer
from sparsam.torch.transformers_switch import AttentionSwitch
from torch import Tensor, nn

__all__ = [
    "Budget",
    "Interruptions",
    "LayerTime",
    "Times",
    "attention_times",
    "compare",
    "fused_times",
    "layer_times",
    "model_times",
]

# The fewest and the most rounds of a measurement, and its share of the budget.
_LAYERS = (2, 6, 0.4)
_MODEL = (3, 10, 0.4)
_AGAIN = (2, 4, 0.1)
_CHOICE = (3, 60, 0.1)
_SINGLE = (3, 10_000, 1.0)
_OFTEN = 60  # interruptions per second on a quiet machine, at most; another busy process causes hundreds


@dataclass(frozen=True)
class LayerTime:
    """Seconds that a layer takes for all examples.

    Attributes:
        dense: The dense layer, and the activation after it where that can be fused.
        packed: The packed layer, which computes that activation too.
        activation: The part of `dense` that the activation takes; 0 if none can be fused.
    """

    dense: float
    packed: float
    activation: float = 0.0

    @property
    def saved(self) -> float:
        """The seconds that packing saves."""
        return self.dense - self.packed

    def alone(self) -> LayerTime:
        """The times without the fused activation, assuming that it cost the packed layer nothing."""
        return LayerTime(self.dense - self.activation, self.packed)


@dataclass(frozen=True)
class Times:
    """The measured times of layers within the model.

    Attributes:
        layers: Name -> the times of a layer.
        fast_paths: Name of a module -> seconds that its fast path saves, which it loses with a packed layer.
    """

    layers: Mapping[str, LayerTime]
    fast_paths: Mapping[str, float]


class Interruptions:
    """Detects whether other work takes the CPUs from this process, in which case wall-clock times mislead."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._before = interruptions()

    def many(self) -> bool:
        """Whether there were more, since this object was made, than on a quiet machine."""
        return interruptions() - self._before > _OFTEN * (time.perf_counter() - self._start) + 2


class Budget:
    """The seconds that measuring may take in all."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.perf_counter() + seconds
        self._interruptions = Interruptions()

    def left(self) -> bool:
        """Whether any time is left."""
        return time.perf_counter() < self._end

    def rounds(self, least: int, most: int, share: float) -> Iterator[int]:
        """Rounds of a measurement, until it took its share of the budget."""
        end = min(self._end, time.perf_counter() + share * self.seconds)
        for number in range(most):
            if number >= least and time.perf_counter() > end:
                return
            yield number

    def choose(self, seconds: Seconds) -> float:
        """Wall-clock seconds, or CPU seconds if other work has disturbed since the beginning."""
        return seconds.cpu if self._interruptions.many() else seconds.wall


def layer_times(model: nn.Module, runner: ModelRunner, swap: LayerSwap, budget: Budget) -> Times:
    """The times of each layer of a swap within the model, dense and packed, the least over rounds.

    Weights are then read from memory as in real use: a layer timed alone would find its own in the cache.

    Args:
        model: The model.
        runner: Runs it.
        swap: The layers, each of which ran before in both forms.
        budget: For all measurements.
    """
    best = _Best()
    fused = {f"{number}": fusion.replacement for number, fusion in enumerate(swap.fusions)}
    dense = {("dense", name): layer.layer for name, layer in swap.layers.items()}
    dense |= {("activation", number): one.original for number, one in fused.items()}
    packed: dict[tuple[str, str], nn.Module] = {("packed", n): one.layer for n, one in swap.layers.items()}
    packed |= {("place", number): one for number, one in fused.items()}
    owners = fast_path_owners(model, list(swap.layers))
    slow = {("slow", name): owner for name, owner in owners.items()}
    fast = {("fast", name): owner for name, owner in owners.items()}
    for _ in budget.rounds(*_LAYERS):
        swap.show(())
        if fast:
            best.take(runner.module_seconds(fast))
        with fast_paths_off(model):
            best.take(runner.module_seconds(dense | slow))
        swap.show(swap.layers)
        best.take(runner.module_seconds(packed))
    total = {key: budget.choose(seconds) for key, seconds in best.total().items()}
    follows = {name: (number, len(one.into)) for number, one in fused.items() for name in one.into}
    layers = {}
    for name in swap.layers:
        number, sharing = follows.get(name, ("", 1))
        activation = total.get(("activation", number), 0.0) / sharing
        place = total.get(("place", number), 0.0) / sharing
        layers[name] = LayerTime(total["dense", name] + activation, total["packed", name] + place, activation)
    lost = {name: max(0.0, total["slow", name] - total["fast", name]) for name in owners}
    return Times(layers, lost)


def model_times(
    runner: ModelRunner, swap: LayerSwap, names: Collection[str], budget: Budget, *, again: bool = False
) -> tuple[float, float]:
    """Seconds that the model takes for all examples: (dense, with these layers packed).

    Wall-clock medians; if other work disturbs, minima of the CPU time.

    Args:
        runner: Runs the model.
        swap: The layers.
        names: Those to pack.
        budget: For all measurements.
        again: Whether it is a further attempt, with fewer rounds.
    """
    taken: dict[bool, list[Seconds]] = {False: [], True: []}
    for _ in budget.rounds(*(_AGAIN if again else _MODEL)):
        for packed in (False, True):
            swap.show(names if packed else ())
            taken[packed].append(runner.seconds())
    before, after = (_typical(times, budget) for times in taken.values())
    return before, after


def _typical(times: Sequence[Seconds], budget: Budget) -> float:
    """The wall-clock median, or the least CPU time."""
    return budget.choose(Seconds(statistics.median(t.wall for t in times), min(t.cpu for t in times)))


def attention_times(runner: ModelRunner, switch: AttentionSwitch, budget: Budget) -> tuple[float, float]:
    """Seconds that the model takes for all examples: (with PyTorch's attention, with the core's).

    Medians, as of `model_times`; in the end it computes with the core's.

    Args:
        runner: Runs the model, with packed layers.
        switch: The attention.
        budget: For all measurements.
    """
    return _in_turn(runner, lambda core: switch.show(core=core), budget)


def fused_times(runner: ModelRunner, switch: FusedSwitch, budget: Budget) -> tuple[float, float]:
    """Seconds that the model takes for all examples: (with modules that call others, with fused ones).

    Medians, as of `model_times`; in the end modules are fused.

    Args:
        runner: Runs the model, with packed layers.
        switch: The modules.
        budget: For all measurements.
    """
    return _in_turn(runner, lambda fused: switch.show(fused=fused), budget)


def wider_times(runner: ModelRunner, show: Callable[[bool], None], budget: Budget) -> tuple[float, float]:
    """Seconds that the model takes for all examples: (with the layers that win, with more and other modules).

    Medians, as of `model_times`.

    Args:
        runner: Runs the model.
        show: Puts the first (False) or the second into it.
        budget: For all measurements.
    """
    return _in_turn(runner, show, budget)


def _in_turn(runner: ModelRunner, show: Callable[[bool], None], budget: Budget) -> tuple[float, float]:
    """Seconds of the model for all examples: (without, with) what `show` lets it compute with."""
    taken: dict[bool, list[Seconds]] = {False: [], True: []}
    for _ in budget.rounds(*_CHOICE):
        for wanted in (False, True):
            show(wanted)
            taken[wanted].append(runner.seconds())
    before, after = (_typical(times, budget) for times in taken.values())
    return before, after


def compare(
    packed: PackedLayer, activation: nn.Module | None, x: Tensor, seconds: float
) -> tuple[float, float]:
    """Seconds that a layer takes by itself for one input: (dense, packed), the least of several.

    Args:
        packed: The layer; it is packed in the end.
        activation: The activation after the dense layer, which the packed one computes too; or None.
        x: The input.
        seconds: After this time no further round begins.
    """
    # Not called as a module: hooks of torch's pruning would compute the weight again.
    layer: Any = packed.layer
    runs: tuple[Callable[[], Tensor], ...] = (
        (lambda: activation(layer.forward(x))) if activation else (lambda: layer.forward(x)),
        lambda: layer.forward(x),
    )
    turns = (packed.remove, packed.install)
    best = [math.inf, math.inf]
    with torch.no_grad(), torch.nn.utils.parametrize.cached():
        for turn, run in zip(turns, runs, strict=True):
            turn()
            run()
        for _ in Budget(seconds).rounds(*_SINGLE):
            for i, run in enumerate(runs):
                turns[i]()
                start = time.perf_counter()
                run()
                best[i] = min(best[i], time.perf_counter() - start)
    return best[0], best[1]


class _Best:
    """The least times of modules over rounds, for each example."""

    def __init__(self) -> None:
        self._least: dict[tuple[int, tuple[str, str]], Seconds] = {}

    def take(self, examples: list[dict[tuple[str, str], Seconds]]) -> None:
        """Adds a round: for each example, the times by module."""
        for example, found in enumerate(examples):
            for key, seconds in found.items():
                before = self._least.get((example, key), seconds)
                self._least[example, key] = Seconds(*map(min, before, seconds))

    def total(self) -> dict[tuple[str, str], Seconds]:
        """The sums over examples."""
        total: dict[tuple[str, str], Seconds] = defaultdict(lambda: Seconds(0.0, 0.0))
        for (_, key), seconds in self._least.items():
            total[key] = Seconds(total[key].wall + seconds.wall, total[key].cpu + seconds.cpu)
        return total
