"""Sparse training: masks that move, at a constant number of kept weights.

Every so often during training a fraction of the kept weights is dropped, those of least magnitude, and as
many others grow: at random (SET) or where the gradient is largest (RigL). These functions say which; the
caller sets what grows to its first value (RigL: zero) and resets the optimizer's state for it. Only here can
a pruned weight become nonzero again.

Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
network science" (SET), 2018. Evci et al., "Rigging the lottery: making all tickets winners" (RigL), 2020,
arXiv:1911.11134.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsam.inputs.checks import check_sparsity, expected, integer, positive
from sparsam.inputs.dtypes import is_weight_dtype
from sparsam.masks import Mask
from sparsam.selection import _refuse_nan


@dataclass(frozen=True)
class SET:
    """Regrowth at random, for `sparsam.torch.Pruner`.

    Attributes:
        fraction: The fraction that the first update drops; it falls as `drop_fraction` says.
        seed: Of the draws, at least 0; each update of each tensor has its own.
    """

    fraction: float = 0.3
    seed: int = 0
    needs_gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_sparsity("SET: fraction", self.fraction)
        if integer("SET: seed", self.seed) < 0:
            raise ValueError(expected("SET: seed", self.seed, "an integer of at least 0", "pass 0, say"))

    def update(
        self, name: str, weights: ArrayLike, mask: Mask, gradients: ArrayLike | None, *, step: int, end: int
    ) -> Mask:
        """Returns the mask after the update of tensor `name` at a step of `end`."""
        del gradients
        key = hashlib.blake2b(
            f"{self.seed} {step} {name}".encode(errors="surrogatepass"), digest_size=8
        ).digest()
        fraction = drop_fraction(step, end, self.fraction)
        return set_update(weights, mask, fraction, seed=int.from_bytes(key, "little"))


@dataclass(frozen=True)
class RigL:
    """Regrowth where gradients are largest, for `sparsam.torch.Pruner`.

    Attributes:
        fraction: As for `SET`.
    """

    fraction: float = 0.3
    needs_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_sparsity("RigL: fraction", self.fraction)

    def update(
        self, name: str, weights: ArrayLike, mask: Mask, gradients: ArrayLike | None, *, step: int, end: int
    ) -> Mask:
        """Returns the mask after the update of tensor `name` at a step of `end`."""
        if gradients is None:
            raise ValueError(
                expected(f"gradients of tensor {name!r}", None, "an array", "pass those of the loss")
            )
        return rigl_update(weights, mask, gradients, drop_fraction(step, end, self.fraction))


RegrowthLike: TypeAlias = Literal["set", "rigl"] | SET | RigL


def resolve(regrow: object) -> SET | RigL | None:
    """Returns the rule for a name or an object; ValueError for anything else."""
    if regrow is None or isinstance(regrow, (SET, RigL)):
        return regrow
    named: dict[object, SET | RigL] = {"set": SET(), "rigl": RigL()}
    if isinstance(regrow, str) and regrow in named:
        return named[regrow]
    wanted = "'set', 'rigl', SET(...), RigL(...) or None"
    raise ValueError(expected("regrow", regrow, wanted, "name one of them, or leave it out"))


def set_update(weights: ArrayLike, mask: Mask, fraction: float, *, seed: int) -> Mask:
    """One mask update of SET: the smallest kept weights are dropped, random others grow.

    Exactly k = round(fraction * mask.count) kept weights are dropped: the smallest abs(w), of equal ones the
    higher flat index first. (Mocanu et al. take the smallest positive and the largest negative weights, a
    fraction of each.) As many grow, drawn without replacement from those that were not kept before.
    If fewer than k weights were not kept, k is their number, since a weight that was just dropped never grows
    in the same update.

    Args:
        weights: Of the mask's shape; float16, bfloat16, float32 or float64. Values where the mask is False
            are not used.
        mask: The weights that are kept now.
        fraction: In [0, 1]; see `drop_fraction`.
        seed: Of the draw, at least 0. The draw depends on it alone: pass another one for each update and each
            tensor.

    Returns:
        A new mask with as many kept.

    Raises:
        ValueError: The shapes differ, the fraction is outside [0, 1], a kept weight is NaN, or the seed is no
            integer of at least 0.
        TypeError: `mask` is not a `Mask`, or `weights` have another dtype.
    """
    if integer("seed", seed) < 0:
        raise ValueError(expected("seed", seed, "an integer of at least 0", "pass 0, say"))
    keep, candidates, k = _moves(weights, mask, fraction)
    grown = np.random.default_rng(seed).choice(candidates, k, replace=False)
    return _updated(keep, grown, mask)


def rigl_update(weights: ArrayLike, mask: Mask, gradients: ArrayLike, fraction: float) -> Mask:
    """One mask update of RigL: the smallest kept weights are dropped, those with the largest gradients grow.

    As `set_update`, but of the weights that were not kept before, those with the largest abs(g) grow; among
    equals, those with the lower flat index. (In the paper, weights that were just dropped compete too; here
    they do not, since a weight that came back as zero would be neither dropped nor kept.)

    Args:
        weights: As for `set_update`.
        mask: The weights that are kept now.
        gradients: The gradient of the loss for every weight, kept or not, of the mask's shape and one of the
            four dtypes. Values where the mask is True are not used.
        fraction: In [0, 1]; see `drop_fraction`.

    Returns:
        A new mask with as many kept.

    Raises:
        ValueError: As for `set_update`; a gradient of a weight that is not kept is NaN.
        TypeError: As for `set_update`.
    """
    keep, candidates, k = _moves(weights, mask, fraction)
    sizes = _magnitudes("gradients", gradients, mask, ~mask.to_array())[candidates]
    return _updated(keep, candidates[np.argsort(-sizes, kind="stable")[:k]], mask)


def drop_fraction(step: int, end: int, initial: float = 0.3) -> float:
    """The fraction to drop at a training step: initial / 2 * (1 + cos(pi step / end)), 0 from `end` on.

    Args:
        step: The training step, at least 0.
        end: The step from which on masks stay as they are (RigL: three quarters of the training), at least 1.
        initial: The fraction at step 0, in [0, 1].

    Raises:
        ValueError: An argument is out of range.
    """
    if integer("step", step) < 0:
        raise ValueError(expected("step", step, "an integer of at least 0", "count steps from 0"))
    if step >= positive("end", end):
        return 0.0
    return check_sparsity("initial", initial) / 2 * (1 + math.cos(math.pi * step / end))


def _moves(
    weights: ArrayLike, mask: Mask, fraction: float
) -> tuple[NDArray[np.bool_], NDArray[np.intp], int]:
    """What is kept after the drop, flat; the flat indices that may grow; how many are exchanged."""
    if not isinstance(mask, Mask):
        msg = f"mask: expected a Mask; got {mask!r}; pack a boolean array with Mask.from_array"
        raise TypeError(msg)
    kept = mask.to_array()
    keep = kept.reshape(-1).copy()
    sizes = _magnitudes("weights", weights, mask, kept)
    active, candidates = np.flatnonzero(keep), np.flatnonzero(~keep)
    k = min(round(check_sparsity("fraction", fraction) * active.size), candidates.size)
    descending = active[np.argsort(-sizes[active], kind="stable")]
    keep[descending[active.size - k :]] = False
    return keep, candidates, k


def _magnitudes(what: str, values: ArrayLike, mask: Mask, relevant: NDArray[np.bool_]) -> NDArray[Any]:
    """Absolute values, flat; where they are not relevant, 0."""
    array = np.asarray(values)
    if not is_weight_dtype(array.dtype):
        msg = (
            f"{what}: expected dtype float16, bfloat16, float32 or float64; got {array.dtype}; convert it "
            "with .astype()"
        )
        raise TypeError(msg)
    if array.shape != mask.shape:
        msg = (
            f"{what}: expected the shape of the mask, {mask.shape}; got {array.shape}; pass the arrays of "
            "one tensor"
        )
        raise ValueError(msg)
    sizes = np.where(relevant, np.abs(array.astype(np.float64)), 0.0)
    _refuse_nan([sizes], [what])
    return sizes.reshape(-1)


def _updated(keep: NDArray[np.bool_], grown: NDArray[np.intp], mask: Mask) -> Mask:
    keep[grown] = True
    return Mask.from_array(keep.reshape(mask.shape))
