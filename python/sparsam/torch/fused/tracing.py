"""Follows a call of a module function by function, and notes the steps that compute the same.

Each tensor that is computed from the arguments has, beside it, the tensor of the places of its numbers in a
buffer of rows: what views, transposes and copies do to one they do to the other, so that the layout of any
operand is known exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

import torch
from sparsam.torch.fused.program import Part, Step, Vector
from torch import Tensor

__all__ = ["Mask", "Moments", "NotUnderstood", "Other", "Rows", "Trace", "places"]


class NotUnderstood(BaseException):
    """The module computes what is no step."""


@dataclass(frozen=True)
class Rows:
    """A tensor with the numbers of a buffer, each once.

    Attributes:
        buffer: The buffer.
        places: Of the shape of the tensor: row times width plus column of each number.
    """

    buffer: int
    places: Tensor


@dataclass(frozen=True)
class Moments:
    """What is computed on the way to a norm of root mean squares.

    Attributes:
        what: "squares", "means", "shifted" (with eps), "inverse" (of the root), "normal" (times that).
        buffer: The buffer of the rows.
        rows: The rows in the order of the tensor.
        eps: What was added to the means.
    """

    what: str
    buffer: int
    rows: Tensor
    eps: float = 0.0


@dataclass(frozen=True)
class Mask:
    """The mask of attention, as it was given.

    Attributes:
        argument: The number of the argument.
        places: As of Rows.
    """

    argument: int
    places: Tensor


@dataclass(frozen=True)
class Other:
    """An argument that nothing may be computed from."""


@dataclass
class Trace:
    """What was seen so far.

    Attributes:
        owned: The Parameters of the module by their id.
        sequences: The number of sequences, and of positions in each; 0 if the rows have other axes.
        positions: See `sequences`.
        widths: The width of each buffer.
        steps: The steps in order; each writes a buffer of its own.
        parts: The packed matrices that they multiply with.
        vectors: The biases and weights of norms.
        heads: Of attention; 0 before the first.
        mask: The number of the argument that masks attention; -1 if all see all; -2 before the first.
    """

    owned: Mapping[int, Tensor]
    sequences: int
    positions: int
    widths: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    vectors: list[Vector] = field(default_factory=list)
    heads: int = 0
    mask: int = -2
    _values: dict[int, tuple[Any, object]] = field(default_factory=dict)

    def know(self, tensor: Tensor, value: object) -> Tensor:
        """Notes what a tensor is, and returns it."""
        self._values[id(tensor)] = (tensor, value)  # with the tensor, so that no other gets its id
        return tensor

    def value(self, tensor: Any) -> Any:
        """What is known of an object."""
        found = self._values.get(id(tensor))
        return None if found is None else found[1]

    def buffer(self, width: int) -> int:
        """A new buffer."""
        self.widths.append(width)
        return len(self.widths) - 1

    def rows(self, tensor: Any) -> tuple[int, Tensor]:
        """The buffer that a tensor is, whole rows in any order, and these rows."""
        value = self.value(tensor)
        if not isinstance(value, Rows):
            refuse("something else than rows")
        width, found = self.widths[value.buffer], value.places
        if found.ndim < 2 or found.shape[-1] != width:
            refuse("parts of rows")
        rows = found[..., 0] // width
        if not torch.equal(found, places(rows, width)):
            refuse("rows that are not whole")
        if not torch.equal(rows.reshape(-1).sort().values, torch.arange(rows.numel())):
            refuse("some of the rows")
        return value.buffer, rows

    def result(self, tensor: Tensor, rows: Tensor, step: tuple[Any, ...], at: int) -> Tensor:
        """Notes a step that gives rows of a tensor's width; `at` is where the step has the number of y."""
        width = tensor.shape[-1]
        if tensor.shape[:-1] != rows.shape:
            refuse("rows of another shape")
        buffer = self.buffer(width)
        self.steps.append((*step[:at], buffer, *step[at:]))
        return self.know(tensor, Rows(buffer, places(rows, width)))

    def part(self, weight: Any, index: int = 0) -> int:
        """The number of a packed matrix."""
        if id(weight) not in self.owned:
            refuse("a weight that is no Parameter of the module")
        self.parts.append(Part(weight, index))
        return len(self.parts) - 1

    def vector(self, tensor: Any, size: int, start: int = 0, whole: int | None = None) -> int:
        """The number of a vector; -1 for None."""
        if tensor is None:
            return -1
        plain = id(tensor) in self.owned and tensor.dtype is torch.float32 and tensor.is_contiguous()
        if not plain or tensor.shape != (size if whole is None else whole,):
            refuse("a vector that is no plain Parameter of the module")
        self.vectors.append(Vector(tensor, start, size))
        return len(self.vectors) - 1


def places(rows: Tensor, width: int) -> Tensor:
    """The places of the numbers of rows: (..., width)."""
    return rows[..., None] * width + torch.arange(width)


def refuse(what: str) -> NoReturn:
    """Ends a trace."""
    raise NotUnderstood(what)


class Tracer(TorchFunctionMode):
    """Lets functions run, and passes those that get a known tensor to what understands them."""

    def __init__(self, trace: Trace, understood: Mapping[Any, Any], harmless: Any) -> None:
        """`understood` has what is called for a function, `harmless` where it does not read numbers."""
        super().__init__()
        self._trace = trace
        self._understood = understood
        self._harmless = harmless

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        understand = self._understood.get(func)
        if all(self._trace.value(leaf) is None for leaf in leaves):
            found = func(*args, **kwargs)
            if understand is not self._harmless and not isinstance(found, (Tensor, tuple, type(None))):
                refuse("numbers of a tensor, which may change")
            return found
        if understand is None:
            refuse(f"{resolve_name(func) or func}")
        return understand(self._trace, func, *args, **kwargs)
