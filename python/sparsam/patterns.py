"""Which weights stand or fall together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from sparsam._checks import expected, integer, positive, set_fields

MAX_GROUP = 256


@dataclass(frozen=True)
class Unstructured:
    """Every weight stands or falls by itself."""

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class NM:
    """Keep `n` of every `m` neighbours along the input axis; `NM(2, 4)` is what sparse tensor cores take.

    A tensor of any rank is seen as its matrix `(shape[0], prod(shape[1:]))`, a 1-D tensor as one row; `m`,
    at most 256, must divide the length of a row. `n` counts the weights that stay, as in jaxpruner. tfmot and
    Wanda count those that go: only 2:4 and 4:8 mean the same in both readings.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        set_fields(self, n=positive("NM: n", self.n), m=positive("NM: m", self.m))
        if self.n > self.m:
            msg = f"NM({self.n}, {self.m}): n is how many of every m weights stay; it must not exceed m"
            raise ValueError(msg)
        if self.m > MAX_GROUP:
            raise ValueError(expected("NM: m", self.m, f"at most {MAX_GROUP} weights in a group"))

    @property
    def sparsity(self) -> float:
        """The only sparsity that this pattern has, `1 - n / m`."""
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Block:
    """Tiles of `rows` x `cols` weights of the matrix `(shape[0], prod(shape[1:]))`; ragged at the edges."""

    rows: int
    cols: int

    def __post_init__(self) -> None:
        set_fields(self, rows=positive("Block: rows", self.rows), cols=positive("Block: cols", self.cols))

    def __str__(self) -> str:
        return f"block {self.rows}x{self.cols}"


@dataclass(frozen=True)
class Slices:
    """Whole slices across an axis: neurons (axis 0), inputs (axis 1), heads (`size` = head dimension).

    `size` neighbouring slices stand or fall together; it must divide the length of the axis. A negative axis
    counts from the end.
    """

    axis: int
    size: int = 1

    def __post_init__(self) -> None:
        set_fields(self, axis=integer("Slices: axis", self.axis), size=positive("Slices: size", self.size))

    def __str__(self) -> str:
        return f"slices axis {self.axis}" + (f" size {self.size}" if self.size > 1 else "")


Pattern: TypeAlias = Unstructured | NM | Block | Slices
