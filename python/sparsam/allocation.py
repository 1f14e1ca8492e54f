"""How much to prune where: a total sparsity in, a sparsity for each tensor out.

With s the target, n the number of groups of a tensor (of weights, unless the pattern is `Block` or `Slices`),
and N that of all tensors:

============ ================ ===================================================================
name         object           sparsity of a tensor
============ ================ ===================================================================
"uniform"    `Uniform()`      s
"erk"        `ERK()`          1 - c sum(dims) / prod(dims); 0 where that density exceeds 1 [1, 2]
"lamp"       `Global("lamp")` the share that one threshold over all LAMP scores prunes of it [3]
"global"     `Global()`       the same with magnitudes
             `OWL(...)`       lower, the more outliers the Wanda scores of its block have [4]
             a mapping        the mapped value; unnamed tensors share the rest of the total uniformly
============ ================ ===================================================================

`allocate` rounds these to whole groups by largest remainder: every tensor gets the integer part of its count,
and the groups still missing from the total `round(s N)` go, one each, to the largest fractions, the earlier
tensor first. So every tensor is within one group of its share, and the total is exact.

[1] Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity", 2018.
[2] Evci et al., "Rigging the lottery: making all tickets winners", 2020, arXiv:1911.11134: kernel sizes too.
[3] Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", 2021, arXiv:2010.07611.
[4] Yin et al., "Outlier weighed layerwise sparsity (OWL)", 2024, arXiv:2310.05175.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsam import scores
from sparsam.apportionment import raise_to_floors, round_to_total, shift_to_mean
from sparsam.config import ALLOCATIONS, Allocation, AllocationLike, Scorer
from sparsam.inputs.checks import check_sparsity, expected, is_number, to_arrays
from sparsam.inputs.dtypes import check_dtype
from sparsam.inputs.float_mode import standard_floats
from sparsam.inputs.names import NamePatterns, closest, matching
from sparsam.orientation import Weights, as_weights
from sparsam.patterns import NM, Block, Pattern, Slices, Unstructured
from sparsam.ranking import score_tensor
from sparsam.selection import _select_groups
from sparsam.statistics import InputStatistics
from sparsam.tiles import count_groups

__all__ = ["ERK", "OWL", "Allocation", "Explicit", "Global", "Uniform", "allocate", "block_of"]

Arrays = Mapping[str, NDArray[Any]]
Grouping = Unstructured | Block | Slices


@dataclass(frozen=True)
class Uniform:
    """The target for every tensor."""

    def shares(self, weights: Arrays, target: float, pattern: Grouping, /) -> dict[str, float]:  # noqa: ARG002
        """Returns the target for every tensor."""
        return dict.fromkeys(weights, target)


@dataclass(frozen=True)
class ERK:
    """Erdos-Renyi kernel: the density of a tensor is c (sum(dims) / prod(dims))^power, at most 1.

    dims are (out, in), or (out, in, kh, kw) of a convolution: small and thin tensors stay denser. c is chosen
    so that the total holds; while a density exceeds 1, that tensor is made dense and c is solved again for
    the rest.

    Attributes:
        power: At least 0; 1 in the papers, 0 is uniform.
        include_kernel: Whether dims include the axes after the second; if not, this is Erdos-Renyi (ER).
    """

    power: float = 1.0
    include_kernel: bool = True

    def __post_init__(self) -> None:
        power = self.power
        if not is_number(power) or not 0 <= power < math.inf:
            raise ValueError(
                expected("ERK: power", power, "a finite number of at least 0", "leave it out for 1")
            )
        if not isinstance(self.include_kernel, bool):
            raise ValueError(
                expected("ERK: include_kernel", self.include_kernel, "True or False", "pass one of them")
            )

    def shares(self, weights: Arrays, target: float, pattern: Grouping, /) -> dict[str, float]:
        """Returns 1 - density for every tensor."""
        weights = as_weights(weights)
        sizes = _sizes(weights, pattern)
        ratios = {}
        for name, size in sizes.items():
            dims = weights.outputs_first(name).shape if weights[name].ndim > 1 else (1, weights[name].size)
            dims = dims if self.include_kernel else dims[:2]
            ratios[name] = sum(dims) / math.prod(dims) if size else 0.0
        free = {name for name, size in sizes.items() if size}
        density = dict.fromkeys(weights, 1.0)
        kept = (1 - target) * sum(sizes.values())
        while free:
            # Divided by the largest ratio, no power overflows, and they do not all underflow to 0.
            top = max(ratios[name] for name in free)
            raw = {name: (ratios[name] / top) ** self.power for name in free}
            left = kept - sum(sizes[name] for name in sizes if name not in free)
            scale = left / sum(raw[name] * sizes[name] for name in free)
            over = {name for name in free if raw[name] * scale > 1}
            if not over:
                density |= {name: max(raw[name] * scale, 0.0) for name in free}
                break
            free -= over
        return {name: 1 - density[name] for name in weights}


@dataclass(frozen=True)
class Global:
    """The share that one threshold over the scores of all tensors would prune of each.

    Only these shares are used: the weights themselves are selected by the configuration's method.

    Attributes:
        scorer: A method's name or object; "lamp" makes this the LAMP allocation. Groups of different tensors
            are compared by score per weight.
    """

    scorer: str | Scorer = "magnitude"

    def __post_init__(self) -> None:
        if not isinstance(scores.resolve(self.scorer), Scorer) or isinstance(self.scorer, type):
            raise ValueError(
                expected("Global: scorer", self.scorer, "a method's name or object", "pass 'magnitude', say")
            )

    def shares(self, weights: Arrays, target: float, pattern: Grouping, /) -> dict[str, float]:
        """Returns the sparsities that one threshold leads to; ValueError for a NaN, with its place."""
        scorer, weights = scores.resolve(self.scorer), as_weights(weights)
        ranked = {
            name: score_tensor(scorer, name, array, transposed=name in weights.transposed)
            for name, array in weights.items()
        }
        viewed = Weights(ranked, weights.transposed)
        groups = {name: viewed.outputs_first(name) for name in ranked}
        masks = _select_groups(groups, target, pattern, scores.traits(scorer).norm)
        return {name: mask.sparsity if mask.size else target for name, mask in masks.items()}


def block_of(name: str) -> str:
    """Returns the name up to its first number, "model.layers.3" of "model.layers.3.mlp.up.weight", or all."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return found[0] if found else name


