"""Which weights matter: arrays in, scores of the same shape out. The larger a score, the more worth keeping.

A scorer is one function over one tensor. It knows nothing of sparsity, patterns or time, and gives zeros the
lowest score, 0, so that a growing schedule prunes again what it pruned before.

========== ============================ ====================================================== =======
name       object                       score of the weight w = W_ij, input x_j                needs
========== ============================ ====================================================== =======
magnitude  `Magnitude()`                abs(w)                                                 nothing
random     `Random(seed)`               a random number                                        nothing
lamp       `LAMP()`                     w^2 / sum of the w'^2 that are not smaller [1]         nothing
saliency   `Saliency(gradients)`        abs(w g) [2, 3]                                        g
fisher     `Fisher(squared_gradients)`  w^2 E[g^2] [4, 5]                                      E[g^2]
movement   `Movement(accumulated)`      - sum over steps of w g [6]                            the sum
wanda      `Wanda(statistics)`          abs(w) rms(x_j) [7]                                    inputs
ria        `RIA(statistics)`            (abs(w) / its column + abs(w) / its row) rms(x_j)^a [8] inputs
========== ============================ ====================================================== =======

What a score needs comes as a mapping from tensor names to arrays or `InputStatistics`, which is read when
scores are computed and not copied. A group of weights (`Block`, `Slices`) has the sum of its weights' scores.
Scores that need arithmetic are float64: products and squares of narrower types are then exact or rounded
once, and neither overflow nor underflow; with float64 weights, underflow gives 0 and overflow infinity.

[1] Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", 2021, arXiv:2010.07611.
[2] Mozer and Smolensky, "Skeletonization: a technique for trimming the fat from a network via relevance
    assessment", 1989.
[3] Lee et al., "SNIP: single-shot network pruning based on connection sensitivity", 2019, arXiv:1810.02340.
[4] LeCun et al., "Optimal brain damage", 1990: second order, diagonal.
[5] Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018, arXiv:1801.05787:
    the diagonal estimated by squared gradients.
[6] Sanh et al., "Movement pruning: adaptive sparsity by fine-tuning", 2020, arXiv:2005.07683.
[7] Sun et al., "A simple and effective pruning approach for large language models", 2024, arXiv:2306.11695.
[8] Zhang et al., "Plug-and-play: an efficient post-training pruning method for large language models", 2024.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsam.config import METHODS, Scorer
from sparsam.inputs.checks import expected, is_number
from sparsam.inputs.float_mode import standard_floats
from sparsam.score_data import array_for, check_mapping, input_rms, refuse_not_finite, to_numbers
from sparsam.statistics import InputStatistics


class Traits(NamedTuple):
    """The optional attributes of a scorer, with the defaults of `sparsam.config.Scorer`."""

    norm: int = 1
    ranks_by_magnitude: bool = False
    needs_rows_as_outputs: bool = False


def traits(scorer: Scorer) -> Traits:
    """Returns the optional attributes of a scorer; ValueError for a norm other than 1 and 2."""
    values: list[Any] = [getattr(scorer, name, default) for name, default in Traits._field_defaults.items()]
    found = Traits(*values)
    _check_norm(type(scorer).__name__, found.norm)
    return found


def _check_norm(what: str, norm: object) -> None:
    if isinstance(norm, bool) or norm not in {1, 2}:
        raise ValueError(
            expected(f"{what}: norm", norm, "1 (absolute values) or 2 (squares)", "pass one of them")
        )


@dataclass(frozen=True)
class Magnitude:
    """The absolute value of a weight; of a block or slice, the sum of abs(w)^norm over it (norm 1 or 2)."""

    norm: int = 1
    ranks_by_magnitude: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_norm("Magnitude", self.norm)

    def score(self, name: str, weights: NDArray[Any], /) -> NDArray[Any]:  # noqa: ARG002
        """Returns `weights` as they are: selection ranks by absolute value, so no copy is needed."""
        return weights


@dataclass(frozen=True)
class Random:
    """A random number in (0, 1] for every weight that is not zero: the baseline for every other method.

    The numbers depend on the seed, the tensor's name and its shape, not on the other tensors or their order.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        try:
            seed = -1 if isinstance(self.seed, bool) else operator.index(self.seed)
        except TypeError:
            seed = -1
        if seed < 0:
            msg = f"Random: expected an integer seed of at least 0; got {self.seed!r}; leave it out for 0"
            raise ValueError(msg)
        object.__setattr__(self, "seed", seed)

    @standard_floats
    def score(self, name: str, weights: NDArray[Any], /) -> NDArray[np.float32]:
        """Returns float32 numbers; 0 where a weight is 0, NaN where it is NaN, which selection refuses."""
        key = int.from_bytes(
            hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=16).digest(), "little"
        )
        draws = np.random.default_rng([self.seed, key]).random(weights.shape, dtype=np.float32)
        scores = np.where(weights == 0, np.float32(0), 1 - draws)
        return np.where(np.isnan(weights), np.float32(np.nan), scores)


