"""What to prune, and how much: the patterns, and `PruningConfig`, which checks itself.

This module, with `sparsam.patterns`, is the vocabulary that a user writes in. What a word means is the
business of the stage that carries it out: `sparsam.schedules` and `sparsam.scores` turn names into objects,
`sparsam.selection` applies a pattern.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from sparsam._checks import ReadOnly, check_sparsity, expected, positive, set_fields
from sparsam.patterns import NM, Block, Pattern, Slices, Tied, Unstructured, as_ties

if TYPE_CHECKING:
    from numpy.typing import NDArray

METHODS = ("magnitude", "random", "lamp", "saliency", "fisher", "movement", "wanda", "ria")
SCOPES = ("layer", "row", "global")
ALLOCATIONS = ("uniform", "erk", "lamp", "global")
SCHEDULES = ("one_shot", "linear", "cubic", "exponential", "cosine")


@runtime_checkable
class Scorer(Protocol):
    """A pruning method: weights in, scores out; the larger a score, the more worth keeping.

    A scorer knows nothing of sparsity, patterns or time. Scores are not negative, and a weight that is zero
    scores zero, so that a growing schedule finds first what it pruned before. Any object with this one
    function is a method.
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
    """How a total sparsity is shared out over tensors, such as `sparsam.allocation.ERK`."""

    def shares(
        self, weights: Mapping[str, NDArray[Any]], target: float, pattern: Unstructured | Block | Slices, /
    ) -> Mapping[str, float]:
        """Returns name -> sparsity in [0, 1], whose mean over all groups is `target` before rounding."""


AllocationLike: TypeAlias = str | Allocation | Mapping[str, float]
ScheduleLike: TypeAlias = str | Schedule | Sequence[float] | Callable[[float], float]
Override: TypeAlias = float | Pattern | tuple[float, Pattern]


class _Unset:
    """Marks the value of a field that nobody set: it reads as the default, or as what the others imply.

    `dataclasses.replace` hands the mark on, so the new configuration settles the field anew.
    """


class _UnsetFloat(_Unset, float):
    pass


class _UnsetInt(_Unset, int):
    pass


class _UnsetStr(_Unset, str):
    pass


_ONE_SHOT = _UnsetStr("one_shot")


