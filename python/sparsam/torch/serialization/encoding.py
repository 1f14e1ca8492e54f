"""A weight in a file: the values that are not pruned, and a bit for each weight (docs/formats.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import torch
from sparsam._core import Packed
from sparsam.sparse.int4 import group_of
from sparsam.torch.layers.packed_weight import DTYPES, PackedWeight, dtype_name, from_array, to_array
from torch import Tensor

__all__ = ["Encoded", "encode", "encode_packed", "encode_rows", "matrix_shape"]


_STORED = (*DTYPES, torch.int8, torch.uint8)
_LEVELS = 16  # of int4 values


@dataclass(frozen=True)
class Encoded:
    """A weight as two tensors.

    Attributes:
        values: Row by row, those whose bit is set; a single 0 if there are none. For int4, uint8: for each
            group of rows the 16 levels, then a code for each value, two in a byte.
        bits: uint8 (rows, ceil(columns / 8)), the first column in the lowest bit. For int8, each row ends
            with its scale, four more bytes, and has only these if `values` are all values of the weight; for
            int4, it ends with its scales, two bytes each.
    """

    values: Tensor
    bits: Tensor

    @property
    def rounded(self) -> str:
        """The kind of integers that values are, "int8" or "int4"; "" for floats."""
        return {torch.int8: "int8", torch.uint8: "int4"}.get(self.values.dtype, "")

    def parts(
        self, name: str, rows: int, cols: int, groups: int = 1, taps: tuple[int, int] = (0, 0)
    ) -> list[Packed]:
        """The matrix, split into groups of rows.

        Args:
            name: The name of the weight in error messages.
            rows: Rows of all groups.
            cols: Columns of each group.
            groups: The number of groups.
            taps: Height and width of the kernel of a convolution.

        Raises:
            ValueError: Bits and values do not fit together, or do not make such a matrix.
        """
        bits, values = self.bits, self.values
        if self.rounded == "int8" and cols and bits.shape == (rows, 4) and values.shape == (rows * cols,):
            return self._whole_parts(name, rows, cols, groups, taps)
        line = (cols + 7) // 8
        width = self._width(line, cols)
        more = {"int8": 4, "int4": 2 * -(-cols // (width or 64))}.get(self.rounded, 0)
        wanted = (rows, line + more)
        if bits.dtype != torch.uint8 or tuple(bits.shape) != wanted:
            msg = (
                f"weight {name!r}: bits: expected uint8 {wanted}; got {dtype_name(bits.dtype)} "
                f"{tuple(bits.shape)}; save the model again"
            )
            raise ValueError(msg)
        if values.dtype not in _STORED or values.ndim != 1:
            got = f"{dtype_name(values.dtype)} {tuple(values.shape)}"
            msg = (
                f"weight {name!r}: values: expected a vector of {', '.join(map(dtype_name, _STORED))}; got "
                f"{got}; save the model again"
            )
            raise ValueError(msg)
        lines = np.split(np.ascontiguousarray(bits.numpy()[:, :line]), groups)
        counts = [int(np.unpackbits(part).sum(dtype=np.int64)) for part in lines]
        lengths = [_LEVELS + (n + 1) // 2 for n in counts] if self.rounded == "int4" else counts
        if len(values) != max(sum(lengths), 1):
            per = f"{sum(lengths)} bytes for" if self.rounded == "int4" else "one for each of"
            msg = (
                f"weight {name!r}: values: expected {per} {sum(counts)} bits; got {len(values)}; save the "
                "model again"
            )
            raise ValueError(msg)
        ends = np.cumsum(lengths)
        pieces = [values[end - length : end] for length, end in zip(lengths, ends, strict=True)]
        scales = np.split(bits.numpy()[:, line:].copy(), groups)
        try:
            return [self._part(*each, cols, width, taps) for each in zip(lines, pieces, scales, strict=True)]
        except ValueError as error:
            msg = (
                f"weight {name!r}: expected values and bits of one matrix; got others: {error}; save the "
                "model again"
            )
            raise ValueError(msg) from error

    def _whole_parts(
        self, name: str, rows: int, cols: int, groups: int, taps: tuple[int, int]
    ) -> list[Packed]:
        """The result of `parts` for int8 if `values` are all values of the weight."""
        q, scales = self.values.numpy().reshape(rows, cols), self.bits.numpy().view(np.float32).reshape(-1)
        try:
            pieces = zip(np.split(q, groups), np.split(scales, groups), strict=True)
            return [Packed.pack_int8(part, scale, taps) for part, scale in pieces]
        except ValueError as error:
            wanted = "int8 values with scales"
            msg = f"weight {name!r}: expected {wanted}; got others: {error}; save the model again"
            raise ValueError(msg) from error

    def _width(self, line: int, cols: int) -> int | None:
        """How many columns share a scale of int4 values; None if the size of `bits` fits neither number."""
        room = self.bits.shape[1] - line if self.bits.ndim == 2 else 0
        return group_of(cols, room // 2) if room % 2 == 0 else None

    def _part(
        self,
        bits: NDArray[np.uint8],
        values: Tensor,
        scales: NDArray[np.uint8],
        cols: int,
        width: int | None,
        taps: tuple[int, int],
    ) -> Packed:
        if self.rounded == "int8":
            scale = scales.view(np.float32).reshape(-1)
            return Packed.from_int8_parts(len(bits), cols, bits, values.numpy(), scale, taps)
        if self.rounded == "int4":
            levels, codes = values.numpy()[:_LEVELS].view(np.int8), values.numpy()[_LEVELS:]
            units = scales.view(ml_dtypes.bfloat16).astype(np.float32)
            return Packed.from_int4_parts(len(bits), cols, width or 64, bits, codes, units, levels)
        return Packed.from_parts(len(bits), cols, bits, to_array(values))

    @classmethod
    def unpacked(cls, parts: Sequence[Packed], shape: Sequence[int]) -> Tensor:
        """The dense tensor from the result of `parts`, bit for bit as it was encoded."""
        arrays = [from_array(part.unpack()) for part in parts]
        return (arrays[0] if len(arrays) == 1 else torch.cat(arrays)).reshape(tuple(shape))


def encode(dense: Tensor) -> Encoded | None:
    """Encodes a dense tensor of at least two axes exactly; None if the result would not be smaller.

    Only 0.0 is left out, not -0.0.
    """
    if dense.ndim < 2 or dense.dtype not in DTYPES or not dense.numel():
        return None
    found = encode_rows(dense)
    return found if found.values.nbytes + found.bits.nbytes < dense.nbytes else None


def encode_rows(dense: Tensor) -> Encoded:
    """Encodes a dense tensor of at least two axes exactly, whatever memory that takes."""
    matrix = dense.detach().contiguous().reshape(len(dense), -1)
    kept = matrix.view(torch.int32 if dense.dtype is torch.float32 else torch.int16) != 0
    values = matrix[kept]
    bits = np.packbits(kept.numpy(), axis=1, bitorder="little")
    return Encoded(values if len(values) else matrix.new_zeros(1), torch.from_numpy(bits))


def encode_packed(weight: PackedWeight) -> Encoded:
    """Encodes a packed weight, group after group; int8 with zeros where bits would take more memory."""
    size = weight.groups * weight.rows * weight.cols
    if weight.dtype is torch.int8 and size < weight.nnz + weight.groups * weight.rows * (
        (weight.cols + 7) // 8
    ):
        found = [part.scales() for part in weight.parts]
        dense = [
            np.rint(part.unpack() / scale[:, None]) for part, scale in zip(weight.parts, found, strict=True)
        ]
        q = np.concatenate(dense).astype(np.int8).reshape(-1)
        return Encoded(torch.from_numpy(q), torch.from_numpy(np.concatenate(found)[:, None].view(np.uint8)))
    values = torch.cat([part for packed in weight.parts for part in _values(packed)])
    bits = np.concatenate([_lines(part) for part in weight.parts])
    return Encoded(values if len(values) else values.new_zeros(1), torch.from_numpy(bits))


def _values(part: Packed) -> list[Tensor]:
    values = from_array(part.values())
    return [from_array(part.levels().view(np.uint8)), values] if part.dtype == "int4" else [values]


def _lines(part: Packed) -> NDArray[np.uint8]:
    bits = part.bits()
    if part.dtype == "int8":
        return np.concatenate([bits, part.scales()[:, None].view(np.uint8)], axis=1)
    if part.dtype == "int4":
        return np.concatenate([bits, part.scales().astype(ml_dtypes.bfloat16).view(np.uint8)], axis=1)
    return bits


def matrix_shape(shape: Sequence[int], *, transposed: bool) -> tuple[int, int]:
    """Rows and columns of the matrix that is encoded for a tensor of that shape."""
    rows, cols = shape[0], math.prod(shape[1:])
    return (cols, rows) if transposed else (rows, cols)
