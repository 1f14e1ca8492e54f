"""Lottery tickets: iterative magnitude pruning with rewinding, and controls to compare a ticket with.

[1] J. Frankle and M. Carbin, "The lottery ticket hypothesis: finding sparse, trainable neural networks",
    ICLR 2019: train, prune, reset what is left to its initial value, repeat.
[2] J. Frankle, G. K. Dziugaite, D. M. Roy and M. Carbin, "Linear mode connectivity and the lottery ticket
    hypothesis", ICML 2020: larger networks have to be reset to an early step of training instead.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from numpy.typing import ArrayLike, NDArray

from sparsam import scores
from sparsam.analysis.random_masks import count_groups, draw_masks, generator
from sparsam.config import PruningConfig
from sparsam.inputs.checks import check_function, check_sparsity, expected, integer, positive, to_arrays
from sparsam.masks import Mask
from sparsam.patterns import NM
from sparsam.pools import Pool, check_patterns, make_pools
from sparsam.pruner import configured, describe, prune_pools
from sparsam.report import Readable, Report
from sparsam.training.callbacks import Arrays, Masks, evaluate_finite, sparsity_of, validate_returned_weights

__all__ = ["TicketResult", "TicketRound", "find_ticket"]

CONTROLS = ("reinitialised", "random mask")

Train = Callable[[Arrays, Masks, int], Mapping[str, ArrayLike] | None]


class TicketRound(NamedTuple):
    """One training run.

    Attributes:
        round: 0 is the dense network.
        sparsity: The share of weights that are pruned, over the tensors that are being pruned.
        score: The score of the trained weights.
    """

    round: int
    sparsity: float
    score: float


@dataclass(frozen=True)
class TicketResult(Readable):
    """The result of `find_ticket`; `print` shows it.

    Attributes:
        rounds: The dense network and each round of pruning, trained with the first seed.
        masks: The ticket: name -> mask of each tensor that is pruned.
        weights: The ticket's start: the weights it is reset to, masked; train these.
        trained: The weights after training them with the first seed.
        report: The statistics of every tensor of `weights`.
        seeds: The seeds that the ticket and its controls were trained with.
        ticket_scores: The scores of the ticket, one for each seed.
        control_scores: Control -> its scores at the ticket's sparsity in every tensor, one for each seed.
    """

    rounds: tuple[TicketRound, ...]
    masks: dict[str, Mask] = field(repr=False)
    weights: dict[str, NDArray[Any]] = field(repr=False)
    trained: dict[str, NDArray[Any]] = field(repr=False)
    report: Report = field(repr=False)
    seeds: tuple[int, ...]
    ticket_scores: tuple[float, ...]
    control_scores: dict[str, tuple[float, ...]]

    @property
    def sparsity(self) -> float:
        """The sparsity of the ticket."""
        return self.rounds[-1].sparsity

    @property
    def dense_score(self) -> float:
        """The score of the dense network, trained with the first seed."""
        return self.rounds[0].score

    @property
    def margins(self) -> dict[str, tuple[float, ...]]:
        """Control -> the ticket's score minus the control's, for each seed."""
        return {
            name: tuple(ticket - other for ticket, other in zip(self.ticket_scores, found, strict=True))
            for name, found in self.control_scores.items()
        }

    @property
    def won(self) -> bool:
        """Whether the ticket beat every control with every seed; False without controls."""
        return bool(self.control_scores) and all(min(margin) > 0 for margin in self.margins.values())

    @property
    def matches_dense(self) -> bool:
        """Whether the ticket's mean score is at least the dense one: what [1] calls a winning ticket."""
        return sum(self.ticket_scores) / len(self.ticket_scores) >= self.dense_score

    def to_dict(self) -> dict[str, Any]:
        """Returns all but the weights and the masks in plain types."""
        return {
            "sparsity": self.sparsity,
            "dense_score": self.dense_score,
            "won": self.won,
            "matches_dense": self.matches_dense,
            "seeds": list(self.seeds),
            "ticket_scores": list(self.ticket_scores),
            "control_scores": {name: list(found) for name, found in self.control_scores.items()},
            "rounds": [row._asdict() for row in self.rounds],
            "report": self.report.to_dict(),
        }

    def __str__(self) -> str:
        lines = [f"{'round':>5}  {'sparsity':>9}  {'score':>10}"]
        lines += [f"{row.round:>5}  {row.sparsity:>9.2%}  {row.score:>10.6g}" for row in self.rounds]
        count = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        lines += ["", f"at {self.sparsity:.2%}, {count}: mean score, and margins of the ticket"]
        lines.append(f"  {'ticket':<15}{_mean(self.ticket_scores):>10.6g}")
        for name, found in self.control_scores.items():
            margin = self.margins[name]
            lines.append(f"  {name:<15}{_mean(found):>10.6g}  {min(margin):+.4g} to {max(margin):+.4g}")
        if self.control_scores:
            verdict = "beat every control with every seed" if self.won else "did not beat every control"
            lines.append(f"The ticket {verdict}.")
        dense = "scores" if self.matches_dense else "does not score"
        lines.append(f"It {dense} at least as much as the dense network ({self.dense_score:.6g}).")
        return "\n".join(lines)


