"""What to prune, and how much: `PruningConfig`, which checks its fields.

The stages give names their meaning: `sparsam.schedules` and `sparsam.scores` turn them into objects,
`sparsam.selection` applies a pattern.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypedDict

from sparsam.inputs.checks import ReadOnly, check_sparsity, expected, positive, set_fields
from sparsam.overrides import (
    Override,
    OverrideLike,
    as_overrides,
    check_pattern,
    same_sparsity,
)
from sparsam.patterns import NM, Block, Pattern, Slices, Tied, Unstructured, as_ties
from sparsam.vocabulary import (
    ALLOCATIONS,
    METHODS,
    SCHEDULES,
    SCOPES,
    Allocation,
    AllocationLike,
    AllocationName,
    MethodLike,
    MethodName,
    Schedule,
    ScheduleLike,
    ScheduleName,
    Scope,
    Scorer,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "ALLOCATIONS",
    "METHODS",
    "SCHEDULES",
    "SCOPES",
    "Allocation",
    "AllocationLike",
    "AllocationName",
    "ConfigFields",
    "MethodLike",
    "MethodName",
    "Override",
    "OverrideLike",
    "PruningConfig",
    "Schedule",
    "ScheduleLike",
    "ScheduleName",
    "Scope",
    "Scorer",
    "check_growing",
    "is_explicit",
]


class ConfigFields(TypedDict, total=False):
    """The fields of `PruningConfig` as keyword arguments, for type checkers and editors."""

    target_sparsity: float | None
    method: MethodLike
    pattern: Pattern
    scope: Scope
    allocation: AllocationLike
    schedule: ScheduleLike | None
    num_iterations: int | None
    exclude: str | Sequence[str]
    overrides: Mapping[str, OverrideLike]
    ties: Tied | Sequence[Tied]
    transposed: str | Sequence[str]


@dataclass(frozen=True)
class PruningConfig:
    """How a set of tensors is pruned. Frozen; every field is checked when it is made.

    Fields hold plain values: equal configurations give equal results. Names of tensors are given exactly or
    as shell-style patterns; an exact name always matches, whatever characters it has.

    Attributes:
        target_sparsity: The fraction of weights to prune, in [0, 1]. By default (None) the sparsity of an N:M
            pattern or the end of an explicit schedule, else 0.5. Always a float on the finished object.
        method: "magnitude", "random", "lamp", or an object of `sparsam.scores`, a `Scorer`. The other names
            ("saliency", "fisher", "movement", "wanda", "ria", "obs", "admm") need data: `sparsam.torch.prune`
            collects it from a model, other functions say which object to pass.
        pattern: Which weights are kept or pruned together: `Unstructured`, `NM`, `Block` or `Slices`.
        scope: What weights are compared with: "layer", those of the same tensor; "row", those of the same
            output row, as in Wanda (single weights and N:M only); "global", all, with one threshold.
        allocation: How a total sparsity is divided among tensors: "uniform" (each has it), "erk", "lamp",
            "global", an object of `sparsam.allocation`, a `SensitivityReport`, or a mapping from names or
            patterns to sparsities, the rest uniform. Allocations other than "uniform" need scope "layer" or
            "row" and a pattern other than N:M. The total is exact, in scope "row" up to the rounding of each
            row.
        schedule: How `sparsam.IterativePruner` approaches the target (`sparsam.prune` prunes to it at once):
            a name, an object of `sparsam.schedules`, the list of sparsities itself, or a function of progress
            in [0, 1] that returns the sparsity. None: its default, "linear".
        num_iterations: How many steps the schedule has; the length of an explicit list. None: the default of
            `sparsam.IterativePruner`, 4.
        exclude: Names or patterns (`fnmatch.fnmatchcase`) of the tensors that stay dense; takes precedence
            over overrides.
        overrides: Name or pattern -> a sparsity, a pattern, or both as `(sparsity, pattern)`; kept as
            `Override`. The last match wins. An overridden tensor is pruned by itself, outside the pool of a
            global scope and the total of an allocation; with Block or Slices its groups are compared over the
            whole tensor, in scope "row" too. Tensors with fewer than two axes (biases, norms) are pruned only
            when named here.
        ties: Couplings: `Tied` slices of several tensors, pruned together in place of `pattern`. Each
            coupling prunes `round(target_sparsity * groups)` of its groups, whatever the allocation. In
            global scope couplings compete by score per weight: with the groups of all other tensors if
            `pattern` is `Block` or `Slices`, else among themselves, since a single weight cannot be compared
            with a head. A member must not be excluded, and may be overridden only by a sparsity that all
            members of its coupling have, to within one weight; this is then the sparsity of the coupling,
            outside the pool of a global scope. It may be in two couplings, across different axes (the rows of
            a middle layer and its columns): each selects from the original weights, and what either of them
            prunes is pruned.
        transposed: Names or patterns of the tensors that are stored as (in, out): Hugging Face's Conv1D,
            Keras. Patterns, scope "row" and the scores that depend on inputs see them as (out, in); for more
            than two axes, as in Keras' (height, width, in, out), the last two come first. Axes in `ties` are
            those of the tensor as it is stored.

    Raises:
        ValueError: A field has a value that is not allowed, or target_sparsity contradicts an N:M pattern or
            an explicit schedule.
    """

    target_sparsity: float = None  # type: ignore[assignment] # Never None once it is made.
    method: MethodLike = "magnitude"
    pattern: Pattern = Unstructured()  # noqa: RUF009 - frozen
    scope: Scope = "layer"
    allocation: AllocationLike = field(default="uniform", hash=False)
    schedule: ScheduleLike | None = None
    num_iterations: int | None = None
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, Override] = field(default_factory=dict, hash=False)
    ties: tuple[Tied, ...] = ()
    transposed: tuple[str, ...] = ()

    if TYPE_CHECKING:  # The dataclass makes it; this is what callers may pass, the fields are what is stored.

        def __init__(
            self,
            target_sparsity: float | None = ...,
            method: MethodLike = ...,
            pattern: Pattern = ...,
            scope: Scope = ...,
            allocation: AllocationLike = ...,
            schedule: ScheduleLike | None = ...,
            num_iterations: int | None = ...,
            exclude: str | Sequence[str] = ...,
            overrides: Mapping[str, OverrideLike] = ...,
            ties: Tied | Sequence[Tied] = ...,
            transposed: str | Sequence[str] = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        pattern = check_pattern("pattern", self.pattern)
        schedule = None if self.schedule is None else _schedule(self.schedule)
        scope = _one_of("scope", self.scope, SCOPES)
        allocation = _allocation(self.allocation)
        _check_together(scope, allocation, pattern)
        set_fields(
            self,
            target_sparsity=_target(self.target_sparsity, pattern, schedule),
            method=_method(self.method),
            scope=scope,
            allocation=allocation,
            schedule=schedule,
            num_iterations=_num_iterations(self.num_iterations, schedule),
            exclude=_names("exclude", self.exclude),
            overrides=as_overrides(self.overrides, pattern),
            ties=as_ties(self.ties),
            transposed=_names("transposed", self.transposed),
        )

    def with_changes(self, **changes: Unpack[ConfigFields]) -> PruningConfig:
        """Returns this configuration with some fields changed.

        Like `dataclasses.replace`, but a new N:M pattern or explicit schedule sets target_sparsity, and a new
        list sets num_iterations, unless these are given too.
        """
        free: dict[str, Any] = {}
        schedule = changes.get("schedule")
        if isinstance(changes.get("pattern"), NM) or is_explicit(schedule):
            free["target_sparsity"] = None
        if is_explicit(schedule) and not callable(schedule):
            free["num_iterations"] = None
        return replace(self, **{**free, **changes})


def check_growing(what: str, values: Iterable[object]) -> tuple[float, ...]:
    """Returns `values` as floats in [0, 1]; ValueError, with the iteration, where they decrease."""
    checked = tuple(
        check_sparsity(f"{what}, iteration {i}", value) for i, value in enumerate(values, start=1)
    )
    if not checked:
        raise ValueError(expected(what, values, "at least one sparsity", "give one for each iteration"))
    for i, (before, after) in enumerate(pairwise(checked), start=2):
        if after < before:
            wanted = f"at least {before}, since what is pruned stays pruned"
            raise ValueError(expected(f"{what}, iteration {i}", after, wanted, "sort them"))
    return checked


def is_explicit(schedule: object) -> bool:
    """Whether a schedule gives the sparsities itself: a list, or a function of progress."""
    return schedule is not None and not isinstance(schedule, (str, Schedule))


def _target(target: object, pattern: Pattern, schedule: ScheduleLike | None) -> float:
    """The sparsity on which an N:M pattern, the end of an explicit schedule and the target agree."""
    demands: list[tuple[str, float]] = []
    if isinstance(pattern, NM):
        demands.append((f"the sparsity of pattern {pattern}", pattern.sparsity))
    if isinstance(schedule, tuple):
        demands.append(("the end of schedule", schedule[-1]))
    elif schedule is not None and is_explicit(schedule) and callable(schedule):
        demands.append(("schedule(1.0)", check_sparsity("schedule(1.0)", schedule(1.0))))
    if target is not None:
        demands.append(("target_sparsity", check_sparsity("target_sparsity", target)))
    (source, agreed), *others = demands or [("the default", 0.5)]
    for other, value in others:
        if not same_sparsity(agreed, value):
            raise ValueError(expected(other, value, f"{agreed}, {source}", "leave one of them out"))
    return agreed


def _num_iterations(value: object, schedule: ScheduleLike | None) -> int | None:
    number = None if value is None else positive("num_iterations", value)
    if not isinstance(schedule, tuple):
        return number
    if number not in {None, len(schedule)}:
        wanted = f"{len(schedule)}, the number of sparsities in schedule"
        raise ValueError(expected("num_iterations", number, wanted, "leave it out"))
    return len(schedule)


def _one_of(what: str, value: object, allowed: tuple[str, ...]) -> str:
    if isinstance(value, str) and value in allowed:
        return value
    raise ValueError(expected(what, value, _either(allowed), "pass one of them"))


def _method(value: object) -> str | Scorer:
    if isinstance(value, str):  # Before the protocol, whose check takes longer.
        if value in METHODS:
            return value
    elif isinstance(value, Scorer) and not isinstance(value, type):
        return value
    raise ValueError(
        expected(
            "method", value, f"{_either(METHODS)}, or an object with score(name, weights)", "pass one of them"
        )
    )


def _allocation(value: object) -> Any:
    if isinstance(value, str):
        if value in ALLOCATIONS:
            return value
    elif isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ValueError(
                    expected(
                        "allocation", name, "names or shell-style patterns as keys", "convert them with str()"
                    )
                )
        return ReadOnly({name: check_sparsity(f"allocation[{name!r}]", own) for name, own in value.items()})
    elif isinstance(value, Allocation) and not isinstance(value, type):
        return value
    others = "an object of sparsam.allocation, or a mapping from names to sparsities"
    raise ValueError(expected("allocation", value, f"{_either(ALLOCATIONS)}, {others}", "pass one of them"))


def _check_together(scope: str, allocation: object, pattern: Pattern) -> None:
    if scope == "row" and isinstance(pattern, (Block, Slices)):
        raise ValueError(
            expected(
                "pattern",
                str(pattern),
                "Unstructured() or NM with scope 'row', which stays in a row",
                "use scope 'layer'",
            )
        )
    if allocation == "uniform":
        return
    if scope == "global":
        msg = (
            "allocation: expected 'uniform' with scope 'global', whose one threshold divides the total; "
            f"got {allocation!r}; use scope 'layer'"
        )
        raise ValueError(msg)
    if isinstance(pattern, NM):
        wanted = f"'uniform' with pattern {pattern}, which has one sparsity"
        raise ValueError(expected("allocation", allocation, wanted, "leave it out"))


def _schedule(value: object) -> Any:
    if isinstance(value, str):
        if value in SCHEDULES:
            return value
    elif (isinstance(value, Schedule) and not isinstance(value, type)) or callable(value):
        return value
    elif isinstance(value, Iterable):
        return check_growing("schedule", tuple(value))
    others = "an object of sparsam.schedules, a list of sparsities, a function of progress"
    raise ValueError(expected("schedule", value, f"{_either(SCHEDULES)}, {others}", "pass one of them"))


def _names(what: str, value: object) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    for name in names:
        if not isinstance(name, str):
            wanted = 'names or shell-style patterns, such as ("head*", "*.norm.*")'
            raise ValueError(expected(what, name, wanted, "pass text"))
    return names


def _either(names: tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names)
