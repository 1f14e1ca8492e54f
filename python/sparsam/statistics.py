"""What a layer's inputs look like, summed up as they stream by: what Wanda, RIA, OWL and weight updates need.

The inputs themselves are not kept. Sums and sums of squares are float64 whatever the dtype of the inputs:
squares of float16 values are exact in it, and a sum of n terms is off by at most about n * 1.1e-16 of the sum
of magnitudes. Second moments are those of centred inputs, from which the others follow: those of a block of
rows around the block's mean are products of matrices, and blocks are merged in float64 by the formula of
Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm for computing sample variances", 1979).

The products are float32 unless the inputs are float64. With c_j the centred values of input j, the moment of
i and j is then off by at most 2^-14 ||c_i|| ||c_j|| (a block has 512 rows, and each product and each sum is
rounded to 2^-24), in practice by some 2^-22 of it; with float64 inputs by at most 2^-43
of it, for means of up to 8000 standard deviations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsam.inputs.checks import positive

__all__ = ["CentredMoments", "InputStatistics"]

_ROWS = 512  # of a block: more make the bound worse, fewer the accumulation in float64 slower
_COLUMNS = 256  # of a strip of products: it is added while the caches hold it
_PIECE = 1 << 22  # elements of a block at most
# Where the largest value of each column lies between, squares of its differences are normal float32 numbers.
_SMALL, _LARGE = 2.0**-30, 2.0**50


@dataclass(frozen=True)
class CentredMoments:
    """Second moments of inputs around their mean; pass it as `h` to minimise what a bias cannot correct.

    Attributes:
        gram: The sum of (x - mean)(x - mean)^T, (in_features, in_features), symmetric.
        mean: The mean of each input, (in_features,).
        count: How many inputs were seen.
        precision: The rounding unit of the products that went into `gram`.
    """

    gram: NDArray[np.float64]
    mean: NDArray[np.float64]
    count: int
    precision: float


class InputStatistics:
    """Streaming sums over the inputs x of a layer with `in_features` inputs; `a + b` merges two.

    With `gram`, second moments are kept as well, `in_features` squared numbers, which weight updates need
    and scores do not. Objects can be pickled, so parts can be gathered in several processes and merged:
    `a + b` equals, but for the rounding of the sums, one object that was updated with the inputs of both.
    """

    def __init__(self, in_features: int, *, gram: bool = True) -> None:
        """Starts with no inputs; ValueError unless `in_features` is an integer of at least 1."""
        self.in_features = positive("InputStatistics: in_features", in_features)
        self._count = 0
        self._sum: NDArray[np.float64] = np.zeros(self.in_features)
        self._squares: NDArray[np.float64] = np.zeros(self.in_features)
        self._moments = _Moments.empty(self.in_features) if gram else None

    def update(self, x: ArrayLike) -> InputStatistics:
        """Adds inputs.

        Beside the sums, memory holds one block of at most 512 inputs at a time.

        Args:
            x: (..., in_features), of any floating dtype and strides; the axes before the last count samples,
                as tokens or im2col patches. Not modified.

        Returns:
            This object.

        Raises:
            ValueError: Another last axis, a NaN or an infinity, or squares beyond float64; the statistics are
                then as they were.
            TypeError: x is not floating-point.
        """
        inputs = np.asarray(x)
        if inputs.dtype.kind != "f" and inputs.dtype.name != "bfloat16":
            msg = f"inputs: expected floating-point numbers; got dtype {inputs.dtype}; convert with .astype()"
            raise TypeError(msg)
        if inputs.ndim == 0 or inputs.shape[-1] != self.in_features:
            msg = f"inputs: expected shape (..., {self.in_features}); got {inputs.shape}"
            raise ValueError(msg)
        rows = inputs.reshape(-1, self.in_features)
        total, squares = self._sum, self._squares
        for start, block in _blocks(rows):
            part = block.astype(np.float64, copy=False)
            _refuse_not_finite(part, start, inputs.shape)
            with np.errstate(over="ignore"):
                total = total + part.sum(axis=0)
                squares = squares + np.einsum("ij,ij->j", part, part)
            if not np.isfinite(squares).all() or not np.isfinite(total).all():
                most = np.abs(part).max()
                msg = f"inputs: expected squares within float64; got values up to {most:g}; scale them down"
                raise ValueError(msg)
        if self._moments is not None:
            for _, block in _blocks(rows):
                self._moments.add(block)
        self._count, self._sum, self._squares = self._count + len(rows), total, squares
        return self

    @property
    def count(self) -> int:
        """How many inputs were seen."""
        return self._count

    @property
    def mean(self) -> NDArray[np.float64]:
        """The mean of each input, (in_features,); ValueError before the first."""
        return _frozen(self._sum / self._seen())

    @property
    def rms(self) -> NDArray[np.float64]:
        """sqrt(mean of x_j^2), (in_features,): Wanda's ||X_j||_2 over sqrt(count); ValueError before any."""
        return _frozen(np.sqrt(self._squares / self._seen()))

    @property
    def sum_squares(self) -> NDArray[np.float64]:
        """The sum of x_j^2 of each input, (in_features,)."""
        return _frozen(self._squares)

    @property
    def gram(self) -> NDArray[np.float64]:
        """The sum of x x^T, (in_features, in_features), symmetric; ValueError if gram=False."""
        return _frozen(self._second_moments().raw())

    @property
    def centred(self) -> CentredMoments:
        """The moments around the mean; ValueError with gram=False, or before the first input.

        They are sums of products of centred inputs, not a difference of large sums, so the diagonal is
        never negative, and exactly 0 for a constant input.
        """
        moments, count = self._second_moments(), self._seen()
        return CentredMoments(moments.centred(), _frozen(moments.mean), count, moments.precision)

    @property
    def precision(self) -> float:
        """The rounding unit of the products behind `gram`: float32's once inputs were not float64."""
        return self._second_moments().precision

    def __add__(self, other: InputStatistics) -> InputStatistics:
        """Returns new statistics over the inputs of both; ValueError where they do not fit together."""
        if not isinstance(other, InputStatistics):
            return NotImplemented
        if self.in_features != other.in_features:
            got = f"{self.in_features} and {other.in_features}"
            msg = f"InputStatistics: expected the same in_features; got {got}"
            raise ValueError(msg)
        if (self._moments is None) != (other._moments is None):
            msg = "InputStatistics: expected the same gram=; got True and False; gather both alike"
            raise ValueError(msg)
        merged = InputStatistics(self.in_features, gram=False)
        merged._count = self._count + other._count
        merged._sum = self._sum + other._sum
        merged._squares = self._squares + other._squares
        if self._moments is not None and other._moments is not None:
            merged._moments = self._second_moments().merged(other._second_moments())
        return merged

    def __repr__(self) -> str:
        gram = self._moments is not None
        return f"InputStatistics(in_features={self.in_features}, gram={gram}, count={self._count})"

    def _seen(self) -> int:
        if self._count == 0:
            msg = "InputStatistics: expected at least one input; got none; call update(x) first"
            raise ValueError(msg)
        return self._count

    def _second_moments(self) -> _Moments:
        if self._moments is None:
            msg = "InputStatistics: expected gram=True; got gram=False; gather them again"
            raise ValueError(msg)
        if self._moments.count != self._count:
            msg = "InputStatistics: expected whole updates; got an interrupted one; gather them again"
            raise ValueError(msg)
        if self._moments.count != self._count:
            msg = "InputStatistics: expected whole updates; got an interrupted one; gather them again"
            raise ValueError(msg)
        return self._moments


