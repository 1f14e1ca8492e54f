"""How sparsity grows over a run: curves from progress p in [0, 1] to a sparsity.

With si the initial and sf the final sparsity, p = i / (N - 1) at iteration i of N, and p = 1 if N = 1:

============== ===================== ====================================
name           object                sparsity at p
============== ===================== ====================================
"one_shot"     `OneShot()`           sf
"linear"       `Polynomial(1)`       sf + (si - sf) (1 - p)
"cubic"        `Polynomial(3)`       sf + (si - sf) (1 - p)^3, AGP [1]
               `Polynomial(power)`   sf + (si - sf) (1 - p)^power
"exponential"  `Exponential()`       1 - (1 - si) ((1 - sf) / (1 - si))^p
"cosine"       `Cosine()`            sf + (si - sf) (1 + cos(pi p)) / 2
============== ===================== ====================================

All but "one_shot" start at si, all end at sf, both exactly. A list of sparsities, or a function of p that
returns the sparsity, is used as it is: it ignores si and sf.

Elsewhere the same names mean other curves. At p = 0.5, from 0 to 1:

- "cubic" is 0.875 here, in AGP, tfmot (PolynomialDecay), NNI (AGP), torchao (CubicSL) and jaxpruner
  (PolynomialSchedule, which runs one step ahead). "cube" of neural-compressor is p^3 = 0.125, "inverse_cubic"
  of SparseML 1 - (1 - p)^(1/3) = 0.206. The exponent of llm-compressor's "polynomial_decay" is 2 by default.
- "cosine" is 0.5 here; "cos" of neural-compressor is 1 - cos(pi p / 2) = 0.293.
- "exponential" is the formula of NNCF.

[1] Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017,
    arXiv:1710.01878.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from sparsam.config import SCHEDULES, Schedule, ScheduleLike, check_growing
from sparsam.inputs.checks import expected, is_number


class _Curve(ABC):
    """A curve with exact ends, clipped so that rounding cannot exceed them."""

    def at(self, progress: float, /, *, initial: float, final: float) -> float:
        """Returns the sparsity at `progress` in [0, 1]."""
        if progress <= 0:
            return initial
        if progress >= 1:
            return final
        return min(max(self._between(progress, initial, final), initial), final)

    @abstractmethod
    def _between(self, p: float, initial: float, final: float) -> float:
        """The formula, for 0 < p < 1."""


@dataclass(frozen=True)
class OneShot:
    """The final sparsity from the first iteration on; later iterations only recover."""

    def at(self, progress: float, /, *, initial: float, final: float) -> float:  # noqa: ARG002
        """Returns `final`."""
        return final


@dataclass(frozen=True)
class Polynomial(_Curve):
    """sf + (si - sf) (1 - p)^power: fast at first, then slower. Power 3 is AGP."""

    power: float = 3

    def __post_init__(self) -> None:
        if not is_number(self.power) or not 0 < self.power < math.inf:
            wanted = "a finite number above 0 (1 is linear, 3 is cubic)"
            raise ValueError(expected("Polynomial: power", self.power, wanted, "pass 3, say"))

    def _between(self, p: float, initial: float, final: float) -> float:
        return final + (initial - final) * math.pow(1 - p, self.power)


@dataclass(frozen=True)
class Exponential(_Curve):
    """1 - (1 - si) ((1 - sf) / (1 - si))^p: each iteration prunes the same share of what is left.

    A density that decays geometrically never reaches 0 and cannot start there: ValueError if either end is 1.
    """

    def at(self, progress: float, /, *, initial: float, final: float) -> float:
        """Returns the sparsity at `progress` in [0, 1]; ValueError where an end is 1."""
        if max(initial, final) >= 1:
            msg = (
                "exponential schedule: expected both ends below sparsity 1, as it never reaches a density "
                f"of 0; got {initial} and {final}; use 'cubic'"
            )
            raise ValueError(msg)
        return super().at(progress, initial=initial, final=final)

    def _between(self, p: float, initial: float, final: float) -> float:
        return 1 - (1 - initial) * math.pow((1 - final) / (1 - initial), p)


@dataclass(frozen=True)
class Cosine(_Curve):
    """sf + (si - sf) (1 + cos(pi p)) / 2: slow at both ends."""

    def _between(self, p: float, initial: float, final: float) -> float:
        return final + (initial - final) * (1 + math.cos(math.pi * p)) / 2


@dataclass(frozen=True)
class _Listed:
    values: tuple[float, ...]

    def at(self, progress: float, /, *, initial: float, final: float) -> float:  # noqa: ARG002
        return self.values[round(progress * (len(self.values) - 1))]


@dataclass(frozen=True)
class _Function:
    sparsity: Callable[[float], float]

    def at(self, progress: float, /, *, initial: float, final: float) -> float:  # noqa: ARG002
        return self.sparsity(progress)


_NAMED: dict[str, Schedule] = {
    "one_shot": OneShot(),
    "linear": Polynomial(1),
    "cubic": Polynomial(3),
    "exponential": Exponential(),
    "cosine": Cosine(),
}


def resolve(schedule: ScheduleLike) -> Schedule:
    """Returns the curve for a name, an object, a list of sparsities or a function of progress.

    Raises:
        ValueError: The name is unknown, or the list is empty, decreases or leaves [0, 1].
    """
    if isinstance(schedule, str):
        if schedule not in _NAMED:
            msg = (
                f"schedule: expected one of {', '.join(map(repr, SCHEDULES))}; got {schedule!r}; pass one of "
                "them"
            )
            raise ValueError(msg)
        return _NAMED[schedule]
    if isinstance(schedule, Schedule):
        return schedule
    if callable(schedule):
        return _Function(schedule)
    return _Listed(check_growing("schedule", schedule))


def sample(schedule: ScheduleLike, *, num_iterations: int, initial: float, final: float) -> list[float]:
    """Returns the sparsity of each iteration, at p = i / (num_iterations - 1); at p = 1 if there is only one.

    Args:
        schedule: A name, an object, a list of sparsities or a function of progress.
        num_iterations: How many iterations, at least 1; the length of an explicit list.
        initial: si, where the curve starts.
        final: sf, where it ends.

    Raises:
        ValueError: The sparsity decreases or leaves [0, 1], a list has another length, or the schedule is
            unknown.
    """
    curve = resolve(schedule)
    if isinstance(curve, _Listed) and len(curve.values) != num_iterations:
        wanted = f"{len(curve.values)}, the number of sparsities in schedule"
        raise ValueError(
            expected("num_iterations", num_iterations, wanted, "pass 1 or more, or leave it out")
        )
    last = num_iterations - 1
    steps = (i / last if last else 1.0 for i in range(num_iterations))
    return list(check_growing("schedule", (curve.at(p, initial=initial, final=final) for p in steps)))