@dataclass(frozen=True, eq=False)
class OWL:
    """Blocks with more outliers are pruned less (Yin et al. 2024).

    Let A be the Wanda scores abs(W_ij) rms(x_j) of all tensors of a block, and D the share of them above
    `multiple` times their mean. The densities of the blocks are D rescaled to a range of 2 `spread` (all
    equal if all D are) and shifted so that the total holds: the sparsities of two blocks differ by at most
    2 `spread`. The paper shifts by the plain mean over its blocks, which have equal sizes; here blocks are
    weighted by their size. Densities that the shift would move out of [0, 1] are clipped, and the others are
    shifted further.

    Attributes:
        statistics: Name -> `InputStatistics`, as for `sparsam.scores.Wanda`.
        multiple: M of the paper, above 0.
        spread: lambda of the paper, in [0, 0.5].
        blocks: Name -> block, as a mapping or a function; `block_of` if left out.
    """

    statistics: Mapping[str, InputStatistics] = field(repr=False)
    multiple: float = 5.0
    spread: float = 0.08
    blocks: Mapping[str, Hashable] | Callable[[str], Hashable] = field(default=block_of, repr=False)

    def __post_init__(self) -> None:
        scores.Wanda(self.statistics)
        for what, value, most in (("multiple", self.multiple, math.inf), ("spread", self.spread, 0.5)):
            low = 0 if what == "spread" else math.ulp(0.0)
            number = is_number(value)
            if not number or not low <= value <= most or value == math.inf:
                wanted = "a number from 0 to 0.5" if what == "spread" else "a finite number above 0"
                raise ValueError(expected(f"OWL: {what}", value, wanted, "leave it out for the default"))
        if not isinstance(self.blocks, Mapping) and not callable(self.blocks):
            wanted = "a mapping or function, name -> block"
            raise ValueError(expected("OWL: blocks", self.blocks, wanted, "leave it out for layers"))

    def shares(self, weights: Arrays, target: float, pattern: Grouping, /) -> dict[str, float]:
        """Returns the sparsity of each tensor's block; ValueError where statistics or a block are missing."""
        weights = as_weights(weights)
        members: dict[Hashable, list[str]] = {}
        for name in weights:
            members.setdefault(self._block(name), []).append(name)
        sizes = _sizes(weights, pattern)
        counts = np.array([sum(sizes[name] for name in names) for names in members.values()], np.float64)
        outliers = np.array([self._outliers(weights, names) for names in members.values()])
        if not counts.sum():
            return dict.fromkeys(weights, target)
        span = float(np.ptp(outliers))
        stretched = (outliers - outliers.min()) / span * 2 * self.spread if span else np.zeros(len(members))
        density = shift_to_mean(stretched, counts, 1 - target)
        return {
            name: 1 - float(own)
            for own, names in zip(density, members.values(), strict=True)
            for name in names
        }

    def _block(self, name: str) -> Hashable:
        if not isinstance(self.blocks, Mapping):
            return self.blocks(name)
        if name not in self.blocks:
            msg = f"OWL: blocks: expected a block of tensor {name!r}; got {list(self.blocks)[:5]!r}; add it"
            raise ValueError(msg)
        return self.blocks[name]

    def _outliers(self, weights: Weights, names: Sequence[str]) -> float:
        """The share of a block's Wanda scores that are above `multiple` times their mean."""
        wanda = scores.Wanda(self.statistics)
        each = [wanda.score(name, weights.outputs_first(name)) for name in names]
        for name, own in zip(names, each, strict=True):
            if not np.isfinite(own).all():
                msg = f"OWL: tensor {name!r}: expected finite weights; got NaN or infinity; exclude it"
                raise ValueError(msg)
        size = sum(own.size for own in each)
        if not size:
            return 0.0
        cutoff = self.multiple * (sum(float(own.sum()) for own in each) / size)
        return sum(int((own > cutoff).sum()) for own in each) / size


