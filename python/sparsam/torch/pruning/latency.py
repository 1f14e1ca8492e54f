"""The sparsity of each layer that makes a model fastest at a given loss of quality, both measured."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils import _pytree as pytree

import torch
from sparsam.analysis.density_choice import Step, fastest
from sparsam.config import PruningConfig
from sparsam.inputs.checks import check_function, check_sparsity, expected, positive
from sparsam.inputs.display import printable
from sparsam.reconstruction import obs
from sparsam.report import Readable
from sparsam.statistics import InputStatistics
from sparsam.torch.acceleration.model_runner import removed
from sparsam.torch.layers.packed_weight import from_array, to_array
from sparsam.torch.layers.packing import pack
from sparsam.torch.pruning.calibration import Batch, read_calibration
from sparsam.torch.pruning.prunable import PrunableWeight, check_model, prunable_weights
from torch import Tensor, nn

__all__ = ["LatencyPlan", "latency_plan"]

LEVELS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
_ROUNDS, _SHORT = (5, 200), 0.05  # rounds: least, most, and seconds after which none begins


@dataclass(frozen=True)
class LatencyPlan(Readable):
    """The sparsity of each layer, and a uniform one of equal loss to compare with; `print` shows it.

    Give it to `prune` as `target_sparsity=plan.sparsity, allocation=plan.sparsities`.

    Attributes:
        chosen: Name of a weight -> its sparsity, the seconds of its layer, and the error.
        uniform: The same at the uniform sparsity.
        sizes: Name -> number of weights.
        steps: Name -> all measurements.
    """

    chosen: Mapping[str, Step]
    uniform: Mapping[str, Step]
    sizes: Mapping[str, int]
    steps: Mapping[str, tuple[Step, ...]]

    @property
    def sparsities(self) -> dict[str, float]:
        """Name -> sparsity."""
        return {name: step.sparsity for name, step in self.chosen.items()}

    @property
    def sparsity(self) -> float:
        """The total sparsity of these weights."""
        pruned = sum(round(step.sparsity * self.sizes[name]) for name, step in self.chosen.items())
        return pruned / sum(self.sizes.values())

    @property
    def seconds(self) -> float:
        """The expected time of all layers, in seconds."""
        return sum(step.seconds for step in self.chosen.values())

    @property
    def uniform_seconds(self) -> float:
        """Their time at the uniform sparsity, in seconds."""
        return sum(step.seconds for step in self.uniform.values())

    def within(self, max_error: float) -> LatencyPlan:
        """The plan for another error budget, from the same measurements."""
        return LatencyPlan(fastest(self.steps, max_error), self.uniform, self.sizes, self.steps)

    @property
    def error(self) -> float:
        """The sum of the errors."""
        return sum(step.error for step in self.chosen.values())

    def to_dict(self) -> dict[str, Any]:
        """Returns everything in types of JSON, and the totals."""
        totals = {name: getattr(self, name) for name in ("sparsity", "seconds", "uniform_seconds", "error")}
        return super().to_dict() | totals

    def __str__(self) -> str:
        width = max(map(len, self.chosen))
        lines = [
            f"{printable(name).ljust(width)}  {step.sparsity:>5.0%}  {1e3 * step.seconds:>8.3f} ms  "
            f"error {step.error:.3g}"
            for name, step in self.chosen.items()
        ]
        gain = self.uniform_seconds / self.seconds if self.seconds else 1.0
        lines.append(
            f"{self.sparsity:.1%} in all: {1e3 * self.seconds:.3f} ms, uniform "
            f"{1e3 * self.uniform_seconds:.3f} ms ({gain:.2f} times as fast, in the layers)"
        )
        return "\n".join(lines)


def latency_plan(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    sparsity: float,
    levels: Sequence[float] = LEVELS,
    exclude: Sequence[str] = (),
    calibration_samples: int = 64,
    callback: Callable[[str, Step], object] | None = None,
) -> LatencyPlan:
    """Measures time and error of linear layers at each sparsity, and chooses the fastest of equal error.

    1. *Time*: a layer of each shape is packed at each sparsity, and called with as many rows as in the first
        batch, alternating with the dense layer; the faster of the two counts, as in `accelerate`.
    2. *Error*: each weight alone is pruned by `obs` on its inputs, and the first batch's outputs are compared
       with the dense ones: the sum of squared differences over that of squares.
    3. The sparsities with the least total time whose errors add up to at most those of the uniform sparsity
       are found exactly (`sparsam.analysis.density_choice`).

    Args:
        model: As for `prune`; put in eval mode during the call.
        calibration: As for `prune`. The first batch should have the size that the model will run with.
        sparsity: The uniform sparsity whose error is the budget; it becomes one of the levels.
        levels: The sparsities to measure; 0 is always included.
        exclude: As in `PruningConfig`.
        calibration_samples: How many rows of the calibration to use.
        callback: Called with each measurement.

    Returns:
        The plan, for `prune(model, target_sparsity=plan.sparsity, allocation=plan.sparsities)`.

    Raises:
        ValueError: The calibration reaches no linear layer to prune, or the model does not accept it; a level
            is outside [0, 1].
        TypeError: `model` is not a module, or `callback` not a function.
    """
    check_model(model)
    check_function("callback", callback, optional=True)
    check_sparsity("sparsity", sparsity)
    exclude = PruningConfig(exclude=exclude).exclude
    if isinstance(levels, str) or not isinstance(levels, Iterable):
        raise ValueError(expected("levels", levels, "sparsities", "pass (0.5, 0.8), say"))
    grid = sorted({0.0, sparsity, *(check_sparsity("levels", level) for level in levels)})
    most = positive("calibration_samples", calibration_samples)
    batches = read_calibration(model, calibration, most)
    weights = [w for w in prunable_weights(model, exclude=exclude)[0] if w.kind == "linear"]
    with _evaluated(model):
        seen = _LayerInputs(model, weights, batches)
        weights = [weight for weight in weights if seen.rows.get(weight.name)]
        if not weights:
            msg = "calibration: expected inputs that reach a linear layer; got none that do; prune otherwise"
            raise ValueError(msg)
        wanted = _outputs(model, batches[0])
        times: dict[Any, dict[float, float]] = {}
        steps: dict[str, tuple[Step, ...]] = {}
        for weight in weights:
            tensor = weight.parameter
            key = tuple(tensor.shape), weight.transposed, tuple(seen.rows[weight.name]), tensor.dtype
            if key not in times:
                times[key] = _seconds(weight, seen.rows[weight.name], grid)
            found = []
            for level in grid:
                error = _error(model, weight, seen.statistics[weight.name], level, batches[0], wanted)
                found.append(Step(level, times[key][level], error))
                if callback is not None:
                    callback(weight.name, found[-1])
            steps[weight.name] = tuple(found)
    uniform = {name: found[grid.index(sparsity)] for name, found in steps.items()}
    budget = sum(step.error for step in uniform.values())
    sizes = {weight.name: weight.parameter.numel() for weight in weights}
    return LatencyPlan(fastest(steps, budget), uniform, sizes, steps)


class _NotFiniteError(ValueError):
    """The inputs of a layer are not finite, although the model runs."""


class _LayerInputs:
    """The moments of layers' inputs, and how many rows the first batch has for each."""

    def __init__(self, model: nn.Module, weights: Sequence[PrunableWeight], batches: Sequence[Batch]) -> None:
        self.rows: dict[str, list[int]] = {}
        self.statistics: dict[str, InputStatistics] = {}

        def watch(weight: PrunableWeight, batch: Batch, *, first: bool) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = (args[0] if args else next(iter(kwargs.values()))).detach()
                rows = x.reshape(-1, x.shape[-1])
                if first:
                    self.rows.setdefault(weight.name, []).append(len(rows))
                mask = batch.row_mask(x.shape[:-1])
                kept = rows if mask is None else rows[mask.reshape(-1)]
                known = self.statistics.setdefault(weight.name, InputStatistics(x.shape[-1]))
                try:
                    known.update(kept.float().numpy())
                except ValueError as error:
                    msg = f"weight {weight.name!r}: expected finite activations; got {error}; leave it out"
                    raise _NotFiniteError(msg) from error

            return weight.module.register_forward_pre_hook(hook, with_kwargs=True)

        for i, batch in enumerate(batches):
            with removed(watch(weight, batch, first=i == 0) for weight in weights):
                try:
                    _outputs(model, batch)
                except _NotFiniteError:
                    raise
                except Exception as error:
                    wanted = "inputs that the model runs with"
                    got = f"{type(error).__name__}: {str(error)[:120]}"
                    msg = f"calibration: batch {i}: expected {wanted}; got {got}; correct them"
                    raise ValueError(msg) from error


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode, without gradients, for the duration of the context."""
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, flag in training:
            module.training = flag


def _outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    leaves = pytree.tree_leaves(model(*batch.args, **batch.kwargs))
    return [x.float() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def _pruned(weight: PrunableWeight, statistics: InputStatistics, level: float) -> NDArray[Any]:
    """The weight pruned by `obs`, as it is stored."""
    array = to_array(weight.parameter.detach())
    if weight.transposed:
        array = np.ascontiguousarray(array.T)
    found = obs(array, statistics, sparsity=level, name=weight.name).weights
    return np.ascontiguousarray(found.T) if weight.transposed else found


def _error(
    model: nn.Module,
    weight: PrunableWeight,
    statistics: InputStatistics,
    level: float,
    batch: Batch,
    wanted: Sequence[Tensor],
) -> float:
    """The error from pruning one weight: the relative squared difference of the model's outputs."""
    if level == 0:
        return 0.0
    parameter = weight.parameter
    before = parameter.detach().clone()
    try:
        parameter.copy_(from_array(_pruned(weight, statistics, level)))
        got = _outputs(model, batch)
    finally:
        parameter.copy_(before)
    off = sum(float((a - b).square().sum()) for a, b in zip(got, wanted, strict=True))
    whole = sum(float(b.square().sum()) for b in wanted)
    error = off / whole if whole else off
    return error if math.isfinite(error) else 1e300


