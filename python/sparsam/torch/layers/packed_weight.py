"""PackedWeight: the bytes of a packed weight as one tensor, and the core's matrices over them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from torch.utils.weak import WeakTensorKeyDictionary

import torch
from sparsam._core import Packed
from sparsam.inputs.float_mode import standard_floats
from sparsam.patterns import NM, Block, Unstructured
from sparsam.sparse.choices import Choices, expect
from sparsam.sparse.cost_model import Key, Weight, dense_key, form_bytes
from sparsam.sparse.dispatch import needed_kernels
from sparsam.sparse.int4 import pack_int4
from sparsam.sparse.int4_form import faster_form
from sparsam.sparse.int8 import pack_int8
from sparsam.sparse.stored import recognise
from torch import Tensor

__all__ = [
    "DTYPES",
    "INT4",
    "ROUNDED",
    "VALUES",
    "PackedWeight",
    "dtype_name",
    "forms_here",
    "from_array",
    "join",
    "pack_matrix",
    "to_array",
    "torch_dense",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT4: torch.dtype = getattr(torch, "int4", torch.quint4x2)  # PyTorch before 2.6 has no other name for it
ROUNDED = (torch.int8, INT4)
VALUES = (*DTYPES, *ROUNDED)  # the dtypes of stored values

_ALIGN = 64
_HEADER = 128  # the size of a form's header
_KIND, _BYTES = 12, 112  # the offsets in it of the kind and the size of the form
_SPARSE = ("bitmask", "panels", "slots")
# The most memory of two forms together, relative to the dense weight in float32: the limits of one form of
# float32 values at 50, 80 and 90 % zeros (0.8, 0.4, 0.22), so that only narrower values have room for two.
_LARGEST_SHARE, _LARGEST_SHARE_PER_DENSITY = 0.8, 2.0

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # the bytes -> their PackedWeight


class PackedWeight:
    """The matrices in the bytes of a packed weight: one (rows x cols) for each group of channels.

    The bytes are a vector of uint8 that never changes: group after group, each in its forms
    (docs/formats.md). Layers, files and graphs own the bytes; this is the core's view of them.

    Attributes:
        parts: The matrix of each group.
        rows: The rows of each part.
        cols: Its columns.
        forms: The forms that each part has.
        choices: Which form multiplies which batch.
    """

    def __init__(self, parts: tuple[Packed, ...], address: int) -> None:
        """For this package; use `pack_matrix` and `read`."""
        self.parts = parts
        self.rows, self.cols = parts[0].rows, parts[0].cols
        self.forms = parts[0].forms
        self._dense = partial(torch_dense, parts[0].dtype)
        self.choices = Choices(Weight.of(parts[0]), self.forms, dense=self._dense)
        self.kernel = self.choices.kernel  # batch -> the form to multiply with
        self._address = address

    @classmethod
    def read(cls, data: Tensor) -> PackedWeight:
        """Returns the weight that these bytes hold; they are checked the first time.

        Raises:
            ValueError: They are not a packed weight, or a damaged one.
        """
        found: PackedWeight | None = _known.get(data)  # type: ignore[no-untyped-call]
        if found is None or found._address != data.data_ptr():  # torch may move what is shared
            found = _adopt(data, trusted=False)
        return found

    def with_forms(self, forms: Sequence[str]) -> Tensor:
        """The bytes of the same weight in these forms."""
        copies = [Packed.from_buffers([p.buffer(f) for f in p.forms], trusted=True) for p in self.parts]
        return join(copies, forms)

    def needed_forms(self, batches: Sequence[int]) -> tuple[str, ...]:
        """The form that is expected to be the fastest for these batches, taken together.

        Two, if a batch would be more than a quarter slower with one, and memory allows.

        Args:
            batches: The numbers of rows of x.
        """
        weight = self.choices.weight
        if not weight.nnz or weight.rounded:
            return self.forms
        expected = expect(weight, self._dense)
        room = 4 * min(_LARGEST_SHARE * weight.rows * weight.cols, _LARGEST_SHARE_PER_DENSITY * weight.nnz)
        times = [expected.times(batch, _SPARSE) for batch in batches]
        forms = needed_kernels(times, most=2)
        if sum(form_bytes(form, weight) for form in forms) > room:
            forms = needed_kernels(times, most=1)
        return forms

    @property
    def groups(self) -> int:
        """The number of parts."""
        return len(self.parts)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored values."""
        name = self.parts[0].dtype
        dtype: torch.dtype = INT4 if name == "int4" else getattr(torch, name)
        return dtype

    @property
    def nnz(self) -> int:
        """The number of stored weights."""
        return sum(part.nnz for part in self.parts)

    @property
    def density(self) -> float:
        """The share of stored weights; 1.0 where there are no weights."""
        size = self.groups * self.rows * self.cols
        return self.nnz / size if size else 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of all forms."""
        return sum(part.nbytes for part in self.parts)

    @property
    def pattern(self) -> NM | Block | Unstructured:
        """The pattern recognised in the first group."""
        return recognise(self.parts[0])

    def unpack(self) -> Tensor:
        """The weight (groups x rows, cols) in `dtype`; a pruned -0.0 comes back as 0.0."""
        arrays = [from_array(part.unpack()) for part in self.parts]
        return arrays[0] if len(arrays) == 1 else torch.cat(arrays)


def torch_dense(dtype: str = "float32") -> Key:
    """The key of PyTorch's dense products, torch.nn.functional.linear of a dtype, with its threads now."""
    return dense_key("torch", str(torch.__version__), dtype, torch.get_num_threads())


