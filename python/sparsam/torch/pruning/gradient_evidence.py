"""Sums of gradients over training steps, for the three scores that use them.

=========== ================================= ==========================================
method      sum over steps                     score of the weight w
=========== ================================= ==========================================
"saliency"  g, since the last update           abs(w mean(g))
"fisher"    g^2, since the last update         w^2 mean(g^2)
"movement"  - w g, since the first step        the sum
=========== ================================= ==========================================

w is the value at which the gradient was taken. A step with gradients that are not finite, such as one that
GradScaler skips, does not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from sparsam.config import Scorer
from sparsam.inputs.checks import expected
from sparsam.torch.pruning.gradients import GRADIENT_METHODS, gradient_term
from sparsam.torch.pruning.masked_weights import to_host
from torch import Tensor, nn

__all__ = ["GradientEvidence", "gradients_of"]


class GradientEvidence:
    """Sums over the gradients of some parameters, float32, on their devices."""

    def __init__(self, method: str, parameters: Mapping[str, nn.Parameter]) -> None:
        self._method = method
        self._parameters = dict(parameters)
        self._sums = {
            name: torch.zeros_like(p, dtype=torch.float32, requires_grad=False)
            for name, p in parameters.items()
        }
        self._steps = 0
        self._weights: dict[str, Tensor] = {}
        self.remember()

    @property
    def ready(self) -> bool:
        """Whether any step has been observed."""
        return self._steps > 0

    @torch.no_grad()
    def observe(self) -> None:
        """Adds the gradients of a step; ValueError where one is missing."""
        gradients = gradients_of(self._parameters)
        if gradients is None:
            return
        for name, gradient in gradients.items():
            weights = self._weights.get(name, gradient)  # kept for "movement" alone, which needs them
            self._sums[name] += gradient_term(self._method, weights.float(), gradient.float())
        self._steps += 1

    def remember(self) -> None:
        """Copies the weights at which the next gradients are taken, before the optimizer overwrites them."""
        if self._method != "movement":
            return
        for name, parameter in self._parameters.items():
            if name in self._weights:
                self._weights[name].copy_(parameter.detach())
            else:
                self._weights[name] = parameter.detach().clone()

    def scorer(self) -> Scorer:
        """Returns the scorer made from the current sums."""
        count = 1 if self._method == "movement" else self._steps
        return GRADIENT_METHODS[self._method](
            {name: to_host(name, total / count) for name, total in self._sums.items()}
        )

    def restart(self) -> None:
        """Begins the next interval between updates."""
        if self._method == "movement":
            return
        self._steps = 0
        for total in self._sums.values():
            total.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Returns copies of the sums."""
        return {
            "steps": self._steps,
            "sums": {name: total.clone() for name, total in self._sums.items()},
            "weights": {name: weights.clone() for name, weights in self._weights.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned; ValueError for anything else."""
        if not _has_same_tensors(state, {"steps": 0, "sums": self._sums, "weights": self._weights}):
            got = list(state) if isinstance(state, Mapping) else state
            wanted = "the evidence of gradients that state_dict() returned"
            raise ValueError(expected("state", got, wanted, "pass the pruner's own state"))
        self._steps = state["steps"]
        for own, stored in ((self._sums, state["sums"]), (self._weights, state["weights"])):
            for name, tensor in own.items():
                tensor.copy_(stored[name])


def _has_same_tensors(state: object, own: Mapping[str, Any]) -> bool:
    """Whether a state has the tensors of another."""
    if not isinstance(state, Mapping) or set(state) != set(own) or not isinstance(state["steps"], int):
        return False
    return all(
        isinstance(state[key], Mapping)
        and {name: getattr(tensor, "shape", None) for name, tensor in state[key].items()}
        == {name: tensor.shape for name, tensor in own[key].items()}
        for key in ("sums", "weights")
    )


def gradients_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor] | None:
    """Returns the gradients, or None if one is not finite; ValueError where one is missing."""
    found = {}
    for name, parameter in parameters.items():
        gradient = parameter.grad
        if gradient is None:
            msg = (
                f"tensor {name!r}: expected a gradient, which this method scores by; got None; call "
                "pruner.step() after optimizer.step() and before zero_grad(), or exclude the tensor"
            )
            raise ValueError(msg)
        found[name] = gradient.detach()
    finite = all(bool(torch.isfinite(gradient.sum(dtype=torch.float64))) for gradient in found.values())
    return found if finite else None