def find_ticket(
    init_weights: Mapping[str, ArrayLike],
    train_fn: Train,
    eval_fn: Callable[[Arrays], float],
    *,
    rounds: int = 5,
    fraction: float = 0.2,
    rewind: Mapping[str, ArrayLike] | None = None,
    config: PruningConfig | None = None,
    controls: Collection[str] = CONTROLS,
    reinit_fn: Callable[[int], Mapping[str, ArrayLike]] | None = None,
    seeds: Sequence[int] = (0,),
    callback: Callable[[str, int, float, float], object] | None = None,
) -> TicketResult:
    """Finds a sparse network that trains well from its own initial weights, and checks it against controls.

    Each round trains, prunes a share of what is left of the trained weights and resets the others, after [1]:

        w = train(start * mask);  mask = the mask without the smallest |w|;  start as before

    In a pool of n groups of the pattern (a tensor, a coupling, or in global scope all of them) of which k are
    pruned, a round prunes `round(fraction * (n - k))` more (in scope "row" to within the rounding of each
    row); what is pruned stays so. The ticket is then trained once for each seed, as are its controls, which
    have the same sparsity in every tensor:

    - "reinitialised": the ticket's mask on newly drawn weights, from `reinit_fn`, or by default the values of
      each tensor of `init_weights` in a random order, which for independent draws is a draw from the same
      distribution;
    - "random mask": the ticket's start under a mask drawn at random, of as many groups of the pattern.

    Args:
        init_weights: Name -> array: the weights at initialisation. Not modified.
        train_fn: (weights, masks, seed) -> the trained weights, or None if it changed the given ones in
            place. The masks say what must stay zero; weights that training revived are zeroed again at the
            end, but `train_fn` itself has to train under the mask. The seed is for the order of the data and
            other random choices. Masks of the dense network are all ones. Training that starts from `rewind`
            starts at its step.
        eval_fn: Weights -> score; the larger, the better. It is given a copy.
        rounds: How many rounds of pruning.
        fraction: The share of the remaining weights that each round prunes.
        rewind: The weights of an early step of training from `init_weights`, to which the kept weights are
            reset, and from which the random mask starts, after [2]; all tensors. Left out: `init_weights`.
            The dense network and the "reinitialised" control always start from initial weights.
        config: Which tensors are pruned, by which method and pattern; the scope. A sparsity in `overrides` is
            those tensors' own `fraction`; [1] prunes the output layer at half the rate. Its target and
            schedule are not used.
        controls: Which controls are trained: "reinitialised", "random mask".
        reinit_fn: Seed -> new initial weights of all tensors.
        seeds: The seeds to train the ticket and the controls with; the rounds use the first. Several seeds
            show how much of a margin is chance.
        callback: Called after each training with what was trained ("dense", "ticket" or a control), the seed,
            the sparsity and the score.

    Returns:
        The ticket, and how it compares.

    Raises:
        ValueError: As for `sparsam.prune`; an argument is out of range, a pattern is N:M, which has one
            sparsity, or the allocation is not "uniform"; weights of other names or shapes came back; a score
            or a weight is NaN.
        TypeError: As for `sparsam.prune`; a callback returned something of another type.
    """
    initial = to_arrays(init_weights, "init_weights")
    settings = configured(config)
    check_patterns(settings, initial, stacklevel=2)
    pools = _pools(initial, settings, check_sparsity("fraction", fraction))
    start = initial if rewind is None else _like("rewind", rewind, initial)
    rounds = positive("rounds", rounds)
    seeds = tuple(integer("seeds", seed) for seed in seeds) if isinstance(seeds, Iterable) else ()
    if not seeds or min(seeds) < 0:
        raise ValueError(
            expected("seeds", seeds, "at least one integer of at least 0", "pass (0, 1, 2), say")
        )
    for what, function in (("train_fn", train_fn), ("eval_fn", eval_fn)):
        check_function(what, function)
    check_function("callback", callback, optional=True)
    if not isinstance(controls, Iterable):
        raise ValueError(expected("controls", controls, "names of controls", "pass () for none"))
    controls = (controls,) if isinstance(controls, str) else tuple(controls)
    for name in controls:
        if name not in CONTROLS:
            raise ValueError(
                expected(
                    "controls",
                    name,
                    f"some of {', '.join(map(repr, CONTROLS))}",
                    "leave it out for all of them",
                )
            )

    def trained(what: str, weights: Arrays, masks: Masks, seed: int) -> tuple[Arrays, float]:
        arrays = _masked(weights, masks)
        given = {name: array.copy() for name, array in arrays.items()}
        where = f" ({what}, seed {seed})"
        arrays = validate_returned_weights(
            "train_fn", given, train_fn(given, dict(masks), seed), arrays, masks, where
        )
        score = evaluate_finite(eval_fn, arrays, f"{what}, seed {seed}")
        if callback is not None:
            callback(what, seed, sparsity_of(masks), score)
        return arrays, score

    names = {name for pool, _ in pools for name in pool.names}
    masks = {name: Mask.ones(array.shape) for name, array in initial.items() if name in names}
    weights, score = trained("dense", initial, masks, seeds[0])
    history = [TicketRound(0, 0.0, score)]
    method = scores.resolve(settings.method)
    pruned = [0 for _ in pools]
    for round_ in range(1, rounds + 1):
        pruned = [
            k + round(pool.sparsity_of(pool.names[0]) * (n - k))
            for k, (pool, n) in zip(pruned, pools, strict=True)
        ]
        shares = [k / n if n else 0.0 for k, (_, n) in zip(pruned, pools, strict=True)]
        steps = [replace(pool, sparsity=share) for share, (pool, _) in zip(shares, pools, strict=True)]
        outs = {name: array.copy() for name, array in weights.items()}
        masks = prune_pools(weights, steps, method, outs, previous=masks).masks
        weights, score = trained("ticket", start, masks, seeds[0])
        history.append(TicketRound(round_, sparsity_of(masks), score))

    found: dict[str, list[float]] = {"ticket": [score], **{name: [] for name in CONTROLS if name in controls}}
    found["ticket"] += [trained("ticket", start, masks, seed)[1] for seed in seeds[1:]]
    for seed in seeds:
        if "reinitialised" in found:
            fresh = _reinitialised(initial, seed, reinit_fn)
            found["reinitialised"].append(trained("reinitialised", fresh, masks, seed)[1])
        if "random mask" in found:
            drawn = draw_masks(initial, masks, [pool for pool, _ in pools], seed)
            found["random mask"].append(trained("random mask", start, drawn, seed)[1])
    ticket = _masked(start, masks)
    return TicketResult(
        tuple(history),
        masks,
        ticket,
        weights,
        describe(ticket, masks, [pool for pool, _ in pools]),
        seeds,
        tuple(found.pop("ticket")),
        {name: tuple(values) for name, values in found.items()},
    )


