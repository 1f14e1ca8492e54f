"""int4 values: one of 16 levels, 0 among them, times the scale of 64 or 128 columns of a row.

A matrix whose groups are all integers q from -7 to 7 times a scale already, as `sparsam.quantize(bits=4)`
makes them, is not rounded again: scale = max |w| / n for the largest n from 7 to 1 with which q times scale
equals w exactly everywhere, and scale is a bfloat16 number.

For any other matrix the scale of a group is max |w| / 64, rounded up to bfloat16. The levels are 0 and the 15
integers from -64 to 64 with the least sum of squared errors over the whole matrix, -64 and 64 being among
them. The kept weights of a pruned matrix are far from 0, and so are most levels then. A weight whose nearest
level is 0 is pruned. Rounding the result again does not change it.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from sparsam._core import Packed
from sparsam.inputs.checks import expected
from sparsam.sparse.arguments import weights
from sparsam.sparse.int4_form import in_faster_form
from sparsam.sparse.int8 import LARGEST_CODE, MAX_COLUMNS

__all__ = ["GROUPS", "check_no_group", "group_of", "is_int4", "pack_int4"]

GROUPS = (64, 128)
"""How many columns may share a scale."""

SYMMETRIC = np.array([0, *range(-7, 0), *range(1, 9)], np.int8)
"""The levels of a matrix whose groups are on a grid already."""

_LARGEST = float(np.ldexp(1.0, 96))  # the largest scale, so that sums of scaled levels stay within float32
_TINY = np.finfo(np.float32).tiny
_LEVELS = 15  # in addition to 0
_FINE = 8  # bins of the histogram between two integers
_PROBES = 64  # groups that are checked first: if they are not on a grid, the others need not be read


def is_int4(dtype: DTypeLike | None) -> bool:
    """Whether the requested dtype of the values is int4."""
    return dtype is not None and np.dtype(dtype) == np.dtype(ml_dtypes.int4)


def check_no_group(group: int | None, dtype: DTypeLike | None) -> None:
    """Raises ValueError for a `group` together with a dtype other than int4."""
    if group is not None:
        raise ValueError(expected("group", group, f"None for dtype {dtype!r}", "pass dtype='int4'"))


def group_of(columns: int, groups: int) -> int | None:
    """How many columns share a scale, given the scales in a row; None if neither 64 nor 128 fits."""
    fitting = [group for group in GROUPS if -(-columns // group) == groups]
    return fitting[0] if fitting else None


def pack_int4(w: ArrayLike, keep: NDArray[np.bool_] | None = None, group: int | None = None) -> Packed:
    """Rounds a matrix to int4 and packs it, in the form that is expected to multiply faster.

    Args:
        w: (out, in), of floats, finite where it is kept.
        keep: Where a weight is kept; by default where it is not 0.
        group: How many columns share a scale, 64 or 128; by default 128 if the weights are on a grid with
            such groups already, else 64.

    Raises:
        ValueError: Not two dimensions, too many columns, weights that are not finite or too large, or another
            group.
        TypeError: Another dtype.
    """
    values = weights(w, None)
    if keep is not None:
        values = np.where(keep, values, values.dtype.type(0))
    return in_faster_form(Packed.pack_int4(*rounded(values.astype(np.float32, copy=False), group)))


def rounded(
    values: NDArray[np.float32], group: int | None = None
) -> tuple[NDArray[np.int8], int, NDArray[np.float32], NDArray[np.int8]]:
    """Returns integers, columns of a group, scales (out, groups) and levels; see the module's docstring."""
    if group is not None and (type(group) is not int or group not in GROUPS):
        raise ValueError(expected("group", group, "None, 64 or 128 columns", "pass one of them"))
    columns = values.shape[1]
    if columns > MAX_COLUMNS:
        raise ValueError(
            expected("w", columns, f"at most {MAX_COLUMNS} columns for int4", "use float values")
        )
    largest = np.abs(values).max(axis=1, initial=0)
    if not (largest <= np.float32(LARGEST_CODE * _LARGEST)).all():
        row = int(np.argmin(largest <= np.float32(LARGEST_CODE * _LARGEST)))
        msg = f"w: expected weights up to 2^102 for int4; got {largest[row]} in row {row}; use float values"
        raise ValueError(msg)
    for width in (group,) if group else (128, 64):
        if columns > width or width == (group or 64):  # groups that are whole rows have one name
            grouped = _grouped(values, width)
            if (scales := _grid_scales(grouped)) is not None:
                q = np.rint(grouped / scales[:, :, None]).astype(np.int8)
                return _ungrouped(q, columns), width, scales, SYMMETRIC
    return _with_levels(values, group or 64)


