"""Pruning from the first layer to the last: all batches wait at each layer until it has been fitted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from sparsam.inputs.system import return_freed_memory
from sparsam.torch.pruning.activations import ActivationMeter
from sparsam.torch.pruning.calibration import Batch
from sparsam.torch.pruning.call_plan import Group, plan_calls
from sparsam.torch.pruning.forward_passes import Pass, Slots, advance, current_pass, end
from sparsam.torch.pruning.group_statistics import GroupBatch, GroupStatistics, OtherRows
from sparsam.torch.pruning.layer_inputs import Inputs, watch
from sparsam.torch.pruning.rectified_fits import Shown
from sparsam.torch.pruning.tracked_outputs import Rectifier, Residual, Tracked
from sparsam.torch.pruning.twins import Rows, Twin
from torch import Tensor, nn

if TYPE_CHECKING:
    from sparsam.torch.pruning.from_files.parts_in_turn import PartsInTurn
    from sparsam.torch.pruning.layer_fits import NewLayer

__all__ = ["LayerSequence"]


class LayerSequence:
    """The forward passes of all batches through a network that is pruned at the same time.

    A context manager, which ends all passes on exit.

    Attributes:
        groups: The weights in the order of their calls, those with the same inputs together.
        layers: Name -> the weight in the pruned network, with outputs first.
        repeated: The gates that one forward pass comes to several times.
    """

    def __init__(
        self,
        pruned: Twin,
        dense: Twin | None,
        batches: Sequence[Batch],
        parts: PartsInTurn | None = None,
        meter: ActivationMeter | None = None,
        keep: Callable[[Tensor], Tensor] = torch.clone,
    ) -> None:
        """Plans the calls by running the dense network.

        Args:
            pruned: The network to prune, still dense.
            dense: The network whose outputs are the targets; None: each layer's own outputs.
            batches: The calibration.
            parts: Brings the weights of both into memory; None: they are in memory.
            meter: Measures the activations of the first batch.
            keep: Copies outputs of the dense network that are needed later.
        """
        self._batches = batches
        self._parts = parts
        self._move = advance if parts is None else parts.advance
        self._threads = torch.get_num_threads()
        self._pruned, self._dense = pruned, dense
        for twin in (pruned, dense):
            if twin is not None:
                watch(twin.model, twin.weights, current_pass)
        plan = plan_calls(pruned.model, batches, pruned.weights, self._move, meter)
        self.groups = plan.groups
        owners = {
            id(module._buffers["running_mean"]): module
            for module in pruned.model.modules()
            if module._buffers.get("running_mean") is not None
        }
        self.layers = {
            name: Rows(weight, owners.get(id(plan.norms.get(name))))
            for name, weight in pruned.weights.items()
        }
        self.repeated = plan.repeated
        self._rectified = plan.rectified
        self._fitted: set[str] = set()
        self._residual: Collection[str] = plan.residual if dense is not None else ()
        slots = Slots(len(batches), frugal=parts is not None)
        self._slots = slots
        self._ahead: list[_DensePass] = []
        self._wanted = set[str]()
        if dense is not None:
            self._wanted.update(
                name
                for group in plan.groups
                for name in group.names
                if not group.repeated and pruned.weights[name].kind != "recurrent"
            )
            self._ahead = [
                _DensePass(dense.model, batch, i, slots, self._wanted, self._residual, keep)
                for i, batch in enumerate(batches)
            ]
        self._passes = [
            _PrunedPass(pruned.model, batch, i, slots, self._fitted, self._residual)
            for i, batch in enumerate(batches)
        ]

    def __enter__(self) -> LayerSequence:  # noqa: PYI034 - Self is of Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        end(self._ahead)
        end(self._passes)
        torch.set_num_threads(self._threads)

    def gather(self, group: Group) -> GroupStatistics:
        """Lets all batches continue to a group, and returns its statistics.

        There are no targets if the dense network sends other rows to the group, or none, as routers of
        experts may do.

        Raises:
            ValueError: No batch reaches it, its inputs are not finite, or the model raised an error.
        """
        if self._parts is not None:
            self._reach_part(group, self._parts)
        targets = self._targets(group)
        self._move([one for one in self._passes if one.waits_at is None or one.waits_at in self._fitted])
        if self._parts is not None:
            self._parts.lend(group.names)
        if group.repeated:
            found = self._statistics(group)
            self._gather_all_calls(group, found)
        else:
            try:
                found = self._gather_waiting(group, targets)
            except OtherRows:
                found = self._gather_waiting(group, [])
            else:
                if targets and not found.parts:
                    found = self._gather_waiting(group, [])
        if not found.parts or not found.parts[0][0].count:
            msg = (
                f"calibration: expected inputs that reach weight {group.names[0]!r}; got none, or padding "
                "only; exclude it, or give more batches"
            )
            raise ValueError(msg)
        return found

    def _reach_part(self, group: Group, parts: PartsInTurn) -> None:
        """Lets all passes leave the parts before that of a group, so that those can be released."""
        waiting = [one for one in self._passes if one.waits_at is None or one.waits_at in self._fitted]
        if parts.holds(group.names[0]):
            advance([one for one in waiting if one.begun and one.gate is None])
            return
        for one in self._ahead:
            one.goal = set()
        parts.reach(group.names[0], [*waiting, *self._ahead])

    def _statistics(self, group: Group) -> GroupStatistics:
        return GroupStatistics([self._pruned.weights[name] for name in group.names], len(self._batches))

    def _gather_waiting(
        self, group: Group, targets: Sequence[Mapping[str, Tensor | None]]
    ) -> GroupStatistics:
        """Collects the inputs of the passes that wait at a group, with the targets of each batch, if any."""
        found = self._statistics(group)
        for seen in self._waiting(group, targets):
            found.add(seen)
        return found

    def _waiting(self, group: Group, targets: Sequence[Mapping[str, Tensor | None]]) -> Iterator[GroupBatch]:
        """Yields the inputs, and targets if any, of each pass that waits at a group."""
        names = set(group.names)
        for i, one in enumerate(self._passes):
            if one.waits_at not in names:
                continue
            wanted, stream = _wanted(group, targets[i], one.residual) if targets else ({}, None)
            if targets and len(wanted) < len(names):
                continue
            rectifiers = {}
            for name in wanted:
                if name in self._rectified:
                    known = self._rectified[name]
                    if known is None and one.residual is not None:
                        known = Rectifier(one.residual.own, one.residual.other)
                    if known is not None:
                        rectifiers[name] = known
            yield GroupBatch(one.batch, i, one.inputs, wanted, stream, rectifiers, len(self._batches))

    def rectified(self, group: Group) -> dict[str, Shown]:
        """Name -> the batches again, for weights of a waiting group whose outputs go into a ReLU."""
        targets = [one.captured for one in self._ahead]
        if not targets or group.repeated:
            return {}
        return {
            name: lambda: self._waiting(group, targets) for name in group.names if name in self._rectified
        }

    def put(self, new: NewLayer) -> None:
        """Assigns a weight its new values if it is in memory; otherwise it gets them when it is read."""
        if self._parts is None or self._parts.holds(new.name, lent=True):
            new.put(self.layers[new.name])

    def finish_group(self, group: Group) -> None:
        """Records that a group has its new weights, and releases what they needed."""
        self._fitted.update(group.names)
        if self._parts is not None:
            self._parts.take_back(group.names, used=self._wanted.issuperset(group.names))
        self._wanted.difference_update(group.names)
        for one in self._ahead:
            for name in group.names:
                one.captured.pop(name, None)
        return_freed_memory()

    def _targets(self, group: Group) -> list[Mapping[str, Tensor | None]]:
        """The dense network's outputs for each batch; an empty list without targets."""
        if not self._ahead or not self._ahead[0].wants(group.names):
            return []
        for one in self._ahead:
            one.goal = set(group.names)
        self._move([one for one in self._ahead if not one.goal <= one.captured.keys()])
        return [one.captured for one in self._ahead]

    def _gather_all_calls(self, group: Group, found: GroupStatistics) -> None:
        """Runs the network in its current state, for weights that one pass uses several times."""
        for start in range(0, len(self._batches), self._slots.running):
            part = range(start, min(start + self._slots.running, len(self._batches)))
            passes = [
                _Collector(self._pruned.model, self._batches[i], i, self._slots, group.names[0]) for i in part
            ]
            try:
                self._move(passes)
            finally:
                end(passes)
            for i, one in zip(part, passes, strict=True):
                for inputs in one.inputs:
                    found.add(GroupBatch(one.batch, i, inputs, {}, batches=len(self._batches)))


