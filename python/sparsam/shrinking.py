"""Shrinking: masked weights in, smaller dense arrays out.

A slice of zeros can be removed if everything connected to it is removed too. Arrays do not say what they are
connected to; couplings do: the rows of one layer, the entries of its bias, the columns of the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsam.coupling import check_ties
from sparsam.inputs.checks import to_arrays
from sparsam.inputs.float_mode import standard_floats
from sparsam.masks import Mask
from sparsam.patterns import Slices, Tied, as_ties


@standard_floats
def shrink(
    weights: Mapping[str, ArrayLike], masks: Mapping[str, Mask], ties: Tied | Sequence[Tied] = ()
) -> dict[str, NDArray[Any]]:
    """Removes the slices that are zero in all members of a coupling: the same network in smaller arrays.

    Pass the same couplings as to `PruningConfig(ties=ties)`:

        ties = Tied({"fc1.weight": Slices(0), "fc1.bias": Slices(0), "fc2.weight": Slices(1)})
        result = sparsam.prune(weights, ties=ties)
        small = shrink(result.weights, result.masks, ties)

    Without couplings nothing is removed: a row of a layer can be removed only together with the columns that
    read it. A tensor may be in two couplings, across different axes. The shapes of the result show what is
    left: with 64 rows per head, `small["q.weight"].shape[0] // 64` heads.

    Removing zeros changes no sum, so the small network computes what the masked one did, up to the order of
    summation. Where a layer is not a sum, the caller has to check that this still holds:

    - Batch norms: weight, bias, running mean and variance of a channel are members of its coupling. A channel
      whose weight and bias are zeroed is 0 with or without them.
    - A mean across the axis that gets shorter (layer norm over these neurons, a softmax over these channels)
      is then taken over fewer numbers, so it changes: do not shrink that axis.
    - A constant that depends on the length of an axis, such as the scale of attention: keep the old value.
    - Behind a Flatten of (channels, height, width), a channel is `Slices(1, size=height * width)`.

    Args:
        weights: Name -> array of any dtype and shape. Not modified.
        masks: Name -> mask, as `sparsam.prune` returns them; weights are masked before anything else. Tensors
            without one are used as they are; `{}` if the weights are already zeroed.
        ties: Which slices are connected, as `Tied` objects.

    Returns:
        Name -> array of the same dtype: a new one for a tensor that has a mask or is coupled, else the
        caller's own.

    Raises:
        ValueError: A slice that the mask of one member removes is not all zero in another member; a mask
            belongs to no tensor, or has another shape; couplings do not fit the tensors or each other.
        TypeError: `weights` or `masks` is not a mapping of the kind above.
    """
    for what, value, kind in (("weights", weights, "arrays"), ("masks", masks, "masks")):
        if not isinstance(value, Mapping):
            msg = (
                f"{what}: expected a mapping from names to {kind}; got {type(value).__name__}; pass "
                "them by name"
            )
            raise TypeError(msg)
    arrays = to_arrays(weights)
    ties = as_ties(ties)
    check_ties(ties, arrays)
    for name, mask in masks.items():
        _check_mask(name, mask, arrays)
        arrays[name] = arrays[name].copy()
        arrays[name][~mask.to_array()] = 0

    kept = [(tied, _kept(tied, arrays)) for tied in ties]
    emptied = {name for tied, keep in kept if not keep.any() for name in tied.members}
    for tied, keep in kept:
        # A tensor that another coupling removes entirely has no slices left to compare.
        present = {name: masks[name] for name in tied.members if name in masks and name not in emptied}
        _check_masks(tied, keep, arrays, present)
    for tied, keep in kept:
        for name, slices in tied.members.items():
            arrays[name] = np.compress(np.repeat(keep, slices.size), arrays[name], axis=slices.axis)
    return arrays


def _check_mask(name: str, mask: object, arrays: Mapping[str, NDArray[Any]]) -> None:
    if not isinstance(mask, Mask):
        msg = f"masks: expected a Mask for {name!r}; got {type(mask).__name__}; see Mask.from_array"
        raise TypeError(msg)
    if name not in arrays:
        msg = f"masks: expected masks of {list(arrays)}; got one of {name!r}; leave that one out"
        raise ValueError(msg)
    if mask.shape != arrays[name].shape:
        msg = (
            f"tensor {name!r}: expected the weights at full size, as they were pruned; got shape "
            f"{arrays[name].shape} and a mask of {mask.shape}; pass those that prune() returned"
        )
        raise ValueError(msg)


def _kept(tied: Tied, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Which groups are kept: those with a nonzero weight in some member."""
    alive = [_any(arrays[name] != 0, slices) for name, slices in tied.members.items()]
    return np.asarray(np.logical_or.reduce(alive))


def _check_masks(
    tied: Tied, keep: NDArray[np.bool_], arrays: Mapping[str, NDArray[Any]], masks: Mapping[str, Mask]
) -> None:
    """Raises ValueError for a group that is kept although the mask of one member removes it."""
    for name, mask in masks.items():
        torn = keep & ~_any(mask.to_array(), tied.members[name])
        if mask.size and torn.any():
            group = int(np.argmax(torn))
            other = next(
                other for other, slices in tied.members.items() if _any(arrays[other] != 0, slices)[group]
            )
            raise ValueError(_partly_removed(tied, group, name, other, arrays[other]))


def _any(flags: NDArray[np.bool_], slices: Slices) -> NDArray[np.bool_]:
    """Whether any flag is set, for each group."""
    lines = np.moveaxis(flags, slices.axis, 0)
    lines = lines.reshape(lines.shape[0], -1) if flags.size else np.zeros((lines.shape[0], 1), np.bool_)
    return np.asarray(lines.any(axis=1).reshape(-1, slices.size).any(axis=1))


def _partly_removed(tied: Tied, group: int, name: str, other: str, array: NDArray[Any]) -> str:
    """The error for a group that is removed in one member and not in another."""
    slices = tied.members[other]
    axis = slices.axis % array.ndim
    first, last = group * slices.size, (group + 1) * slices.size - 1
    where = f"index {first}" if first == last else f"indices {first} to {last}"
    if array.ndim == 1:
        why = "without the weights before it a bias is still a constant that the next layer reads"
    else:
        why = "removing it would change what the network computes"
    return (
        f"ties: group {group}: expected zeros in all members, since the mask of {name!r} removes it; got "
        f"others in {other!r} ({where} of axis {axis}), and {why}; prune the members together with "
        "PruningConfig(ties=...), or leave the tie out"
    )
