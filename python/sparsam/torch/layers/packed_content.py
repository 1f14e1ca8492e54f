"""The content that a packed tensor, its aliases and its views share: the bytes and their layout."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from sparsam.inputs.float_mode import standard_floats
from sparsam.torch.layers.packed_weight import INT4, ROUNDED, PackedWeight, dtype_name, pack_matrix, to_array
from sparsam.torch.layers.phases import Phases
from torch import Tensor, nn

__all__ = ["Content", "Layout", "pack_dense", "taps_of"]

# By the id of the Parameter that was packed, which the content keeps alive.
_known: weakref.WeakValueDictionary[int, Content] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Layout:
    """How a weight is packed.

    Attributes:
        shape: The shape of the dense tensor.
        dtype: Its dtype; the values may be stored as another.
        groups: The number of matrices with equal numbers of outputs that are packed separately: the groups of
            a convolution, or the projections of an attention layer.
        transposed: Whether it is (in, out), as in the Conv1D of Hugging Face's GPT-2.
        looked_up: Whether rows of it are looked up, as in an embedding; nothing is multiplied with it then.
        phases: The geometry of a transposed convolution; None for all others.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    groups: int = 1
    transposed: bool = False
    looked_up: bool = False
    phases: Phases | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the matrix whose rows belong to outputs."""
        if self.phases is not None:
            return self.phases.matrix_shape(self.shape, self.groups)
        outs, ins = self.shape[0], math.prod(self.shape[1:])
        return (ins, outs) if self.transposed else (outs, ins)

    @property
    def taps(self) -> tuple[int, int]:
        """See `taps_of`."""
        return taps_of(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether it is one matrix for products: not a convolution, an embedding or several matrices."""
        return len(self.shape) == 2 and self.groups == 1 and not self.looked_up


class Content:
    """The content that a packed tensor, its aliases and its views share.

    Attributes:
        data: The bytes (uint8).
        layout: Their layout.
        outs: The number of outputs of a linear layer; 0 for a convolution and for an embedding.
        original: The Parameter that was packed, or None.
        released: Whether `original` is empty, which saves its memory, until the weight is unpacked again.
        changed: Whether the weight was changed after it was packed.
        place: The module that it was last installed in, and its name there; None if there is none.
        trainable: Whether the dense weight required a gradient: a backward pass must then raise an error
            instead of leaving the weight out.
    """

    def __init__(self, data: Tensor, layout: Layout, original: nn.Parameter | None = None) -> None:
        self.data = data
        self.layout = layout
        self.outs = layout.matrix[0] if len(layout.shape) == 2 and not layout.looked_up else 0
        self.original = original
        self.place: tuple[weakref.ref[nn.Module], str] | None = None
        self.released = False
        self.changed = False
        self.trainable = original is not None and original.requires_grad
        self.read: PackedWeight | None = None  # what `data` holds, once it was asked for
        self._remember()

    @classmethod
    @standard_floats
    def find(cls, original: Tensor, layout: Layout, values: torch.dtype) -> Content | None:
        """Returns a tied layer's content for the same Parameter, if packing it now would give the same.

        Args:
            original: The Parameter, as it is now.
            layout: The requested layout.
            values: The requested dtype of the values.
        """
        found = _known.get(id(original))
        if found is None or found.original is not original or found.layout != layout:
            return None
        if found.weight.dtype != values:
            return None
        if values in ROUNDED:
            same = torch.equal(found.data, pack_dense(original.detach(), layout, values, found.weight.forms))
        else:
            same = torch.equal(found.unpack(), original.detach().to(values).to(layout.dtype))
        return found if same else None

    def _remember(self) -> None:
        if self.original is not None:
            _known[id(self.original)] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Content:
        made = memo[id(self)] = Content(self.data, self.layout)  # bytes never change
        made.original = copy.deepcopy(self.original, memo)
        made.released, made.changed, made.trainable = self.released, self.changed, self.trainable
        made._remember()
        return made

    def __getstate__(self) -> dict[str, Any]:
        # A copy: torch moves the memory of what is sent to another process.
        return vars(self) | {"data": self.data.clone(), "read": None, "place": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._remember()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "data":
            self.read = None

    @property
    def weight(self) -> PackedWeight:
        """The matrices that the bytes hold."""
        read = self.read
        if read is None:
            self.read = read = PackedWeight.read(self.data)
        return read

    def unpack(self) -> Tensor:
        """The dense tensor."""
        layout = self.layout
        matrix: Tensor = torch.ops.sparsam.unpack(self.data, *layout.matrix, layout.dtype)
        if layout.phases is not None:
            return layout.phases.weight(matrix, layout.shape, layout.groups)
        return matrix.T.contiguous() if layout.transposed else matrix.reshape(layout.shape)

    def pack(self, dense: Tensor) -> None:
        """Replaces the values, in the same forms."""
        weight = self.weight
        self.data = pack_dense(dense, self.layout, weight.dtype, weight.forms)
        self.changed = True

    def cast(self, dtype: torch.dtype) -> Content:
        """Returns the content for a layer that computes in another dtype."""
        weight, old = self.weight, self.layout
        layout = replace(old, dtype=dtype)
        values = dtype if weight.dtype == old.dtype else weight.dtype
        data = pack_dense(self.unpack().to(dtype), layout, values, weight.forms)
        cast = Content(data, layout, self.original)
        cast.released, cast.changed, cast.trainable = self.released, True, self.trainable
        return cast


def taps_of(shape: Sequence[int]) -> tuple[int, int]:
    """Height and width of the kernel in the weight of a convolution, for signals 1 and its length; else 0.

    Volumes are images with the channels of several depths.
    """
    kernel = shape[2:]
    if len(kernel) == 1:
        return 1, kernel[0]
    return (kernel[-2], kernel[-1]) if kernel else (0, 0)


def pack_dense(dense: Tensor, layout: Layout, values: torch.dtype, forms: Sequence[str]) -> Tensor:
    """Returns the bytes of a dense tensor.

    Raises:
        TypeError: int4 values for a convolution, int8 values for a transposed one.
    """
    rounds = values in ROUNDED
    if rounds and layout.phases is not None:
        msg = (
            f"dtype: expected float values for a transposed convolution; got {values}; use it for "
            "other layers"
        )
        raise TypeError(msg)
    if values is INT4 and len(layout.shape) != 2:
        msg = (
            f"dtype: expected int8 or float values for a convolution; got {values}; use it for linear layers"
        )
        raise TypeError(msg)
    matrix = dense.float() if rounds else dense.to(values)
    if layout.phases is not None:
        matrix = layout.phases.matrix(matrix, layout.groups)
    else:
        matrix = matrix.T if layout.transposed else matrix.reshape(layout.matrix)
    return pack_matrix(
        to_array(matrix),
        groups=layout.groups,
        forms=forms,
        values=dtype_name(values) if rounds else "",
        taps=layout.taps,
    )
