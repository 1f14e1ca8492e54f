"""Patterns: which weights are kept or pruned together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from sparsam.inputs.checks import ReadOnly, expected, integer, positive, set_fields

MAX_GROUP = 256


@dataclass(frozen=True)
class Unstructured:
    """Every weight is kept or pruned by itself."""

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class NM:
    """Keep `n` of every `m` neighbours along the input axis; sparse tensor cores need `NM(2, 4)`.

    A tensor of any rank is seen as its matrix `(shape[0], prod(shape[1:]))`, a 1-D tensor as one row; `m`,
    at most 256, must divide the length of a row. `n` counts the weights that stay, as in jaxpruner. tfmot and
    Wanda count those that are pruned: only 2:4 and 4:8 mean the same in both conventions.

    The rows of a convolution (out, in, kh, kw) thus run over inputs and kernel positions together, and groups
    may straddle input channels. Sparse tensor cores want groups of neighbouring input channels at one kernel
    position: `axis="channels"`, for which `m` must divide the number of input channels. For a tensor of one
    or two axes both mean the same.

    Attributes:
        n: How many weights of a group are kept, at least 1.
        m: How many weights a group has, at most 256.
        axis: "flat" or "channels".
    """

    n: int
    m: int
    axis: Literal["flat", "channels"] = "flat"

    def __post_init__(self) -> None:
        set_fields(self, n=positive("NM: n", self.n), m=positive("NM: m", self.m))
        if self.n > self.m:
            raise ValueError(
                expected(
                    "NM: n",
                    self.n,
                    f"at most m, which is {self.m}: n of every m stay",
                    "lower it, or raise m",
                )
            )
        if self.axis not in ("flat", "channels"):
            raise ValueError(expected("NM: axis", self.axis, "'flat' or 'channels'", "pass one of them"))
        if self.m > MAX_GROUP:
            raise ValueError(expected("NM: m", self.m, f"at most {MAX_GROUP} weights in a group", "lower it"))

    @property
    def sparsity(self) -> float:
        """The only sparsity that this pattern has, `1 - n / m`."""
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" + (" channels" if self.axis == "channels" else "")


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

    `size` neighbouring slices are kept or pruned together; it must divide the length of the axis. A negative
    axis counts from the end.
    """

    axis: int
    size: int = 1

    def __post_init__(self) -> None:
        set_fields(self, axis=integer("Slices: axis", self.axis), size=positive("Slices: size", self.size))

    def __str__(self) -> str:
        return f"slices axis {self.axis}" + (f" size {self.size}" if self.size > 1 else "")


Pattern: TypeAlias = Unstructured | NM | Block | Slices


@dataclass(frozen=True)
class Tied:
    """Slices of several tensors that are kept or pruned together: slice i of every member is group i.

    The heads of an attention block, and the neurons between two layers:

        heads = Slices(0, size=64)
        Tied({"q.weight": heads, "k.weight": heads, "v.weight": heads, "o.weight": Slices(1, size=64)})
        Tied({"fc1.weight": Slices(0), "fc1.bias": Slices(0), "fc2.weight": Slices(1)})

    All members must have the same number of groups; axes and sizes may differ (keys and values that several
    queries share; `Slices(1, height * width)` of the layer behind a Flatten). A group's score is the sum of
    the scores of its weights. Members of one axis (biases, the weight and bias of a norm) are pruned with the
    group but do not count in its score: a bias says little about how much a neuron matters, and many methods
    have no score for it. `scored` overrides this.

    Attributes:
        members: Name of a tensor -> its `Slices`.
        scored: The members whose scores count. By default those with two axes or more; if there are none,
            all.

    Raises:
        ValueError: No members, a member that is not `Slices` under a name, or `scored` names no member.
    """

    members: Mapping[str, Slices]
    scored: Sequence[str] | None = None

    def __post_init__(self) -> None:
        members = self.members
        if not isinstance(members, Mapping) or not members:
            raise ValueError(
                expected(
                    "Tied: members",
                    members,
                    "a mapping from tensor names to Slices",
                    "pass {'fc1.weight': Slices(0)}, say",
                )
            )
        for name, slices in members.items():
            if not isinstance(name, str):
                raise ValueError(
                    expected("Tied: members", name, "names of tensors as keys", "convert them with str()")
                )
            if not isinstance(slices, Slices):
                raise ValueError(
                    expected(
                        f"Tied: member {name!r}",
                        slices,
                        "Slices(axis, size)",
                        "pass Slices(0) for rows, Slices(1) for columns",
                    )
                )
        scored = self.scored
        if scored is not None:
            scored = (scored,) if isinstance(scored, str) else tuple(scored)
            if not scored or any(name not in members for name in scored):
                raise ValueError(
                    expected(
                        "Tied: scored",
                        self.scored,
                        f"some of the members {list(members)}",
                        "name members only, or leave it out for all",
                    )
                )
        set_fields(self, members=ReadOnly(members), scored=scored)


def as_ties(value: Tied | Sequence[Tied]) -> tuple[Tied, ...]:
    """Returns `value` as a tuple; ValueError unless it is a `Tied` or a sequence of them."""
    ties = (value,) if isinstance(value, Tied) else value
    if isinstance(ties, Sequence) and all(isinstance(tied, Tied) for tied in ties):
        return tuple(ties)
    raise ValueError(
        expected(
            "ties",
            value,
            "Tied objects, such as (Tied({'fc1.weight': Slices(0), ...}),)",
            "wrap a single one in a tuple",
        )
    )
