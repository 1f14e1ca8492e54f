"""The search for the highest sparsity that passes: bisection, with checks below the result."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

__all__ = ["Bisection", "SearchProbe"]


class SearchProbe(NamedTuple):
    """One sparsity that was tried.

    Attributes:
        target: The requested total sparsity.
        sparsity: The sparsity reached, over the tensors that are pruned.
        score: What `eval_fn` returned, after recovery if there is any.
        passed: Whether that is at least the lowest acceptable score.
    """

    target: float
    sparsity: float
    score: float
    passed: bool


class Bisection:
    """The probes of a search and the next target. The dense model, target 0, is noted first.

    The interval between the highest sparsity that passed and the lowest that failed is halved until it is at
    most `tolerance` wide; the end is tried only when all below it passed. Since a score need not fall with
    sparsity, up to `checks` probes are then spent in the middle of the widest gaps below the sparsity found;
    if one fails, the search continues below it.

    Attributes:
        probes: Target -> its result.
        finished: Whether the search converged.
    """

    def __init__(self, end: float, tolerance: float, checks: int) -> None:
        self._end, self._tolerance, self._checks = end, tolerance, checks
        self.probes: dict[float, SearchProbe] = {}
        self.finished = False

    def note(self, probe: SearchProbe) -> None:
        """Records the result for a target."""
        self.probes[probe.target] = probe

    def bounds(self) -> tuple[float, float | None]:
        """The highest target that passed below the lowest that failed; and the latter."""
        failed = min((at for at, probe in self.probes.items() if not probe.passed), default=None)
        passed = max(
            at for at, probe in self.probes.items() if probe.passed and (failed is None or at < failed)
        )
        return passed, failed

    def following(self) -> float | None:
        """The target to try next; None once the search is finished."""
        target = self._middle()
        if target is None and self._checks:
            target = self._gap()
            self._checks -= 1
        self.finished = target is None
        return target

    def curve(self) -> tuple[SearchProbe, ...]:
        """All probes, by rising target."""
        return tuple(sorted(self.probes.values()))

    def _middle(self) -> float | None:
        """The next target of the bisection; None if it has ended."""
        low, high = self.bounds()
        if high is None and self._end - low <= self._tolerance:
            return self._end if low < self._end else None
        high = self._end if high is None else high
        return (low + high) / 2 if high - low > self._tolerance else None

    def _gap(self) -> float | None:
        """The middle of the widest gap below the target found; None if none is wider than the tolerance."""
        passed = sorted(at for at in self.probes if at <= self.bounds()[0])
        gaps = [
            (high - low, (low + high) / 2) for low, high in pairwise(passed) if high - low > self._tolerance
        ]
        return max(gaps)[1] if gaps else None
