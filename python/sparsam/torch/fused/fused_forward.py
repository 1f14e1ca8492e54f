"""The forward of a fused module: its steps in one call of the core, or its own forward."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch._C import _len_torch_function_stack
from torch.compiler import is_compiling

import torch
from sparsam import _core
from sparsam.torch.fused import results
from sparsam.torch.fused.calls import Slot, key_of
from sparsam.torch.fused.guards import Guard, Vectors
from sparsam.torch.fused.program import Program, Step
from sparsam.torch.fused.reads import FUSED, Dependencies
from sparsam.torch.layers.products import is_plain
from torch import Tensor, is_autocast_enabled, is_grad_enabled, nn

__all__ = ["FusedForward", "Ready", "forward", "fused_of", "scratch"]

_LONGEST = 512  # positions of attention whose scores stay in the L2 cache, see `layers.attention`
_KEPT = 64  # batches whose steps are kept
_memory = threading.local()


class FusedForward:
    """What a fused module computes with.

    Attributes:
        module: The module.
        programs: Its steps, for each form of its calls.
        depends: What these depend on.
    """

    def __init__(self, module: nn.Module, programs: Sequence[Program], depends: Dependencies) -> None:
        self.module = module
        self.programs = tuple(programs)
        self.depends = depends
        self._bound: tuple[dict[Any, Ready], Guard | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_bound": None}

    def fits(self) -> bool:
        """Whether all weights and modules are those that the steps were found with."""
        return all(read.holds() for read in self.depends.reads if read.table)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the module returns; NotImplemented if this call is not one that the steps are for."""
        ready, guard = self._bound or self._bind()
        try:
            one = ready.get(key_of(args, kwargs))
        except TypeError:  # an argument that is no constant
            return NotImplemented
        if one is None:
            return NotImplemented
        values = (*args, *kwargs.values())
        rows = one.rows(values)
        if rows is None:
            return NotImplemented
        if guard is None or not guard.holds():
            ready, guard = self._bind()
            if guard is None:
                return NotImplemented
            one = ready[one.program.call.key]
        if is_grad_enabled() and one.trains(rows):
            return NotImplemented
        return one.run(rows, values)

    def _ready(self, program: Program) -> Ready:
        return Ready(program)

    def _bind(self) -> tuple[dict[Any, Ready], Guard | None]:
        """Makes everything ready that depends on the present state of the module."""
        contents = [part.weight._content for program in self.programs for part in program.parts]
        ready = {program.call.key: self._ready(program) for program in self.programs}
        self._bound = bound = ready, Guard.of(self.depends, contents)
        return bound


