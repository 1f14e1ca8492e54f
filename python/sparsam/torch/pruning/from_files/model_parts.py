"""The parts of a model that are in memory one at a time: its blocks, and what lies outside of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

__all__ = ["Part", "find_parts"]

_LISTS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True)
class Part:
    """A module whose weights come into memory together, when its forward begins.

    Attributes:
        name: Its name in the model.
        is_block: Whether it is an element of a list of modules.
    """

    name: str
    is_block: bool


def find_parts(model: nn.Module) -> list[Part]:
    """Returns the parts in the model's order: together they have all parameters but a few.

    Blocks are the elements of the outermost lists of modules. Outside of these, a part is a module as large
    as possible without a block in it, such as embeddings, a norm or a head. Modules around blocks may have
    parameters themselves, which are in no part.

    Raises:
        ValueError: There is no list of modules.
    """
    parts = list(_walk(model, "", set()))
    if not any(part.is_block for part in parts):
        kind = type(model).__name__
        msg = (
            f"model: expected blocks in a list of modules (nn.ModuleList, nn.Sequential); got none in "
            f"{kind}; load it, and call sparsam.torch.prune"
        )
        raise ValueError(msg)
    return parts


def _walk(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[Part]:
    if module in seen or not _has_parameters(module):
        return
    seen.add(module)
    prefix = f"{name}." if name else ""
    if isinstance(module, _LISTS):
        for child, block in module.named_children():
            if block not in seen and _has_parameters(block):
                seen.add(block)
                yield Part(prefix + child, True)
    elif any(isinstance(one, _LISTS) and _has_parameters(one) for one in module.modules()):
        for child, other in module.named_children():
            yield from _walk(other, prefix + child, seen)
    else:
        yield Part(name, False)


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
