"""Which layers stay packed, decided from measurements alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from sparsam.torch.acceleration.measurement import LayerTime, Times

__all__ = ["Decision", "decide", "families"]

_SLOW = "gain under"  # why a layer stays dense


@dataclass(frozen=True)
class Decision:
    """The decision about measured layers.

    Attributes:
        swap: The names of the layers to pack.
        times: The times of all layers, including the activation where it is fused.
        reasons: Name -> why a layer stays dense.
    """

    swap: tuple[str, ...]
    times: Mapping[str, LayerTime]
    reasons: Mapping[str, str]

    @property
    def slow(self) -> tuple[str, ...]:
        """The layers that stay dense because they gain too little by themselves."""
        return tuple(name for name, why in self.reasons.items() if why.startswith(_SLOW))

    def with_swap(self, names: Collection[str]) -> Decision:
        """The same with these layers packed."""
        reasons = {name: why for name, why in self.reasons.items() if name not in names}
        return Decision(tuple(names), self.times, reasons)


def decide(
    times: Times,
    *,
    fused: Iterable[Collection[str]],
    min_gain: float,
    lookups: Collection[str] = (),
) -> Decision:
    """Keeps the layers that win with the activations fused into them, and by more than a lost fast path.

    Args:
        times: The measured times.
        fused: For each activation that can be fused, the layers that it follows; it is fused only if all of
            them are packed.
        min_gain: How many times faster a packed layer must be.
        lookups: Layers that stay packed whatever their time: embeddings, which are packed to save memory.
    """
    found = dict(times.layers)
    reasons: dict[str, str] = {}

    def drop_slow(names: Iterable[str]) -> None:
        for name in names:
            if (
                name not in reasons
                and name not in lookups
                and found[name].dense < min_gain * found[name].packed
            ):
                reasons[name] = f"{_SLOW} {min_gain:g}"

    drop_slow(found)
    for group in fused:
        if any(name in reasons for name in group):
            found |= {name: found[name].alone() for name in group}
            drop_slow(group)
    for owner, lost in times.fast_paths.items():
        packed = [name for name in found if name not in reasons and name not in lookups]
        inside = [name for name in packed if _within(name, owner)]
        if sum(found[name].saved for name in inside) <= lost:
            where = f"of {owner}" if owner else "of the model"
            reasons |= dict.fromkeys(inside, f"saves less than the fast path {where}, which it would lose")
    return Decision(tuple(name for name in found if name not in reasons), found, reasons)


def families(shapes: Mapping[str, object]) -> list[tuple[str, ...]]:
    """Groups similar layers: of one shape, and of one name except for numbers; each alone if all are similar.

    Args:
        shapes: Name -> the shape of the layer, or any other value that is equal for similar layers.
    """
    found: dict[tuple[str, object], list[str]] = {}
    for name, shape in shapes.items():
        found.setdefault((re.sub(r"\d+", "0", name), shape), []).append(name)
    return [tuple(names) for names in found.values()] if len(found) > 1 else [(name,) for name in shapes]


def _within(name: str, owner: str) -> bool:
    return not owner or name.startswith(f"{owner}.")