@dataclass(frozen=True, eq=False)
class Saliency:
    """abs(w g): the first-order change of the loss when the weight is pruned (Mozer, Smolensky 1989).

    SNIP has the same formula: it takes the gradient of one batch at initialisation, and divides by the sum
    over the network, which does not change the ranking.

    Attributes:
        gradients: Name -> the gradient of the loss, in the shape of the tensor.
    """

    gradients: Mapping[str, ArrayLike] = field(repr=False)

    def __post_init__(self) -> None:
        check_mapping(self, "gradients", self.gradients, "the gradient")

    @standard_floats
    def score(self, name: str, weights: NDArray[Any], /) -> NDArray[np.float64]:
        """Returns abs(w g); ValueError where the gradient is missing, of another shape or not finite."""
        return _times(weights, np.abs(array_for(self, "gradients", self.gradients, name, weights)))


@dataclass(frozen=True, eq=False)
class Fisher:
    """w^2 E[g^2]: twice the second-order rise of the loss, with a diagonal Hessian estimated as E[g^2].

    The factor 1/2 of the Taylor term is left out, which does not change the ranking. E[g^2] is the mean of
    the squared gradients of single samples (the empirical Fisher information); the second moment that Adam
    keeps, of batch gradients, is a common stand-in.

    Attributes:
        squared_gradients: Name -> E[g^2], at least 0, in the shape of the tensor.
    """

    squared_gradients: Mapping[str, ArrayLike] = field(repr=False)

    def __post_init__(self) -> None:
        check_mapping(self, "squared_gradients", self.squared_gradients, "the mean of g^2")

    @standard_floats
    def score(self, name: str, weights: NDArray[Any], /) -> NDArray[np.float64]:
        """Returns w^2 E[g^2]; ValueError where E[g^2] is missing, misshapen, negative or not finite."""
        means = array_for(self, "squared_gradients", self.squared_gradients, name, weights)
        if (means < 0).any():
            msg = (
                f"Fisher: squared_gradients of tensor {name!r}: expected at least 0; got {means.min()}; pass "
                "means of squares"
            )
            raise ValueError(msg)
        return _times(weights, _times(weights, means))


