"""Blocks of a pruned network, trained one after the other towards the outputs of the dense one.

Both networks run side by side from block to block: a block of the dense one sees what the dense network
gives it, and the same block of the pruned one what the blocks before it give that were pruned and trained
already, so that it also learns to make up for their errors (as EBFT does: Guo et al. 2024, arXiv 2402.12419).
Only one block is in memory, with its gradients and the moments of the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils import _pytree as pytree

import torch
from sparsam.inputs.checks import expected, is_number, positive
from sparsam.inputs.system import return_freed_memory
from sparsam.torch.pruning.calibration import Batch
from sparsam.torch.pruning.distillation import distill
from sparsam.torch.pruning.forward_passes import Ended, Gate, Pass, Slots, advance, current_pass, end
from sparsam.torch.pruning.from_files.distilled_blocks import DistilledBlocks
from sparsam.torch.pruning.from_files.model_parts import Part
from sparsam.torch.pruning.from_files.parts_in_turn import PartsInTurn
from sparsam.torch.pruning.group_statistics import split
from sparsam.torch.pruning.hidden_states import first_tensor, unpadded_rows
from sparsam.torch.pruning.prune_plan import PrunePlan
from sparsam.torch.pruning.pruning_report import DistilledBlock
from sparsam.torch.pruning.spilling import spilled
from sparsam.torch.pruning.twins import Twin
from torch import Tensor, nn

__all__ = ["Training", "distill_blocks"]


@dataclass(frozen=True)
class Training:
    """Which blocks are trained, and how long.

    Attributes:
        steps: Of each block; None: no limit.
        seconds: Of all blocks together, in equal shares; None: no limit.
        blocks: The names of the blocks with weights that are pruned; none without limits.
        shared: The names of the Parameters in these that are used outside of their block too, such as a norm
            of all blocks. They are not trained: each block would want others.
    """

    steps: int | None
    seconds: float | None
    blocks: tuple[str, ...]
    shared: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        steps: int | None,
        seconds: float | None,
        model: nn.Module,
        parts: Sequence[Part],
        plan: PrunePlan,
    ) -> Training:
        """The training of a model.

        Raises:
            ValueError: A limit is no number above 0; there are no such blocks; their weights are rounded, or
                are of a dtype too coarse for training.
        """
        if steps is not None:
            positive("distill_steps", steps)
        if seconds is not None and (not is_number(seconds) or not 0 < seconds < math.inf):
            raise ValueError(expected("distill_seconds", seconds, "a time above 0", "raise it"))
        if steps is None and seconds is None:
            return cls(None, None, ())
        if plan.method.values is not None:
            do = "leave one of them out"
            raise ValueError(
                expected("values", plan.method.values, "none with training, which changes them", do)
            )
        names = [
            part.name
            for part in parts
            if part.is_block and any(name.startswith(f"{part.name}.") for name in plan.weights)
        ]
        if not names:
            do = "leave distill_steps and distill_seconds out"
            raise ValueError(expected("model", "none", "blocks with weights to prune", do))
        for block in names:
            for name, one in model.get_submodule(block).named_parameters():
                if one.dtype.itemsize < 4:
                    do = "make it with .float(); files keep their dtypes"
                    got = f"{f'{block}.{name}'!r} in {one.dtype}"
                    msg = f"model: expected one in float32, to be trained; got {got}; {do}"
                    raise ValueError(msg)
        return cls(steps, seconds, tuple(names), frozenset(_shared(model, names)))

    @property
    def share(self) -> float | None:
        """The seconds for one block."""
        return None if self.seconds is None else self.seconds / len(self.blocks)


def distill_blocks(
    twins: Sequence[Twin],
    parts: PartsInTurn,
    batches: Sequence[Batch],
    blocks: DistilledBlocks,
    training: Training,
    repeated: Collection[str],
    folder: Path,
    step: Callable[[int], object],
) -> tuple[list[DistilledBlock], list[str]]:
    """Distils those blocks that are not distilled yet; a block that does not improve stays as it was.

    One batch in ten is not trained with, and its error decides; with fewer than four, that of all.

    Args:
        twins: The pruned network and the dense one.
        parts: Their parts, with the new values of all weights.
        batches: The calibration.
        blocks: The blocks to distil, and those that are done.
        training: How long.
        repeated: The blocks that a pass comes to several times; they are not distilled.
        folder: A folder for activations.
        step: Called with the number of blocks that are done, after each.

    Returns:
        The blocks that were distilled, and the names of those that were not, because a pass calls them
        several times or never.
    """
    slots = Slots(len(batches), frugal=True)
    passes = [[_Recorder(twin.model, batch, i, slots) for i, batch in enumerate(batches)] for twin in twins]
    students, teachers = passes
    for twin in twins:
        for name in blocks.names:
            _record(twin.model.get_submodule(name), name, folder)
    threads = torch.get_num_threads()
    skipped = [name for name in blocks.names if name in repeated]
    left = [name for name in blocks.names if name not in repeated and blocks.outcome(name) is None]
    try:
        for part, waiting in parts.turns([*students, *teachers]) if left else ():
            advance([one for one in waiting if one in teachers])
            if part in left:
                parts.leave_dense(part)
                calls = _calls(part, students, teachers)
                if calls:
                    module = twins[0].model.get_submodule(part)
                    found = _train(module, part, parts, calls, training)
                    values = parts.parameters(part).items()
                    blocks.save(found, {name: one for name, one in values if name not in training.shared})
                    if not found.improved:
                        parts.read_again(part)
                    return_freed_memory()
                else:
                    skipped.append(part)
                left.remove(part)
                step(len(blocks.names) - len(left))
            for one in (*students, *teachers):
                one.calls.pop(part, None)
            advance([one for one in waiting if one in students])
            if not left:
                break
    finally:
        end(students)
        end(teachers)
        torch.set_num_threads(threads)
    parts.close()
    outcomes = [blocks.outcome(name) for name in blocks.names]
    return [outcome for outcome in outcomes if outcome is not None], skipped + left


def _shared(model: nn.Module, blocks: Sequence[str]) -> Iterator[str]:
    """The names of the Parameters in blocks that are used outside of their block too."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for block in blocks:
        for several in names.values():
            inside = [name for name in several if name.startswith(f"{block}.")]
            if len(inside) < len(several):
                yield from inside


