"""The plan of a run over files: which tensors are pruned and how, and whether memory suffices."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam import scores
from sparsam.allocation import OWL, Global, resolve
from sparsam.checkpoint.layout import Entry, Layout
from sparsam.checkpoint.ranking_passes import Ranking
from sparsam.checkpoint.shard_passes import needed
from sparsam.config import PruningConfig, Scorer
from sparsam.inputs.checks import expected
from sparsam.inputs.dtypes import DTYPES
from sparsam.inputs.names import NamePatterns
from sparsam.orientation import outputs_first
from sparsam.patterns import NM, Block, Slices, Unstructured
from sparsam.pools import Pool, check_patterns, make_pools
from sparsam.tiles import count_groups

__all__ = ["FilePlan", "Pooling", "parse_size", "shapes_of"]

_UNITS = {"": 1, "B": 1, **{f"{u}iB": 1024**i for i, u in enumerate("KMGT", 1)}}
_UNITS |= {f"{u}B": 1000**i for i, u in enumerate("KMGT", 1)}

# Bytes per weight that a scorer needs to compute scores: 56 for LAMP, measured with tracemalloc.
_SCORE_BYTES = 64


def parse_size(what: str, value: int | str) -> int:
    """Returns a number of bytes, given as a number or as text like 2GiB; ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*", str(value))
    if isinstance(value, bool) or found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise ValueError(expected(what, value, "a number of bytes, such as 2GiB", "write 512MiB, say"))
    return int(float(found[1]) * _UNITS[found[2]])


def shapes_of(entries: Sequence[Entry]) -> dict[str, NDArray[Any]]:
    """Returns name -> an array of the tensor's shape and dtype that takes no memory, by name.

    It is full of NaN, so that code that reads values raises an error; of integers, full of zeros. A dtype
    that NumPy lacks becomes uint8.

    Raises:
        ValueError: NumPy cannot hold a shape.
    """
    arrays = {}
    for entry in sorted(entries, key=lambda entry: entry.name):
        kind = np.dtype(np.uint8) if entry.numpy_dtype is None else entry.numpy_dtype
        fill = np.zeros((), kind) if kind.kind in "biu" else np.full((), math.nan, kind)
        try:
            arrays[entry.name] = np.broadcast_to(fill, entry.shape)
        except ValueError as error:
            msg = (
                f"tensor {entry.name!r}: expected a shape that NumPy can hold; got {list(entry.shape)} "
                f"({error}); get the file again"
            )
            raise ValueError(msg) from error
    return arrays


@dataclass(frozen=True)
class Pooling:
    """Tensors under one threshold.

    Attributes:
        names: The tensors, in the order in which ties are decided.
        sizes: Tensor -> how many weights or groups are compared.
        sparsity: Of all of them.
        ranking: What is compared.
    """

    names: tuple[str, ...]
    sizes: Mapping[str, int]
    sparsity: float
    ranking: Ranking

    @property
    def k(self) -> int:
        """How many are pruned."""
        return round(self.sparsity * sum(self.sizes.values()))

    @classmethod
    def of(
        cls,
        arrays: Mapping[str, NDArray[Any]],
        sparsity: float,
        method: Scorer,
        pattern: Unstructured | Block | Slices,
        transposed: frozenset[str],
    ) -> Pooling:
        """The pooling of arrays of which the shapes are known."""
        viewed = {name: outputs_first(a) if name in transposed else a for name, a in arrays.items()}
        sizes = {name: count_groups(name, array.shape, pattern) for name, array in viewed.items()}
        return cls(tuple(arrays), sizes, sparsity, Ranking(method, pattern, len(arrays) > 1, transposed))


