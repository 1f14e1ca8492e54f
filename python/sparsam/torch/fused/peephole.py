"""Shortens a list of steps: activations go into products, sums into the norms after them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from sparsam.torch.fused.program import Step

__all__ = ["READS", "WRITES", "renumbered", "shortened"]

# Where a step has the numbers of the buffers that it reads, and of those that it writes.
READS = {
    "linear": (2,),
    "attention": (1, 2, 3),
    "cached": (1,),
    "rotary": (1, 2, 3),
    "add": (1, 2),
    "layer_norm": (1,),
    "add_layer_norm": (1, 2),
    "rms_norm": (1,),
    "add_rms_norm": (1, 2),
    "activate": (1,),
    "gate": (1, 2),
}
WRITES = {
    "linear": (3,),
    "attention": (4,),
    "cached": (2,),
    "rotary": (4,),
    "add": (3,),
    "layer_norm": (2,),
    "add_layer_norm": (3, 4),
    "rms_norm": (2,),
    "add_rms_norm": (3, 4),
    "activate": (2,),
    "gate": (3,),
}


def shortened(steps: Iterable[Step], outputs: Collection[int]) -> list[Step]:
    """Fewer steps that compute the same outputs; each still writes buffers of its own."""
    found = _needed(list(steps), outputs)
    found = _with_activations(found, outputs)
    return _with_sums(found, outputs)


def renumbered(step: Step, buffers: dict[int, int]) -> Step:
    """A step with other numbers of its buffers."""
    at = {*READS[step[0]], *WRITES[step[0]]}
    return tuple(buffers.get(one, one) if i in at else one for i, one in enumerate(step))


def _needed(steps: Sequence[Step], outputs: Collection[int]) -> list[Step]:
    """Without the steps whose results nobody reads."""
    wanted, found = set(outputs), []
    for step in reversed(steps):
        if any(step[i] in wanted for i in WRITES[step[0]]):
            wanted.update(step[i] for i in READS[step[0]])
            found.append(step)
    return found[::-1]


def _readers(steps: Iterable[Step], outputs: Collection[int]) -> Counter[int]:
    """How often each buffer is read; outputs once more."""
    return Counter([*(step[i] for step in steps for i in READS[step[0]]), *outputs])


def _with_activations(steps: Sequence[Step], outputs: Collection[int]) -> list[Step]:
    """Products compute the activation of their result where nothing else reads that."""
    readers, found = _readers(steps, outputs), list(steps)
    for step in steps:
        if step[0] != "activate":
            continue
        _, x, y, activation = step
        i = next((i for i, one in enumerate(found) if one[0] == "linear" and one[3] == x), None)
        if i is not None and readers[x] == 1 and not found[i][5]:
            found[i] = (*found[i][:3], y, found[i][4], activation)
            found.remove(step)
    return found


def _with_sums(steps: Sequence[Step], outputs: Collection[int]) -> list[Step]:
    """Sums and the norm of one in one step; the norm moves up to the sum."""
    readers, found = _readers(steps, outputs), list(steps)
    for step in steps:
        if step[0] != "add":
            continue
        _, a, b, total = step
        norm = next((s for s in found if s[0] in {"layer_norm", "rms_norm"} and s[1] == total), None)
        if norm is not None:
            kept = total if readers[total] > 1 else -1
            found[found.index(step)] = (f"add_{norm[0]}", a, b, kept, *norm[2:])
            found.remove(norm)
    return found