@standard_floats
def pack_matrix(
    matrix: NDArray[Any],
    *,
    groups: int = 1,
    forms: Sequence[str] = ("panels",),
    values: str = "",
    taps: tuple[int, int] = (0, 0),
) -> Tensor:
    """The bytes of an array (groups x rows, cols) of floats; weights that are exactly 0 are pruned.

    With `values` "int8" or "int4" they are rounded to that; the form is then "slots", or with int8 "rows" if
    `forms` has it, and with int4 "bitmask" if that is expected to be faster. `taps` is the kernel of a
    convolution, for int8.
    """
    parts = np.split(matrix, groups)
    if values == "int8":
        form = "rows" if "rows" in forms else "slots"
        return join([pack_int8(part, form=form, taps=taps) for part in parts], (form,))
    if values == "int4":
        packed = [pack_int4(part) for part in parts]
        if len({part.width for part in packed}) > 1:  # what is on a grid of 128 columns is on one of 64
            packed = [pack_int4(part, group=64) for part in parts]
        return join(packed, packed[0].forms)
    return join([Packed.pack(part) for part in parts], forms)


def dtype_name(dtype: object) -> str:
    """The name of a dtype of values without its module, "int4" whatever PyTorch calls it."""
    return "int4" if dtype is INT4 else str(dtype).removeprefix("torch.")


def forms_here(parts: Sequence[Packed], forms: Sequence[str]) -> tuple[str, ...]:
    """These forms, or of int4 values the one that is faster on this machine."""
    return (faster_form(parts[0]),) if parts[0].dtype == "int4" else tuple(forms)


def join(parts: Sequence[Packed], forms: Sequence[str]) -> Tensor:
    """The bytes of these matrices, one for each group, in these forms; the matrices keep no others."""
    for part in parts:
        for form in forms:
            part.add(form)
        part.keep(list(forms))
    if len(parts) == len(forms) == 1:  # the memory of the core itself
        data = torch.from_numpy(np.asarray(_Memory(parts[0].buffer(forms[0]))))
        _known[data] = PackedWeight(tuple(parts), data.data_ptr())
    else:
        buffers = [part.buffer(form) for part in parts for form in part.forms]
        data = _aligned(sum(map(len, buffers)))
        np.concatenate(buffers, out=data.numpy())
        _adopt(data, trusted=True)
    return data


def _aligned(size: int) -> Tensor:
    """Returns uninitialised bytes at an aligned address, which NumPy does not promise."""
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def _adopt(data: Tensor, *, trusted: bool) -> PackedWeight:
    """Checks the bytes and remembers their PackedWeight."""
    if data.device.type != "cpu" or data.dtype != torch.uint8 or data.ndim != 1:
        msg = (
            f"packed weight: expected a vector of uint8 on the CPU; got {data.dtype} of shape "
            f"{tuple(data.shape)} on {data.device}; pack the layer again"
        )
        raise ValueError(msg)
    whole = data.detach().contiguous()  # not `data`, which the cached value must not keep alive
    if whole.data_ptr() % _ALIGN:
        copied = _aligned(len(whole))
        copied.numpy()[:] = whole.numpy()  # not by torch, whose threads a forked child lacks
        whole = copied
    buffers = _split(whole.numpy())
    kinds = [int(buffer[_KIND]) for buffer in buffers]
    forms = next((i for i, kind in enumerate(kinds) if kind in kinds[:i]), len(kinds))
    pieces = [buffers[i : i + forms] for i in range(0, len(buffers), forms)]
    parts = tuple(Packed.from_buffers(piece, trusted=trusted) for piece in pieces)
    if len({(part.rows, part.cols, part.dtype, part.forms) for part in parts}) > 1:
        msg = "packed weight: expected groups of one shape; got others; pack the layer again"
        raise ValueError(msg)
    found = _known[data] = PackedWeight(parts, data.data_ptr())
    return found


class _Memory:
    """Memory of the core, declared writeable since torch warns of read-only arrays; nobody writes to it."""

    def __init__(self, buffer: NDArray[np.uint8]) -> None:
        self._owner = buffer
        address, _ = buffer.__array_interface__["data"]
        self.__array_interface__ = {**buffer.__array_interface__, "data": (address, False)}


def _split(data: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """The forms that follow each other."""
    found, start = [], 0
    while start < len(data):
        length = int.from_bytes(data[start + _BYTES : start + _BYTES + 8].tobytes(), "little")
        if not _HEADER <= length <= len(data) - start:
            break
        found.append(data[start : start + length])
        start += length
    if start < len(data) or not found:
        msg = f"packed weight: expected whole forms; got {len(data)} bytes; pack the layer again"
        raise ValueError(msg)
    return found


def to_array(tensor: Tensor) -> NDArray[Any]:
    """A CPU tensor of floats as a NumPy array on the same memory where it is contiguous."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def from_array(array: NDArray[Any]) -> Tensor:
    """A NumPy array of floats as a tensor on the same memory."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
