"""Selection: scores, a pattern and a sparsity in, exactly k groups pruned out.

The rules, the same for every instruction set, thread count and memory layout: `round(sparsity * n)` of n
groups are pruned (Python's round), in scope "row" of each row's entries; among equal scores the lower flat
index is kept, and over several tensors the earlier tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsam import _core
from sparsam.config import Scope
from sparsam.inputs.checks import check_sparsity, expected
from sparsam.inputs.dtypes import check_dtype
from sparsam.inputs.float_mode import standard_floats
from sparsam.masks import Mask, _check_overlap, _check_separate_memory
from sparsam.orientation import mask_as_stored, outputs_first
from sparsam.patterns import NM, Block, Pattern, Slices, Unstructured
from sparsam.tiles import matrix_shape, tile_sizes, tiling_of


class Threshold(NamedTuple):
    """The k-th smallest magnitude, and what is needed to prune exactly k.

    Attributes:
        value: the k-th smallest |w|; 0.0 for k = 0.
        k: how many are to be pruned, round(sparsity * n).
        below: how many have |w| < value. All of them are pruned.
        equal: how many have |w| == value (0 for k = 0). The last k - below of them are pruned.
    """

    value: float
    k: int
    below: int
    equal: int


def threshold(arrays: ArrayLike | Sequence[ArrayLike], sparsity: float) -> Threshold:
    """The exact k-th smallest magnitude over one array or a list of arrays, k = round(sparsity * n).

    Equals `np.sort(np.abs(x), axis=None)[k - 1]`, in about one read of the data: a sample brackets the rank,
    one parallel pass counts and collects the values in the bracket (Floyd and Rivest, 1975). At most 5 % of
    the data, or 128 KiB if that is more, is copied.

    Args:
        arrays: one array, or a list or tuple of arrays that share the threshold; float16, bfloat16, float32
            or float64, also mixed; any shapes and strides. -0.0 equals 0.0; infinities order as numbers do.
        sparsity: in [0, 1].

    Returns:
        The threshold with its counts.

    Raises:
        ValueError: sparsity is outside [0, 1], or a NaN was found (with its place).
        TypeError: a dtype is not one of the four.
    """
    if isinstance(arrays, np.ndarray):
        return _threshold([arrays], _rank(sparsity, arrays.size), None)
    if isinstance(arrays, (list, tuple)) and all(isinstance(a, np.ndarray) for a in arrays):
        pool = list(arrays)
    else:
        pool = [np.asarray(arrays)]
    return _threshold(pool, _rank(sparsity, sum(a.size for a in pool)), None)


def select(
    scores: ArrayLike,
    sparsity: float,
    pattern: Pattern = Unstructured(),  # noqa: B008 - frozen
    *,
    scope: Literal["layer", "row"] = "layer",
    norm: int = 1,
    transposed: bool = False,
    name: str = "scores",
) -> Mask:
    """Choose which entries of one array to keep: exactly `round(sparsity * n)` of its n groups are pruned.

    Args:
        scores: ranked by magnitude: the larger, the more worth keeping. Dtypes and layouts as in `threshold`.
        sparsity: in [0, 1]. For NM(n, m) it must be 1 - n/m, or 0.
        pattern: what is kept or pruned together. `Unstructured()`: each entry. `NM(n, m)`: the n largest of
            every m along the rows of the matrix (shape[0], -1) are kept. `Block(r, c)`: tiles of that matrix,
            ragged at its far edges. `Slices(axis, size)`: runs of `size` indices of that axis.
        scope: "layer": all entries are compared. "row": those within a row of the matrix (shape[0], -1), as
            in Wanda: exactly `round(sparsity * columns)` of each row are pruned, ties to the lower index. A
            vector is one row. For NM, which selects within rows anyway, it changes nothing; Block and Slices
            span rows and raise ValueError.
        norm: a group's score is the sum of |score| (1) or of its square (2), accumulated in float64 in a
            fixed order.
        transposed: the scores are (in, out), as in Hugging Face's Conv1D and Keras, or (..., in, out):
            pattern and rows are those of (out, in). Ties go to the lower flat index of that.
        name: the array's name in error messages.

    Returns:
        The mask, of the shape of `scores`.

    Raises:
        ValueError: sparsity out of range, a NaN, or a shape that the pattern does not divide.
        TypeError: a dtype other than the four.
    """
    if scope not in ("layer", "row"):
        raise ValueError(
            expected(
                "scope", scope, "'layer' (all entries compared) or 'row' (those of a row)", "pass one of them"
            )
        )
    array = np.asarray(scores)
    check_dtype(name, array)
    if transposed:
        _refuse_nan([array], [name])  # With its place in the array as it is stored.
        array = outputs_first(array)
    mask = select_into({name: array}, sparsity, pattern, scope=scope, norm=norm, out=None).masks[name]
    return mask_as_stored(mask) if transposed else mask


def select_many(
    scores: Mapping[str, ArrayLike],
    sparsity: float,
    pattern: Pattern = Unstructured(),  # noqa: B008 - frozen
    *,
    scope: Scope = "global",
    norm: int = 1,
    out: Mapping[str, NDArray[Any]] | None = None,
) -> dict[str, Mask]:
    """`select` for several arrays: with one threshold for all, for each array, or for each row.

    Groups of different tensors are compared by score per weight (the sum divided by the number of weights),
    groups of one tensor by their sum. For NM selection is within each group, so pooling changes nothing.

    Args:
        scores: name -> array; ties go to the earlier name, then to the lower flat index.
        sparsity: in [0, 1]: of all groups together, or of each array or row.
        pattern: as in `select`.
        scope: "global": one threshold over all arrays. "layer", "row": as in `select`, in each array by
            itself.
        norm: as in `select`.
        out: name -> array of the same shape and dtype that receives the scores with pruned entries as +0; may
            be the same arrays (in place). Apart from that, no output may share memory with another array.
            Useful if the scores are the weights themselves.

    Returns:
        name -> mask.

    Raises:
        ValueError: as `select`, with the tensor's name.
        TypeError: as `select`, with the tensor's name.
        KeyboardInterrupt: the user stopped the call. Each output is then unchanged or fully pruned.
    """
    arrays = {name: np.asarray(array) for name, array in scores.items()}
    for name, array in arrays.items():
        check_dtype(name, array)
    if out is not None:
        check_outputs(arrays, out)
    return select_into(arrays, sparsity, pattern, scope=scope, norm=norm, out=out).masks


class Pruned(NamedTuple):
    """Masks, and the number of nonzero weights of each tensor that was written."""

    masks: dict[str, Mask]
    nonzero: dict[str, int]


def select_into(
    arrays: Mapping[str, NDArray[Any]],
    sparsity: float | dict[str, float],
    pattern: Pattern,
    *,
    scope: Scope,
    norm: int,
    out: Mapping[str, NDArray[Any]] | None,
) -> Pruned:
    """`select_many` of arrays and outputs that are checked already, which also counts the nonzero weights.

    Unless the scope is global, `sparsity` may map each name to its own, all of them checked.
    """
    if norm not in (1, 2):
        raise ValueError(
            expected("norm", norm, "1 (sum of magnitudes) or 2 (sum of squares)", "pass one of them")
        )
    if scope not in ("layer", "row", "global"):
        raise ValueError(expected("scope", scope, "'layer', 'row' or 'global'", "pass one of them"))
    if scope == "global" and isinstance(pattern, (Unstructured, Block, Slices)):
        assert not isinstance(sparsity, dict)  # one threshold has one
        if isinstance(pattern, Unstructured):
            return _select_entries(arrays, sparsity, out)
        return _written(_select_tiles(arrays, sparsity, pattern, norm), arrays, out)
    if not isinstance(sparsity, dict):
        sparsity = dict.fromkeys(arrays, check_sparsity("sparsity", sparsity))
    if isinstance(pattern, Unstructured):
        if scope == "layer":
            return _select_each(arrays, sparsity, out)
        masks = {name: _select_rows(name, array, sparsity[name]) for name, array in arrays.items()}
    elif isinstance(pattern, NM):
        masks = {name: _select_nm(name, array, sparsity[name], pattern) for name, array in arrays.items()}
    elif isinstance(pattern, (Block, Slices)):
        if scope == "row":
            wanted = "Unstructured() or NM with scope 'row', which compares weights within a row"
            raise ValueError(expected("pattern", pattern, wanted, "use scope 'layer'"))
        masks = {}
        for name, array in arrays.items():
            masks |= _select_tiles({name: array}, sparsity[name], pattern, norm)
    else:
        wanted = "Unstructured(), NM(n, m), Block(rows, cols) or Slices(axis, size)"
        raise TypeError(expected("pattern", pattern, wanted, "pass one of them"))
    return _written(masks, arrays, out)


def _written(
    masks: dict[str, Mask], arrays: Mapping[str, NDArray[Any]], out: Mapping[str, NDArray[Any]] | None
) -> Pruned:
    if out is None:
        return Pruned(masks, {})
    return Pruned(masks, {name: mask.write(arrays[name], out[name]) for name, mask in masks.items()})


def _rank(sparsity: float, n: int) -> int:
    return round(check_sparsity("sparsity", sparsity) * n)


def _threshold(pool: list[NDArray[Any]], k: int, names: Sequence[str] | None) -> Threshold:
    if k == 0:
        _refuse_nan(pool, names)
        return Threshold(0.0, 0, 0, 0)
    value, below, equal = _core.threshold(pool, k)
    if math.isnan(value):
        raise _vanished(pool, names)
    return Threshold(value, k, below, equal)


def _vanished(pool: Sequence[NDArray[Any]], names: Sequence[str] | None) -> ValueError:
    """Raises ValueError with the index of a NaN; returns the error to raise if it has been overwritten."""
    _refuse_nan(pool, names)
    what = "the arrays" if names is None else f"tensors {', '.join(map(repr, names[:3]))}"
    msg = (
        f"{what}: expected weights that do not change during the call; got a NaN that has been "
        "overwritten since; stop the thread that writes to them, or pass copies"
    )
    return ValueError(msg)


def _refuse_nan(pool: Sequence[NDArray[Any]], names: Sequence[str] | None, *, by: str = "") -> None:
    position = _core.find_nan(list(pool))
    if position is None:
        return
    array, index = position
    at = tuple(int(i) for i in np.unravel_index(index, pool[array].shape))
    what = f"array {array}" if names is None else f"tensor {names[array]!r}"
    msg = f"{by}{what}: expected numbers to rank; got NaN at index {at}; repair or exclude the tensor"
    raise ValueError(msg)


def check_outputs(arrays: Mapping[str, NDArray[Any]], outs: Mapping[str, NDArray[Any]]) -> None:
    """Raises for an output that an array cannot be written to, or that shares memory with another array."""
    for name, array in arrays.items():
        _check_out(name, array, outs.get(name))
    _check_separate_memory(arrays, {name: outs[name] for name in arrays})


def _check_out(name: str, array: NDArray[Any], out: object) -> None:
    if not isinstance(out, np.ndarray):
        wanted = f"an array of {array.dtype} {array.shape}"
        raise TypeError(expected(f"out for tensor {name!r}", out, wanted, "pass np.empty_like(scores)"))
    if out.shape != array.shape or out.dtype != array.dtype:
        msg = (
            f"out for tensor {name!r}: expected {array.dtype} {array.shape}; got {out.dtype} {out.shape}; "
            "pass np.empty_like(scores)"
        )
        raise ValueError(msg)
    if not out.flags.writeable:
        msg = f"out for tensor {name!r}: expected a writeable array; got one that is read-only; pass a copy"
        raise ValueError(msg)
    _check_overlap(array, out)


def _select_entries(
    scores: Mapping[str, NDArray[Any]], sparsity: float, out: Mapping[str, NDArray[Any]] | None
) -> Pruned:
    names, pool = list(scores), list(scores.values())
    total = sum(a.size for a in pool)
    t = _threshold(pool, _rank(sparsity, total), names)
    if t.k == 0 and out is None:
        return Pruned({name: Mask.ones(array.shape) for name, array in scores.items()}, {})
    # Never negative, even if another thread has changed what was counted.
    ties = min(max(t.below + t.equal - t.k, 0), t.equal) if t.k else total
    outs = [] if out is None else [out[name] for name in names]
    return _pruned(scores, *_core.threshold_mask(pool, t.value, ties, outs))


def _select_each(
    scores: Mapping[str, NDArray[Any]],
    sparsities: dict[str, float],
    out: Mapping[str, NDArray[Any]] | None,
) -> Pruned:
    """`_select_entries` of each array by itself, in one call of the kernels."""
    names, pool = list(scores), list(scores.values())
    outs = [] if out is None else [out[name] for name in names]
    ranks = [round(sparsities[name] * array.size) for name, array in scores.items()]
    found = _core.threshold_masks(pool, ranks, outs)
    if found is None:
        raise _vanished(pool, names)
    return _pruned(scores, *found)


def _pruned(
    arrays: Mapping[str, NDArray[Any]], words: list[NDArray[np.uint64]], kept: list[int], nonzero: list[int]
) -> Pruned:
    masks = {
        name: Mask(bits, array.shape, count)
        for (name, array), bits, count in zip(arrays.items(), words, kept, strict=True)
    }
    return Pruned(masks, dict(zip(arrays, nonzero, strict=True)))


def _select_rows(name: str, array: NDArray[Any], sparsity: float) -> Mask:
    rows, columns = matrix_shape(array.shape)
    if rows == 1:
        return _select_entries({name: array}, sparsity, None).masks[name]
    k = _rank(sparsity, columns)
    if k == 0 or rows == 0:
        _refuse_nan([array], [name])
        return Mask.ones(array.shape)
    words = _core.row_topk_mask(array, columns, k)
    if words is None:
        raise _vanished([array], [name])
    return Mask(words, array.shape)


def _select_nm(name: str, array: NDArray[Any], sparsity: float, pattern: NM) -> Mask:
    _rank(sparsity, array.size)
    if sparsity == 0:
        _refuse_nan([array], [name])
        return Mask.ones(array.shape)
    if not math.isclose(sparsity, pattern.sparsity, rel_tol=1e-9):
        wanted = f"{pattern.sparsity:g} (or 0), as {pattern!r} keeps {pattern.n} of every {pattern.m}"
        do = "leave sparsity to the pattern, or pass another one"
        raise ValueError(expected(f"sparsity for tensor {name!r}", sparsity, wanted, do))
    channels = pattern.axis == "channels" and array.ndim > 2
    columns = array.shape[1] if channels else matrix_shape(array.shape)[1]
    if columns % pattern.m:
        what = "input channels" if channels else "weights in a row"
        msg = (
            f"tensor {name!r}: pattern {pattern}: expected a multiple of {pattern.m} {what}; got {columns} "
            f"in shape {array.shape}; exclude the tensor, or give it another pattern in overrides"
        )
        raise ValueError(msg)
    viewed = np.moveaxis(array, 1, -1) if channels else array
    words = _core.nm_mask(viewed, pattern.n, pattern.m)
    if words is None:
        raise _vanished([array], [name])
    mask = Mask(words, viewed.shape)
    return Mask.from_array(np.moveaxis(mask.to_array(), -1, 1)) if channels else mask


def _select_tiles(
    scores: Mapping[str, NDArray[Any]], sparsity: float, pattern: Block | Slices, norm: int
) -> dict[str, Mask]:
    groups = _select_groups(scores, sparsity, pattern, norm)
    tilings = {name: tiling_of(name, array.shape, pattern) for name, array in scores.items()}
    return {
        name: Mask(_core.expand_tiles(groups[name]._words, *tilings[name]), array.shape)
        for name, array in scores.items()
    }


@standard_floats
def _select_groups(
    scores: Mapping[str, NDArray[Any]], sparsity: float, pattern: Unstructured | Block | Slices, norm: int
) -> dict[str, Mask]:
    """Masks over the groups of each tensor; several tensors share one threshold."""
    if isinstance(pattern, Unstructured):
        return _select_entries(scores, sparsity, None).masks
    tilings = {name: tiling_of(name, array.shape, pattern) for name, array in scores.items()}
    sums = {name: _core.tile_scores(array, *tilings[name], norm) for name, array in scores.items()}
    if any(np.isnan(s).any() for s in sums.values()):
        raise _vanished(list(scores.values()), list(scores))
    if len(sums) > 1:
        for name in sums:
            sums[name] /= tile_sizes(*tilings[name])
    return _select_entries(sums, sparsity, None).masks