@dataclass(frozen=True)
class FilePlan:
    """What is done to the tensors of some shards.

    Attributes:
        layouts: The shards.
        config: What to do.
        arrays: `shapes_of` all tensors.
        method: The scorer.
    """

    layouts: tuple[Layout, ...]
    config: PruningConfig
    arrays: Mapping[str, NDArray[Any]]
    method: Scorer

    @classmethod
    def of(cls, layouts: Sequence[Layout], config: PruningConfig, *, stacklevel: int) -> FilePlan:
        """Makes and checks a plan; warns as `prune` does.

        Raises:
            ValueError: The configuration does not fit the tensors, or needs all of them at once.
            TypeError: A tensor to be pruned has a dtype that cannot be.
        """
        if isinstance(config.allocation, OWL):
            msg = (
                "allocation: expected one that needs no weights, or 'global' or 'lamp'; got OWL; take the "
                "sparsities of sparsam.allocation.allocate"
            )
            raise ValueError(msg)
        if config.ties:
            msg = "ties: expected none, since tied tensors are selected together; got some; use sparsam.prune"
            raise ValueError(msg)
        entries = [entry for layout in layouts for entry in layout.entries]
        arrays = shapes_of(entries)
        check_patterns(config, arrays, stacklevel=stacklevel + 1)
        excluded, overridden = NamePatterns(config.exclude), NamePatterns(config.overrides)
        for entry in entries:
            name = entry.name
            unknown = entry.numpy_dtype is None and not excluded.matches(name)
            if unknown and overridden.last(name) is not None:
                msg = (
                    f"tensor {name!r}: expected one of the dtypes {', '.join(DTYPES)}; got {entry.dtype}; "
                    "exclude the tensor, or narrow the override"
                )
                raise TypeError(msg)
        return cls(tuple(layouts), config, arrays, scores.resolve(config.method))

    def allocation_pooling(self) -> Pooling | None:
        """The threshold that an allocation needs to share the total out; None where it needs no weights."""
        scorer = self._allocation_scorer
        if scorer is None:
            return None
        overridden = NamePatterns(self.config.overrides)
        names = [name for pool in self._uniform_pools for name in pool.names if overridden.last(name) is None]
        pattern = self.config.pattern
        assert not isinstance(pattern, NM)  # which PruningConfig refuses
        stored = NamePatterns(self.config.transposed)
        transposed = frozenset(name for name in names if stored.matches(name))
        arrays = {name: self.arrays[name] for name in names}
        target = self.config.target_sparsity
        return Pooling.of(arrays, target, scorer, pattern, transposed)

    @property
    def _allocation_scorer(self) -> Scorer | None:
        """The scorer of an allocation that compares weights of all tensors; None for another allocation."""
        allocation = self.config.allocation
        if allocation == "uniform" or not isinstance(chosen := resolve(allocation), Global):
            return None
        return scores.resolve(chosen.scorer)

    @property
    def _uniform_pools(self) -> list[Pool]:
        """The pools before an allocation has shared the total out: which tensors are pruned, and how."""
        return make_pools(self.arrays, self.config.with_changes(allocation="uniform"))

    def pools(self, shares: Mapping[str, float] | None) -> list[Pool]:
        """The pools of the configuration, with the shares that an allocation's threshold gave, if any."""
        config = self.config if shares is None else self.config.with_changes(allocation=_Measured(shares))
        return [one for pool in make_pools(self.arrays, config) for one in pool.split()]

    def pooling(self, pool: Pool) -> Pooling | None:
        """The threshold of a pool; None where tensors are selected one by one, or groups as in NM."""
        if pool.scope != "global" or isinstance(pool.pattern, NM):
            return None
        arrays = {name: self.arrays[name] for name in pool.names}
        return Pooling.of(arrays, pool.sparsity_of(pool.names[0]), self.method, pool.pattern, pool.transposed)

    def check_memory(self, memory: int) -> None:
        """Raises ValueError if the buffers of a tensor do not fit."""
        pool_of = {name: pool for pool in self._uniform_pools for name in pool.names}
        most, which = 0, ""
        for layout in self.layouts:
            for entry in layout.entries:
                if entry.name in pool_of:
                    size = needed(entry.nbytes) + self._beside(entry, pool_of[entry.name])
                    most, which = max((most, which), (size, entry.name))
        if most > memory:
            msg = (
                f"memory: expected at least {math.ceil(most / 2**20)}MiB, for tensor {which!r} and the work "
                f"on it; got {memory / 2**20:g}MiB; raise it"
            )
            raise ValueError(msg)

    def _beside(self, entry: Entry, pool: Pool) -> int:
        """Bytes that scores, groups and transposed masks take in addition to a tensor."""
        each = 0
        scorers = (self.method, self._allocation_scorer)
        if not all(scorer is None or scores.traits(scorer).ranks_by_magnitude for scorer in scorers):
            each += _SCORE_BYTES
        if entry.name in pool.transposed or (
            isinstance(pool.pattern, NM) and pool.pattern.axis == "channels"
        ):
            each += 4 + np.dtype(entry.numpy_dtype).itemsize
        size = math.prod(entry.shape)
        if isinstance(pool.pattern, (Block, Slices)):
            each_group = 24 * count_groups(entry.name, self.arrays[entry.name].shape, pool.pattern)
            return each * size + each_group + size // 8
        return each * size


@dataclass(frozen=True)
class _Measured:
    """An allocation whose shares are known already."""

    known: Mapping[str, float]

    def shares(
        self, weights: Mapping[str, NDArray[Any]], target: float, pattern: Unstructured | Block | Slices, /
    ) -> Mapping[str, float]:
        """Returns the shares."""
        del weights, target, pattern
        return self.known