@dataclass(frozen=True, eq=False)
class Movement:
    """- sum over training steps of w g: how far weights moved away from zero (Sanh et al. 2020).

    The sum is signed: a weight that shrank has a negative sum and is pruned before one that did not move.
    Scores must not be negative, so `score` returns the sum minus a constant, the same for all tensors of the
    mapping: the smallest sum minus a millionth of the range, so that only zeros score 0. Ranking, differences
    and the comparison of groups of equal size are unchanged, between tensors too, up to float64 rounding:
    sums that differ by less than 2^-52 of the range may tie.

    Attributes:
        accumulated: Name -> the sum, in the shape of the tensor. Make a new object when the sums have
            changed.
    """

    accumulated: Mapping[str, ArrayLike] = field(repr=False)
    _floor: float = field(init=False, repr=False, default=0.0)

    @standard_floats
    def __post_init__(self) -> None:
        check_mapping(self, "accumulated", self.accumulated, "- sum w g")
        sums = (to_numbers(self, "accumulated", name, value) for name, value in self.accumulated.items())
        ends = [(float(array.min()), float(array.max())) for array in sums if array.size] or [(0.0, 0.0)]
        least, most = min(low for low, _ in ends), max(high for _, high in ends)
        if not math.isfinite(most - least):
            msg = (
                f"Movement: accumulated: expected a range within float64; got {least} to {most}; scale the "
                "sums"
            )
            raise ValueError(msg)
        object.__setattr__(self, "_floor", least - ((most - least) * 1e-6 or 1.0))

    @standard_floats
    def score(self, name: str, weights: NDArray[Any], /) -> NDArray[np.float64]:
        """Returns the sums minus the constant; ValueError where a sum is missing, misshapen or not finite."""
        raised = array_for(self, "accumulated", self.accumulated, name, weights) - self._floor
        if (raised < 0).any():
            msg = (
                f"Movement: accumulated of tensor {name!r}: expected the sums that it was made with; got "
                "smaller ones; make a new Movement"
            )
            raise ValueError(msg)
        return np.where(weights == 0, 0.0, np.where(np.isnan(weights), np.nan, raised))


@dataclass(frozen=True, eq=False)
class Wanda:
    """abs(W_ij) rms(x_j): the weight times the typical size of its input (Sun et al. 2024).

    The paper has ||x_j||_2, which is rms(x_j) times the square root of the number of inputs: the same order
    within a tensor. It compares weights within an output row: `scope="row"`.

    Attributes:
        statistics: Name -> `InputStatistics` of the layer's inputs. A tensor of more than two axes, as a
            convolution (out, in, kh, kw), is seen as its matrix (out, in * kh * kw): its statistics are those
            of the unfolded input, in that order.
    """

    statistics: Mapping[str, InputStatistics] = field(repr=False)
    needs_rows_as_outputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_mapping(self, "statistics", self.statistics, "the InputStatistics")

    @standard_floats
    def score(self, name: str, weights: NDArray[Any], /) -> NDArray[np.float64]:
        """Returns abs(W_ij) rms(x_j); ValueError where statistics are missing, empty or of other inputs."""
        rms = input_rms(self, self.statistics, name, weights)
        return _times(weights.reshape(len(weights), rms.size), rms).reshape(weights.shape)


@dataclass(frozen=True, eq=False)
class RIA:
    """(abs(W_ij) / sum_i abs(W_ij) + abs(W_ij) / sum_j abs(W_ij)) rms(x_j)^power (Zhang et al. 2024).

    Relative importance and activations: a weight is measured by its share of its column (input) and of its
    row (output), so that no whole row or column is pruned away.

    Attributes:
        statistics: As for `Wanda`.
        power: a in the paper, at least 0; 0.5 there.
    """

    statistics: Mapping[str, InputStatistics] = field(repr=False)
    power: float = 0.5
    needs_rows_as_outputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_mapping(self, "statistics", self.statistics, "the InputStatistics")
        power = self.power
        if not is_number(power) or not 0 <= power < math.inf:
            raise ValueError(
                expected("RIA: power", power, "a finite number of at least 0", "leave it out for 0.5")
            )

    @standard_floats
    def score(self, name: str, weights: NDArray[Any], /) -> NDArray[np.float64]:
        """Returns the scores; ValueError as for `Wanda`, and for weights that are not finite."""
        rms = input_rms(self, self.statistics, name, weights)
        sizes = _relative_sizes(self, name, weights).reshape(len(weights), rms.size)
        columns, rows = sizes.sum(axis=0, keepdims=True), sizes.sum(axis=1, keepdims=True)
        share = sizes / np.where(columns == 0, 1, columns) + sizes / np.where(rows == 0, 1, rows)
        return np.asarray(share * rms**self.power).reshape(weights.shape)