@dataclass(frozen=True)
class PruningConfig:
    """How a set of tensors is pruned. Frozen; every field is checked when it is made.

    target_sparsity, schedule and num_iterations know whether they were set: left out (or None), they follow
    the others even after `dataclasses.replace`, and `sparsam.IterativePruner` has its own defaults for them.

    Attributes:
        target_sparsity: The fraction of weights to prune, in [0, 1]. Left out, it is what an N:M pattern or
            an explicit schedule asks for, else 0.5. Always a float on the finished object.
        method: "magnitude", "random", "lamp", or an object of `sparsam.scores`, a `Scorer`. The other names
            ("saliency", "fisher", "movement", "wanda", "ria") need data and say which object to pass.
        pattern: Which weights stand or fall together: `Unstructured`, `NM`, `Block` or `Slices`.
        scope: What weights are compared with: "layer", those of the same tensor; "row", those of the same
            output row, as in Wanda (single weights and N:M only); "global", all, with one threshold.
        allocation: How a total sparsity is shared out over tensors: "uniform" (each has it), "erk", "lamp",
            "global", an object of `sparsam.allocation`, or a mapping from names or shell-style patterns to
            sparsities, the rest uniform. Others than "uniform" go with the scopes "layer" and "row", not with
            N:M patterns, and hit the total exactly, in scope "row" but for the rounding in each row.
        schedule: The way to the target that `sparsam.IterativePruner` takes (`sparsam.prune` goes there at
            once): a name, an object of `sparsam.schedules`, the list of sparsities itself, or a function of
            progress in [0, 1] that returns the sparsity.
        num_iterations: How many steps the schedule has. Left out, the length of an explicit list, else 1.
        exclude: Shell-style patterns (`fnmatch.fnmatchcase`) of the tensors that stay dense; they beat
            overrides.
        overrides: Shell-style pattern -> a sparsity, a pattern, or both as `(sparsity, pattern)`. The last
            match wins. An overridden tensor is pruned by itself, outside the pool of a global scope and the
            total of an allocation; with Block or Slices as a whole in scope "row" too. Tensors with fewer
            than two axes (biases, norms) are pruned only when named here.
        ties: `Tied` slices of several tensors, decided together in place of `pattern`. Each tie prunes
            `round(target_sparsity * groups)` of its groups, whatever the allocation. In global scope ties
            compete by score per weight: with the groups of all other tensors if `pattern` is `Block` or
            `Slices`, else among themselves, since a weight by itself is no rival of a head. A member must not
            be excluded or overridden. It may be in two ties, across different axes (the rows of a middle
            layer and its columns): each is decided on the weights as they are, and what one of them prunes is
            pruned.

    Raises:
        ValueError: A field has none of the values allowed, or target_sparsity contradicts an N:M pattern or
            an explicit schedule.
    """

    target_sparsity: float = _UnsetFloat(0.5)
    method: str | Scorer = "magnitude"
    pattern: Pattern = Unstructured()  # noqa: RUF009 - frozen
    scope: str = "layer"
    allocation: AllocationLike = field(default="uniform", hash=False)
    schedule: ScheduleLike = _ONE_SHOT
    num_iterations: int = _UnsetInt(1)
    exclude: Sequence[str] = ()
    overrides: Mapping[str, Override] = field(default_factory=dict, hash=False)
    ties: Sequence[Tied] = ()

    def __post_init__(self) -> None:
        pattern = _pattern("pattern", self.pattern)
        schedule = _schedule(self.schedule) if _is_set(self.schedule) else _ONE_SHOT
        steps = len(schedule) if isinstance(schedule, tuple) else None
        if not _is_set(self.num_iterations):
            num_iterations: int = _UnsetInt(steps or 1)
        else:
            num_iterations = positive("num_iterations", self.num_iterations)
            if steps not in {None, num_iterations}:
                msg = f"num_iterations is {num_iterations}, but schedule lists {steps} sparsities"
                raise ValueError(msg)
        scope = _one_of("scope", self.scope, SCOPES)
        allocation = _allocation(self.allocation)
        _check_together(scope, allocation, pattern)
        set_fields(
            self,
            target_sparsity=_agreed_target(self.target_sparsity, _demands(pattern, schedule)),
            method=_method(self.method),
            scope=scope,
            allocation=allocation,
            schedule=schedule,
            num_iterations=num_iterations,
            exclude=_exclude(self.exclude),
            overrides=_overrides(self.overrides, pattern),
            ties=as_ties(self.ties),
        )

    def with_defaults(
        self, *, target_sparsity: float, schedule: ScheduleLike, num_iterations: int
    ) -> PruningConfig:
        """Returns this configuration with other defaults, for what was not set and no other field implies."""
        free: dict[str, Any] = {}
        if not _demands(self.pattern, self.schedule):
            free["target_sparsity"] = target_sparsity
        if not isinstance(self.pattern, NM):
            free["schedule"] = schedule
        if not isinstance(self.schedule, tuple):
            free["num_iterations"] = num_iterations
        return replace(self, **{name: new for name, new in free.items() if not _is_set(getattr(self, name))})


def check_growing(what: str, values: Iterable[object]) -> tuple[float, ...]:
    """Returns `values` as floats in [0, 1] that never shrink, or raises the ValueError that says where."""
    checked = tuple(
        check_sparsity(f"{what}, iteration {i}", value) for i, value in enumerate(values, start=1)
    )
    if not checked:
        msg = f"{what} is empty: list at least one sparsity"
        raise ValueError(msg)
    for i, (before, after) in enumerate(pairwise(checked), start=2):
        if after < before:
            msg = f"{what} shrinks from {before} to {after} at iteration {i}; what is pruned stays pruned"
            raise ValueError(msg)
    return checked


def _is_set(value: object) -> bool:
    return value is not None and not isinstance(value, _Unset)


def _demands(pattern: Pattern, schedule: ScheduleLike) -> list[tuple[str, float]]:
    """The sparsities that an N:M pattern and the end of an explicit schedule ask for, and who asks."""
    demands = []
    if isinstance(pattern, NM):
        demands.append((f"pattern {pattern}", pattern.sparsity))
    if isinstance(schedule, tuple):
        demands.append(("the end of schedule", schedule[-1]))
    elif not isinstance(schedule, (str, Schedule)) and callable(schedule):
        demands.append(("schedule(1.0)", check_sparsity("schedule(1.0)", schedule(1.0))))
    return demands


