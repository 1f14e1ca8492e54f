"""Modules of the packed model as one call of the core each, where that is faster in the model."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sparsam.torch.acceleration import measurement
from sparsam.torch.acceleration.installation import LayerSwap
from sparsam.torch.acceleration.measurement import Budget
from sparsam.torch.acceleration.model_runner import ModelRunner, difference
from sparsam.torch.fused.calls import Call
from sparsam.torch.fused.fused_forward import FusedForward, fused_of
from sparsam.torch.fused.installation import FusedSwitch, find, fuse, seen_calls
from torch import nn

__all__ = ["FusedRow", "agrees", "choose_fused", "fuse_by_name", "fuse_with_slow"]

# The largest difference of a module's outputs, relative to the largest: with float32 and narrower values.
_ORDER, _ORDER_NARROW = 1e-4, 2e-2
_GAIN = 1.01  # of the whole model, at least: less is within what two measurements differ by


@dataclass(frozen=True)
class FusedRow:
    """The modules of a model that can be computed by one call of the core each.

    Attributes:
        modules: Their names; "" for the model itself.
        plain_ms: Milliseconds of the model with packed layers, and with modules that call them; where more
            layers are packed so that modules around them can be fused, without those; None if not timed.
        fused_ms: The same with fused modules.
        swapped: Whether they are fused now.
        reason: Why not; else "".
    """

    modules: tuple[str, ...]
    plain_ms: float | None
    fused_ms: float | None
    swapped: bool
    reason: str = ""

    def __str__(self) -> str:
        number = len(self.modules)
        several = "module" if number == 1 else "modules"
        if self.plain_ms is None or self.fused_ms is None:
            return f"no module is: {self.reason}"
        times = f"the model takes {self.fused_ms:,.2f} ms with that, {self.plain_ms:,.2f} without"
        if self.swapped:
            return f"{number} {several} as one call of the core each: {times}"
        return f"no module is: {self.reason}; {times}"


def choose_fused(
    model: nn.Module,
    runner: ModelRunner,
    swap: LayerSwap,
    names: Collection[str],
    *,
    tolerance: float,
    budget: Budget,
) -> FusedRow | None:
    """Fuses the modules of the packed model where they compute the same and it is faster.

    Args:
        model: The model.
        runner: Runs it.
        swap: Its packed layers; receives the fused modules if these win, and is packed in the end.
        names: The layers that win.
        tolerance: The largest accepted difference of an output, relative to the largest output.
        budget: For all measurements.

    Returns:
        What was found; None where no module can be fused.
    """
    modules, reason = _fuse(model, runner, swap, names, tolerance)
    if not modules:
        return None
    if swap.fused is None:
        return FusedRow(modules, None, None, swapped=False, reason=reason)
    seconds = measurement.fused_times(runner, swap.fused, budget)
    won = seconds[0] >= _GAIN * seconds[1]
    if not won:
        swap.detach_fused()
    plain_ms, fused_ms = (1e3 * s for s in seconds)
    return FusedRow(modules, plain_ms, fused_ms, won, "" if won else f"gain under {_GAIN:g}")


def fuse_with_slow(
    model: nn.Module,
    runner: ModelRunner,
    swap: LayerSwap,
    names: Collection[str],
    slow: Collection[str],
    *,
    tolerance: float,
    budget: Budget,
) -> tuple[tuple[str, ...], FusedRow | None]:
    """Packs layers that do not win by themselves as well, where the modules around them win as a whole.

    A module with one dense layer cannot be fused.

    Args:
        model: The model.
        runner: Runs it.
        swap: Its packed layers, and the modules that are fused so far; receives others if these win.
        names: The layers that win.
        slow: Those that do not.
        tolerance: As of `choose_fused`.
        budget: For all measurements.

    Returns:
        The layers to pack, and what was found; None where nothing changed.
    """
    before = swap.fused
    swap.detach_fused()
    modules, _ = _fuse(model, runner, swap, (*names, *slow), tolerance)
    inside = {name for name in slow if any(not one or name.startswith(f"{one}.") for one in modules)}
    after, more = swap.fused, tuple(name for name in swap.layers if name in names or name in inside)

    def show(wider: bool) -> None:
        swap.detach_fused()
        swap.fused = after if wider else before
        swap.show(more if wider else names)

    if after is None or not inside:
        show(wider=False)
        return tuple(names), None
    seconds = measurement.wider_times(runner, lambda wider: show(wider=wider), budget)
    won = seconds[0] >= _GAIN * seconds[1]
    show(wider=won)
    if not won:
        return tuple(names), None
    plain_ms, fused_ms = (1e3 * s for s in seconds)
    return more, FusedRow(modules, plain_ms, fused_ms, swapped=True)


def _fuse(
    model: nn.Module, runner: ModelRunner, swap: LayerSwap, names: Collection[str], tolerance: float
) -> tuple[tuple[str, ...], str]:
    """Fuses the modules that can be with these layers packed; returns them, and why they are not fused."""
    swap.show(names)
    with seen_calls(model) as calls:
        outputs = runner.outputs()
    found = find(model, calls, agrees)
    if not found:
        return (), ""
    swap.fused = FusedSwitch(found)
    swap.show(names)
    apart = difference(runner.outputs(), outputs)
    if apart is not None and apart <= tolerance:
        return tuple(found), ""
    swap.detach_fused()
    what = "no output can be compared" if apart is None else f"outputs differ by {apart:.1e} of the largest"
    return tuple(found), what


def fuse_by_name(model: nn.Module, calls: Mapping[str, Sequence[Call]]) -> None:
    """Fuses the modules of these names, as they were when they were saved.

    Their steps are found again, and compared with what the modules compute: nothing is taken from a file but
    the names, and how to call them.

    Warns:
        UserWarning: There is no such module, or it is none that can be fused: it computes the same itself.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, forms in calls.items():
        module = modules.get(name)
        found = None
        if module is not None and fused_of(module) is None:
            with _evaluating(module):
                found = fuse(module, forms)
                found = found if found is not None and agrees(found) else None
                FusedSwitch({} if found is None else {name: found}).show(fused=True)
        if found is None:
            got = "none" if module is None else f"a {type(module).__name__} that is not"
            warnings.warn(
                f"fused module {name!r}: expected one that the core computes as a whole, as in the saved "
                f"model; got {got}; it computes the same more slowly: use the versions of libraries that the "
                "model was saved with",
                UserWarning,
                stacklevel=2,
            )


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module into eval mode, for the time of the block."""
    flags = [(one, one.training) for one in module.modules()]
    try:
        for one, _ in flags:
            one.training = False
        yield
    finally:
        for one, training in flags:
            one.training = training


@torch.no_grad()
def agrees(fused: FusedForward) -> bool:
    """Whether the steps of a module compute what the module does, for random rows."""
    module: Any = fused.module
    for program in fused.programs:
        lead = (*program.call.sizes[0], *(2,) * (program.call.axes - 3))[-(program.call.axes - 1) :]
        args, kwargs = program.call.example(lead)
        narrow = any(part.weight.packed.dtype != torch.float32 for part in program.parts)
        try:
            found = fused.run(tuple(args), kwargs)
        except ValueError:  # steps that do not fit together
            return False
        if found is NotImplemented:
            return False
        apart = difference(found, type(module).forward(module, *args, **kwargs))
        if apart is None or apart > (_ORDER_NARROW if narrow else _ORDER):
            return False
    return True