def _grouped(values: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """(out, groups, width), the last group filled up with zeros."""
    rows, columns = values.shape
    groups = -(-columns // width)
    if groups * width == columns:
        return values.reshape(rows, groups, width)
    padded = np.zeros((rows, groups * width), np.float32)
    padded[:, :columns] = values
    return padded.reshape(rows, groups, width)


def _ungrouped(q: NDArray[np.int8], columns: int) -> NDArray[np.int8]:
    rows, groups, width = q.shape
    return np.ascontiguousarray(q.reshape(rows, groups * width)[:, :columns])


def _grid_scales(grouped: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """The scales (out, groups) if every group is integers from -7 to 7 times a scale, else None."""
    flat = grouped.reshape(-1, grouped.shape[2]) if grouped.size else np.zeros((0, 1), np.float32)
    scales = np.ones(len(flat), np.float32)
    for part in (slice(0, _PROBES), slice(None)):
        some = flat[part]
        largest = np.abs(some).max(axis=1, initial=0)
        rest = np.flatnonzero(largest > 0)
        for most in range(7, 0, -1):
            tried = largest[rest] / np.float32(most)
            step = tried[:, None]
            fits = (tried >= _TINY) & (tried == _to_bfloat16(tried))
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                fits &= (np.rint(some[rest] / step) * step == some[rest]).all(axis=1)
            scales[part][rest[fits]] = tried[fits]
            rest = rest[~fits]
        if len(rest):
            return None
    return scales.reshape(grouped.shape[:2])


def _to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def _with_levels(
    values: NDArray[np.float32], width: int
) -> tuple[NDArray[np.int8], int, NDArray[np.float32], NDArray[np.int8]]:
    grouped = _grouped(values, width)
    largest = np.abs(grouped).max(axis=2, initial=0)
    bits = np.maximum(largest / np.float32(LARGEST_CODE), _TINY).view(np.uint32)
    scales: NDArray[np.float32] = ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)
    scales[largest == 0] = 1
    relative = grouped / scales[:, :, None]
    kept = relative != 0
    places = np.rint(relative[kept] * _FINE).astype(np.int64) + LARGEST_CODE * _FINE
    costs = np.broadcast_to(scales.astype(np.float64)[:, :, None] ** 2, kept.shape)[kept]
    if costs.size:
        costs /= costs.max()
    histogram = np.bincount(places, costs, minlength=2 * LARGEST_CODE * _FINE + 1).astype(np.float64)
    levels = _best_levels(histogram)
    rising = np.sort(levels)
    middles = (rising[1:].astype(np.float32) + rising[:-1]) / 2
    q = rising[np.searchsorted(middles, relative)]
    return _ungrouped(q, values.shape[1]), width, scales, levels


def _best_levels(histogram: NDArray[np.float64]) -> NDArray[np.int8]:
    """0, and the 15 integers that give the values of a histogram over [-64, 64] the least squared error."""
    middle = LARGEST_CODE * _FINE
    upper, lower = _one_side(histogram[middle:]), _one_side(histogram[middle::-1])
    total = [upper[0][n] + lower[0][_LEVELS - n] for n in range(_LEVELS + 1)]
    n = int(np.argmin(total))
    found = [-level for level in lower[1][_LEVELS - n]][::-1] + upper[1][n]
    return np.array([0, *found], np.int8)


def _one_side(histogram: NDArray[np.float64]) -> tuple[list[float], list[list[int]]]:
    """For n = 0 to 15 levels above 0, the last of which is 64: the least error, and the levels.

    Prefix sums of the histogram give the error of rounding the values between two neighbouring levels a and b
    to the nearer one; dynamic programming finds the path from 0 to 64 in n steps with the least total error.
    """
    place = np.arange(len(histogram)) / _FINE
    moments = [np.concatenate(([0.0], np.cumsum(histogram * place**k))) for k in range(3)]

    def error(level: int, begin: int, end: int) -> float:
        zeroth, first, second = (float(m[end] - m[begin]) for m in moments)
        return max(second - 2 * level * first + level * level * zeroth, 0.0)

    between = np.full((LARGEST_CODE + 1, LARGEST_CODE + 1), np.inf)
    for a in range(LARGEST_CODE):
        for b in range(a + 1, LARGEST_CODE + 1):
            cut = (a + b) * _FINE // 2 + 1
            between[a, b] = error(a, a * _FINE, cut) + error(b, cut, b * _FINE)
    best = np.full(LARGEST_CODE + 1, np.inf)
    best[0] = 0.0
    errors = [error(0, 0, len(histogram))]
    ways: list[list[int]] = [[]]
    came: list[NDArray[np.intp]] = []
    for _ in range(_LEVELS):
        through = best[:, None] + between
        came.append(np.argmin(through, axis=0))
        best = through.min(axis=0)
        level, way = LARGEST_CODE, [LARGEST_CODE]
        for before in came[:0:-1]:
            level = int(before[level])
            way.append(level)
        errors.append(float(best[LARGEST_CODE]))
        ways.append(way[::-1])
    return errors, ways