def _agreed_target(target: float, demands: Sequence[tuple[str, float]]) -> float:
    """The sparsity that the demands and the target agree on."""
    own = [("target_sparsity", check_sparsity("target_sparsity", target))] if _is_set(target) else []
    if not demands and not own:
        return _UnsetFloat(0.5)
    (source, agreed), *others = [*demands, *own]
    for other, value in others:
        if not _same(agreed, value):
            msg = f"{other} is {value}, but {source} has the sparsity {agreed}; they must agree"
            raise ValueError(msg)
    return agreed if own else _UnsetFloat(agreed)


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=0, abs_tol=1e-9)


def _one_of(what: str, value: object, allowed: tuple[str, ...]) -> str:
    if isinstance(value, str) and value in allowed:
        return value
    raise ValueError(expected(what, value, _either(allowed)))


def _method(value: object) -> str | Scorer:
    if isinstance(value, Scorer) and not isinstance(value, type):
        return value
    if isinstance(value, str) and value in METHODS:
        return value
    raise ValueError(expected("method", value, f"{_either(METHODS)}, or an object with score(name, weights)"))


def _allocation(value: object) -> AllocationLike:
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ValueError(expected("allocation", name, "names or shell-style patterns as keys"))
        return ReadOnly({name: check_sparsity(f"allocation[{name!r}]", own) for name, own in value.items()})
    if isinstance(value, Allocation) and not isinstance(value, type):
        return value
    if isinstance(value, str) and value in ALLOCATIONS:
        return value
    others = "an object of sparsam.allocation, or a mapping from names to sparsities"
    raise ValueError(expected("allocation", value, f"{_either(ALLOCATIONS)}, {others}"))


def _check_together(scope: str, allocation: AllocationLike, pattern: Pattern) -> None:
    if scope == "row" and isinstance(pattern, (Block, Slices)):
        msg = (
            f"scope 'row' compares weights within a row: expected Unstructured() or NM; got pattern {pattern}"
        )
        raise ValueError(msg)
    if allocation == "uniform":
        return
    if scope == "global":
        msg = (
            f"allocation: expected 'uniform' with scope 'global', whose one threshold shares the total out; "
            f"got {allocation!r}; use scope 'layer'"
        )
        raise ValueError(msg)
    if isinstance(pattern, NM):
        msg = f"allocation: pattern {pattern} has one sparsity: expected 'uniform'; got {allocation!r}"
        raise ValueError(msg)


def _schedule(value: object) -> ScheduleLike:
    if isinstance(value, str):
        if value in SCHEDULES:
            return value
    elif (isinstance(value, Schedule) and not isinstance(value, type)) or callable(value):
        return value
    elif isinstance(value, Iterable):
        return check_growing("schedule", value)
    others = "an object of sparsam.schedules, a list of sparsities, a function of progress"
    raise ValueError(expected("schedule", value, f"{_either(SCHEDULES)}, {others}"))


def _pattern(what: str, value: object) -> Pattern:
    if isinstance(value, Pattern):
        return value
    raise ValueError(
        expected(what, value, "Unstructured(), NM(n, m), Block(rows, cols) or Slices(axis, size)")
    )


def _exclude(value: object) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    for name in names:
        if not isinstance(name, str):
            raise ValueError(
                expected("exclude", name, 'shell-style name patterns, such as ("head*", "*.norm.*")')
            )
    return names


def _overrides(value: object, pattern: Pattern) -> Mapping[str, Override]:
    if not isinstance(value, Mapping):
        raise ValueError(
            expected("overrides", value, "a mapping from name patterns to sparsities or patterns")
        )
    for name in value:
        if not isinstance(name, str):
            raise ValueError(expected("overrides", name, "shell-style name patterns as keys"))
    return ReadOnly(
        {name: _override(f"overrides[{name!r}]", entry, pattern) for name, entry in value.items()}
    )


def _override(what: str, value: object, pattern: Pattern) -> Override:
    if isinstance(value, Pattern):
        return value
    sparsity, own = value if isinstance(value, tuple) and len(value) == 2 else (value, pattern)
    number, own = check_sparsity(what, sparsity), _pattern(what, own)
    if isinstance(own, NM):
        if not _same(number, own.sparsity):
            msg = f"{what} is {number}, but pattern {own} has the sparsity {own.sparsity}; they must agree"
            raise ValueError(msg)
        number = own.sparsity
    return (number, own) if isinstance(value, tuple) else number


def _either(names: tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names)
