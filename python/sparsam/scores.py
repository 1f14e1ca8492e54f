"""Which weights matter: arrays in, scores of the same shape out. The larger a score, the more worth keeping.

A scorer is one function over one tensor. It knows nothing of sparsity, patterns or time, and gives what is
already zero the lowest score, 0, so that a growing schedule finds first what it pruned before.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam.config import METHODS, Scorer


@dataclass(frozen=True)
class Magnitude:
    """The absolute value of a weight; of a block or slice, the sum of abs(w)^norm over it (norm 1 or 2)."""

    norm: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.norm, bool) or self.norm not in {1, 2}:
            msg = f"Magnitude: expected norm 1 (absolute values) or 2 (squares); got {self.norm!r}"
            raise ValueError(msg)

    def score(self, name: str, weights: NDArray[Any], /) -> NDArray[Any]:  # noqa: ARG002
        """Returns `weights` as they are: selection ranks by absolute value, so no copy is needed."""
        return weights


@dataclass(frozen=True)
class Random:
    """A draw in (0, 1] for every weight that is not zero: the baseline that a criterion has to beat.

    The draws depend on the seed, the tensor's name and its shape, not on its place among the tensors or on
    the others.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        try:
            seed = -1 if isinstance(self.seed, bool) else operator.index(self.seed)
        except TypeError:
            seed = -1
        if seed < 0:
            msg = f"Random: expected an integer seed of at least 0; got {self.seed!r}"
            raise ValueError(msg)
        object.__setattr__(self, "seed", seed)

    def score(self, name: str, weights: NDArray[Any], /) -> NDArray[np.float32]:
        """Returns float32 draws; 0 where a weight is 0, and NaN where it is NaN, which selection refuses."""
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")
        draws = np.random.default_rng([self.seed, key]).random(weights.shape, dtype=np.float32)
        scores = np.where(weights == 0, np.float32(0), 1 - draws)
        return np.where(np.isnan(weights), np.float32(np.nan), scores)


_NAMED: dict[str, Callable[[], Scorer]] = {"magnitude": Magnitude, "random": Random}


def resolve(method: str | Scorer) -> Scorer:
    """Returns the scorer that a name stands for; an object stands for itself.

    Raises:
        ValueError: The name is unknown.
    """
    if not isinstance(method, str):
        return method
    if method not in _NAMED:
        msg = f"method: expected one of {', '.join(map(repr, METHODS))}; got {method!r}"
        raise ValueError(msg)
    return _NAMED[method]()