@dataclass
class _Moments:
    """Second moments around the mean.

    Attributes:
        count: Of how many inputs.
        mean: (in,); of a constant input exactly that.
        sums: (in, in), of which the strips from the diagonal to the right are right; all if `whole`.
        precision: The largest rounding unit of what was added.
        whole: Whether `sums` is symmetric.
        shared: Whether `sums` was handed out, so that it may not change any more.
    """

    count: int
    mean: NDArray[np.float64]
    sums: NDArray[np.float64]
    precision: float = float(np.finfo(np.float64).eps)
    whole: bool = True
    shared: bool = False

    @classmethod
    def empty(cls, inputs: int) -> _Moments:
        return cls(0, np.zeros(inputs), np.zeros((inputs, inputs)))

    def add(self, block: NDArray[Any]) -> None:
        """Adds a block of finite inputs."""
        count, before = self.count + len(block), self.count
        self.count, self.whole = count, False  # first, so that an interrupted addition shows
        if self.shared:
            self.sums, self.shared = self.sums.copy(), False
        dtype = np.float32 if _fits_float32(block) else np.float64
        # Less the first row, and only then less the mean: what is constant gives exactly 0.
        rows = np.empty((len(block) + 1, block.shape[1]), dtype)
        centred = np.subtract(block, block[0], out=rows[:-1], dtype=dtype)
        offset = centred.mean(axis=0, dtype=np.float64)
        centred -= offset.astype(dtype)
        distance = block[0].astype(np.float64) + offset - self.mean
        # Chan's term for two means, as one more row.
        rows[-1] = math.sqrt(before * len(block) / count) * distance
        for start in range(0, rows.shape[1], _COLUMNS):
            strip = slice(start, start + _COLUMNS)
            self.sums[strip, start:] += rows[:, strip].T @ rows[:, start:]
        self.mean = self.mean + distance * (len(block) / count)
        self.precision = max(self.precision, float(np.finfo(dtype).eps))

    def merged(self, other: _Moments) -> _Moments:
        """The moments of the inputs of both."""
        count = self.count + other.count
        if not self.count or not other.count:
            one = self if self.count else other
            return replace(one, sums=one.sums.copy(), shared=False)
        distance = other.mean - self.mean
        sums = self.sums + other.sums
        for start in range(0, len(sums), _COLUMNS):
            strip = slice(start, start + _COLUMNS)
            term = distance[strip, None] * distance
            sums[strip] += term * (self.count * other.count / count)
        mean = self.mean + distance * (other.count / count)
        precision = max(self.precision, other.precision)
        return _Moments(count, mean, sums, precision, self.whole and other.whole)

    def centred(self) -> NDArray[np.float64]:
        """The sums of (x - mean)(x - mean)^T, read-only and never changed again."""
        self._complete()
        self.shared = True
        return _frozen(self.sums)

    def raw(self) -> NDArray[np.float64]:
        """The sums of x x^T, a new array."""
        self._complete()
        result = np.empty_like(self.sums)
        for start in range(0, len(result), _COLUMNS):
            strip = slice(start, start + _COLUMNS)
            np.multiply(self.mean[strip, None], self.mean, out=result[strip])
            result[strip] *= self.count
            result[strip] += self.sums[strip]
        return result

    def _complete(self) -> None:
        """Mirrors what is right of the diagonal."""
        for start in range(0, 0 if self.whole else len(self.sums), _COLUMNS):
            strip = slice(start, start + _COLUMNS)
            self.sums[strip, strip] = np.triu(self.sums[strip, strip]) + np.triu(self.sums[strip, strip], 1).T
            self.sums[start + _COLUMNS :, strip] = self.sums[strip, start + _COLUMNS :].T
        self.whole = True


