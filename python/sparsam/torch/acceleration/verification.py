"""Checks that a model with packed layers computes the same and is faster; leaves other layers dense."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsam.torch.acceleration import measurement
from sparsam.torch.acceleration.decision import Decision, families
from sparsam.torch.acceleration.fusion import Fusion
from sparsam.torch.acceleration.installation import LayerSwap
from sparsam.torch.acceleration.measurement import Budget
from sparsam.torch.acceleration.model_runner import ModelRunner, difference

__all__ = ["DIFFERS", "Gain", "VerifiedOutputs", "fuse", "keep_what_gains", "try_out"]

DIFFERS = "with it packed, outputs differ"
_MESSAGE = 120  # characters of an error in a report


@dataclass(frozen=True)
class VerifiedOutputs:
    """A run with packed layers.

    Attributes:
        outputs: What the model returned for each example.
        reasons: Name -> why the layer must stay dense.
    """

    outputs: Sequence[Any]
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Gain:
    """The speed-up of the whole model.

    Attributes:
        swap: The layers that are packed in the end.
        before: Seconds of the dense model for all examples.
        after: Seconds with those layers packed.
        slower: Seconds with all layers that win by themselves, if that is not faster than dense; else None.
    """

    swap: tuple[str, ...]
    before: float
    after: float
    slower: float | None = None


def try_out(
    runner: ModelRunner, swap: LayerSwap, reference: Sequence[Any], *, tolerance: float, budget: Budget
) -> VerifiedOutputs:
    """Runs the model with all layers packed, and finds those with which it fails or returns other outputs.

    Args:
        runner: Runs the model.
        swap: The layers; those that must stay dense are removed from it.
        reference: The outputs of the dense model.
        tolerance: The largest accepted difference of an output, relative to the largest output.
        budget: When it is spent, a family of layers is rejected as a whole for any one of them.
    """
    outputs, why = _attempt(runner, swap, tuple(swap.layers), reference, tolerance)
    reasons: dict[str, str] = {}
    if why:
        good: tuple[str, ...] = ()
        for family in families({name: layer.weight.shape for name, layer in swap.layers.items()}):
            _, why = _attempt(runner, swap, good + family, reference, tolerance)
            if not why:
                good += family
                continue
            for name in family:
                one = why
                if len(family) > 1 and budget.left():
                    _, one = _attempt(runner, swap, (*good, name), reference, tolerance)
                if one:
                    reasons[name] = one
                else:
                    good += (name,)
        outputs, _ = _attempt(runner, swap, good, reference, tolerance)
    for name in reasons:
        swap.drop(name)
    return VerifiedOutputs(outputs, reasons)


def fuse(
    runner: ModelRunner,
    swap: LayerSwap,
    fusions: Sequence[Fusion],
    unfused: Sequence[Any],
    *,
    tolerance: float,
) -> None:
    """Fuses the activations whose fusion does not change the outputs.

    Args:
        runner: Runs the model.
        swap: Receives these fusions.
        fusions: The candidates.
        unfused: The outputs of the model with packed layers and no fusion.
        tolerance: The largest accepted difference of an output, relative to the largest output.
    """
    swap.fusions = list(fusions)
    if not fusions or _alike(runner, swap, unfused, tolerance):
        return
    for fusion in fusions:
        swap.unfuse(fusion)
    for fusion in fusions if len(fusions) > 1 else ():
        swap.fusions.append(fusion)
        if not _alike(runner, swap, unfused, tolerance):
            swap.unfuse(fusion)


def keep_what_gains(
    runner: ModelRunner, swap: LayerSwap, decision: Decision, budget: Budget, lookups: Collection[str] = ()
) -> Gain:
    """Times the whole model; while it is not faster, removes the family of layers that saves least.

    Args:
        runner: Runs the model.
        swap: The layers.
        decision: Which of them win by themselves.
        budget: When it is spent, no further family is tried.
        lookups: Those of them that stay packed whatever the time.
    """
    before, after = measurement.model_times(runner, swap, decision.swap, budget)
    if after < before or (lookups and set(decision.swap) <= set(lookups)):
        return Gain(decision.swap, before, after)
    saved = {
        family: sum(decision.times[name].saved for name in family)
        for family in families(
            {name: swap.layers[name].weight.shape for name in decision.swap if name not in lookups}
        )
    }
    rest = sorted(saved, key=lambda family: saved[family])
    while len(rest) > 1 and budget.left():
        rest = rest[1:]
        names = tuple(n for n in decision.swap if n in lookups or any(n in family for family in rest))
        dense, fewer = measurement.model_times(runner, swap, names, budget, again=True)
        if fewer < dense:
            return Gain(names, dense, fewer, after)
    if lookups:
        dense, fewer = measurement.model_times(runner, swap, lookups, budget, again=True)
        return Gain(tuple(lookups), dense, fewer, after)
    return Gain((), before, before, after)


def _attempt(
    runner: ModelRunner, swap: LayerSwap, names: Collection[str], reference: Sequence[Any], tolerance: float
) -> tuple[Sequence[Any], str]:
    """The outputs of the model with these layers packed, and what is wrong with them, "" if nothing."""
    swap.show(names)
    try:
        outputs = runner.outputs()
    except Exception as error:  # whatever the model's own code makes of a packed layer
        text = f"does not run with it packed: {type(error).__name__}: {' '.join(str(error).split())}"
        return (), text if len(text) <= _MESSAGE else f"{text[: _MESSAGE - 3]}..."
    apart = difference(outputs, reference)
    if apart is not None and apart > tolerance:
        return outputs, f"{DIFFERS} by {apart:.1e} of the largest"
    return outputs, ""


def _alike(runner: ModelRunner, swap: LayerSwap, unfused: Sequence[Any], tolerance: float) -> bool:
    outputs, why = _attempt(runner, swap, tuple(swap.layers), unfused, tolerance)
    return not why and difference(outputs, unfused) is not None
