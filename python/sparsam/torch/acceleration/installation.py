"""Puts packed layers into a model, and takes them out."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from sparsam.torch.acceleration.candidate_layers import places
from sparsam.torch.acceleration.fusion import Fused, Fusion
from sparsam.torch.fused.installation import FusedSwitch, unfuse
from sparsam.torch.layers.packing import PackedLayer, clean, is_packed, packed_layers
from sparsam.torch.transformers_models import withdraw
from sparsam.torch.transformers_switch import AttentionSwitch, switch_back
from torch import nn

__all__ = ["LayerSwap", "fast_path_owners", "fast_paths_off", "restore"]

# Layers that in eval mode may read their children's weights instead of calling them; what prevents that.
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
        attention: The models that compute with the core's attention while any layer is in the model.
        fused: The modules that the core computes as a whole, while all of their layers are in the model.
    """

    def __init__(self, model: nn.Module) -> None:
        """Begins with no layers, and leaves the model as it is."""
        self._model = model
        self.where = places(model)
        self.layers: dict[str, PackedLayer] = {}
        self.fusions: list[Fusion] = []
        self.attention: AttentionSwitch | None = None
        self.fused: FusedSwitch | None = None

    def show(self, names: Collection[str]) -> None:
        """Puts the packed layers of these names into the model, and the dense ones for all others."""
        if self.fused is not None:
            self.fused.show(fused=False)
        for name, layer in self.layers.items():
            if name in names:
                layer.install()
            else:
                layer.remove()
        for fusion in self.fusions:
            if set(names).issuperset(fusion.replacement.into):
                fusion.install()
            else:
                fusion.remove()
        if self.attention is not None:
            self.attention.show(core=bool(names))
        _set_fast_paths(self._model)
        if self.fused is not None and names:
            self.fused.show(fused=True)

    def detach_attention(self) -> None:
        """Lets all models compute with PyTorch's attention, permanently."""
        if self.attention is not None:
            self.attention.show(core=False)
            self.attention = None

    def detach_fused(self) -> None:
        """Lets all modules call their own layers, permanently."""
        if self.fused is not None:
            self.fused.show(fused=False)
            self.fused = None

    def unfuse(self, fusion: Fusion) -> None:
        """Puts an activation back into its place, permanently."""
        fusion.remove()
        self.fusions.remove(fusion)

    def drop(self, name: str) -> None:
        """Takes a layer out, of the model and of the swap, and the activation that it would compute."""
        for fusion in [one for one in self.fusions if name in one.replacement.into]:
            self.unfuse(fusion)
        self.layers.pop(name).remove()

    def undo(self) -> None:
        """Restores the model, weights that were freed included."""
        self.show(())
        for layer in self.layers.values():
            layer.restore()


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
            wanted = everywhere or any(is_packed(child) for child in module.modules())
            known = vars(module)
            if wanted and _BEFORE not in known:
                known[_BEFORE] = known[attribute]
                known[attribute] = value
            elif not wanted and _BEFORE in known:
                known[attribute] = known.pop(_BEFORE)


def restore(model: nn.Module) -> int:
    """Puts back the original Parameters and activation modules that `accelerate`, `load` or `pack` replaced.

    Hugging Face models that `accelerate` or `load` let compute with the core's attention compute with
    PyTorch's again.

    Works on a copy of an accelerated model too, and on an unpickled one. A weight whose memory was freed is
    unpacked into its Parameter again: the same numbers, except that -0.0 becomes 0.0. Changes made to a
    packed weight are kept.

    Args:
        model: The model, or a single layer; one in which nothing is packed is left as it is.

    Returns:
        The number of layers that were restored.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        msg = f"restore: expected a torch.nn.Module; got {type(model).__name__}; pass the model"
        raise TypeError(msg)
    unfuse(model)
    layers = packed_layers(model)
    for layer in layers:
        layer.restore()
    for module in list(model.modules()):
        for attribute, child in list(module._modules.items()):
            if isinstance(child, Fused):
                setattr(module, attribute, child.restored())
        clean(module)  # also where a dense weight was put in the place of a packed one
    _set_fast_paths(model)
    switch_back(model)
    withdraw(model)
    return len(layers)
