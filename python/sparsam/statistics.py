"""What a layer's inputs look like, summed up as they stream by: what Wanda, RIA, OWL and weight updates need.

The inputs themselves are not kept. Sums are float64 whatever the dtype of the inputs: squares of float16
values are exact in it, and a sum of n terms is off by at most about n * 1.1e-16 of the sum of magnitudes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsam._checks import positive

# Inputs are widened in pieces of about this many elements: 32 MiB of float64.
_PIECE = 1 << 22


class InputStatistics:
    """Streaming sums over the inputs x of a layer with `in_features` inputs; `a + b` merges two.

    With `gram`, the sum of x x^T is kept as well, `in_features` squared numbers, which weight updates need
    and scores do not. Objects can be pickled, so parts can be gathered in several processes and merged:
    `a + b` equals, but for the rounding of the sums, one object that was updated with the inputs of both.
    """

    def __init__(self, in_features: int, *, gram: bool = True) -> None:
        """Starts with no inputs; ValueError unless `in_features` is an integer of at least 1."""
        self.in_features = positive("InputStatistics: in_features", in_features)
        self._count = 0
        self._sum: NDArray[np.float64] = np.zeros(self.in_features)
        self._squares: NDArray[np.float64] = np.zeros(self.in_features)
        self._gram: NDArray[np.float64] | None = (
            np.zeros((self.in_features, self.in_features)) if gram else None
        )

    def update(self, x: ArrayLike) -> InputStatistics:
        """Adds inputs.

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
            msg = f"inputs have dtype {inputs.dtype}: expected floating-point numbers; convert with .astype()"
            raise TypeError(msg)
        if inputs.ndim == 0 or inputs.shape[-1] != self.in_features:
            msg = f"inputs have shape {inputs.shape}: expected (..., {self.in_features})"
            raise ValueError(msg)
        rows = inputs.reshape(-1, self.in_features)
        count, total, squares, gram = self._count, self._sum, self._squares, self._gram
        step = max(1, _PIECE // self.in_features)
        for start in range(0, len(rows), step):
            part = rows[start : start + step].astype(np.float64)
            _refuse_not_finite(part, start, inputs.shape)
            with np.errstate(over="ignore"):
                count += len(part)
                total = total + part.sum(axis=0)
                squares = squares + np.einsum("ij,ij->j", part, part)
            if not np.isfinite(squares).all() or not np.isfinite(total).all():
                msg = f"inputs reach {np.abs(part).max():g}: their squares exceed float64; scale them down"
                raise ValueError(msg)
            if gram is not None:
                gram = part.T @ part + gram
        self._count, self._sum, self._squares, self._gram = count, total, squares, gram
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
        """The sum of x x^T, (in_features, in_features), symmetric; ValueError if it was not asked for."""
        if self._gram is None:
            msg = "these InputStatistics were made with gram=False: expected gram=True; gather them again"
            raise ValueError(msg)
        return _frozen(self._gram)

    def __add__(self, other: InputStatistics) -> InputStatistics:
        """Returns new statistics over the inputs of both; ValueError where they do not fit together."""
        if not isinstance(other, InputStatistics):
            return NotImplemented
        if self.in_features != other.in_features:
            msg = f"InputStatistics of {self.in_features} and {other.in_features} inputs: expected the same"
            raise ValueError(msg)
        if (self._gram is None) != (other._gram is None):
            msg = "InputStatistics with gram=True and gram=False: expected the same; gather both alike"
            raise ValueError(msg)
        merged = InputStatistics(self.in_features, gram=False)
        merged._count = self._count + other._count
        merged._sum = self._sum + other._sum
        merged._squares = self._squares + other._squares
        if self._gram is not None and other._gram is not None:
            merged._gram = self._gram + other._gram
        return merged

    def __repr__(self) -> str:
        gram = self._gram is not None
        return f"InputStatistics(in_features={self.in_features}, gram={gram}, count={self._count})"

    def _seen(self) -> int:
        if self._count == 0:
            msg = "InputStatistics have seen no input: call update(x) first"
            raise ValueError(msg)
        return self._count


def _refuse_not_finite(part: NDArray[np.float64], start: int, shape: tuple[int, ...]) -> None:
    bad = ~np.isfinite(part)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        at = (*(int(i) for i in np.unravel_index(start + row, shape[:-1] or (1,))), column)
        index = at if len(shape) > 1 else (column,)
        msg = (
            f"inputs are {part[row, column]} at index {index}: expected finite numbers; leave that input out"
        )
        raise ValueError(msg)


def _frozen(array: NDArray[np.float64]) -> NDArray[np.float64]:
    """A read-only view; sums are replaced by an update, never changed, so it stays what it was."""
    view: NDArray[np.float64] = array.view()
    view.flags.writeable = False
    return view
