"""Gradients of a loss with respect to the weights of a model, for the scores that need them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

import torch
from sparsam import scores
from sparsam.config import Scorer
from sparsam.torch.pruning.calibration import Batch
from sparsam.torch.pruning.prunable import PrunableWeight
from sparsam.torch.pruning.twins import Twin
from torch import Tensor, nn

__all__ = ["GRADIENT_METHODS", "gradient_scorer", "gradient_term"]

_Array = TypeVar("_Array", Tensor, "NDArray[np.float64]")

GRADIENT_METHODS: Mapping[str, Callable[..., Scorer]] = {
    "saliency": scores.Saliency,
    "fisher": scores.Fisher,
    "movement": scores.Movement,
}
"""The methods that need gradients of a loss."""


def gradient_term(method: str, weights: _Array, gradients: _Array) -> _Array:
    """Returns the term of a method's sum for one gradient g, taken at weights w: g, g^2 or - w g."""
    if method == "saliency":
        return gradients
    return gradients * gradients if method == "fisher" else -weights * gradients


def gradient_scorer(
    method: str,
    model: nn.Module,
    weights: Sequence[PrunableWeight],
    batches: Sequence[Batch],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    done: Callable[[int], object] = lambda _: None,
) -> Scorer:
    """Scores by the gradients of a loss over batches, of the dense model in evaluation mode.

    "saliency" takes the mean gradient, "fisher" the mean of the squared gradients of batches, "movement"
    minus the sum of weight times gradient. `done` is called with the index of each batch.

    Raises:
        ValueError: The loss is not a scalar with a gradient, does not depend on a weight, or a gradient is
            not finite.
    """
    twin = Twin(model, weights)
    sums = {name: np.zeros(tuple(weight.parameter.shape)) for name, weight in twin.weights.items()}
    for weight in twin.weights.values():
        weight.parameter.requires_grad_(True)
    reached: set[str] = set()
    for index, batch in enumerate(batches):
        with torch.enable_grad():
            loss = loss_fn(twin.model, batch.given)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                got = f"{tuple(loss.shape)} numbers" if isinstance(loss, Tensor) else type(loss).__name__
                msg = (
                    f"loss_fn: batch {index}: expected one number with a gradient; got {got}; return the loss"
                )
                raise ValueError(msg)
            loss.backward()  # type: ignore[no-untyped-call]
        for name, weight in twin.weights.items():
            gradient = weight.parameter.grad
            if gradient is None:
                continue
            reached.add(name)
            values = gradient.double().numpy()
            if not np.isfinite(values).all():
                msg = (
                    f"weight {name!r}: batch {index}: expected a finite gradient of the loss; got NaN or "
                    "infinity; leave that batch out"
                )
                raise ValueError(msg)
            term = gradient_term(method, weight.parameter.detach().double().numpy(), values)
            sums[name] += term if method == "movement" else term / len(batches)
            weight.parameter.grad = None
        done(index)
    for name in twin.weights:
        if name not in reached:
            msg = (
                "loss_fn: expected a loss that depends on every weight that is pruned; got no gradient of "
                f"{name!r} from any batch; exclude it, or use it in the loss"
            )
            raise ValueError(msg)
    return GRADIENT_METHODS[method](sums)