def _wanted(
    group: Group, captured: Mapping[str, Tensor | None], residual: Residual | None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The target outputs that were captured, and the residual stream they are added to."""
    outputs = {name: captured.get(name) for name in group.names}
    known = {name: output for name, output in outputs.items() if output is not None}
    if residual is None:
        return known, None
    name = residual.own.name
    if name not in known:
        return {}, None
    total = known[name]
    stream = total if total.ndim > 1 and residual.own.norm is None else None
    return {name: residual.wanted(total, residual.other)}, stream


class _DensePass(Pass):
    """Runs until it has the outputs of some weights.

    Attributes:
        goal: The weights.
        captured: Name -> the output, or the residual sum that includes it; None if no sum was found.
    """

    def __init__(
        self,
        network: nn.Module,
        batch: Batch,
        index: int,
        slots: Slots,
        wanted: Collection[str],
        residual: Collection[str],
        keep: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(network, batch, index, slots)
        self._keep = keep
        self.goal: set[str] = set()
        self.captured: dict[str, Tensor | None] = {}
        self._wanted, self._residual = wanted, residual

    def wants(self, names: Sequence[str]) -> bool:
        """Whether it captures these weights."""
        return all(name in self._wanted for name in names)

    def after(self, name: str, output: Callable[[], Tensor | None]) -> None:
        if name not in self._wanted or name in self.captured:
            return
        if name not in self._residual:
            self._capture(name, output())
        elif (given := output()) is not None:
            self.track(name, given)

    def added(self, name: str, total: Tensor) -> None:
        self._capture(name, total)

    def lost(self, tracked: Tracked) -> None:
        self._capture(tracked.name, None)

    def _capture(self, name: str, output: Tensor | None) -> None:
        self.captured[name] = output
        if self.goal and self.goal <= self.captured.keys():
            self.goal = set()
            self.wait()
        elif output is not None:
            self.captured[name] = self._keep(output)  # the model may change it in place


class _PrunedPass(Pass):
    """Waits where a weight that is not fitted yet is used, or at the residual sum that follows, if any.

    Attributes:
        waits_at: The weight at which it waits.
        inputs: The inputs of that weight.
        residual: The residual sum, if it waits there.
    """

    def __init__(
        self,
        network: nn.Module,
        batch: Batch,
        index: int,
        slots: Slots,
        fitted: Collection[str],
        residual: Collection[str],
    ) -> None:
        super().__init__(network, batch, index, slots)
        self.waits_at: str | None = None
        self.inputs: Inputs = ()
        self.residual: Residual | None = None
        self._fitted, self._residual = fitted, residual
        self._pending: dict[str, tuple[Inputs, Callable[[], Tensor]]] = {}

    def before(self, name: str, inputs: Callable[[], Inputs], again: Callable[[], Tensor]) -> None:
        if name in self._fitted:
            return
        if name in self._residual:
            self._pending[name] = (inputs(), again)
        else:
            self._wait_at(name, inputs(), None)

    def after(self, name: str, output: Callable[[], Tensor | None]) -> None:
        if name in self._pending and (given := output()) is not None:
            self.track(name, given)

    def meets(self, residual: Residual) -> None:
        inputs, again = self._pending.pop(residual.own.name)
        self._wait_at(residual.own.name, inputs, residual)
        output = again()
        for step in residual.own.steps:
            output = step(output)
        residual.own.tensor.copy_(output)

    def lost(self, tracked: Tracked) -> None:
        self._pending.pop(tracked.name, None)

    def _wait_at(self, name: str, inputs: Inputs, residual: Residual | None) -> None:
        self.waits_at, self.inputs, self.residual = name, inputs, residual
        self.wait()
        self.waits_at, self.inputs, self.residual = None, (), None


class _Collector(Pass):
    """Does not wait, and keeps the inputs of every call of one weight."""

    def __init__(self, network: nn.Module, batch: Batch, index: int, slots: Slots, name: str) -> None:
        super().__init__(network, batch, index, slots)
        self.inputs: list[Inputs] = []
        self._name = name

    def before(self, name: str, inputs: Callable[[], Inputs], again: Callable[[], Tensor]) -> None:
        del again
        if name == self._name:
            self.inputs.append(tuple(x.clone() for x in inputs()))  # the model may change it in place
