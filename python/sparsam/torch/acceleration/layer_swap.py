"""Packed layers in and out of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsam.torch.acceleration.candidates import Place
from sparsam.torch.acceleration.fusion import Fused, Fusion
from sparsam.torch.layers.modules import SparseLayer
from torch import nn

__all__ = ["LayerSwap", "disable_fast_paths", "restore"]

# Layers that, in eval mode, may read the weights of their children and never call them, and what stops that.
_FAST_PATHS: tuple[tuple[type[nn.Module], str, int], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
_BEFORE = "_sparsam_before"  # what the attribute was; a plain attribute, so that copies have it


class LayerSwap:
    """Packed layers and fused activations, all of which are in the model or none."""

    def __init__(self, model: nn.Module, where: Mapping[int, Sequence[Place]]) -> None:
        """Begins with nothing to exchange.

        Args:
            model: The model.
            where: The places of its modules, as `candidates.places` finds them.
        """
        self._model = model
        self._where = where
        self.layers: dict[str, SparseLayer] = {}
        self.fusions: list[Fusion] = []

    def install(self) -> None:
        """Puts the packed layers in."""
        for layer in self.layers.values():
            self._put(layer.original, layer)
        for fusion in self.fusions:
            fusion.install()
        disable_fast_paths(self._model)

    def remove(self) -> None:
        """Puts the original layers back."""
        for fusion in self.fusions:
            fusion.remove()
        for layer in self.layers.values():
            self._put(layer.original, layer.original)
        disable_fast_paths(self._model)

    def drop(self, name: str) -> SparseLayer:
        """Takes one layer out, of the model and of the exchange."""
        layer = self.layers.pop(name)
        self._put(layer.original, layer.original)
        return layer

    def _put(self, original: nn.Module, module: nn.Module) -> None:
        for parent, attribute in self._where[id(original)]:
            setattr(parent, attribute, module)


def disable_fast_paths(model: nn.Module, *, everywhere: bool = False) -> None:
    """Lets transformer layers call their children where these are packed, and only there.

    Args:
        model: The model.
        everywhere: Also where nothing is packed.
    """
    for module in model.modules():
        for kind, attribute, value in _FAST_PATHS:
            if not isinstance(module, kind) or not hasattr(module, attribute):
                continue
            wanted = everywhere or any(isinstance(child, SparseLayer) for child in module.modules())
            known = vars(module)
            if wanted and _BEFORE not in known:
                known[_BEFORE] = known[attribute]
                known[attribute] = value
            elif not wanted and _BEFORE in known:
                known[attribute] = known.pop(_BEFORE)


def restore(model: nn.Module) -> int:
    """Puts back the very modules and Parameters that `accelerate`, `load` or you replaced with packed layers.

    Fused activations come back too. Works on a copy of an accelerated model, and on an unpickled one. A
    weight whose memory was freed is unpacked into its Parameter again: the same numbers, but that -0.0
    becomes 0.0.

    Args:
        model: The model; one that has no packed layers is left as it is.

    Returns:
        The number of layers that were restored.

    Raises:
        TypeError: `model` is no module, or itself a packed layer, which cannot be replaced from within.
    """
    if isinstance(model, SparseLayer) or not isinstance(model, nn.Module):
        msg = f"restore: expected a model that holds packed layers; got {type(model).__name__}"
        msg += "; use its .restored()" if isinstance(model, SparseLayer) else ""
        raise TypeError(msg)
    restored = set()
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if isinstance(child, (SparseLayer, Fused)):
                setattr(parent, attribute, child.restored())
            if isinstance(child, SparseLayer):
                restored.add(id(child))
    disable_fast_paths(model)
    return len(restored)