@dataclass(frozen=True)
class LAMP:
    """w^2 over the sum of the w'^2 of its tensor that are not smaller, itself included (Lee et al. 2021).

    Within a tensor the order is that of magnitudes; between tensors (scope "global") it decides how many of
    each are pruned. Equal weights are ordered as in selection: the lower flat index has fewer others in its
    sum, and so the larger score. The largest weight of every tensor scores 1.
    """

    @standard_floats
    def score(self, name: str, weights: NDArray[Any], /) -> NDArray[np.float64]:
        """Returns the scores, in [0, 1]; ValueError for weights that are not finite."""
        squares = np.square(_relative_sizes(self, name, weights)).reshape(-1)
        order = squares.size - 1 - _stable_order(squares[::-1])
        ascending = squares[order]
        sums = np.cumsum(ascending[::-1])[::-1]
        scores = np.empty_like(squares)
        scores[order] = ascending / np.where(sums == 0, 1, sums)
        return scores.reshape(weights.shape)


def _stable_order(values: NDArray[np.float64]) -> NDArray[np.intp]:
    """A stable np.argsort, in about the same time, but by pieces, between which Ctrl-C is seen."""
    if values.size <= _PIECE:
        return np.argsort(values, kind="stable")
    seen = np.unique(values[:: values.size >> 12])
    edges = seen[1 :: max(seen.size // 64, 1)]  # fewer than 128: a bucket's number fits one byte
    pieces = (values[start : start + _PIECE] for start in range(0, values.size, _PIECE))
    buckets = np.concatenate([np.searchsorted(edges, piece, "right").astype(np.uint8) for piece in pieces])
    order = np.argsort(buckets, kind="stable")  # of bytes: a radix sort
    start = 0
    for count in np.bincount(buckets).tolist():
        part = order[start : start + count]
        part[:] = part[np.argsort(values[part], kind="stable")]
        start += count
    return order


def _times(weights: NDArray[Any], factors: NDArray[np.float64]) -> NDArray[np.float64]:
    """abs(w) times non-negative factors: 0 where either is 0, NaN where w is NaN."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        product = np.abs(weights.astype(np.float64)) * factors
    undefined = np.isnan(product)
    if undefined.any():
        product[undefined & np.isinf(weights)] = 0
    return np.asarray(product)


def _relative_sizes(scorer: object, name: str, weights: NDArray[Any]) -> NDArray[np.float64]:
    """Absolute values divided by a power of two (exact), so that neither squares nor sums overflow."""
    sizes = np.abs(weights.astype(np.float64))
    refuse_not_finite(f"{type(scorer).__name__}: tensor {name!r}", sizes)
    with np.errstate(under="ignore"):
        return np.asarray(np.ldexp(sizes, -np.frexp(sizes.max(initial=0))[1]))


_PIECE = 1 << 20

_NAMED: dict[str, Callable[[], Scorer]] = {"magnitude": Magnitude, "random": Random, "lamp": LAMP}
_NEEDS = {
    "saliency": "pass scores.Saliency({name: gradient})",
    "fisher": "pass scores.Fisher({name: mean of g^2})",
    "movement": "pass scores.Movement({name: - sum of w g})",
    "wanda": "pass scores.Wanda({name: InputStatistics})",
    "ria": "pass scores.RIA({name: InputStatistics})",
    "obs": "it gives weights, not scores: use sparsam.obs, or sparsam.torch.prune for a model",
    "admm": "it gives weights, not scores: use sparsam.admm, or sparsam.torch.prune for a model",
}


def resolve(method: str | Scorer) -> Scorer:
    """Returns the scorer for a name; an object is returned as it is.

    Raises:
        ValueError: The name is unknown, or belongs to a scorer that needs data.
    """
    if not isinstance(method, str):
        return method
    if method in _NEEDS:
        msg = f"method: expected an object that has its data; got the name {method!r}; {_NEEDS[method]}"
        raise ValueError(msg)
    if method not in _NAMED:
        msg = f"method: expected one of {', '.join(map(repr, METHODS))}; got {method!r}; pass one of them"
        raise ValueError(msg)
    return _NAMED[method]()