def _blocks(rows: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    """The rows in blocks, with the index of the first of each; a dtype that BLAS lacks becomes float32."""
    step = max(1, min(_ROWS, _PIECE // rows.shape[1]))
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        narrow = block.dtype.name in ("float16", "bfloat16") or block.dtype == np.float32
        yield start, np.ascontiguousarray(block, np.float32 if narrow else np.float64)


def _fits_float32(block: NDArray[Any]) -> bool:
    """Whether the products of a block can be float32: no column's values are too large or small for that."""
    if block.dtype != np.float32:
        return False
    largest = np.maximum(block.max(axis=0), -block.min(axis=0))
    return bool(((largest == 0) | ((largest >= _SMALL) & (largest <= _LARGE))).all())


def _refuse_not_finite(part: NDArray[np.float64], start: int, shape: tuple[int, ...]) -> None:
    bad = ~np.isfinite(part)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        at = (*(int(i) for i in np.unravel_index(start + row, shape[:-1] or (1,))), column)
        index = at if len(shape) > 1 else (column,)
        msg = (
            f"inputs: expected finite numbers; got {part[row, column]} at index {index}; leave that input out"
        )
        raise ValueError(msg)


def _frozen(array: NDArray[np.float64]) -> NDArray[np.float64]:
    """A read-only view; sums are replaced by an update, never changed, so it stays what it was."""
    view: NDArray[np.float64] = array.view()
    view.flags.writeable = False
    return view
