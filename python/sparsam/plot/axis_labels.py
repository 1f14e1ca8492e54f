"""Names of tensors as labels of an axis: short, printable and distinct."""

from __future__ import annotations

from collections.abc import Sequence

from sparsam.inputs.display import printable

_NAME = 46
_DOTS = "\N{HORIZONTAL ELLIPSIS}"


def printed(name: str) -> str:
    """A name with control characters escaped, which matplotlib neither reads as mathematics nor hides."""
    text = printable(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def shortened(name: str) -> str:
    """A name that fits beside an axis."""
    if len(name) > _NAME:
        name = f"{name[: _NAME // 2]}{_DOTS}{name[-_NAME // 2 :]}"
    return printed(name)


def labels(names: Sequence[str]) -> list[str]:
    """Names that fit and still differ; where one is long, common beginnings and endings are cut off."""
    found = list(names)
    if any(len(name) > _NAME for name in names):
        words = [name.split(".") for name in names]
        start = _equal_words(words)
        end = _equal_words([list(reversed(parts[start:])) for parts in words])
        cut = [".".join(parts[start : len(parts) - end]) for parts in words]
        found = [_DOTS * bool(start) + name + _DOTS * bool(end) for name in cut]
    found = list(map(shortened, found))
    return found if len(set(found)) == len(set(names)) else list(map(printed, names))


def _equal_words(names: Sequence[Sequence[str]]) -> int:
    """How many words all of them begin with, leaving at least one word of each."""
    most = min(map(len, names)) - 1
    return next((i for i in range(most) if len({name[i] for name in names}) > 1), most)