def _pools(arrays: Arrays, config: PruningConfig, fraction: float) -> list[tuple[Pool, int]]:
    """The pools, with the fraction of each round as their sparsity, and their numbers of groups."""
    if config.allocation != "uniform":
        msg = (
            "allocation: expected 'uniform', since find_ticket prunes the same share of each pool; got "
            f"{config.allocation!r}; use scope='global' to let the magnitudes decide"
        )
        raise ValueError(msg)
    if isinstance(config.pattern, NM):
        wanted = "one that can prune more in each round"
        msg = f"pattern: expected {wanted}; got {config.pattern}, which has one sparsity; use another pattern"
        raise ValueError(msg)
    unset: dict[str, Any] = {"schedule": None, "num_iterations": None}
    pools = []
    alike = make_pools(arrays, replace(config, target_sparsity=fraction, **unset))
    for pool in [part for together in alike for part in together.split()]:
        if isinstance(pool.pattern, NM) and not pool.ties:
            msg = (
                f"overrides: tensor {pool.names[0]!r}: expected a pattern that can prune more in each round; "
                f"got {pool.pattern}, which has one sparsity; use another, or exclude the tensor"
            )
            raise ValueError(msg)
        pools.append((pool, count_groups(pool, arrays)))
    if not pools:
        msg = (
            f"init_weights: expected tensors to prune; got {list(arrays)!r}, which the configuration leaves "
            "dense; change exclude, or add weights"
        )
        raise ValueError(msg)
    return pools


def _reinitialised(
    initial: Arrays, seed: int, reinit_fn: Callable[[int], Mapping[str, ArrayLike]] | None
) -> Arrays:
    """Newly drawn weights; without `reinit_fn`, the initial values in another order."""
    if reinit_fn is not None:
        return _like("reinit_fn", reinit_fn(seed), initial)
    return {
        name: array
        if array.dtype.kind in "biu"
        else generator("init", name, seed).permutation(array.ravel()).reshape(array.shape)
        for name, array in initial.items()
    }


def _like(what: str, weights: object, initial: Arrays) -> Arrays:
    """Weights of the same names, shapes and dtypes."""
    if not isinstance(weights, Mapping):
        got = type(weights).__name__
        msg = f"{what}: expected a mapping from names to arrays; got {got}; pass {{'name': array}}"
        raise TypeError(msg)
    if set(weights) != set(initial):
        got = f"{sorted(map(str, weights))!r}"
        msg = f"{what}: expected the tensors {sorted(initial)!r}; got {got}; give each of them"
        raise ValueError(msg)
    return validate_returned_weights(what, {}, weights, initial, {})


def _masked(weights: Arrays, masks: Masks) -> Arrays:
    """Copies of the arrays, with the weights that the masks prune zeroed."""
    return {
        name: masks[name].apply(array) if name in masks else array.copy() for name, array in weights.items()
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
