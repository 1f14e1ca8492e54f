"""Streaming second moments around the mean: of inputs, and of inputs with target outputs.

The moments of a block of rows around the block's own mean are matrix products; blocks are merged in float64
by the formula of Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm for computing sample
variances", 1979).

Products, and sums of 128 of them, are float32 unless the inputs are float64; these sums are added up in
float64. Let c_j be column j of the centred rows, each row multiplied by the square root of its weight. The
error of the moment of i and j is then at most 2^-16 ||c_i|| ||c_j|| (each number, product and sum has a
relative error of 2^-24, and at most 130 of these add up), in practice about 2^-22 of that norm product; with
float64 inputs at most 2^-43 of it, for means of up to 8000 standard deviations. Columns are scaled by powers
of two, so that this holds for numbers of every size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsam.moment_sums import MomentSums, Scaled

__all__ = ["CentredMoments", "Moments"]


@dataclass(frozen=True)
class CentredMoments:
    """Second moments of inputs around their mean; as `h` they give the error that a bias cannot correct.

    The last three are None without targets.

    Attributes:
        gram: The sum of (x - mean)(x - mean)^T, (in_features, in_features), symmetric. In this sum and those
            below, each term is multiplied by the weight of its row.
        mean: The mean of each input, (in_features,).
        count: How many inputs were seen.
        precision: The rounding unit of the products that went into `gram` and `cross`.
        weight: The sum of the rows' weights; `count` where none were given.
        cross: The sum of (y - target_mean)(x - mean)^T, (out_features, in_features).
        target_mean: The mean of each target, (out_features,).
        target_squares: The sum of (y_i - target_mean_i)^2 of each target, (out_features,).
    """

    gram: NDArray[np.float64]
    mean: NDArray[np.float64]
    count: int
    precision: float
    weight: float
    cross: NDArray[np.float64] | None = None
    target_mean: NDArray[np.float64] | None = None
    target_squares: NDArray[np.float64] | None = None

    def squared_error(
        self,
        w: ArrayLike,
        bias: ArrayLike | None = None,
        *,
        rows: slice | NDArray[np.int64] = slice(None),
    ) -> float:
        """The sum of ||y - W x - b||^2 over the rows seen, from the moments alone.

        With H, C, t the moments above, m and u the means, r = u - W m - b and n the weight:

            tr(W H W^T) - 2 tr(W C^T) + sum(t) + n ||r||^2

        So statistics of held-out rows are enough to evaluate weights, for example to choose a damping. Errors
        below some 2^-20 of the sum of the squared targets are rounding.

        Args:
            w: Weights W, (out, in_features) or (out, in, ...).
            bias: b, (out,); by default the best one, with which r is 0.
            rows: Which of the targets belong to W, where the targets are those of several layers.

        Raises:
            ValueError: There are no targets, or the shapes do not fit together.
        """
        if self.cross is None or self.target_mean is None or self.target_squares is None:
            msg = "squared_error: expected targets; got none; give InputStatistics their number"
            raise ValueError(msg)
        cross, squares = self.cross[rows], self.target_squares[rows]
        matrix = np.asarray(w, np.float64)
        if matrix.ndim < 2 or matrix.reshape(len(matrix), -1).shape != cross.shape:
            msg = (
                f"squared_error: expected w of shape {cross.shape}; got {matrix.shape}; pass the weights of "
                "this layer"
            )
            raise ValueError(msg)
        matrix = matrix.reshape(cross.shape)
        error = float(np.vdot(matrix @ self.gram - 2 * cross, matrix)) + float(squares.sum())
        if bias is not None:
            offset = np.asarray(bias, np.float64)
            if offset.shape != squares.shape:
                msg = (
                    f"squared_error: expected bias of shape {squares.shape}; got {offset.shape}; pass the "
                    "bias of this layer"
                )
                raise ValueError(msg)
            rest = self.target_mean[rows] - matrix @ self.mean - offset
            error += self.weight * float(rest @ rest)
        return max(error, 0.0)


@dataclass
class Moments:
    """Moments of vectors x of `inputs` numbers, and with vectors y of `targets` numbers if that is not 0.

    Attributes:
        count: The number of rows.
        weight: The sum of the rows' weights.
        mean: (in,); for a constant input exactly its value.
        sums: (in, in).
        target_mean: (out,).
        target_squares: (out,).
        cross: (out, in).
        precision: The largest rounding unit of what was added.
    """

    count: int
    weight: float
    mean: NDArray[np.float64]
    sums: MomentSums
    target_mean: NDArray[np.float64]
    target_squares: NDArray[np.float64]
    cross: MomentSums
    precision: float = float(np.finfo(np.float64).eps)

    @classmethod
    def empty(cls, inputs: int, targets: int) -> Moments:
        """The moments of no rows."""
        sums, cross = MomentSums.zeros(inputs, inputs, symmetric=True), MomentSums.zeros(targets, inputs)
        return cls(0, 0.0, np.zeros(inputs), sums, np.zeros(targets), np.zeros(targets), cross)

    def add(self, arrays: list[NDArray[Any]], weights: NDArray[np.float64] | None = None) -> None:
        """Adds a block of finite rows x, or x and y, in float32 or float64, with positive weights."""
        x = arrays[0]
        added = float(len(x)) if weights is None else float(weights.sum())
        self.count += len(x)  # first, so that an interrupted addition can be detected
        total = self.weight + added
        between = math.sqrt(self.weight * added / total)
        wide = np.float64 in [array.dtype for array in arrays]
        dtype = np.float64 if wide else np.float32
        inputs = _centre(x, weights, self.mean, between, dtype)
        self.sums.add(inputs.scaled, inputs.scaled)
        for y in arrays[1:]:
            targets = _centre(y, weights, self.target_mean, between, dtype)
            self.cross.add(targets.scaled, inputs.scaled)
            self.target_squares = self.target_squares + targets.squares
            self.target_mean = self.target_mean + targets.distance * (added / total)
        self.mean = self.mean + inputs.distance * (added / total)
        self.weight = total
        self.precision = max(self.precision, float(np.finfo(dtype).eps))

    def merged(self, other: Moments) -> Moments:
        """Returns the moments of the rows of both."""
        weight = self.weight + other.weight
        factor = self.weight * other.weight / weight if weight else 0.0
        share = other.weight / weight if weight else 0.0
        distance, target_distance = other.mean - self.mean, other.target_mean - self.target_mean
        between, target_between = (math.sqrt(factor) * d for d in (distance, target_distance))
        merged = replace(
            self,
            count=self.count + other.count,
            weight=weight,
            mean=self.mean + distance * share,
            sums=self.sums.plus(other.sums),
            target_mean=self.target_mean + target_distance * share,
            target_squares=self.target_squares + other.target_squares + target_between**2,
            cross=self.cross.plus(other.cross),
            precision=max(self.precision, other.precision),
        )
        merged.sums.add(Scaled.row(between), Scaled.row(between))
        merged.cross.add(Scaled.row(target_between), Scaled.row(between))
        return merged

    def gram(self) -> NDArray[np.float64]:
        """The sum of x x^T, a new array."""
        return self.sums.dense(self.weight, self.mean, self.mean)

    def raw_cross(self) -> NDArray[np.float64]:
        """The sum of y x^T, a new array."""
        return self.cross.dense(self.weight, self.target_mean, self.mean)


@dataclass(frozen=True)
class _Centred:
    """A block less its mean.

    Attributes:
        scaled: The centred rows times the square roots of their weights, and one more row with Chan's term
            for the difference of two means, (rows + 1, width). The scales are powers of two that bring the
            largest number of each column between 1/2 and 1.
        distance: The block's mean minus the mean so far, (width,).
        squares: The sums of the squares of each column, (width,).
    """

    scaled: Scaled
    distance: NDArray[np.float64]
    squares: NDArray[np.float64]


def _centre(
    block: NDArray[Any],
    weights: NDArray[np.float64] | None,
    mean: NDArray[np.float64],
    between: float,
    dtype: type[np.floating[Any]],
) -> _Centred:
    """Centres a block; `between` is sqrt(n m / (n + m)) for rows of total weight n so far and m here."""
    wide = np.empty((len(block) + 1, block.shape[1]))
    # The first row is subtracted before the mean, so that constant columns give exactly 0.
    centred = np.subtract(block, block[0], out=wide[:-1], dtype=np.float64)
    offset = centred.mean(axis=0) if weights is None else weights @ centred / weights.sum()
    centred -= offset
    if weights is not None:
        centred *= np.sqrt(weights)[:, None]
    distance = block[0].astype(np.float64) + offset - mean
    wide[-1] = between * distance
    largest = np.maximum(wide.max(axis=0), -wide.min(axis=0))
    scale = np.ldexp(1.0, np.clip(np.frexp(largest)[1], -1000, 1000))
    squares = np.einsum("ij,ij->j", wide, wide)
    rows = wide if dtype is np.float64 else np.empty(wide.shape, dtype)
    np.multiply(wide, 1 / scale, out=rows, casting="same_kind")
    return _Centred(Scaled(rows, scale), distance, squares)
