"""Streaming sums over a layer's inputs: what Wanda, RIA, OWL and weight updates need.

The inputs themselves are not kept. Sums and sums of squares are float64 whatever the dtype of the inputs:
squares of float16 values are exact in it, and a sum of n terms is off by at most about n * 1.1e-16 of the sum
of magnitudes. `moments.py` says how second moments are summed, and how exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsam.inputs.checks import expected, positive
from sparsam.inputs.float_mode import standard_floats
from sparsam.moments import CentredMoments, Moments

__all__ = ["CentredMoments", "InputStatistics"]

_ROWS = 512  # most rows of a block; with fewer, the accumulation in float64 takes longer
_PIECE = 1 << 22  # most elements of a block


class InputStatistics:
    """Streaming sums over the inputs x of a layer with `in_features` inputs; `a + b` merges two.

    With `gram`, second moments are kept as well (`in_features` squared numbers), which weight updates need
    and scores do not. With `targets`, those of x with the target outputs y are kept too, with which
    `refit(..., cross=)` fits a layer to the outputs of a dense network; layers that share their inputs share
    one object, with their targets side by side. Rows may have weights.

    Objects can be pickled, so that several processes can each collect a part: up to the rounding of the sums,
    `a + b` equals one object that was updated with the inputs of both.
    """

    def __init__(self, in_features: int, *, gram: bool = True, targets: int | None = None) -> None:
        """Starts with no inputs.

        Args:
            in_features: How many inputs the layer has.
            gram: Whether to keep second moments.
            targets: The number of target outputs that come with each input; None for none.

        Raises:
            ValueError: A number is not an integer of at least 1, or targets are given without `gram`.
        """
        self.in_features = positive("InputStatistics: in_features", in_features)
        self.targets = None if targets is None else positive("InputStatistics: targets", targets)
        if targets is not None and not gram:
            raise ValueError(expected("InputStatistics: gram", gram, "True with targets", "leave gram out"))
        self._count = 0
        self._weight = 0.0
        self._inputs = _Sums.empty(self.in_features)
        self._outputs = _Sums.empty(self.targets or 0)
        self._moments = Moments.empty(self.in_features, self.targets or 0) if gram else None

    @standard_floats
    def update(
        self, x: ArrayLike, targets: ArrayLike | None = None, *, weights: ArrayLike | None = None
    ) -> InputStatistics:
        """Adds inputs.

        Besides the sums, memory holds one block of at most 512 inputs at a time.

        Args:
            x: (..., in_features), of any floating dtype and strides; the axes before the last count samples,
                as tokens or im2col patches. Not modified.
            targets: The target outputs y, (..., targets) with the same axes before the last, of any floating
                dtype; required if the object was made with `targets`, else not allowed.
            weights: How much each row counts, of the shape of these axes, at least 0; 1 by default. Rows of
                weight 0, such as padding, are left out: they are not counted and may hold NaN or infinities.

        Returns:
            This object.

        Raises:
            ValueError: Shapes do not match, a NaN or an infinity, negative weights, squares that overflow
                float64, or targets missing or unexpected. The statistics are then unchanged.
            TypeError: x or targets are not floating-point, or weights are not numbers.
        """
        inputs = _checked("inputs", x, self.in_features)
        wanted = self._checked_targets(targets, inputs.shape)
        shares = None if weights is None else _checked_weights(weights, inputs.shape[:-1])
        given = [("inputs", inputs)] if wanted is None else [("inputs", inputs), ("targets", wanted)]
        found = [self._inputs, self._outputs]
        count, weight = self._count, self._weight
        for block in _blocks([array for _, array in given], shares):
            for i, (name, array) in enumerate(given):
                found[i] = found[i].with_block(name, block, block.arrays[i], array.shape)
            count += len(block.arrays[0])
            weight += len(block.arrays[0]) if block.weights is None else float(block.weights.sum())
        if self._moments is not None:
            for block in _blocks([array for _, array in given], shares):
                self._moments.add(block.arrays, block.weights)
        self._count, self._weight = count, weight
        self._inputs, self._outputs = found
        return self

    @property
    def count(self) -> int:
        """How many inputs were seen."""
        return self._count

    @property
    def weight(self) -> float:
        """The sum of the weights of the inputs; `count` where none were given."""
        return self._weight

    @property
    @standard_floats
    def mean(self) -> NDArray[np.float64]:
        """The mean of each input, (in_features,); ValueError before the first."""
        return _frozen(self._inputs.total / self._seen())

    @property
    @standard_floats
    def rms(self) -> NDArray[np.float64]:
        """sqrt(mean of x_j^2), (in_features,): Wanda's norm over sqrt(count); ValueError before the first."""
        return _frozen(np.sqrt(self._inputs.squares / self._seen()))

    @property
    def sum_squares(self) -> NDArray[np.float64]:
        """The sum of x_j^2 of each input, (in_features,)."""
        return _frozen(self._inputs.squares)

    @property
    @standard_floats
    def target_mean(self) -> NDArray[np.float64]:
        """The mean of each target, (targets,); ValueError without targets, or before the first."""
        self._target_moments()
        return _frozen(self._outputs.total / self._seen())

    @property
    def target_squares(self) -> NDArray[np.float64]:
        """The sum of y_i^2 of each target, (targets,); ValueError without targets."""
        self._target_moments()
        return _frozen(self._outputs.squares)

    @property
    @standard_floats
    def gram(self) -> NDArray[np.float64]:
        """The sum of x x^T, (in_features, in_features), symmetric; ValueError if gram=False."""
        return _frozen(self._second_moments().gram())

    @property
    @standard_floats
    def cross(self) -> NDArray[np.float64]:
        """The sum of y x^T, (targets, in_features); ValueError without targets."""
        return _frozen(self._target_moments().raw_cross())

    @property
    @standard_floats
    def centred(self) -> CentredMoments:
        """The moments around the mean; ValueError with gram=False, or before the first input.

        They are sums of products of centred inputs, not a difference of large sums, so the diagonal is
        never negative, and exactly 0 for a constant input.
        """
        moments, weight = self._second_moments(), self._seen()
        with_targets: dict[str, Any] = {}
        if self.targets is not None:
            with_targets = {
                "cross": _frozen(moments.cross.dense()),
                "target_mean": _frozen(moments.target_mean),
                "target_squares": _frozen(moments.target_squares),
            }
        return CentredMoments(
            _frozen(moments.sums.dense()),
            _frozen(moments.mean),
            self._count,
            moments.precision,
            weight,
            **with_targets,
        )

    @property
    def precision(self) -> float:
        """The rounding unit of the products behind `gram`: float32's once inputs were not float64."""
        return self._second_moments().precision

    @standard_floats
    def __add__(self, other: InputStatistics) -> InputStatistics:
        """Returns new statistics over the inputs of both; ValueError if their sizes or options differ."""
        if not isinstance(other, InputStatistics):
            return NotImplemented
        for what in ("in_features", "targets"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                msg = f"InputStatistics: expected the same {what}; got {mine} and {theirs}; use one value"
                raise ValueError(msg)
        if (self._moments is None) != (other._moments is None):
            msg = "InputStatistics: expected the same gram=; got True and False; use one value"
            raise ValueError(msg)
        merged = InputStatistics(self.in_features, gram=False)
        merged.targets = self.targets
        merged._count, merged._weight = self._count + other._count, self._weight + other._weight
        merged._inputs = self._inputs.plus(other._inputs)
        merged._outputs = self._outputs.plus(other._outputs)
        if self._moments is not None and other._moments is not None:
            merged._moments = self._second_moments().merged(other._second_moments())
        return merged

    def __repr__(self) -> str:
        targets = "" if self.targets is None else f", targets={self.targets}"
        gram = self._moments is not None
        return f"InputStatistics(in_features={self.in_features}, gram={gram}{targets}, count={self._count})"

    def _checked_targets(self, targets: ArrayLike | None, shape: tuple[int, ...]) -> NDArray[Any] | None:
        if self.targets is None:
            if targets is not None:
                msg = "targets: expected none; got some; give their number to InputStatistics(targets=)"
                raise ValueError(msg)
            return None
        if targets is None:
            msg = f"targets: expected an array of shape (..., {self.targets}); got none; give one with each x"
            raise ValueError(msg)
        wanted = _checked("targets", targets, self.targets)
        if wanted.shape[:-1] != shape[:-1]:
            msg = (
                f"targets: expected shape {(*shape[:-1], self.targets)}; got {wanted.shape}; pass the "
                "outputs that belong to x"
            )
            raise ValueError(msg)
        return wanted

    def _seen(self) -> float:
        if self._count == 0:
            msg = "InputStatistics: expected at least one input; got none; call update(x) first"
            raise ValueError(msg)
        return self._weight

    def _target_moments(self) -> Moments:
        if self.targets is None:
            msg = "InputStatistics: expected targets=; got None; collect them again with targets="
            raise ValueError(msg)
        return self._second_moments()

    def _second_moments(self) -> Moments:
        if self._moments is None:
            msg = "InputStatistics: expected gram=True; got gram=False; collect them again with gram=True"
            raise ValueError(msg)
        if self._moments.count != self._count:
            msg = "InputStatistics: expected complete updates; got an interrupted one; collect them again"
            raise ValueError(msg)
        return self._moments


@dataclass(frozen=True)
class _Block:
    """Rows of each array, in float32 or float64, with their weights and their indices in the input."""

    arrays: list[NDArray[Any]]
    weights: NDArray[np.float64] | None
    places: NDArray[np.intp] | range


@dataclass(frozen=True)
class _Sums:
    """The sum and the sum of squares of each column, each (width,)."""

    total: NDArray[np.float64]
    squares: NDArray[np.float64]

    @classmethod
    def empty(cls, width: int) -> _Sums:
        return cls(np.zeros(width), np.zeros(width))

    def plus(self, other: _Sums) -> _Sums:
        return _Sums(self.total + other.total, self.squares + other.squares)

    def with_block(self, name: str, block: _Block, rows: NDArray[Any], shape: tuple[int, ...]) -> _Sums:
        """The sums with a block added; ValueError for values or squares that are not finite."""
        wide = rows.astype(np.float64, copy=False)
        _refuse_not_finite(name, wide, block.places, shape)
        with np.errstate(over="ignore", invalid="ignore"):
            if block.weights is None:
                added = _Sums(wide.sum(axis=0), np.einsum("ij,ij->j", wide, wide))
            else:
                added = _Sums(block.weights @ wide, np.einsum("i,ij,ij->j", block.weights, wide, wide))
            result = self.plus(added)
        if not np.isfinite(result.squares).all() or not np.isfinite(result.total).all():
            most = np.abs(wide).max()
            msg = f"{name}: expected squares within float64; got values up to {most:g}; scale them down"
            raise ValueError(msg)
        return result


def _checked(name: str, values: ArrayLike, width: int) -> NDArray[Any]:
    array = np.asarray(values)
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        msg = f"{name}: expected floating-point numbers; got dtype {array.dtype}; convert with .astype()"
        raise TypeError(msg)
    if array.ndim == 0 or array.shape[-1] != width:
        msg = f"{name}: expected shape (..., {width}); got {array.shape}; pass the {name} of this layer"
        raise ValueError(msg)
    return array


def _checked_weights(weights: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The weights of the rows, flattened."""
    array = np.asarray(weights)
    if array.dtype.kind not in "fbiu" and array.dtype.name != "bfloat16":
        msg = f"weights: expected numbers; got dtype {array.dtype}; convert with .astype()"
        raise TypeError(msg)
    if array.shape != shape:
        msg = (
            f"weights: expected shape {shape}, one for each row; got {array.shape}; pass as many as x has "
            "rows"
        )
        raise ValueError(msg)
    flat = array.astype(np.float64).reshape(-1)
    bad = np.flatnonzero(~(np.isfinite(flat) & (flat >= 0)))
    if bad.size:
        index = tuple(int(i) for i in np.unravel_index(bad[0], shape or (1,)))
        msg = (
            f"weights: expected finite numbers of at least 0; got {flat[bad[0]]} at index {index}; correct "
            "them, or leave those rows out"
        )
        raise ValueError(msg)
    return flat


def _blocks(arrays: list[NDArray[Any]], weights: NDArray[np.float64] | None) -> Iterator[_Block]:
    """The rows of all arrays in blocks, without those of weight 0, as float32 or float64."""
    rows = [array.reshape(-1, array.shape[-1]) for array in arrays]
    step = max(1, min(_ROWS, _PIECE // sum(array.shape[1] for array in rows)))
    for start in range(0, len(rows[0]), step):
        places: NDArray[np.intp] | range = range(start, min(start + step, len(rows[0])))
        parts = [array[start : start + step] for array in rows]
        shares = None if weights is None else weights[start : start + step]
        if shares is not None and not shares.all():
            kept = np.flatnonzero(shares)
            places, shares, parts = kept + start, shares[kept], [part[kept] for part in parts]
        if len(parts[0]):
            yield _Block([_native(part) for part in parts], shares, places)


def _native(block: NDArray[Any]) -> NDArray[Any]:
    narrow = block.dtype.name in ("float16", "bfloat16") or block.dtype == np.float32
    return np.ascontiguousarray(block, np.float32 if narrow else np.float64)


def _refuse_not_finite(
    name: str, part: NDArray[np.float64], places: NDArray[np.intp] | range, shape: tuple[int, ...]
) -> None:
    bad = ~np.isfinite(part)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        at = (*(int(i) for i in np.unravel_index(int(places[row]), shape[:-1] or (1,))), column)
        index = at if len(shape) > 1 else (column,)
        msg = f"{name}: expected finite numbers; got {part[row, column]} at index {index}; leave that row out"
        raise ValueError(msg)


def _frozen(array: NDArray[np.float64]) -> NDArray[np.float64]:
    """A read-only view; an update replaces the array and never changes it, so the view stays valid."""
    view: NDArray[np.float64] = array.view()
    view.flags.writeable = False
    return view
