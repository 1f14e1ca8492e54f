"""Layers with packed weights: packing them, fusing the activation after them, and restoring them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch._C import _len_torch_function_stack
from torch.compiler import is_compiling
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.overrides import handle_torch_function

import torch
from sparsam.torch.layers import convolutions, packed_parameter, products
from sparsam.torch.layers.activated import mark_activated
from sparsam.torch.layers.operators import ACTIVATIONS
from sparsam.torch.layers.packed_parameter import PackedParameter, is_packed, packed_parameters
from sparsam.torch.layers.packed_tensor import PackedTensor
from sparsam.torch.layers.packed_weight import PackedWeight
from sparsam.torch.layers.phases import Phases
from torch import Tensor, nn

__all__ = [
    "CONVOLUTIONS",
    "PROJECTIONS",
    "PackedLayer",
    "can_activate",
    "clean",
    "dense_class",
    "forward_and_activate",
    "groups",
    "is_embedding",
    "is_one_of_several",
    "is_packed",
    "is_transposed",
    "pack",
    "packable",
    "packed_layers",
    "packed_together",
    "phases_of",
]

_CONVOLUTIONS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
_TRANSPOSED = (nn.ConvTranspose1d.forward, nn.ConvTranspose2d.forward, nn.ConvTranspose3d.forward)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_RECURRENT_WEIGHT = re.compile(r"weight_(ih|hh|hr)(_l\d+(_reverse)?)?")
CONVOLUTIONS: tuple[type[nn.Module], ...] = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def pack(
    layer: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    activation: str | None = None,
    batches: Sequence[int] = (),
) -> nn.Module:
    """Packs the weight of one layer in place: `layer.weight` is a `PackedTensor` then.

    `sparsam.torch.restore` puts the original Parameter back. In a `MultiheadAttention` all projections are
    packed: `in_proj_weight` (or `q_proj_weight` and so on) and `out_proj.weight`; in an `LSTM`, `GRU`, `RNN`
    or a cell of these, all matrices.

    Args:
        layer: A `torch.nn.Linear` (or the Conv1D of Hugging Face's GPT-2), `Conv1d`, `Conv2d`, `Conv3d`,
            `ConvTranspose1d`, `ConvTranspose2d`, `ConvTranspose3d`, `Embedding`, `MultiheadAttention`,
            `LSTM`, `GRU`, `RNN` or a cell of these, or one of a subclass; on the CPU, float32, bfloat16 or
            float16. Its zeros are skipped.
        dtype: The dtype of the stored values, such as `torch.bfloat16`; by default that of the weight. Sums
            are float32. `torch.int8`, for linear layers, attention and convolutions that are not transposed,
            and `torch.int4` (PyTorch 2.6), for linear layers and attention, round weights and inputs to
            integers, whose sums are exact (`SparseMatrix.from_dense`); inputs of a convolution with one scale
            for each image (and group of channels), and of `Conv3d` for each depth of the result. A
            `torch.nn.Embedding` supports only int8, which rounds the rows that are looked up.
        activation: Applied to the layer's result: None, "relu", "gelu", "gelu_tanh" or "silu".
        batches: The numbers of rows that a linear layer will be called with, see `PackedTensor.prepare`.

    Returns:
        `layer`.

    Raises:
        TypeError: Another kind of layer or of numbers; a layer that is packed already.
        ValueError: The layer is not on the CPU; an unknown activation; a batch below 1.
    """
    if not isinstance(layer, nn.Module):
        msg = f"layer: expected a torch.nn.Module; got {type(layer).__name__}; pass a layer of the model"
        raise TypeError(msg)
    packed = PackedLayer.of(layer, dtype=dtype)
    packed.activation = activation
    for weight in packed.weights if batches else ():
        weight.tensor.prepare(batches)
    packed.install()
    return layer


class PackedLayer:
    """A layer and its packed weights, which can be installed and removed.

    Attributes:
        layer: The layer.
        weights: Its packed weights: one, or those of nn.MultiheadAttention.
    """

    def __init__(self, layer: nn.Module, weights: Sequence[PackedParameter]) -> None:
        """Takes weights that are packed already; `of` packs them."""
        self.layer = layer
        self.weights = tuple(weights)
        self._activation = ""

    @classmethod
    def of(cls, layer: nn.Module, *, dtype: torch.dtype | None = None) -> PackedLayer:
        """Packs the weights of a dense layer, and leaves the layer as it is. Errors as for `pack`."""
        name = dense_class(layer).__name__
        if cls.find(layer) is not None:
            msg = f"layer: expected a dense one; got a packed {name}; call sparsam.torch.restore first"
            raise TypeError(msg)
        if not (places := packable(layer)):
            msg = (
                "layer: expected a torch.nn.Linear, convolution, Embedding, MultiheadAttention or recurrent "
                f"layer; got a {name}; leave it dense"
            )
            raise TypeError(msg)
        weights = []
        for module, attribute in places:
            dense: Any = getattr(module, attribute)
            pieces, transposed = groups(layer, attribute), is_transposed(layer)
            looked_up = is_embedding(layer)
            packed = PackedTensor.pack(
                dense,
                dtype=dtype,
                groups=pieces,
                transposed=transposed,
                looked_up=looked_up,
                phases=phases_of(layer),
            )
            weights.append(PackedParameter(module, attribute, packed))
        return cls(layer, weights)

    @classmethod
    def find(cls, layer: nn.Module) -> PackedLayer | None:
        """Returns the packed layer if a weight of it is packed."""
        weights = packed_parameters(layer)
        if isinstance(layer, nn.MultiheadAttention):
            weights += packed_parameters(layer.out_proj)
        if not weights:
            return None
        found = cls(layer, weights)
        found._activation = _installed_activation(layer)
        return found

    @property
    def activation(self) -> str | None:
        """The activation of the layer's result, which it computes itself while it is packed."""
        return self._activation or None

    @activation.setter
    def activation(self, name: str | None) -> None:
        if name is not None and (not name or name not in ACTIVATIONS):
            known = ", ".join(repr(known) for known in ACTIVATIONS if known)
            msg = f"activation: expected None or one of {known}; got {name!r}; pass one of them"
            raise ValueError(msg)
        if name is not None and isinstance(self.layer, (nn.MultiheadAttention, nn.Embedding, *_RECURRENT)):
            kind = dense_class(self.layer).__name__
            msg = f"activation: expected None for a layer of class {kind}; got {name!r}; leave it out"
            raise ValueError(msg)
        self._activation = name or ""
        if is_packed(self.layer):
            self._show_activation()

    @property
    def weight(self) -> PackedTensor:
        """The weight; the first if there are several."""
        return self.weights[0].tensor

    @property
    def packed(self) -> PackedWeight:
        """The matrices of `weight`."""
        return self.weight.packed

    @property
    def density(self) -> float:
        """The share of the weights that are stored."""
        weights = [weight.tensor for weight in self.weights]
        size = sum(weight.numel() for weight in weights)
        return sum(weight.packed.nnz for weight in weights) / size if size else 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of all packed weights."""
        return sum(weight.tensor.nbytes for weight in self.weights)

    def install(self) -> None:
        """Puts the packed weights in, and the activation."""
        for weight in self.weights:
            weight.install()
        self._show_activation()

    def _show_activation(self) -> None:
        own = vars(self.layer)
        if _installed_activation(self.layer):
            del own["forward"]
        if self._activation:
            own["forward"] = partial(forward_and_activate, self.layer, self._activation)

    def remove(self) -> None:
        """Puts the original weights back; those whose memory was released stay empty."""
        for weight in self.weights:
            weight.remove()
        if not is_packed(self.layer):
            clean(self.layer)

    def restore(self) -> None:
        """Puts the original weights back, with the values that the packed ones have now."""
        for weight in self.weights:
            weight.restore()
        clean(self.layer)


def packed_layers(model: nn.Module) -> list[PackedLayer]:
    """The packed layers of a model; attention is one, with its output projection."""
    found = [layer for module in model.modules() if (layer := PackedLayer.find(module)) is not None]
    parts = {id(one.module) for layer in found for one in layer.weights if one.module is not layer.layer}
    return [layer for layer in found if id(layer.layer) not in parts]


def packable(layer: nn.Module) -> tuple[tuple[nn.Module, str], ...]:
    """The modules and the names of the weights that can be packed in a layer; none for another kind."""
    if isinstance(layer, nn.MultiheadAttention):
        own = tuple((layer, name) for name in PROJECTIONS if getattr(layer, name, None) is not None)
        return (*own, (layer.out_proj, "weight"))
    if isinstance(layer, nn.RNNBase):
        names = itertools.chain(*layer._all_weights)
        return tuple((layer, name) for name in names if name.startswith("weight"))
    if isinstance(layer, nn.RNNCellBase):
        return (layer, "weight_ih"), (layer, "weight_hh")
    known = isinstance(layer, (nn.Linear, nn.Embedding, *CONVOLUTIONS)) or is_transposed(layer)
    return ((layer, "weight"),) if known else ()


def is_embedding(layer: nn.Module) -> bool:
    """Whether rows of its weight are looked up: packed, they are int8, and all of them are kept."""
    return isinstance(layer, nn.Embedding)


def is_one_of_several(attribute: str) -> bool:
    """Whether that is the name of a weight in layers that have several: attention and recurrent ones."""
    return attribute in PROJECTIONS or _RECURRENT_WEIGHT.fullmatch(attribute) is not None


def packed_together(layer: nn.Module) -> bool:
    """Whether it computes with packed weights only if all of its weights are packed."""
    return isinstance(layer, _RECURRENT)


def groups(layer: nn.Module, attribute: str) -> int:
    """How many matrices a weight of a layer is packed as.

    Three for the projections of queries, keys and values in one Parameter: cross-attention multiplies with
    parts of it.
    """
    return 3 if attribute == "in_proj_weight" else getattr(layer, "groups", 1)


def phases_of(layer: nn.Module) -> Phases | None:
    """The geometry of a transposed convolution; None for any other layer."""
    if not isinstance(layer, CONVOLUTIONS[3:]):
        return None
    one: Any = layer
    return Phases(tuple(one.stride), tuple(one.padding), tuple(one.dilation))


def clean(layer: nn.Module) -> None:
    """Removes from a layer all that `PackedLayer.install` added, except the weight."""
    packed_parameter.clean(layer)
    if _installed_activation(layer):
        del vars(layer)["forward"]


def is_transposed(layer: nn.Module) -> bool:
    """Whether it is Hugging Face's Conv1D, a linear layer with the weight (in, out)."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
        for kind in type(layer).__mro__
    )


