"""What dense and packed layers take, measured in turn, for that other work disturbs both alike."""

from __future__ import annotations

import math
import resource
import statistics
import time

import torch
from sparsam.torch.acceleration.layer_swap import LayerSwap, disable_fast_paths
from sparsam.torch.acceleration.model_runner import ModelRunner
from sparsam.torch.layers.modules import SparseLayer
from torch import Tensor, nn

__all__ = ["Interruptions", "compare", "layer_times", "model_times"]

_LAYERS = (3, 50, 2.0)  # at least and at most so many rounds, and seconds after which no further one begins
_MODEL = (5, 100, 3.0)
_SINGLE = (3, 10_000, 0.1)
_OFTEN = 60  # a second; a process beside ours makes it hundreds
_PATIENCE = 3


class Interruptions:
    """Whether other work takes the CPUs away from this process: then times, of any kind, may mislead."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._before = _switches()

    def many(self) -> bool:
        """Whether, since this object was made, they came more often than on a quiet machine."""
        return _switches() - self._before > _OFTEN * (time.perf_counter() - self._start) + 2


def _switches() -> int:
    """How often the kernel stopped a thread of this process in favour of something else."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


class _Rounds:
    """Counts rounds of a measurement; more of them while other work interferes."""

    def __init__(self, least: int, most: int, seconds: float) -> None:
        self._least, self._most, self._seconds = least, most, seconds
        self._start = time.perf_counter()
        self._interruptions = Interruptions()
        self._done = -1

    def more(self) -> bool:
        """Whether one more is due."""
        self._done += 1
        if self._done < self._least:
            return True
        patience = _PATIENCE if self._interruptions.many() else 1
        return self._done < self._most and time.perf_counter() - self._start < patience * self._seconds


def layer_times(
    model: nn.Module, session: ModelRunner, exchange: LayerSwap
) -> dict[str, tuple[float, float]]:
    """Seconds that each layer of an exchange takes within the model: (dense, packed), the least over rounds.

    Weights then come from where they come from in use: a layer timed alone would find its own in the cache.
    Leaves the packed layers in the model.

    Args:
        model: The model.
        session: Runs it.
        exchange: The layers, each of which ran before in both forms.
    """
    sparse: dict[str, nn.Module] = dict(exchange.layers)
    dense = {name: layer.original for name, layer in exchange.layers.items()}
    best: dict[tuple[str, bool, int], float] = {}
    rounds = _Rounds(*_LAYERS)
    while rounds.more():
        for packed, layers in ((False, dense), (True, sparse)):
            if packed:
                exchange.install()
            else:
                exchange.remove()
                disable_fast_paths(model, everywhere=True)
            for example, found in enumerate(session.layer_seconds(layers)):
                for name, seconds in found.items():
                    key = (name, packed, example)
                    best[key] = min(best.get(key, math.inf), seconds)
    total = {name: [0.0, 0.0] for name in sparse}
    for (name, packed, _), seconds in best.items():
        total[name][packed] += seconds
    return {name: (before, after) for name, (before, after) in total.items()}


def model_times(session: ModelRunner, exchange: LayerSwap) -> tuple[float, float]:
    """Seconds that the model takes for all examples: (without the exchange, with it), medians.

    Leaves the packed layers in the model.
    """
    taken: tuple[list[float], list[float]] = ([], [])
    exchange.remove()
    session.seconds()
    rounds = _Rounds(*_MODEL)
    while rounds.more():
        exchange.remove()
        taken[0].append(sum(session.seconds()))
        exchange.install()
        taken[1].append(sum(session.seconds()))
    return statistics.median(taken[0]), statistics.median(taken[1])


def compare(sparse: SparseLayer, x: Tensor) -> tuple[float, float]:
    """Seconds that a layer takes by itself for one input: (dense, packed), the least of several."""
    best = [math.inf, math.inf]
    # Not called as modules: hooks of torch's pruning would compute the weight anew.
    forwards = (sparse.original.forward, sparse.forward)
    with torch.no_grad(), torch.nn.utils.parametrize.cached():
        for forward in forwards:
            forward(x)
        rounds = _Rounds(*_SINGLE)
        while rounds.more():
            for i, forward in enumerate(forwards):
                start = time.perf_counter()
                forward(x)
                best[i] = min(best[i], time.perf_counter() - start)
    return best[0], best[1]
