"""The order of calls in the dense network: which weights share inputs, which end a residual branch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from weakref import ref

import torch
from sparsam.torch.pruning.activations import ActivationMeter
from sparsam.torch.pruning.calibration import Batch
from sparsam.torch.pruning.forward_passes import Ended, Gate, Pass, Slots, advance, end
from sparsam.torch.pruning.layer_inputs import Inputs
from sparsam.torch.pruning.prunable import PrunableWeight
from sparsam.torch.pruning.tracked_outputs import Rectifier, Residual, Tracked
from sparsam.torch.pruning.unfolded_rows import unfolding
from torch import Tensor, nn

__all__ = ["CallPlan", "Group", "plan_calls"]


@dataclass
class Group:
    """Weights that are multiplied with the same inputs, and are fitted together.

    Attributes:
        names: The weights, in the order of their first calls.
        repeated: Whether one forward pass calls them several times.
    """

    names: list[str]
    repeated: bool = False


@dataclass
class CallPlan:
    """The order in which a network calls its weights.

    Attributes:
        groups: In the order of their first calls.
        residual: The weights whose output is added to something that is computed before them.
        norms: Weight -> the running mean of the batch norm that directly follows.
        rectified: Weight -> the ReLU that its output goes into and nothing else; None where the ReLU's input
            is the sum of a residual branch, so that its zero depends on the other summand.
        repeated: The gates that one forward pass comes to several times.
    """

    groups: list[Group] = field(default_factory=list)
    residual: set[str] = field(default_factory=set)
    norms: dict[str, Tensor] = field(default_factory=dict)
    rectified: dict[str, Rectifier | None] = field(default_factory=dict)
    repeated: set[Gate] = field(default_factory=set)

    def place(self, name: str) -> int:
        """The index of the group that a weight is in."""
        return next(i for i, group in enumerate(self.groups) if name in group.names)


def plan_calls(
    network: nn.Module,
    batches: Sequence[Batch],
    weights: Mapping[str, PrunableWeight],
    move: Callable[[Collection[Pass]], None] = advance,
    meter: ActivationMeter | None = None,
) -> CallPlan:
    """Runs batches through the dense network until every weight has been called.

    Args:
        network: The network.
        batches: The calibration.
        weights: The weights to watch.
        move: Lets passes continue.
        meter: Measures the first of them.

    Raises:
        ValueError: No batch reaches a weight.
    """
    plan, reached = CallPlan(), set[str]()
    for index, batch in enumerate(batches):
        trace = _Trace(network, batch, index, plan, weights, None if index else meter)
        try:
            move([trace])
        finally:
            end([trace])
        trace.complete_plan()
        reached.update(trace.calls)
        if reached.issuperset(weights):
            return plan
    missing = next(name for name in weights if name not in reached)
    msg = (
        f"calibration: expected inputs that reach every weight that is pruned; got none for {missing!r}; "
        "exclude it, or add inputs that reach it"
    )
    raise ValueError(msg)


class _Trace(Pass):
    """A forward pass that does not wait, and adds what it observes to a plan."""

    def __init__(
        self,
        network: nn.Module,
        batch: Batch,
        index: int,
        plan: CallPlan,
        weights: Mapping[str, PrunableWeight],
        meter: ActivationMeter | None,
    ) -> None:
        super().__init__(network, batch, index, Slots(1))
        self._meter = meter
        self._copied = 0
        self._entered = set[Gate]()
        self._weights = weights
        self.calls: Counter[str] = Counter()
        self._plan = plan
        self._known = {name for group in plan.groups for name in group.names}
        self._inputs: list[tuple[ref[Tensor], int, Group]] = []
        self._sums: set[str] = set()
        self._norms: dict[str, Tensor] = {}
        self._rectified: dict[str, Rectifier | None] = {}
        self._totals: dict[str, Tracked] = {}
        self._pending: dict[str, int] = {}
        self._given: dict[str, list[tuple[Tensor, int]]] = {}

    def before(self, name: str, inputs: Callable[[], Inputs], again: Callable[[], Tensor]) -> None:
        del again
        if self._meter is not None:
            kernel = self._weights[name].parameter.shape[2:]
            self._copied = math.prod(kernel) * sum(tensor.nbytes for tensor in inputs())
            self._meter.wait()
        self.calls[name] += 1
        if self.calls[name] > 1 or name in self._known:
            return
        given = inputs()
        self._given[name] = [(tensor, _version(tensor)) for tensor in given]
        if len(given) == 1:
            for known, version, group in self._inputs:
                same = unfolding(self._weights[group.names[0]]) == unfolding(self._weights[name])
                if same and known() is given[0] and _version(given[0]) == version:
                    group.names.append(name)
                    return
        group = Group([name])
        self._plan.groups.append(group)
        if len(given) == 1:
            self._inputs.append((ref(given[0]), _version(given[0]), group))
        # A later call: sums of earlier outputs are no longer expected.
        self._pending.clear()
        self._given = {name: self._given[name]}

    def enter(self, gate: Gate) -> None:
        if gate.head and self.calls.keys() >= self._weights.keys():
            raise Ended  # its outputs are as wide as the vocabulary, and not needed
        super().enter(gate)
        if gate in self._entered:
            self._plan.repeated.add(gate)
        self._entered.add(gate)
        if self._meter is not None:
            self._meter.begin(gate)

    def measured(self) -> AbstractContextManager[object]:
        return nullcontext() if self._meter is None else self._meter

    def after(self, name: str, output: Callable[[], Tensor | None]) -> None:
        if self._meter is not None and (made := output()) is not None:
            self._meter.move(self._copied + 3 * made.nbytes)
            self._meter.wait()
        if self.calls[name] == 1 and name not in self._known and (given := output()) is not None:
            self._pending[name] = self._plan.place(name)
            self.track(name, given)

    def joined(self, tracked: Sequence[Tracked]) -> Tracked:
        last = max(tracked, key=lambda one: self._plan.place(one.name))
        for one in tracked:
            self._rectified.pop(one.name, None)
        return last

    def meets(self, residual: Residual) -> None:
        if self._meter is not None:
            self._meter.wait()
        name = residual.own.name
        self._used(residual.own)
        if name in self._pending:
            del self._pending[name]
            # A pass that waits at the sum computes the output again, so the inputs must not have changed.
            if all(_version(tensor) == version for tensor, version in self._given[name]):
                self._sums.add(name)

    def added(self, name: str, total: Tensor) -> None:
        if self._meter is not None:
            self._meter.wait()
        if name in self._sums and name not in self._totals:
            self._totals[name] = Tracked(name, total)
            self._tracked[id(total)] = self._totals[name]

    def lost(self, tracked: Tracked) -> None:
        self._used(tracked)

    def rectified(self, tracked: Tracked, result: Tensor) -> None:
        self._used(tracked)
        if tracked.name not in self._sums:
            self._rectified[tracked.name] = Rectifier(tracked, torch.zeros(()))
        elif self._is_total(tracked) and not tracked.steps:
            self._rectified[tracked.name] = None
        if result is not tracked.tensor:
            self._tracked[id(tracked.tensor)] = tracked  # another use would end it

    def _used(self, tracked: Tracked) -> None:
        self._rectified.pop(tracked.name, None)
        if tracked.norm is not None and not self._is_total(tracked):
            self._norms[tracked.name] = tracked.norm

    def _is_total(self, tracked: Tracked) -> bool:
        return tracked is self._totals.get(tracked.name)

    def complete_plan(self) -> None:
        """Adds to the plan what is known only at the end of a pass."""
        for group in self._plan.groups:
            group.repeated = group.repeated or any(self.calls[name] > 1 for name in group.names)
            if len(group.names) == 1 and not group.repeated:
                self._plan.residual.update(self._sums.intersection(group.names))
        self._plan.norms.update(self._norms)
        self._plan.rectified.update(
            (name, found)
            for name, found in self._rectified.items()
            if found is not None or name in self._plan.residual
        )


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; unknown for tensors made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version
