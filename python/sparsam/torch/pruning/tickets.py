"""Lottery tickets of a PyTorch model: `sparsam.find_ticket`, with training functions that take the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

import torch
from sparsam.analysis import lottery
from sparsam.analysis.random_masks import generator
from sparsam.config import PruningConfig
from sparsam.inputs.checks import check_function, expected
from sparsam.inputs.tensors import to_torch
from sparsam.masks import Mask
from sparsam.pruner import configured
from sparsam.torch.pruning.masked_weights import MaskedWeights, plain_model, to_host
from sparsam.torch.pruning.prunable import check_model, named_weights, prunable_weights
from torch import Tensor, nn

__all__ = ["find_ticket"]

Arrays = dict[str, NDArray[Any]]


def find_ticket(
    model: nn.Module,
    train_fn: Callable[[nn.Module, Callable[[], None], int], object],
    eval_fn: Callable[[nn.Module], float],
    *,
    rounds: int = 5,
    fraction: float = 0.2,
    rewind: Mapping[str, Tensor] | None = None,
    config: PruningConfig | None = None,
    controls: Collection[str] = lottery.CONTROLS,
    seeds: Sequence[int] = (0,),
    callback: Callable[[str, int, float, float], object] | None = None,
) -> lottery.TicketResult:
    """Finds a sparse network that trains well from its initial weights: `sparsam.find_ticket` for a model.

    Args:
        model: The model at initialisation; trained in place in each round, and finally set to the ticket: the
            initial weights with the ticket's zeros. Buffers are reset with the weights.
        train_fn: (model, hold, seed) trains it; `hold()` after each `optimizer.step()` keeps the zeros.
        eval_fn: Model -> score; the larger, the better.
        rounds: As for `sparsam.find_ticket`, as are `fraction`, `controls`, `seeds` and `callback`.
        fraction: The share of the remaining weights that each round prunes.
        rewind: A state_dict of an early step of training, to which the kept weights are reset.
        config: Which tensors are pruned, and how. Weights that `sparsam.torch.prune` leaves dense stay dense,
            unless `overrides` has their exact names.
        controls: As for `sparsam.find_ticket`; "reinitialised" permutes the values of each weight of two axes
            or more.
        seeds: The seeds with which the ticket and its controls are trained.
        callback: Called after each training.

    Raises:
        ValueError: As for `sparsam.find_ticket`; `rewind` lacks a tensor of the model. After any error the
            model has its initial weights again.
        TypeError: `model` is not a module.
    """
    check_model(model)
    for what, function in (("train_fn", train_fn), ("eval_fn", eval_fn)):
        check_function(what, function)
    if rewind is not None and not isinstance(rewind, Mapping):
        do = "pass model.state_dict() of an early step"
        raise TypeError(expected("rewind", type(rewind).__name__, "a state_dict", do))
    plain = plain_model(model)
    parameters = dict(plain.named_parameters())
    initial = _arrays(plain.state_dict())
    settings = configured(config)
    prunable, _ = prunable_weights(plain, exclude=settings.exclude, named=named_weights(settings))
    pruned = {weight.name for weight in prunable}
    settings = settings.with_changes(
        exclude=tuple(name for name in initial if name not in pruned),
        transposed=(*settings.transposed, *(weight.name for weight in prunable if weight.transposed)),
    )

    def train(weights: Arrays, masks: dict[str, Mask], seed: int) -> Arrays:
        _load(plain, weights)
        held = MaskedWeights({name: parameters[name] for name in masks}, masks)
        train_fn(model, held.apply, seed)
        return _arrays(plain.state_dict())

    def evaluate(weights: Arrays) -> float:
        _load(plain, weights)
        return eval_fn(model)

    def reinitialised(seed: int) -> Arrays:
        return {
            name: generator("init", name, seed).permutation(array.ravel()).reshape(array.shape)
            if name in parameters and array.ndim > 1
            else array
            for name, array in initial.items()
        }

    try:
        result = lottery.find_ticket(
            initial,
            train,
            evaluate,
            rounds=rounds,
            fraction=fraction,
            rewind=None if rewind is None else _rewound(rewind, initial),
            config=settings,
            controls=controls,
            reinit_fn=reinitialised,
            seeds=seeds,
            callback=callback,
        )
    except BaseException:
        _load(plain, initial)
        raise
    _load(plain, result.weights)
    return result


def _rewound(state: Mapping[str, Tensor], initial: Arrays) -> Arrays:
    """The arrays of an early state_dict, for the model's tensors."""
    for name in initial:
        if name not in state:
            msg = f"rewind: expected the model's state_dict; got none of {name!r}; pass model.state_dict()"
            raise ValueError(msg)
    return {name: to_host(name, state[name]).copy() for name in initial}


def _arrays(state: Mapping[str, Tensor]) -> Arrays:
    """Copies of the tensors of a state_dict; shared tensors once."""
    found: Arrays = {}
    seen = set()
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        found[name] = to_host(name, tensor).copy()
    return found


@torch.no_grad()
def _load(model: nn.Module, weights: Mapping[str, NDArray[Any]]) -> None:
    state = model.state_dict()
    for name, array in weights.items():
        state[name].copy_(to_torch(array.copy()))