@dataclass(frozen=True)
class Explicit:
    """Sparsities by name or shell-style pattern; the last match wins, and unmatched tensors are uniform.

    A matched tensor has exactly `round(sparsity * n)` groups pruned; the others share the rest of the total.
    Where every tensor is matched, the total must agree with the target up to that rounding; the difference
    goes to the largest remainders.

    Attributes:
        sparsities: Name or pattern (`fnmatch.fnmatchcase`) -> sparsity.
    """

    sparsities: Mapping[str, float]

    def __post_init__(self) -> None:
        if not isinstance(self.sparsities, Mapping):
            wanted = "a mapping from names or patterns to sparsities"
            raise ValueError(
                expected("Explicit: sparsities", self.sparsities, wanted, "pass {'fc1.weight': 0.5, ...}")
            )
        for name, value in self.sparsities.items():
            check_sparsity(f"allocation[{name!r}]", value)

    def shares(self, weights: Arrays, target: float, pattern: Grouping, /) -> dict[str, float]:
        """Returns the sparsities; ValueError where a pattern matches nothing or the total cannot hold."""
        for wanted in self.sparsities:
            if not matching(wanted, weights):
                msg = (
                    "allocation: expected names or patterns of tensors to be pruned, apart from overrides "
                    f"and ties, which are outside the total; got {wanted!r}, which matches none; "
                    f"{closest(wanted, weights)}"
                )
                raise ValueError(msg)
        patterns = NamePatterns(self.sparsities)
        keys = {name: key for name in weights if (key := patterns.last(name)) is not None}
        named = {name: float(self.sparsities[key]) for name, key in keys.items()}
        sizes = _sizes(weights, pattern)
        total = sum(sizes.values())
        counts = {name: round(share * sizes[name]) for name, share in named.items()}
        others = sum(sizes[name] for name in weights if name not in named)
        left = round(target * total) - sum(counts.values())
        if not others and abs(left) <= len(named):
            return {name: named.get(name, target) for name in weights}
        if not 0 <= left <= others:
            low, high = sum(counts.values()), sum(counts.values()) + others
            msg = (
                f"allocation: expected sparsities that allow the total {target:g}; got ones that allow from "
                f"{low / total:.6g} to {high / total:.6g}; change them, or target_sparsity"
            )
            raise ValueError(msg)
        rest = left / others if others else target
        exact = {name: count / sizes[name] if sizes[name] else target for name, count in counts.items()}
        return {name: exact.get(name, rest) for name in weights}


