"""The names that a configuration accepts, and protocols for objects in their place; see `sparsam.config`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args, runtime_checkable

from sparsam.patterns import Block, Slices, Unstructured

if TYPE_CHECKING:
    from numpy.typing import NDArray

MethodName: TypeAlias = Literal[
    "magnitude", "random", "lamp", "saliency", "fisher", "movement", "wanda", "ria", "obs", "admm"
]
Scope: TypeAlias = Literal["layer", "row", "global"]
AllocationName: TypeAlias = Literal["uniform", "erk", "lamp", "global"]
ScheduleName: TypeAlias = Literal["one_shot", "linear", "cubic", "exponential", "cosine"]

METHODS: tuple[MethodName, ...] = get_args(MethodName)
SCOPES: tuple[Scope, ...] = get_args(Scope)
ALLOCATIONS: tuple[AllocationName, ...] = get_args(AllocationName)
SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)


@runtime_checkable
class Scorer(Protocol):
    """A pruning method: weights in, scores out; the larger a score, the more worth keeping.

    A scorer knows nothing of sparsity, patterns or time. Scores are not negative, and a weight that is zero
    scores zero, so that a growing schedule prunes again what it pruned before. Any object with this one
    function is a method. Three further attributes are optional; `sparsam.scores.traits` reads them:

        norm: 1 (if absent) or 2: a group of weights scores the sum of its scores, or of their squares.
        ranks_by_magnitude: True if scores are ranked by their absolute value, so that they may be negative,
            as those of a scorer that returns `weights` itself always may; False if absent.
        needs_rows_as_outputs: True if the score of a weight depends on its row and column. Tensors that the
            configuration calls `transposed` then arrive as (out, in). False if absent: tensors arrive as
            they are stored.
    """

    def score(self, name: str, weights: NDArray[Any], /) -> NDArray[Any]:
        """Returns the floating-point scores of tensor `name`, in the shape of `weights`."""


@runtime_checkable
class Schedule(Protocol):
    """A curve from an initial to a final sparsity, such as `sparsam.schedules.Polynomial`."""

    def at(self, progress: float, /, *, initial: float, final: float) -> float:
        """Returns the sparsity at `progress` in [0, 1]."""


@runtime_checkable
class Allocation(Protocol):
    """How a total sparsity is divided among tensors, such as `sparsam.allocation.ERK`."""

    def shares(
        self, weights: Mapping[str, NDArray[Any]], target: float, pattern: Unstructured | Block | Slices, /
    ) -> Mapping[str, float]:
        """Returns name -> sparsity in [0, 1], whose mean over all groups is `target` before rounding."""


MethodLike: TypeAlias = MethodName | Scorer
AllocationLike: TypeAlias = AllocationName | Allocation | Mapping[str, float]
ScheduleLike: TypeAlias = ScheduleName | Schedule | Sequence[float] | Callable[[float], float]
