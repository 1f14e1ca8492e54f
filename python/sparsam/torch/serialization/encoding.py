"""A weight in a file: the values that are not pruned, and a bit for each place (docs/formats.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import torch
from sparsam._core import Packed
from sparsam.torch.layers.packed_weight import DTYPES, VALUES, PackedWeight, from_array, to_array
from torch import Tensor

__all__ = ["Encoded", "encode", "encode_packed", "matrix_shape"]


@dataclass(frozen=True)
class Encoded:
    """A weight as two tensors.

    Attributes:
        values: Row by row, those whose bit is set; a single 0 where none is.
        bits: uint8 (rows, ceil(columns / 8)), the first column in the lowest bit; of int8 values each row
            ends with its scale, four bytes more, and these alone are there where values are all of a weight.
    """

    values: Tensor
    bits: Tensor

    def parts(self, name: str, rows: int, cols: int, groups: int = 1) -> list[Packed]:
        """The matrix, split into groups of rows.

        Args:
            name: What errors call it.
            rows: Of all groups.
            cols: Of each.
            groups: How many there are.

        Raises:
            ValueError: Bits and values do not fit together, or do not make such a matrix.
        """
        bits, values = self.bits, self.values
        int8 = values.dtype is torch.int8
        if int8 and cols and bits.shape == (rows, 4) and values.shape == (rows * cols,):
            return self._whole_parts(name, rows, cols, groups)
        wanted = (rows, (cols + 7) // 8 + 4 * int8)
        if bits.dtype != torch.uint8 or tuple(bits.shape) != wanted:
            msg = (
                f"weight {name!r}: bits: expected uint8 {wanted}; got {_name(bits.dtype)} "
                f"{tuple(bits.shape)}; save the model again"
            )
            raise ValueError(msg)
        if values.dtype not in VALUES or values.ndim != 1:
            got = f"{_name(values.dtype)} {tuple(values.shape)}"
            msg = (
                f"weight {name!r}: values: expected a vector of {', '.join(map(_name, VALUES))}; got {got}; "
                "save the model again"
            )
            raise ValueError(msg)
        scales = bits.numpy()[:, wanted[1] - 4 * int8 :].copy().view(np.float32).reshape(-1) if int8 else None
        lines = np.split(np.ascontiguousarray(bits.numpy()[:, : (cols + 7) // 8]), groups)
        counts = [int(np.unpackbits(part).sum(dtype=np.int64)) for part in lines]
        if len(values) != max(sum(counts), 1):
            msg = (
                f"weight {name!r}: values: expected one for each of {sum(counts)} bits; got {len(values)}; "
                "save the model again"
            )
            raise ValueError(msg)
        ends = np.cumsum(counts)
        try:
            if scales is None:
                return [
                    Packed.from_parts(len(part), cols, part, to_array(values[end - count : end]))
                    for part, count, end in zip(lines, counts, ends, strict=True)
                ]
            return [
                Packed.from_int8_parts(len(part), cols, part, values[end - count : end].numpy(), scale)
                for part, count, end, scale in zip(lines, counts, ends, np.split(scales, groups), strict=True)
            ]
        except ValueError as error:
            msg = (
                f"weight {name!r}: expected values and bits of one matrix; got others: {error}; save the "
                "model again"
            )
            raise ValueError(msg) from error

    def _whole_parts(self, name: str, rows: int, cols: int, groups: int) -> list[Packed]:
        """What `parts` gives of int8 values that are all of a weight."""
        q, scales = self.values.numpy().reshape(rows, cols), self.bits.numpy().view(np.float32).reshape(-1)
        try:
            pieces = zip(np.split(q, groups), np.split(scales, groups), strict=True)
            return [Packed.pack_int8(part, scale) for part, scale in pieces]
        except ValueError as error:
            wanted = "int8 values with scales"
            msg = f"weight {name!r}: expected {wanted}; got others: {error}; save the model again"
            raise ValueError(msg) from error

    @classmethod
    def unpacked(cls, parts: Sequence[Packed], shape: Sequence[int]) -> Tensor:
        """The dense tensor of what `parts` gave, to the last bit what was encoded."""
        arrays = [from_array(part.unpack()) for part in parts]
        return (arrays[0] if len(arrays) == 1 else torch.cat(arrays)).reshape(tuple(shape))


def encode(dense: Tensor) -> Encoded | None:
    """A dense tensor with at least two axes, to the last bit, or None where that is not smaller.

    What is left out is 0.0, and not -0.0.
    """
    if dense.ndim < 2 or dense.dtype not in DTYPES or not dense.numel():
        return None
    matrix = dense.detach().contiguous().reshape(len(dense), -1)
    kept = matrix.view(torch.int32 if dense.dtype is torch.float32 else torch.int16) != 0
    count = int(kept.sum())
    if max(count, 1) * dense.itemsize + len(matrix) * ((matrix.shape[1] + 7) // 8) >= dense.nbytes:
        return None
    bits = np.packbits(kept.numpy(), axis=1, bitorder="little")
    return Encoded(matrix[kept] if count else matrix.new_zeros(1), torch.from_numpy(bits))


def encode_packed(weight: PackedWeight) -> Encoded:
    """A packed weight, group after group; int8 values whole where bits would take more than zeros."""
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
    values = torch.cat([from_array(part.values()) for part in weight.parts])
    bits = np.concatenate([_lines(part) for part in weight.parts])
    return Encoded(values if len(values) else values.new_zeros(1), torch.from_numpy(bits))


def _lines(part: Packed) -> NDArray[np.uint8]:
    bits = part.bits()
    if part.dtype != "int8":
        return bits
    return np.concatenate([bits, part.scales()[:, None].view(np.uint8)], axis=1)


def matrix_shape(shape: Sequence[int], *, transposed: bool) -> tuple[int, int]:
    """Rows and columns of the matrix that is encoded for a tensor of that shape."""
    rows, cols = shape[0], math.prod(shape[1:])
    return (cols, rows) if transposed else (rows, cols)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
