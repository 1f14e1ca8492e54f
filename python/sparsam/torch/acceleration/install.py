"""Packed layers in and out of a model."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from sparsam.torch.acceleration.candidates import places
from sparsam.torch.acceleration.fusion import Fused, Fusion
from sparsam.torch.layers.modules import SparseLayer
from torch import nn

__all__ = ["LayerSwap", "fast_path_owners", "fast_paths_off", "restore"]

# Layers that, in eval mode, may read the weights of their children and never call them, and what stops that.
_FAST_PATHS: tuple[tuple[type[nn.Module], str, int], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
_BEFORE = "_sparsam_before"  # what the attribute was; a plain attribute, so that copies have it


class LayerSwap:
    """The packed layers of a model, and the activations that they can compute.

    Attributes:
        where: The places of the model's modules, as `candidates.places` finds them.
        layers: The packed layers by name.
        fusions: The activations. One is fused while all of its layers are in the model.
    """

    def __init__(self, model: nn.Module) -> None:
        """Begins with no layers, and leaves the model as it is."""
        self._model = model
        self.where = places(model)
        self.layers: dict[str, SparseLayer] = {}
        self.fusions: list[Fusion] = []

    def show(self, names: Collection[str]) -> None:
        """Puts the packed layers of these names into the model, and the dense ones for all others."""
        for name, layer in self.layers.items():
            module = layer if name in names else layer.original
            for parent, attribute in self.where[id(layer.original)]:
                setattr(parent, attribute, module)
        for fusion in self.fusions:
            if set(names).issuperset(fusion.replacement.into):
                fusion.install()
            else:
                fusion.remove()
        _set_fast_paths(self._model)

    def unfuse(self, fusion: Fusion) -> None:
        """Gives an activation back its place, for good."""
        fusion.remove()
        self.fusions.remove(fusion)

    def drop(self, name: str) -> None:
        """Takes a layer out, of the model and of the swap, and the activation that it would compute."""
        for fusion in [one for one in self.fusions if name in one.replacement.into]:
            self.unfuse(fusion)
        layer = self.layers.pop(name)
        for parent, attribute in self.where[id(layer.original)]:
            setattr(parent, attribute, layer.original)

    def undo(self) -> None:
        """Makes the model what it was, weights that were freed included."""
        self.show(())
        for layer in self.layers.values():
            layer.training = layer.original.training
            layer.restored()


def fast_path_owners(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    """The outermost modules with a fast path that hold one of these layers, by name."""
    found: dict[str, nn.Module] = {}
    for owner, module in model.named_modules():
        prefix = f"{owner}." if owner else ""
        inside = any(owner.startswith(f"{outer}.") or not outer for outer in found)
        fast = isinstance(module, tuple(kind for kind, _, _ in _FAST_PATHS))
        if fast and not inside and any(name.startswith(prefix) for name in names):
            found[owner] = module
    return found


@contextmanager
def fast_paths_off(model: nn.Module) -> Iterator[None]:
    """Lets transformer layers call their children, for the time of the block."""
    _set_fast_paths(model, everywhere=True)
    try:
        yield
    finally:
        _set_fast_paths(model)


def _set_fast_paths(model: nn.Module, *, everywhere: bool = False) -> None:
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
    _set_fast_paths(model)
    return len(restored)
