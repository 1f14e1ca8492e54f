"""Activations that packed layers compute: recognised by their values, and their replacements."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sparsam.torch.acceleration.candidate_layers import Place
from sparsam.torch.layers.activated import is_activated
from sparsam.torch.layers.operators import ACTIVATIONS
from sparsam.torch.layers.packing import PackedLayer, can_activate
from torch import Tensor, nn

__all__ = ["Follower", "Fused", "Fusion", "fusions", "recognise_activation"]

_TOLERANCE = 1e-6
_FAR = (8.5, 10.5, 13.0, 20.5, 60.0, 200.0, 1e4)  # where clipped activations would show


@dataclass(frozen=True)
class Follower:
    """An activation module whose inputs are exactly the outputs of some layers, unchanged.

    Attributes:
        module: The module.
        activation: Which one it is.
        layers: The names of the layers.
    """

    module: nn.Module
    activation: str
    layers: tuple[str, ...]


def _unchanged_output(x: Tensor, activation: str, into: tuple[str, ...]) -> Tensor:
    """Returns x if a layer marked it as activated; a function, so that torch.fx graphs can call it."""
    if not is_activated(x):
        msg = (
            f"{activation}: expected the unchanged output of {', '.join(into)}, which computes it too since "
            "accelerate; got another tensor; insert adapters and other modules between them before "
            "accelerate, or call sparsam.torch.restore first"
        )
        raise RuntimeError(msg)
    return x


torch.fx.wrap("_unchanged_output")


class Fused(nn.Module):
    """Replaces an activation that packed layers compute: returns its input.

    Attributes:
        original: The activation.
        layers: The packed layers that compute it. Neither it nor they are submodules.
        into: The names that the layers had.
    """

    def __init__(self, original: nn.Module, layers: tuple[nn.Module, ...], into: tuple[str, ...]) -> None:
        super().__init__()
        self._hidden = (original, layers)  # in a tuple, so that it is not registered as a submodule
        self.into = into
        self.training = original.training

    @property
    def original(self) -> nn.Module:
        """The activation."""
        return self._hidden[0]

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The packed layers that compute it."""
        return self._hidden[1]

    def restored(self) -> nn.Module:
        """`original`, in the mode that this module is in."""
        return self.original.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x if it is the output of one of the layers.

        Raises:
            RuntimeError: It is another tensor, or was changed since: something is between them.
        """
        return _unchanged_output(x, type(self.original).__name__, self.into)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{type(self.original).__name__}, fused into {', '.join(self.into)}"


@dataclass(frozen=True)
class Fusion:
    """An activation that could become part of packed layers.

    Attributes:
        activation: Which one it is.
        layers: The packed layers whose outputs are its only inputs.
        replacement: The module that takes its place.
        places: Where it is in the model.
    """

    activation: str
    layers: tuple[PackedLayer, ...]
    replacement: Fused
    places: tuple[Place, ...]

    def install(self) -> None:
        """Makes it part of the layers."""
        for layer in self.layers:
            layer.activation = self.activation
        for parent, attribute in self.places:
            setattr(parent, attribute, self.replacement)

    def remove(self) -> None:
        """Puts everything back."""
        for layer in self.layers:
            layer.activation = None
        for parent, attribute in self.places:
            setattr(parent, attribute, self.replacement.original)


def recognise_activation(module: nn.Module) -> str | None:
    """The activation that a module computes, in training and in eval mode; None if kernels lack it."""
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return None
    far = [sign * x for x in _FAR for sign in (1, -1)]
    wide: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    x = torch.cat([torch.linspace(-8, 8, 4001, **wide), torch.tensor(far, **wide)])
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        try:
            found = [copy.deepcopy(module).train(mode)(x.clone()) for mode in (False, True)]
        except Exception:  # a module that cannot take such a tensor
            return None
        for name, function in ACTIVATIONS.items():
            wanted = function(x)
            close = _TOLERANCE * wanted.abs().clamp(min=1)
            if name and all(_matches(y, wanted, close) for y in found):
                return name
    return None


def _matches(y: Any, wanted: Tensor, close: Tensor) -> bool:
    return isinstance(y, Tensor) and y.shape == wanted.shape and bool(((y - wanted).abs() <= close).all())


def fusions(
    followers: Iterable[Follower], layers: Mapping[str, PackedLayer], where: Mapping[int, Sequence[Place]]
) -> list[Fusion]:
    """The activations that could become part of packed layers: those that follow only such layers."""
    found = []
    for follower in followers:
        packed = tuple(layers[name] for name in follower.layers if name in layers)
        if len(packed) == len(follower.layers) and all(can_activate(one.layer) for one in packed):
            fused = Fused(follower.module, tuple(one.layer for one in packed), follower.layers)
            found.append(Fusion(follower.activation, packed, fused, tuple(where[id(follower.module)])))
    return found
