"""The list of steps that stands for a module's forward in one form of its calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsam.torch.fused.caching import Cut
from sparsam.torch.fused.calls import Call
from torch import Tensor

__all__ = ["Part", "Program", "Step", "Vector"]

Step = tuple[Any, ...]  # as `_core.Steps` takes it, but a number of `Program.parts` for the packed weight


@dataclass(frozen=True)
class Part:
    """One matrix of a packed weight.

    Attributes:
        weight: The weight.
        index: Which of its matrices.
    """

    weight: Any
    index: int = 0


@dataclass(frozen=True)
class Vector:
    """Neighbouring numbers of a dense Parameter.

    Attributes:
        tensor: The Parameter.
        start: The first.
        size: How many.
    """

    tensor: Tensor
    start: int
    size: int


@dataclass(frozen=True)
class Program:
    """The steps.

    Attributes:
        call: The form of the calls.
        widths: The width of each buffer.
        steps: The steps.
        parts: The packed matrices in them.
        vectors: The biases and weights of norms in them.
        inputs: Which argument each buffer is that one is, as (number of the argument, buffer).
        mask: The number of the argument that masks attention; -1 for none.
        heads: Of attention, for the shape of the mask; 0 where the steps have none.
        returns: What the module returns, as `results.describe` has it.
        cut: What is done between the steps before attention over a cache and those after it; None without.
    """

    call: Call
    widths: tuple[int, ...]
    steps: tuple[Step, ...]
    parts: tuple[Part, ...]
    vectors: tuple[Vector, ...]
    inputs: tuple[tuple[int, int], ...]
    mask: int
    heads: int
    returns: Any
    cut: Cut | None = None

    @property
    def attends(self) -> bool:
        """Whether rows see others of their sequence."""
        return any(step[0] == "attention" for step in self.steps)

    def same(self, other: Program) -> bool:
        """Whether it is the same list of steps."""
        return self._shape == other._shape and all(
            map(_is, self._operands, other._operands)  # not ==, which compares numbers
        )

    @property
    def _shape(self) -> tuple[Any, ...]:
        pieces = tuple((v.start, v.size) for v in self.vectors), tuple(p.index for p in self.parts)
        return (
            self.widths,
            self.steps,
            pieces,
            self.inputs,
            self.mask,
            self.heads,
            self.returns,
            self.cut,
        )

    @property
    def _operands(self) -> tuple[Any, ...]:
        return tuple(p.weight for p in self.parts) + tuple(v.tensor for v in self.vectors)


def _is(a: object, b: object) -> bool:
    return a is b
