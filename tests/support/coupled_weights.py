"""Small attention and MLP tensors whose slices are coupled, and methods to score them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsam.config import Scorer
from sparsam.patterns import Slices, Tied
from sparsam.scores import Magnitude, Random

Arrays = dict[str, NDArray[Any]]


class Positional:
    """A method of one's own: later weights matter more, and a bias is not to be asked for."""

    def score(self, name: str, weights: NDArray[Any], /) -> NDArray[Any]:
        assert weights.ndim > 1, name
        return np.where(weights == 0, 0.0, np.arange(1.0, weights.size + 1).reshape(weights.shape))


SCORERS: list[Scorer] = [Magnitude(), Magnitude(2), Random(7), Positional()]


SELF_ATTENTION = Tied({"q": Slices(0, 3), "k": Slices(-2, 3), "v": Slices(0, 3), "o": Slices(1, 3)})


MLP = Tied({"fc1": Slices(0), "fc1.bias": Slices(-1), "fc2": Slices(1)})


def block(seed: int = 0, high: int = 3) -> Arrays:
    """Integers, so that every sum is exact and ties abound: attention with 4 heads of 3, and an MLP."""
    rng = np.random.default_rng(seed)
    shapes = {"fc2": (5, 8), "q": (12, 5), "fc1.bias": (8,), "k": (12, 5), "o": (5, 12), "v": (12, 5)}
    shapes |= {"fc1": (8, 5), "embed": (8, 4), "norm": (5,), "conv": (4, 2, 2, 2)}
    return {
        name: np.asarray(rng.integers(-high, high + 1, shape), np.float32) for name, shape in shapes.items()
    }
