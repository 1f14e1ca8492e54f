"""One exact threshold over tensors that do not fit into memory together, by counting passes.

A sample gives two values that very likely enclose the threshold. A pass over the tensors, one at a time,
counts the scores below and at these values, and collects the few between. A pass that missed the threshold,
or collected too many, still narrows the range, by at least half from the fourth pass on. The result is that
of `selection.threshold` over all tensors (Floyd and Rivest, 1975, with the data on disk).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsam import _core
from sparsam.config import Scorer
from sparsam.inputs.dtypes import check_dtype
from sparsam.masks import Mask
from sparsam.orientation import mask_as_stored, outputs_first
from sparsam.patterns import Block, Slices, Unstructured
from sparsam.ranking import score_tensor
from sparsam.scores import traits
from sparsam.selection import _refuse_nan
from sparsam.tiles import tile_sizes, tiling_of

__all__ = ["Counts", "Cut", "Found", "Ranking", "find_threshold", "run_starts"]

RUN = 16
"""Neighbours that are sampled together."""

_DEVIATIONS = 3.0
_GUESSES = 4


class Counts(NamedTuple):
    """How many scores of one tensor lie below, at and between two values.

    Attributes:
        below: How many are smaller than the lower one.
        equal: How many are the lower one.
        inside: How many lie strictly between the two.
        found: Those, unless there were too many.
    """

    below: int
    equal: int
    inside: int
    found: NDArray[Any] | None


class Cut(NamedTuple):
    """What is pruned of one tensor: the scores below a value, and those equal to it except the first few."""

    value: float
    ties_kept: int


@dataclass(frozen=True)
class Ranking:
    """The scores that are compared over all tensors of a pool, of each weight or group.

    Attributes:
        method: The scorer.
        pattern: The pattern, which defines the groups.
        several: Whether the pool has several tensors: groups then compare by score per weight.
        transposed: The tensors that are stored as (in, out).
    """

    method: Scorer
    pattern: Unstructured | Block | Slices
    several: bool
    transposed: frozenset[str]

    @property
    def reads_weights(self) -> bool:
        """Whether the scores are the weights as they are stored."""
        return bool(traits(self.method).ranks_by_magnitude) and self.pattern == Unstructured()

    def values(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """Returns the scores of a tensor, in its shape, or of its groups; the larger, the better."""
        check_dtype(name, array)
        ranked = score_tensor(self.method, name, array, transposed=name in self.transposed)
        if self.pattern == Unstructured():
            return ranked
        assert not isinstance(self.pattern, Unstructured)
        _refuse_nan([ranked], [name])
        viewed = outputs_first(ranked) if name in self.transposed else ranked
        tiling = tiling_of(name, viewed.shape, self.pattern)
        sums = _core.tile_scores(viewed, *tiling, traits(self.method).norm)
        return sums / tile_sizes(*tiling) if self.several else sums

    def count(self, name: str, array: NDArray[Any], low: float, high: float, room: int) -> Counts:
        """Counts the scores of a tensor around two values; ValueError for a NaN."""
        values = self.values(name, array)
        found = _core.bracket(values, low, high, room)
        if found is None:
            _refuse_nan([values], [name])
            msg = f"tensor {name!r}: expected a file that does not change; got one that did; run it again"
            raise ValueError(msg)
        below, equal, inside, between = found
        return Counts(below, equal, inside, None if between is None else between.copy())

    def apply(self, name: str, array: NDArray[Any], cut: Cut) -> tuple[int, int]:
        """Zeroes the pruned weights in place; returns how many were pruned, and how many are not zero."""
        values = self.values(name, array)
        outs = [array] if values is array else []
        (words,), _, (nonzero,) = _core.threshold_mask([values], cut.value, cut.ties_kept, outs)
        if self.pattern == Unstructured():
            mask = Mask(words, array.shape)
            return mask.size - mask.count, nonzero if outs else mask.write(array, array)
        assert not isinstance(self.pattern, Unstructured)
        viewed = outputs_first(array) if name in self.transposed else array
        tiling = tiling_of(name, viewed.shape, self.pattern)
        mask = Mask(_core.expand_tiles(words, *tiling), viewed.shape)
        mask = mask_as_stored(mask) if name in self.transposed else mask
        return mask.size - mask.count, mask.write(array, array)


class Found(NamedTuple):
    """A threshold over several tensors.

    Attributes:
        value: The k-th smallest score; 0.0 for k = 0.
        below: Tensor -> how many are smaller.
        equal: Tensor -> how many are equal.
    """

    value: float
    below: Mapping[str, int]
    equal: Mapping[str, int]

    def cuts(self, k: int, names: Iterable[str]) -> dict[str, Cut]:
        """Returns the cut of each tensor, so that k scores are pruned; ties keep those of earlier tensors."""
        kept = sum(self.equal.values()) - (k - sum(self.below.values()))
        cuts = {}
        for name in names:
            here = min(kept, self.equal[name])
            cuts[name] = Cut(self.value, here)
            kept -= here
        return cuts


def find_threshold(
    k: int,
    sizes: Mapping[str, int],
    sample: Callable[[int], NDArray[np.float64]],
    count: Callable[[float, float], Mapping[str, Counts]],
) -> Found:
    """Returns the k-th smallest of all scores, usually in one pass over them.

    Args:
        k: From 0 to the number of scores.
        sizes: Tensor -> how many scores it has.
        sample: Attempt -> a random sample of the scores, another one in each attempt.
        count: (low, high) -> tensor -> the counts of its scores around the two values.
    """
    total = sum(sizes.values())
    if k == 0:
        # One pass nevertheless, since it refuses NaN.
        count(0.0, 0.0)
        return Found(0.0, dict.fromkeys(sizes, 0), dict(sizes))
    least, most, before, upto, width = 0.0, math.inf, 0, total, _DEVIATIONS
    attempt = 0
    while True:
        low = high = _middle(least, most)
        if attempt < _GUESSES:
            drawn = sample(attempt)
            drawn = np.sort(drawn[(drawn >= least) & (drawn <= most)])
            if drawn.size:
                low, high = _pivots(drawn, (k - before) / (upto - before), width, least, most)
        counts = count(low, high)
        below = sum(c.below for c in counts.values())
        equal = sum(c.equal for c in counts.values())
        inside = sum(c.inside for c in counts.values())
        if k <= below:
            most, upto = math.nextafter(low, -math.inf), below
        elif k <= below + equal:
            return Found(
                low, {n: c.below for n, c in counts.items()}, {n: c.equal for n, c in counts.items()}
            )
        elif k <= below + equal + inside:
            collected = [(n, c) for n, c in counts.items() if c.inside]
            if all(c.found is not None for _, c in collected):
                return _within(k - below - equal, counts)
            least, most = math.nextafter(low, math.inf), math.nextafter(high, -math.inf)
            before, upto = below + equal, below + equal + inside
            attempt += 1
            continue
        else:
            above = math.nextafter(low, math.inf)
            least, before = (high, below + equal + inside) if high > low else (above, below + equal)
        width *= 4
        attempt += 1


def run_starts(size: int, wanted: int, seed: int) -> NDArray[np.int64]:
    """Returns where runs of `RUN` begin in `size` elements, one in each of equal parts, `wanted` in all."""
    runs = max(1, min(wanted // RUN, size // RUN))
    jitter = np.random.default_rng(seed).random(runs)
    starts = ((np.arange(runs) + jitter) * (size / runs)).astype(np.int64) // RUN * RUN
    return np.minimum(starts, max(size - RUN, 0))


def _middle(least: float, most: float) -> float:
    """The float64 half-way between two that are at least 0, counting floats."""
    bits = np.array([least, most]).view(np.int64)
    return float(np.int64(bits[0] + (bits[1] - bits[0]) // 2).view(np.float64))


def _pivots(
    drawn: NDArray[np.float64], share: float, width: float, least: float, most: float
) -> tuple[float, float]:
    """Two values that enclose a share of the sorted sample, wider by some deviations."""
    size = drawn.size
    margin = width * (math.sqrt(size * share * (1 - share)) + 1)
    first, last = math.floor(share * size - margin), math.ceil(share * size + margin)
    low = least if first < 1 else float(drawn[first - 1])
    high = most if last >= size else float(drawn[last])
    return low, high


def _within(k: int, counts: Mapping[str, Counts]) -> Found:
    """The k-th smallest of the scores that were collected."""
    found = {name: np.abs(c.found) for name, c in counts.items() if c.found is not None}
    # A type that holds all of them exactly.
    common = np.float64 if any(own.itemsize == 8 for own in found.values()) else np.float32
    together = np.concatenate([own.astype(common, copy=False) for own in found.values()])
    together.partition(k - 1)
    value = together[k - 1]
    below, equal = {}, {}
    for name, c in counts.items():
        own = found[name].astype(common, copy=False) if name in found else together[:0]
        below[name] = c.below + c.equal + int(np.count_nonzero(own < value))
        equal[name] = int(np.count_nonzero(own == value))
    return Found(float(value), below, equal)
