"""Finds the modules of a model that can be fused, and lets them compute with their steps or themselves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from sparsam.torch.fused.calls import Call
from sparsam.torch.fused.decoding_forward import DecodingForward
from sparsam.torch.fused.fused_forward import FusedForward, forward, fused_of
from sparsam.torch.fused.lowering import lower
from sparsam.torch.fused.program import Program
from sparsam.torch.fused.reads import Reads
from torch import nn

__all__ = ["FusedSwitch", "find", "fuse", "fused_modules", "seen_calls", "unfuse"]

_KNOWN = {"torch", "transformers", "sparsam"}
_SINGLE = {"linear", "activate", "layer_norm", "add"}  # what is one call of PyTorch anyway


class FusedSwitch:
    """The modules of a model that can be fused.

    Attributes:
        found: What they compute with, by their names in the model.
    """

    def __init__(self, found: Mapping[str, FusedForward]) -> None:
        self.found = dict(found)
        # The same objects each time: that of a module inside another is among what is compared at each call.
        self._forwards = {name: partial(forward, one.module, one) for name, one in found.items()}

    def show(self, *, fused: bool) -> None:
        """Fuses those that have the weights that their steps were found with, or none."""
        for name, one in self.found.items():
            if fused and one.fits():
                vars(one.module)["forward"] = self._forwards[name]
            elif fused_of(one.module) is not None:
                del vars(one.module)["forward"]


def fused_modules(model: nn.Module) -> dict[str, FusedForward]:
    """The modules of a model that are fused, by name."""
    found = ((name, fused_of(module)) for name, module in model.named_modules())
    return {name: one for name, one in found if one is not None}


def unfuse(model: nn.Module) -> None:
    """Lets all modules compute themselves."""
    for module in model.modules():
        if fused_of(module) is not None:
            del vars(module)["forward"]


@contextmanager
def seen_calls(model: nn.Module) -> Iterator[dict[str, list[Call]]]:
    """The forms in which the modules of a model are called in the block, by name."""
    seen: dict[str, list[Call]] = {}
    odd: set[str] = set()

    def note(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        call = Call.of(args, kwargs)
        if call is None:
            odd.add(name)
        elif call not in seen.setdefault(name, []):
            seen[name].append(call)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            hook = module.register_forward_pre_hook(partial(note, name), with_kwargs=True)
            stack.callback(hook.remove)
        yield seen
    for name in odd:
        seen.pop(name, None)


def find(
    model: nn.Module, calls: Mapping[str, Collection[Call]], good: Callable[[FusedForward], bool]
) -> dict[str, FusedForward]:
    """The largest modules that can be fused, by name.

    Args:
        model: The model, in eval mode.
        calls: The forms of calls of each module.
        good: Whether a fused module computes what it did.
    """
    found: dict[str, FusedForward] = {}
    for name, module in model.named_modules():
        around = [other for outer, other in found.items() if not outer or name.startswith(f"{outer}.")]
        # What computes one position at a time leaves others to the modules in it.
        if not all(isinstance(other, DecodingForward) for other in around):
            continue
        one = fuse(module, calls.get(name, ()))
        if one is None or (around and isinstance(one, DecodingForward)):
            continue
        if good(one):
            found[name] = one
    return found


def fuse(module: nn.Module, calls: Collection[Call]) -> FusedForward | None:
    """A module with its steps for these forms of calls, those that it has steps for; None without any."""
    if not calls or "forward" in vars(module) or not _is_known(module):
        return None
    programs: dict[Any, Program] = {}
    wanted = dict.fromkeys(variant for call in calls for variant in call.variants())
    with torch.random.fork_rng(devices=[]), Reads(module) as reads:
        for call in wanted:
            program = lower(module, call)
            if program is not None:
                programs.setdefault(call.key, program)
    if not programs or not any(map(_gains, programs.values())):
        return None
    depends = reads.dependencies()
    if depends is None:
        return None
    decodes = any(program.cut is not None for program in programs.values())
    kind = DecodingForward if decodes else FusedForward
    return kind(module, tuple(programs.values()), depends)


def _is_known(module: nn.Module) -> bool:
    """Whether it is made of classes of PyTorch and transformers.

    A forward that is followed with a few sizes, masks and flags may do something else with others. Those of
    these libraries were looked at; one of any other class could read whatever it likes.
    """
    return all(type(one).__module__.partition(".")[0] in _KNOWN for one in module.modules())


def _gains(program: Program) -> bool:
    """Whether the steps are more than one call of PyTorch."""
    return len(program.steps) > 1 or program.steps[0][0] not in _SINGLE