def _seconds(weight: PrunableWeight, rows: Sequence[int], grid: Sequence[float]) -> dict[float, float]:
    """The time of all calls of a layer at each sparsity, in seconds, dense where that is faster."""
    layer: Any = copy.deepcopy(weight.module)
    width = layer.weight.shape[0 if weight.transposed else 1]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(n, width, generator=generator).to(layer.weight.dtype) for n in rows]
    dense = _time(layer, inputs)
    found = {}
    for level in grid:
        packed: Any = copy.deepcopy(weight.module)
        keep = torch.rand(packed.weight.shape, generator=generator) >= level
        packed.weight.mul_(keep)
        pack(packed, batches=tuple(set(rows)))
        # Noise only adds time, and a sparser layer is not slower: the minimum so far counts.
        found[level] = dense = min(dense, _time(packed, inputs))
    return found


def _time(layer: nn.Module, inputs: Sequence[Tensor]) -> float:
    """The shortest of several runs, after one to warm up."""
    best, end = math.inf, time.perf_counter() + _SHORT
    for number in range(_ROUNDS[1] + 1):
        start = time.perf_counter()
        for x in inputs:
            layer(x)
        if number:
            best = min(best, time.perf_counter() - start)
        if number >= _ROUNDS[0] and time.perf_counter() > end:
            break
    return best