@dataclass
class _Call:
    """One call of a block in a pass.

    Attributes:
        args: Its inputs.
        kwargs: Its inputs by keyword.
        output: What it returned, in a file; None in the pruned network, or if it is no tensor.
        times: How often the pass called the block.
    """

    args: Any
    kwargs: Mapping[str, Any]
    output: Tensor | None = None
    times: int = 1


@dataclass(frozen=True)
class _Example:
    """The inputs of a block in the pruned network, and its output in the dense one, for one batch."""

    batch: Batch
    index: int
    given: _Call
    target: Tensor


class _Recorder(Pass):
    """Keeps the calls of blocks that are distilled, and stops before the output layer.

    Attributes:
        calls: Block -> its call.
    """

    def __init__(self, network: nn.Module, batch: Batch, index: int, slots: Slots) -> None:
        super().__init__(network, batch, index, slots)
        self.calls: dict[str, _Call] = {}

    def enter(self, gate: Gate) -> None:
        if gate.head:
            raise Ended
        super().enter(gate)


def _record(block: nn.Module, name: str, folder: Path) -> None:
    """Registers hooks that tell the current pass of the calls of a block, before it waits at its gate."""

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        if isinstance(found := current_pass(), _Recorder):
            times = found.calls[name].times + 1 if name in found.calls else 1
            found.calls[name] = _Call(args, kwargs, times=times)

    def after(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(found := current_pass(), _Recorder) and name in found.calls:
            tensor = first_tensor(output)
            if tensor is not None:  # a copy, since the model may change it in place
                found.calls[name].output = spilled(tensor, folder)

    block.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
    block.register_forward_hook(after)


def _calls(part: str, students: Sequence[_Recorder], teachers: Sequence[_Recorder]) -> list[_Example]:
    """The examples to train a block with; none if a pass calls it several times."""
    found = []
    for index, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        given, wanted = student.calls.get(part), teacher.calls.get(part)
        if wanted is not None and wanted.times > 1:
            return []
        if given is not None and wanted is not None and wanted.output is not None:
            found.append(_Example(student.batch, index, given, wanted.output))
    return found


class _Student(nn.Module):
    """A block as a function of the number of the example, whose output without padding is one column."""

    def __init__(self, block: nn.Module, examples: Mapping[int, _Example]) -> None:
        super().__init__()
        self.block, self._examples = block, examples

    def forward(self, number: Tensor) -> Tensor:
        example = self._examples[int(number)]
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (example.given.args, example.given.kwargs))
        tensor = first_tensor(self.block(*args, **kwargs))
        assert tensor is not None
        return _column(tensor, example)


class _Teacher(nn.Module):
    """What the dense network's block returned, in that form."""

    def __init__(self, examples: Mapping[int, _Example]) -> None:
        super().__init__()
        self._examples = examples

    def forward(self, number: Tensor) -> Tensor:
        example = self._examples[int(number)]
        return _column(example.target, example)


def _column(tensor: Tensor, example: _Example) -> Tensor:
    """The numbers of an output, of which `distill` takes the relative squared difference."""
    return unpadded_rows(tensor, example.batch).reshape(-1, 1)


def _train(
    block: nn.Module, name: str, parts: PartsInTurn, examples: Sequence[_Example], training: Training
) -> DistilledBlock:
    """Trains a block; its zeros stay zero."""
    known = {example.index: example for example in examples}
    student, teacher = _Student(block, known), _Teacher(known)
    apart: list[Tensor] = []
    used: list[Tensor] = []
    for place, one in enumerate(examples):
        chosen = apart if _is_held_out(place, len(examples)) else used
        chosen.append(torch.tensor(one.index))
    judged = apart or used
    before = _error(student, teacher, judged)
    named = parts.parameters(name)
    parameters = list(named.values())
    for own, parameter in named.items():
        changes = parameter.ndim < 2 or parameter.detach().any()  # a weight of zeros only stays so
        parameter.requires_grad_(bool(changes) and own not in training.shared)
    if not any(parameter.requires_grad for parameter in parameters):
        return DistilledBlock(name, 0, before, before)
    try:
        done = distill(student, teacher, used, steps=training.steps, seconds=training.share, layers="outputs")
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    return DistilledBlock(name, done.steps, before, _error(student, teacher, judged))


def _is_held_out(place: int, examples: int) -> bool:
    """Whether an example is not trained with, as its batch is not fitted to; never with few examples."""
    return any(part == 1 and rows == slice(None) for part, rows in split(place, examples, 1))


def _error(student: nn.Module, teacher: nn.Module, numbers: Iterable[Tensor]) -> float:
    """The squared difference of outputs, relative to the squared norm of the dense network's."""
    difference = energy = 0.0
    with torch.no_grad():
        for number in numbers:
            wanted = teacher(number).double()
            difference += float((student(number).double() - wanted).square().sum())
            energy += float(wanted.square().sum())
    return difference / energy if energy else 0.0