_NAMED: dict[str, Allocation] = {
    "uniform": Uniform(),
    "erk": ERK(),
    "lamp": Global("lamp"),
    "global": Global(),
}


def resolve(method: AllocationLike) -> Allocation:
    """Returns the allocation for a name or a mapping; an object is returned as it is.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(method, Mapping):
        return Explicit(method)
    if isinstance(method, str) and method in _NAMED:
        return _NAMED[method]
    if isinstance(method, Allocation) and not isinstance(method, type):
        return method
    names = ", ".join(map(repr, ALLOCATIONS))
    wanted = f"{names}, an Allocation, or a mapping to sparsities"
    raise ValueError(expected("allocation", method, wanted, "pass one of the names"))


@standard_floats
def allocate(
    weights: Mapping[str, ArrayLike],
    target: float,
    method: AllocationLike = "uniform",
    *,
    pattern: Pattern = Unstructured(),  # noqa: B008 - frozen
    transposed: str | Sequence[str] = (),
) -> dict[str, float]:
    """Shares a total sparsity out over tensors.

    Args:
        weights: Name -> array. Tensors with fewer than two axes are left out, as `sparsam.prune` leaves them
            dense.
        target: The total, in [0, 1].
        method: A name, an object of this module, or a mapping from names or patterns to sparsities.
        pattern: What counts as one group; not N:M, which has one sparsity.
        transposed: Names or patterns of the tensors that are stored as (in, out).

    Returns:
        Name -> sparsity in [0, 1], such that the sum of round(sparsity * n) is exactly round(target * N).

    Raises:
        ValueError: The target is outside [0, 1], the method does not fit the tensors, or the pattern is N:M.
        TypeError: `weights` is no mapping from names, or a tensor has a dtype that cannot be pruned.
    """
    arrays = {name: array for name, array in to_arrays(weights).items() if array.ndim > 1}
    for name, array in arrays.items():
        check_dtype(name, array)
    stored = NamePatterns((transposed,) if isinstance(transposed, str) else transposed)
    transposed = [name for name in arrays if stored.matches(name)]
    return allocate_groups(Weights(arrays, transposed), check_sparsity("target", target), method, pattern)


def allocate_groups(
    arrays: Weights,
    target: float,
    method: AllocationLike,
    pattern: Pattern,
    *,
    floors: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """`allocate` over tensors of any rank, each of which is pruned by at least `floors[name]` groups."""
    if not isinstance(pattern, Grouping):
        why = f"pattern {pattern}, which has one sparsity" if isinstance(pattern, NM) else repr(pattern)
        msg = (
            f"allocation: expected the pattern Unstructured(), Block or Slices; got {why}; use allocation "
            "'uniform' for N:M"
        )
        raise ValueError(msg)
    allocation = resolve(method)
    sizes = _sizes(arrays, pattern)
    total = round(target * sum(sizes.values()))
    shares = allocation.shares(arrays, target, pattern)
    for name in arrays:
        share = shares.get(name)
        if not is_number(share) or not -1e-9 <= share <= 1 + 1e-9:
            what, do = f"{allocation!r}: share of tensor {name!r}", "return a share for each tensor"
            raise ValueError(expected(what, share, "one in [0, 1]", do))
    wanted = {name: min(max(float(shares[name]), 0.0), 1.0) * size for name, size in sizes.items()}
    if abs(sum(wanted.values()) - total) > len(sizes) + 1e-9 * total:
        got = sum(wanted.values()) / sum(sizes.values())
        what, do = f"{allocation!r}: total of its shares", "make them add up to it"
        raise ValueError(expected(what, got, f"the target {target}", do))
    least = {name: (floors or {}).get(name, 0) for name in sizes}
    counts = round_to_total(raise_to_floors(wanted, least, total), sizes, least, total)
    return {name: counts[name] / size if size else target for name, size in sizes.items()}


def _sizes(weights: Arrays, pattern: Grouping) -> dict[str, int]:
    weights = as_weights(weights)
    return {name: count_groups(name, weights.outputs_first(name).shape, pattern) for name in weights}