class Ready:
    """A program with the matrices of the core."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._vectors = Vectors(program.vectors)
        self._weights = [part.weight._content.weight for part in program.parts]
        self._matrices = [w.parts[p.index] for w, p in zip(self._weights, program.parts, strict=True)]
        self._axes = program.call.axes
        self._inputs = [(i, buffer, program.widths[buffer]) for i, buffer in program.inputs]
        self._attends = program.attends
        self._mask = program.mask
        self._results = tuple(dict.fromkeys(results.buffers(program.returns)))
        self._steps: dict[int, Any] = {}

    def rows(self, values: Sequence[Any]) -> list[Tensor] | None:
        """The tensors of rows among the arguments; None if they are not what the core reads."""
        found: list[Tensor] = []
        shape: Any = None
        for i, _, width in self._inputs:
            x = values[i]
            if x.dtype is not torch.float32 or not x.is_cpu or not x.is_contiguous():
                return None
            own = x.shape
            if len(own) != self._axes or own[-1] != width or (shape is not None and own[:-1] != shape):
                return None
            shape = own[:-1]
            found.append(x)
        if not shape.numel() or (self._attends and shape[1] > _LONGEST):
            return None
        usual = is_plain(found[0]) and not _len_torch_function_stack() and not is_autocast_enabled("cpu")
        return found if usual and not any(x.is_neg() for x in found[1:]) else None

    def trains(self, rows: Sequence[Tensor]) -> bool:
        """Whether the result should have a gradient."""
        program = self.program
        return (
            any(x.requires_grad for x in rows)
            or any(vector.tensor.requires_grad for vector in program.vectors)
            or any(part.weight._content.trainable for part in program.parts)
        )

    def run(self, rows: Sequence[Tensor], values: Sequence[Any]) -> Any:
        """What the module returns; NotImplemented if the core does not read a vector or the mask."""
        addresses = self._vectors.addresses()
        if addresses is None:
            return NotImplemented
        first = rows[0]
        lead = first.shape[:-1]
        count = lead.numel()
        sequences, positions = lead if self._attends else (count, 1)
        mask: Any = None
        if self._mask >= 0:
            slot = self.program.call.slots[self._mask]
            mask = _mask(values[self._mask], slot, sequences, self.program.heads, positions)
            if mask is None:
                return NotImplemented
        steps = self._made(count)
        widths = self.program.widths
        given = [(one[1], x.data_ptr()) for one, x in zip(self._inputs, rows, strict=True)]
        made = {buffer: first.new_empty((*lead, widths[buffer])) for buffer in self._results}
        given += [(buffer, y.data_ptr()) for buffer, y in made.items()]
        memory = scratch(steps.scratch(sequences, positions))
        shown = None if mask is None else mask[1]
        steps.run(sequences, positions, given, addresses, shown, memory.data_ptr(), memory.numel())
        return results.build(self.program.returns, made)

    def _made(self, count: int) -> Any:
        """What `_make` returns, made once for each number of rows."""
        steps = self._steps.get(count)
        if steps is None:
            if len(self._steps) >= _KEPT:
                self._steps.clear()
            self._steps[count] = steps = self._make(count)
        return steps

    def _make(self, count: int) -> Any:
        """The steps of the core for a number of rows."""
        return self._compiled(self.program.steps, count)

    def _compiled(self, steps: Sequence[Step], count: int) -> Any:
        """Some steps for a number of rows."""
        made: list[tuple[Any, ...]] = []
        for step in steps:
            name, number, *rest = step
            if name == "linear":
                kernel = self._weights[number].kernel(count)
                made.append((name, self._matrices[number], kernel, *rest))
            else:
                made.append(step)
        return _core.Steps(list(self.program.widths), made)


def scratch(needed: int) -> Tensor:
    """Memory of this thread for so many floats."""
    found: Tensor | None = getattr(_memory, "scratch", None)
    if found is None or found.numel() < needed:
        found = _memory.scratch = torch.empty(needed, dtype=torch.float32, device="cpu")
    return found


def _mask(mask: Tensor, slot: Slot, sequences: int, heads: int, positions: int) -> Any:
    """A mask that lives while it is read, and what the core reads of it; None if it cannot."""
    if mask.ndim != 4 or not mask.is_cpu or mask.dtype is not getattr(torch, slot.dtype):
        return None
    if any(known == 1 != n for known, n in zip(slot.shape[:3], mask.shape, strict=False)):
        return None
    if not is_plain(mask) or mask.requires_grad:
        return None
    wanted = (sequences, heads, positions, positions)
    if any(n not in {1, w} for n, w in zip(mask.shape, wanted, strict=True)):
        return None
    shown = mask.expand(wanted)
    shown = shown if shown.stride(3) == 1 else shown.contiguous()
    return shown, (shown.data_ptr(), shown.dtype is torch.bool, tuple(shown.stride()[:3]))


def forward(module: Any, fused: FusedForward, *args: Any, **kwargs: Any) -> Any:
    """The forward of a fused module."""
    if not is_compiling():
        found = fused.run(args, kwargs)
        if found is not NotImplemented:
            return found
    return type(module).forward(module, *args, **kwargs)


vars(forward)[FUSED] = True


def fused_of(module: nn.Module) -> FusedForward | None:
    """What a module computes with, if it is fused."""
    own = vars(module).get("forward")
    found = isinstance(own, partial) and own.func is forward
    return own.args[1] if found else None  # type: ignore[union-attr]