def dense_class(layer: nn.Module) -> type[Any]:
    """The class of a layer, before torch.nn.utils.parametrize changed it."""
    return type(layer).__bases__[0] if parametrize.is_parametrized(layer) else type(layer)


def can_activate(layer: nn.Module) -> bool:
    """Whether its forward is only the product, so that the kernel can apply an activation too."""
    forward = type(layer).forward
    known = forward in {nn.Linear.forward, *_CONVOLUTIONS, *_TRANSPOSED}
    return (known or _is_conv1d_of_transformers(forward)) and "forward" not in vars(layer)


def _is_conv1d_of_transformers(forward: Any) -> bool:
    where = getattr(forward, "__module__", ""), getattr(forward, "__qualname__", "")
    return where == ("transformers.pytorch_utils", "Conv1D.forward")


def _installed_activation(layer: nn.Module) -> str:
    forward = vars(layer).get("forward")
    known = isinstance(forward, partial) and forward.func is forward_and_activate
    return forward.args[1] if known else ""  # type: ignore[union-attr]


def forward_and_activate(layer: Any, activation: str, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a layer and the activation after it, in one product if the weight is packed."""
    weight = layer.weight
    found: Any = NotImplemented
    x = args[0] if args else next(iter(kwargs.values()))
    if not is_compiling() and _len_torch_function_stack():  # somebody follows what is computed
        return handle_torch_function(forward_and_activate, (x,), layer, activation, *args, **kwargs)
    forward = type(layer).forward
    if forward is nn.Linear.forward:
        found = products.linear(x, weight, layer.bias, activation)
    elif forward in _CONVOLUTIONS:
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x = functional.pad(x, layer._reversed_padding_repeated_twice, layer.padding_mode)
            padding = 0
        geometry = (layer.stride, padding, layer.dilation, layer.groups)
        found = convolutions.convolve(x, weight, layer.bias, *geometry, activation)
    elif forward in _TRANSPOSED and len(args) + len(kwargs) == 1:  # without a wanted size
        others = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
        found = convolutions.convolve_transposed(x, weight, layer.bias, *others, activation)
    elif _is_conv1d_of_transformers(forward):
        found = products.addmm(layer.bias, x, weight, activation=activation)
    if found is NotImplemented:
        found = ACTIVATIONS[activation](forward(layer, *args, **kwargs))
    return mark_activated(found)
